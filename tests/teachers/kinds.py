"""Changes of a toy distiller that make it one with each kind of teacher; what its tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch

from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_distiller, toy_segmentor

KL = dict(type='mmstructkd.PixelwiseKLLoss')
ATTENTION = dict(type='mmstructkd.AttentionTransferLoss', loss_weight=100.0)
SCORES = dict(kd=dict(tap='decode_head.conv_seg', loss=KL))
SGD = dict(type='SGD', lr=1e-3, momentum=0.9)


def peer(**changes: Any) -> dict:
    back = dict(back=dict(tap='decode_head.conv_seg', loss=KL))
    return dict(dict(type='mmstructkd.PeerTeacher', config=toy_segmentor(6), terms=back), **changes)


def frozen(width: int) -> dict:
    return dict(config=toy_segmentor(width), allow_random=True)


SELF = dict(type='mmstructkd.SelfTeacher')
LEVELS = dict(tap=dict(student='backbone[*]', teacher='neck[*]'), match='order', loss=ATTENTION)
CONTRAST = dict(
    tap='decode_head.convs',
    connector=dict(type='mmstructkd.DeepProjectorConnector', out_channels=5),
    loss=dict(type='mmstructkd.PrototypeContrastLoss'),
)
#: Changes of a toy distiller that make it one with such a teacher.
KINDS: dict[str, dict] = {
    'self': dict(teacher=SELF, terms=dict(SCORES, levels=LEVELS)),
    'self_detached': dict(teacher=dict(SELF, detach=True), terms=SCORES),
    'peer': dict(teacher=peer(), terms=SCORES),
    'peer_with_optimizer': dict(teacher=peer(optimizer=SGD), terms=SCORES),
    'peer_with_constraint': dict(
        teacher=peer(constraints=dict(back=dict(bound=0.1, rate=0.1)), zero_classifier=True), terms=SCORES
    ),
    'contrast': dict(teacher=peer(terms=dict(back=CONTRAST)), terms=dict(kd=CONTRAST)),
    'view': dict(teacher=dict(type='mmstructkd.ViewTeacher', flip=True), terms=SCORES),
    'average': dict(teacher=dict(type='mmstructkd.ViewTeacher', momentum=0.9, flip=True), terms=SCORES),
    'group': dict(
        teachers=dict(
            big=frozen(8),
            wide=frozen(6),
            own=SELF,
            mean=dict(type='mmstructkd.TeacherMean', of=dict(big=0.7, wide=0.3), confidence='maximum'),
        ),
        terms=dict(
            a=dict(tap=dict(student='decode_head.conv_seg', teacher='mean.decode_head.conv_seg'), loss=KL),
            b=dict(tap=dict(student='decode_head.conv_seg', teacher='own.decode_head.conv_seg'), loss=KL),
        ),
    ),
    'gated': dict(
        teacher=frozen(8),
        gates=['backbone.layer1', 'backbone.layer2'],
        terms=dict(SCORES, local=dict(tap=['backbone[0]', 'backbone[1]'], loss=ATTENTION)),
    ),
    'staged': dict(
        teacher=frozen(8),
        stages=[dict(end=1, terms=['kd']), dict(freeze=['decode_head', 'backbone.layer1'])],
        terms=SCORES,
    ),
    'fused': dict(
        teachers=dict(peer=peer(), fused=dict(SELF, also='peer.backbone[*]')),
        terms=dict(
            mutual=dict(tap=dict(student='decode_head.conv_seg', teacher='peer.decode_head.conv_seg'), loss=KL),
            fused=dict(tap=dict(student='decode_head.conv_seg', teacher='fused.decode_head.conv_seg'), loss=KL),
        ),
    ),
    'mixed': dict(
        teacher=frozen(8),
        streams=dict(mixed=dict(type='mmstructkd.MixedStream')),
        terms=dict(kd=dict(SCORES['kd'], on=['labelled', 'mixed'])),
    ),
    'blend': dict(
        teacher=dict(type='mmstructkd.BlendTeacher', stream='mixed'),
        streams=dict(mixed=dict(type='mmstructkd.MixedStream', alpha=0.4, norm='update')),
        terms=dict(
            kd=dict(SCORES['kd'], on='mixed'),
            maps=dict(on='mixed', tap='backbone[*]', loss=dict(type='mmstructkd.FeatureMSELoss')),
        ),
    ),
    'turned': dict(
        teacher=frozen(8),
        streams=dict(turned=dict(type='mmstructkd.TurnedStream', turns=['half'])),
        terms=dict(kd=dict(SCORES['kd'], on='turned')),
    ),
    'scaled': dict(
        teacher=frozen(8),
        streams=dict(small=dict(type='mmstructkd.ScaledStream', scale=0.5)),
        terms=dict(kd=dict(SCORES['kd'], on='small')),
    ),
}


def model_of(kind: str, **changes: Any) -> dict:
    model = toy_distiller(**{**copy.deepcopy(KINDS[kind]), **changes})
    if 'teachers' in KINDS[kind]:
        model.pop('teacher')
    return model


def build(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS.build(model_of(kind, **changes))
    model.init_weights()
    return model.train()
