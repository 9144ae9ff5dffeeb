from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import FocalGlobalLoss
from mmstructkd.losses.focal_global import ContextBlock
from mmstructkd.structures import Targets
from tests.reference import boxes as reference

SHAPE, INPUT = (3, 4, 5, 7), (40, 56)


def pair():
    student, teacher = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    return student.clone().requires_grad_(), teacher.clone()


def targets(**kwargs):
    several = [[3.0, 2.0, 30.0, 31.0], [10.0, 9.0, 20.0, 17.0]]
    boxes = (torch.tensor(several), torch.zeros(0, 4), torch.tensor([[20.0, 11.0, 55.0, 28.0]]))
    return Targets(boxes=boxes, input_size=INPUT, **kwargs)


def bound(**kwargs):
    loss = FocalGlobalLoss(**kwargs).double()
    loss.bind(torch.zeros(1, 4, 5, 7), torch.zeros(1, 4, 5, 7))
    return loss.double()


def learned(loss):
    """Context blocks that add something, as after some steps."""
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for block in (loss.context_student, loss.context_teacher):
            block.norm.bias += 3  # some units above 0
    return loss


def context(block, features, places):
    """What the block adds to an image (D, H, W), by its equation."""
    pixels = [features[:, y, x] for y, x in places]
    scores = torch.stack([block.mask.weight[0] @ p + block.mask.bias[0] for p in pixels]).softmax(0)
    pooled = sum(w * p for w, p in zip(scores, pixels, strict=True))
    hidden = block.reduce.weight @ pooled + block.reduce.bias
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
    hidden = (hidden * block.norm.weight + block.norm.bias).clamp(min=0)
    return block.expand.weight @ hidden + block.expand.bias


def relation(loss, student, teacher, valid=None):
    images = []
    for b, places in enumerate(reference.places_of(SHAPE, valid)):
        if places:
            added_s = context(loss.context_student, student[b], places)
            added_t = context(loss.context_teacher, teacher[b], places)
            gaps = [student[b, :, y, x] + added_s - teacher[b, :, y, x] - added_t for y, x in places]
            images.append(sum(g.square().sum() for g in gaps))
    return sum(images) / len(images)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(
    ('preset', 'numbers'),
    [
        (None, (1e-3, 5e-4, 5e-4, 5e-6, 0.5)),
        ('one-stage', (1e-3, 5e-4, 5e-4, 5e-6, 0.5)),
        ('reppoints', (1.6e-3, 8e-4, 8e-4, 8e-6, 0.5)),
        ('fcos', (1.6e-3, 8e-4, 8e-4, 8e-6, 0.8)),
        ('two-stage', (5e-5, 2.5e-5, 5e-5, 5e-7, 0.5)),
    ],
)
def test_value_and_gradients_equal_reference(preset, numbers, masked):
    student, teacher = pair()
    valid = None
    if masked:
        valid = torch.ones(3, 5, 7, dtype=torch.bool)
        valid[0, :, 5:] = False
        valid[1] = False
    loss = learned(bound(preset=preset, loss_weight=5.0))
    got = loss(student, teacher, targets(valid=valid))
    focal = reference.focal_feature(student, teacher, targets().boxes, INPUT, numbers[:3], numbers[4], valid)
    want = 5 * (focal + numbers[3] * relation(loss, student, teacher, valid))
    torch.testing.assert_close(got, want)
    inputs = [student, *loss.parameters()]
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_at_first_the_context_adds_nothing():
    student, teacher = pair()
    loss = bound(foreground_weight=0, background_weight=0, attention_weight=0, global_weight=1)
    want = (student - teacher).square().sum() / 3
    torch.testing.assert_close(loss(student, teacher, targets()), want)


def test_both_context_blocks_learn_and_the_teacher_gets_no_gradient():
    student, teacher = pair()
    loss = learned(bound())
    loss(student, teacher.requires_grad_(), targets()).backward()
    assert teacher.grad is None
    for block in (loss.context_student, loss.context_teacher):
        assert isinstance(block, ContextBlock)
        assert all(p.grad is not None for p in block.parameters())
        assert block.expand.weight.grad.any()


def test_no_global_part_no_parameters():
    student, teacher = pair()
    loss = bound(global_weight=0)
    assert not list(loss.parameters())
    want = reference.focal_feature(student, teacher, targets().boxes, INPUT, (1e-3, 5e-4, 5e-4), 0.5)
    torch.testing.assert_close(loss(student, teacher, targets()), want)


def test_second_bind_keeps_the_blocks():
    loss = bound()
    block = loss.context_student
    loss.bind(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    assert loss.context_student is block
    with pytest.raises(ShapeError, match=r'FocalGlobalLoss: `student` must have the 4 channels that it was bound to'):
        loss.bind(torch.zeros(1, 6, 2, 2), torch.zeros(1, 6, 2, 2))


def test_one_channel():
    loss = FocalGlobalLoss()
    student = torch.randn(1, 1, 3, 3, requires_grad=True)
    loss.bind(student, student)
    assert loss(student, torch.randn(1, 1, 3, 3), Targets(boxes=(torch.zeros(0, 4),), input_size=(9, 9))).isfinite()


def test_needs_boxes_and_bind():
    student, teacher = pair()
    with pytest.raises(ConfigError, match=r'FocalGlobalLoss: `targets.boxes` must be given, got None\. Use it with a'):
        bound()(student, teacher)
    with pytest.raises(ConfigError, match=r'FocalGlobalLoss: `targets.input_size` must be given, got None'):
        bound()(student, teacher, Targets(boxes=targets().boxes))
    with pytest.raises(ConfigError, match='FocalGlobalLoss: `bind` must be called before the loss'):
        FocalGlobalLoss()(student, teacher, targets())
    with pytest.raises(ShapeError, match=r'FocalGlobalLoss: `student` and `teacher` must share B, D, H and W'):
        bound()(student, teacher[..., :3], targets())
    assert FocalGlobalLoss.tasks == ('det',)


def test_bad_arguments():
    for name in ('foreground_weight', 'background_weight', 'attention_weight', 'global_weight'):
        with pytest.raises(ConfigError, match=f'FocalGlobalLoss: `{name}` must be a finite number of at least 0, got'):
            FocalGlobalLoss(**{name: -1e-3})
    with pytest.raises(ConfigError, match='FocalGlobalLoss: `temperature` must be a finite number above 0, got 0'):
        FocalGlobalLoss(temperature=0)
    with pytest.raises(ConfigError, match="`temperature` must be 0.8 with preset='fcos', got 0.5"):
        FocalGlobalLoss(preset='fcos', temperature=0.5)
    shown = repr(FocalGlobalLoss(preset='two-stage'))
    assert 'temperature=0.5' in shown
    assert 'global_weight=5e-07' in shown
