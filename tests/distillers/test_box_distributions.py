"""Localization distillation takes heads that predict distributions, the same ones, at the tap that gives them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmstructkd.errors import ConfigError, ShapeError, TapError
from mmstructkd.losses import LocalizationKLLoss
from mmstructkd.registry import MODELS
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.testing import toy_depth_estimator, toy_detector, toy_distiller

LOSS = dict(type='mmstructkd.LocalizationKLLoss')


def build(student: dict, teacher: dict, tap: str | dict, **loss) -> nn.Module:
    torch.manual_seed(0)
    terms = dict(edges=dict(tap=tap, loss=dict(LOSS, **loss)))
    return MODELS.build(
        toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    ).train()


def gfl(width: int, reg_max: int = 8) -> dict:
    model = toy_detector('gfl', width)
    model.bbox_head.reg_max = reg_max
    return model


@pytest.mark.parametrize(
    ('kind', 'tap', 'head'),
    [
        ('retinanet', 'bbox_head.retina_reg', 'RetinaHead'),  # 36 channels: nine bins of four edges, to who counts
        ('fcos', 'bbox_head.conv_reg', 'FCOSHead'),  # 4 channels: one bin each, a constant
        ('faster_rcnn', 'roi_head.bbox_head.fc_reg', 'Shared2FCBBoxHead'),
        ('faster_rcnn', 'rpn_head.rpn_reg', 'RPNHead'),
    ],
)
def test_plain_offsets_are_refused_by_name(kind: str, tap: str, head: str) -> None:
    with pytest.raises(ConfigError, match=f"term 'edges': LocalizationKLLoss: the student must predict .* got {head}"):
        build(toy_detector(kind, 2), toy_detector(kind, 4), tap)
    with pytest.raises(ConfigError, match=f"term 'edges': LocalizationKLLoss: the student must predict .* got {head}"):
        build(toy_detector(kind, 2), toy_detector(kind, 4), tap, region='all', edges=1)


@pytest.mark.parametrize(
    'name', ['ATSSHead', 'YOLOXHead', 'VFNetHead', 'PAAHead', 'TOODHead', 'RTMDetHead', 'FCOSHead']
)
def test_heads_of_mmdet_without_distributions(name: str) -> None:
    kind = MODELS.get(f'mmdet.{name}')
    head = kind.__new__(kind)  # what it is, without building it: its class has no distributions
    nn.Module.__init__(head)
    loss = LocalizationKLLoss()
    with pytest.raises(ConfigError, match=f'the teacher must predict where an edge lies .* got {name}'):
        loss.check_heads(MODELS.build(dict(gfl(2).bbox_head, _scope_='mmdet')), head)


def test_a_plain_teacher_beside_distributions() -> None:
    tap = dict(student='bbox_head.gfl_reg', teacher='bbox_head.retina_reg')
    with pytest.raises(ConfigError, match="term 'edges': LocalizationKLLoss: the teacher must .* got RetinaHead"):
        build(gfl(2), toy_detector('retinanet', 4), tap)


def test_bins_edges_and_taps() -> None:
    with pytest.raises(ConfigError, match='must have the same bins, got 9 of GFLHead and 17 of GFLHead'):
        build(gfl(2), gfl(4, reg_max=16), 'bbox_head.gfl_reg')
    with pytest.raises(ConfigError, match='`edges` must be 4 for the GFLHead of the student, got 2'):
        build(gfl(2), gfl(4), 'bbox_head.gfl_reg', edges=2)
    with pytest.raises(
        ShapeError, match=r"term 'edges': .*`student` must have 36 channels, 4 x 9 bins, got \(1, 6, 12"
    ):
        build(gfl(2), gfl(4), 'bbox_head.gfl_cls')
    with pytest.raises(TapError, match="term 'edges': `student` must name a module of GFL"):
        build(gfl(2), gfl(4), 'bbox_head.gfl_regs')


@pytest.mark.parametrize('tap', ['bbox_head.gfl_reg', [f'bbox_head.scales.{level}' for level in range(5)]])
def test_distributions_learn(tap) -> None:
    model = build(gfl(2), gfl(4), tap)
    losses = model(**synthetic_batch(model, (64, 96), 2), mode='loss')
    losses['loss_kd_edges'].backward()
    assert losses['loss_kd_edges'] > 0
    assert model.student.bbox_head.gfl_reg.weight.grad.any()


def test_depth_in_bins_and_depth_as_a_number() -> None:
    bins = [toy_depth_estimator(width, 'DepthClassificationHead') for width in (2, 4)]
    model = build(*bins, 'decode_head.conv_depth', edges=1, region='all')
    assert model.terms['edges'].loss.bins == 12
    with pytest.raises(ConfigError, match='`edges` must be 1 for the DepthClassificationHead of the student, got 4'):
        build(*bins, 'decode_head.conv_depth', region='all')
    with pytest.raises(ConfigError, match='the student must predict .* got DepthRegressionHead'):
        build(toy_depth_estimator(2), toy_depth_estimator(4), 'decode_head.to_depth', edges=1, region='all')


def test_used_directly_it_asks_for_no_head() -> None:
    edges = torch.randn(2, 12, 3, 4, requires_grad=True)
    loss = LocalizationKLLoss(region='all')
    loss.bind(edges, edges)
    assert loss(edges, torch.randn(2, 12, 3, 4)) > 0
