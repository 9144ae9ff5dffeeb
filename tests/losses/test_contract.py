"""What every registered loss promises, whatever it computes."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

import mmstructkd.losses
from mmstructkd.errors import ConfigError
from mmstructkd.losses import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

NAMES = sorted(
    name
    for name, kind in MODELS.module_dict.items()
    if isinstance(kind, type) and issubclass(kind, DistillLoss) and kind.__module__.startswith('mmstructkd.')
)
#: Settings that keep a loss small here; nothing that it promises depends on them.
SMALL = {
    'DecoupledKLLoss': {'target': 'teacher'},
    'HolisticLoss': {'critic': {'base_channels': 2}, 'seed': 0},
    'IntraClassVariationLoss': {'num_classes': 3},
    'LocalizationKLLoss': {'region': 'all', 'edges': 1},
    'MemoryContrastLoss': {'num_classes': 3, 'seed': 0},
    'OrdinalRelationLoss': {'num_pairs': 300},
    'PrototypeContrastLoss': {'num_classes': 3, 'seed': 0},
    'RegionContrastLoss': {'num_classes': 3, 'seed': 0},
    'VirtualNormalLoss': {'num_triplets': 300},
    'WeightedSoftLabelLoss': {'target': 'teacher'},
    'ZipfLabelLoss': {'target': 'teacher'},
}
SHAPE = (2, 3, 8, 6)


def as_depth(noise):
    """One channel, above 0."""
    return 1 + 2 * noise[:, :1].abs()


#: What a loss takes, made of noise (B, C, H, W), where that is not the noise itself.
INPUTS = {
    'DepthRegressionLoss': as_depth,
    'GradientMatchingLoss': as_depth,
    'OrdinalRelationLoss': as_depth,
    'ScaleShiftInvariantLoss': as_depth,
    'VirtualNormalLoss': as_depth,
}

#: Losses that need boxes; they get one of (8, 8) to (20, 16) in each image, in an input of 32 x 24.
BOXED = ('FocalGlobalLoss',)

#: Losses that need labels; where a test has none they get three classes, side by side in each image.
LABELLED = ('IntraClassVariationLoss', 'MemoryContrastLoss', 'PrototypeContrastLoss', 'RegionContrastLoss')

every = pytest.mark.parametrize('name', NAMES)


def build(name, **kwargs):
    loss = MODELS.build({'type': f'mmstructkd.{name}', **SMALL.get(name, {}), **kwargs})
    loss.bind(torch.zeros(1, *SHAPE[1:]), torch.zeros(1, *SHAPE[1:]))
    return loss


def pair(name, shape=SHAPE, dtype=torch.float32):
    make = INPUTS.get(name, lambda noise: noise)
    student, teacher = (make(noise).to(dtype) for noise in torch.randn(2, *shape).unbind())
    return student.clone().requires_grad_(), teacher.clone().requires_grad_()


def parts(loss, student, teacher, targets=None):
    """The student's part and all objectives together; in eval mode, where no buffer moves."""
    if type(loss).__name__ in BOXED:
        boxes = (torch.tensor([[8.0, 8.0, 20.0, 16.0]]),) * student.shape[0]
        targets = dataclasses.replace(targets or Targets(), boxes=boxes, input_size=(32, 24))
    if type(loss).__name__ in LABELLED and (targets is None or targets.labels is None):
        labels = (torch.arange(48) % 3).view(1, 8, 6).expand(student.shape[0], -1, -1)
        targets = dataclasses.replace(targets or Targets(), labels=labels)
    value = loss.eval()(student, teacher, targets)
    return (value[''], sum(value.values())) if isinstance(value, dict) else (value, value)


def test_all_losses_are_here():
    exported = {n for n in mmstructkd.losses.__all__ if n.endswith('Loss') and n != 'DistillLoss'}
    assert set(NAMES) == exported
    assert len(NAMES) >= 4


@every
def test_gradient_to_the_student_and_none_to_the_teacher(name):
    student, teacher = pair(name)
    part, total = parts(build(name), student, teacher)
    assert part.shape == ()
    assert part.isfinite()
    (grad,) = torch.autograd.grad(part, student, retain_graph=True)
    assert grad.isfinite().all()
    assert grad.any()
    total.backward()
    assert teacher.grad is None
    # Objectives of the loss's own modules do not reach the student.
    torch.testing.assert_close(student.grad, grad)


@every
def test_inputs_stay_as_they_are(name):
    student, teacher = pair(name)
    before = student.detach().clone(), teacher.detach().clone()
    parts(build(name), student, teacher)[1].backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher.detach(), before[1])


@every
def test_channels_last_equals_contiguous(name):
    student, teacher = pair(name)
    loss = build(name)
    want, _ = parts(loss, student, teacher)
    (want_grad,) = torch.autograd.grad(want, student)
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    got, _ = parts(loss, last, teacher.detach().to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, last)[0], want_grad)


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_promoted(name, dtype):
    student, teacher = pair(name, dtype=dtype)
    loss = build(name)
    got, _ = parts(loss, student, teacher)
    assert got.dtype == torch.float32
    want, _ = parts(loss, student.detach().float(), teacher.float())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    (grad,) = torch.autograd.grad(got, student)
    assert grad.dtype == dtype
    assert grad.isfinite().all()


@every
def test_same_number_inside_autocast(name):
    student, teacher = pair(name)
    loss = build(name)
    want, _ = parts(loss, student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        got, _ = parts(loss, student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@every
def test_weight_scales_the_students_part(name):
    student, teacher = pair(name)
    one, two = (parts(build(name, loss_weight=w), student, teacher)[0] for w in (1.0, 2.5))
    torch.testing.assert_close(two, 2.5 * one)
    none = parts(build(name, loss_weight=0), student, teacher)[0]
    assert none.item() == 0
    assert none.requires_grad


@every
@pytest.mark.parametrize('source', ['valid', 'labels'])
def test_pixels_that_do_not_count_change_nothing(name, source):
    student, teacher = pair(name)
    valid = torch.rand(2, 8, 6) > 0.4
    labels = torch.where(valid, torch.randint(0, 3, valid.shape), 7)
    # A dataset gives the mask, and labels with it where there are any.
    targets = Targets(valid=valid) if source == 'valid' else Targets(labels=labels, valid=labels != 7, ignore_index=7)
    loss = build(name)
    want, _ = parts(loss, student, teacher, targets)
    (want_grad,) = torch.autograd.grad(want, student)
    assert not want_grad[(~valid)[:, None].expand_as(want_grad)].any()
    assert not torch.isclose(want, parts(loss, student, teacher)[0], rtol=1e-6)
    other_s = torch.where(valid[:, None], student.detach(), 50.0).requires_grad_()
    other_t = torch.where(valid[:, None], teacher, -50.0)
    got, _ = parts(loss, other_s, other_t, targets)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, other_s)[0], want_grad)


@every
def test_nothing_counts_is_zero_with_a_graph(name):
    student, teacher = pair(name)
    got, total = parts(build(name), student, teacher, Targets(valid=torch.zeros(2, 8, 6, dtype=torch.bool)))
    total.backward()
    assert got.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@every
def test_targets_of_the_input_size(name):
    student, teacher = pair(name)
    valid = torch.rand(2, 8, 6) > 0.4
    loss = build(name)
    want, _ = parts(loss, student, teacher, Targets(valid=valid))
    large = valid.repeat_interleave(4, 1).repeat_interleave(4, 2)
    got, _ = parts(loss, student, teacher, Targets(valid=large))
    torch.testing.assert_close(got, want)


@every
def test_one_image(name):
    student, teacher = pair(name, (1, *SHAPE[1:]))
    got, _ = parts(build(name), student, teacher)
    assert torch.autograd.grad(got, student)[0].isfinite().all()


@every
def test_one_pixel(name):
    student, teacher = pair(name, (2, 3, 1, 1))
    got, _ = parts(build(name), student, teacher)
    assert got.isfinite()
    assert torch.autograd.grad(got, student)[0].isfinite().all()


@every
def test_unknown_argument_raises(name):
    with pytest.raises(TypeError, match='no_such_argument'):
        build(name, no_such_argument=1)


@every
@pytest.mark.parametrize('weight', [-1, -1e-9, float('nan'), float('inf'), '1', True])
def test_bad_weight_is_refused(name, weight):
    with pytest.raises(ConfigError, match=f'{name}: `loss_weight` must be a finite number of at least 0, got'):
        build(name, loss_weight=weight)


@every
def test_state_dict_round_trip(name):
    first, second = build(name), build(name)
    with torch.no_grad():
        for tensor in second.state_dict().values():
            tensor.copy_(torch.zeros_like(tensor))
    second.load_state_dict(first.state_dict(), strict=True)
    student, teacher = pair(name)
    torch.testing.assert_close(parts(first, student, teacher), parts(second, student, teacher), rtol=0, atol=0)


@every
def test_copies_and_pickles_after_a_step(name):
    loss = build(name)
    student, teacher = pair(name)
    want, total = parts(loss, student, teacher)
    total.backward()
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(parts(twin, student, teacher)[0], want, rtol=0, atol=0)


@every
def test_prints_its_weight(name):
    assert 'loss_weight=0.25' in repr(build(name, loss_weight=0.25))
