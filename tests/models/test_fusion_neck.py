"""The neck that fuses the maps of several networks, and the self-teacher that reads through it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as torch_functional

from mmstructkd.errors import ConfigError, ShapeError, TapError
from mmstructkd.models import FusionNeck
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_depth_estimator, toy_distiller, toy_segmentor
from tests.teachers.kinds import KINDS, KL, SELF, build, frozen, peer


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    """BatchNorm in training and ReLU, channel by channel."""
    out = []
    for channel in range(x.shape[1]):
        values = x[:, channel]
        unit = (values - values.mean()) / (values.var(unbiased=False) + norm.eps).sqrt()
        out.append((norm.weight[channel] * unit + norm.bias[channel]).clamp(min=0))
    return torch.stack(out, 1)


def reference(neck: FusionNeck, level: int, maps: list[Tensor]) -> Tensor:
    """Each output pixel as a sum over the 3x3 pixels around it, of one channel; then a mix of channels."""
    size = maps[0].shape[2:]
    others = [torch_functional.interpolate(m, size=size, mode='bilinear', align_corners=False) for m in maps[1:]]
    whole = torch.cat([maps[0], *others], dim=1)
    each, mix = neck.fusions[str(level)]
    padded = torch_functional.pad(whole, (1, 1, 1, 1))
    height, width = size
    around = torch.zeros_like(whole)
    for channel in range(whole.shape[1]):
        for dy in range(3):
            for dx in range(3):
                weight = each.conv.weight[channel, 0, dy, dx]
                around[:, channel] += weight * padded[:, channel, dy : dy + height, dx : dx + width]
    hidden = normalised(around, each.bn)
    mixed = [
        sum(mix.conv.weight[out, c, 0, 0] * hidden[:, c] for c in range(hidden.shape[1]))
        for out in range(maps[0].shape[1])
    ]
    return normalised(torch.stack(mixed, 1), mix.bn)


@pytest.mark.parametrize('sizes', [((4, 5), (4, 5)), ((4, 6), (2, 3)), ((3, 4), (6, 8))])
def test_value_and_gradient_are_those_of_a_loop(sizes: tuple) -> None:
    torch.manual_seed(0)
    neck = FusionNeck([[2, 3]]).double().train()
    grads, values = [], []
    for run in (lambda maps: neck([maps])[0], lambda maps: reference(neck, 0, maps)):
        generator = torch.Generator().manual_seed(1)
        maps = [
            torch.randn(2, width, *size, generator=generator, dtype=torch.float64).requires_grad_()
            for width, size in zip((2, 3), sizes, strict=True)
        ]
        value = run(maps)
        values.append(value)
        grads.append(torch.autograd.grad((value * value).sum(), [*maps, *neck.parameters()]))
    torch.testing.assert_close(*values)
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize(('levels', 'fused'), [(None, {0, 1, 2}), ([-1], {2}), ([0, 2], {0, 2})])
def test_levels_that_are_not_fused_are_the_first_networks(levels: Any, fused: set) -> None:
    neck = FusionNeck([[2, 3]] * 3, levels=levels)
    maps = [[torch.randn(2, 2, 4, 4), torch.randn(2, 3, 4, 4)] for _ in range(3)]
    out = neck(maps)
    assert {level for level in range(3) if out[level] is not maps[level][0]} == fused
    assert {name.split('.')[1] for name, _ in neck.named_parameters()} == {str(level) for level in fused}


def test_other_widths_are_refused() -> None:
    with pytest.raises(ShapeError, match=r'of level 0 must have 5 channels together, got \[2, 2\]'):
        FusionNeck([[2, 3]])([[torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4)]])


@pytest.mark.parametrize('levels', [[], [3], [-4], ['a']])
def test_levels_that_there_are_not(levels: list) -> None:
    with pytest.raises(ConfigError, match='`levels` must be numbers of the 3 levels'):
        FusionNeck([[2, 3]] * 3, levels=levels)


def test_the_twin_reads_both_and_its_loss_reaches_both() -> None:
    for detach in (False, True):
        model = build(
            'fused', teachers=dict(peer=peer(task_weight=0.0), fused=dict(SELF, also='peer.backbone[*]', detach=detach))
        )
        for term in (*model.terms.values(), *model.teacher.terms.values()):
            term.factor = 0.0
        model.task_weight = 0.0
        total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
        total.backward()
        for network in (model.student, model.teacher.members['peer'].network):
            moved = any(p.grad is not None and p.grad.any() for p in network.backbone.parameters())
            assert moved != detach


@pytest.mark.parametrize('other', ['frozen', 'wider peer'])
def test_other_networks_can_be_fused(other: str) -> None:
    teachers = copy.deepcopy(KINDS['fused']['teachers'])
    teachers['peer'] = frozen(8) if other == 'frozen' else peer(config=toy_segmentor(8))
    model = build('fused', teachers=teachers)
    losses = model(**toy_batch(), mode='loss')
    assert losses['loss_kd_fused'] > 0
    assert losses['fused_teacher_decode.loss_ce'] > 0


def test_depth() -> None:
    student = toy_depth_estimator(4)
    tap = dict(student='decode_head.to_depth', teacher='fused.decode_head.to_depth')
    model = toy_distiller(
        student=student,
        terms=dict(kd=dict(tap=tap, loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1'))),
        teachers=dict(
            peer=dict(type='mmstructkd.PeerTeacher', config=student), fused=dict(SELF, also='peer.backbone[*]')
        ),
    )
    model.pop('teacher')
    built = MODELS.build(model)
    assert isinstance(built.teacher.members['fused'].network.neck, FusionNeck)


MISTAKES = [
    (dict(peer=peer(), fused=dict(SELF, also='per.backbone[*]')), ConfigError, "got 'per.backbone.*peer"),
    (dict(peer=peer(), fused=dict(SELF, also='fused.neck[*]')), ConfigError, 'must name another teacher'),
    (
        dict(peer=peer(), one=dict(SELF, also='peer.backbone[*]'), fused=dict(SELF, also='one.neck[*]')),
        ConfigError,
        'which is made of others',
    ),
    (dict(peer=peer(), fused=dict(SELF, also='peer.backbone[3]')), TapError, 'must give as many maps as `features`'),
]


@pytest.mark.parametrize(('teachers', 'error', 'match'), MISTAKES)
def test_mistakes(teachers: dict, error: type, match: str) -> None:
    terms = dict(kd=dict(tap=dict(student='decode_head.conv_seg', teacher='fused.decode_head.conv_seg'), loss=KL))
    model = toy_distiller(teachers=teachers, terms=terms)
    model.pop('teacher')
    with pytest.raises(error, match=match):
        MODELS.build(model)


def test_there_must_be_another() -> None:
    model = toy_distiller(
        teacher=dict(SELF, also='peer.backbone[*]'), terms=dict(kd=dict(tap='decode_head.conv_seg', loss=KL))
    )
    with pytest.raises(ConfigError, match='`also` must name a teacher beside it'):
        MODELS.build(model)
