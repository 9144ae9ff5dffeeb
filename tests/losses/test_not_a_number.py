"""A value that is no number, or infinite, at one position that counts: it shows in the loss, or harms nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mmstructkd import functional as F
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from tests.losses import test_contract as contract

LEARNED = {'type': 'mmstructkd.LearnableTemperature'}
STANDARDIZED = {'type': 'mmstructkd.StandardizedTemperature'}
#: Every loss as it is, and settings that take another way through the arithmetic.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in contract.NAMES),
    ('AttentionTransferLoss', dict(power=1, reduction='sum')),
    ('BinaryKLLoss', dict(normalizer='positions')),
    ('CategorySimilarityLoss', dict(temperature=LEARNED, kernel_size=1)),
    ('ChannelwiseKLLoss', dict(temperature=LEARNED)),
    ('ChannelwiseKLLoss', dict(temperature=STANDARDIZED)),
    ('CorrelationCongruenceLoss', dict(mode='adjacent')),
    ('CorrelationCongruenceLoss', dict(nodes='classes', num_classes=3)),
    ('DecoupledKLLoss', dict(temperature=LEARNED)),
    ('DepthRegressionLoss', dict(kind='silog', root=True)),
    ('DepthRegressionLoss', dict(teacher_output='disparity')),
    ('DistLoss', dict(class_map=[1, 2, 0])),
    ('DistLoss', dict(temperature=LEARNED)),
    ('GradientMatchingLoss', dict(align=True)),
    ('GradientMatchingLoss', dict(align=True, teacher_output='disparity')),
    ('HolisticLoss', dict(softmax=True)),
    ('HolisticLoss', dict(mode='hinge')),
    ('InterclassSimilarityLoss', dict(normalize=False, temperature=LEARNED)),
    ('InterclassSimilarityLoss', dict(preset='code')),
    ('IntraClassVariationLoss', dict(preset='code')),
    ('LocalStructureLoss', dict(include_self=False)),
    ('LocalizationKLLoss', dict(temperature=LEARNED)),
    ('LocalizationKLLoss', dict(region='confident', threshold=0.4)),
    ('PairwiseAffinityLoss', dict(kernel_size=1)),
    ('PairwiseAffinityLoss', dict(kernel_size=1, radius=1)),
    ('PairwiseAffinityLoss', dict(preset='code')),
    ('PixelwiseKLLoss', dict(class_map=[1, 0, 0])),
    ('PixelwiseKLLoss', dict(temperature=LEARNED)),
    ('PixelwiseKLLoss', dict(temperature=STANDARDIZED)),
    ('RegionContrastLoss', dict(mode='wasserstein')),
    ('RegionContrastLoss', dict(regions='cells')),
    ('RegionContrastLoss', dict(regions='boxes')),
    ('RelationalLoss', dict(angle_weight=0)),
    ('RelationalLoss', dict(distance_weight=0)),
    ('RelationalLoss', dict(nodes='images')),
    ('ScaleShiftInvariantLoss', dict(robust=True)),
    ('ScaleShiftInvariantLoss', dict(teacher_output='disparity')),
    ('SimilarityPreservingLoss', dict(nodes='cells')),
    ('StandardizedMSELoss', dict(preset='pkd')),
    ('WeightedSoftLabelLoss', dict(temperature=LEARNED)),
    ('ZipfLabelLoss', dict(voter='teacher')),
]
#: Depth: what a teacher cannot read is no reading, for it may be a sensor.
NO_READING = {name for name in contract.NAMES if contract.INPUTS.get(name) is contract.as_depth}

every = pytest.mark.parametrize(
    ('name', 'settings'), CASES, ids=[f'{name}-{number}' for number, (name, _) in enumerate(CASES)]
)
values = pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 1e30, -1e30], ids=str)


def scored(name, settings, side, value, dtype=torch.float32):
    """The student's part, the sum of all objectives, and every gradient, with ``value`` at one place."""
    loss = MODELS.build({'type': f'mmstructkd.{name}', **contract.SMALL.get(name, {}), **settings})
    tensors = dict(zip(('student', 'teacher'), (x.detach() for x in contract.pair(name, dtype=dtype)), strict=True))
    loss.bind(*(torch.zeros(1, *x.shape[1:]) for x in tensors.values()))
    if value is not None:
        tensors[side][0, 0, 3, 2] = value
    student = tensors['student'].requires_grad_()
    targets = Targets(
        labels=(torch.arange(48) % 3).view(1, 8, 6).expand(2, -1, -1),
        boxes=(torch.tensor([[4.0, 4.0, 24.0, 24.0]]),) * 2,
        box_labels=(torch.tensor([0]), torch.tensor([1])),
        input_size=(32, 24),
    )
    part, total = contract.parts(loss, student, tensors['teacher'], targets)
    parameters = [p for p in loss.parameters() if p.requires_grad]
    gradients = [g for g in torch.autograd.grad(total, [student, *parameters], allow_unused=True) if g is not None]
    return part, total, gradients


@every
@values
@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_it_shows_or_harms_nothing(name, settings, side, value):
    for dtype in (torch.float32, torch.bfloat16):
        part, total, gradients = scored(name, settings, side, value, dtype)
        harmless = total.isfinite() and part.isfinite() and all(g.isfinite().all() for g in gradients)
        assert harmless or not total.isfinite()
        if math.isnan(value) and not (side == 'teacher' and name in NO_READING):
            assert not total.isfinite()


@pytest.mark.parametrize(('name', 'settings'), [case for case in CASES if case[0] in NO_READING])
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf], ids=str)
def test_a_student_that_overflows_is_never_without_a_reading(name, settings, value):
    """Left out, it would be a hole in a map that otherwise is good."""
    _, total, _ = scored(name, settings, 'student', value)
    assert not total.isfinite()


@pytest.mark.parametrize('name', sorted(NO_READING))
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, 0.0, -1.0], ids=str)
def test_what_a_depth_teacher_cannot_read_is_left_out(name, value):
    got, _, gradients = scored(name, {}, 'teacher', value)
    assert got.isfinite()
    assert gradients[0].isfinite().all()
    if name in ('DepthRegressionLoss', 'ScaleShiftInvariantLoss', 'GradientMatchingLoss'):
        assert gradients[0][0, 0, 3, 2] == 0


@pytest.mark.parametrize('value', [math.inf, -math.inf], ids=str)
@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_an_infinite_logit_of_a_coin_shows(side, value):
    """The sigmoid of infinity is 1, and would be learned."""
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    {'student': student, 'teacher': teacher}[side][0, 1, 2, 2] = value
    assert F.binary_kl_loss(student, teacher).isnan()
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    assert F.binary_kl_loss(student, teacher, valid=valid).isnan()
    valid[0, 2, 2] = False
    assert F.binary_kl_loss(student, teacher, valid=valid).isfinite()


def test_dist_shows_a_teacher_that_is_no_number():
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    student.requires_grad_()
    teacher[0, 1, 2, 2] = math.nan
    for weights in (dict(inter_weight=0), dict(intra_weight=0), {}):
        assert F.dist_loss(student, teacher, **weights).isnan()


def test_an_impossible_class_is_no_error():
    """Minus infinity among scores of a softmax is probability 0, also with a learned temperature."""
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    student.requires_grad_()
    teacher[:, 1] = -math.inf
    temperature = torch.tensor(2.0, requires_grad=True)
    loss = F.pixelwise_kl_loss(student, teacher, temperature=temperature)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert temperature.grad.isfinite()
