from __future__ import annotations

import functools

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.scores import label_losses
from mmstructkd.functional.cross_entropy import cross_entropy_loss
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from mmstructkd.functional.soft_target import constrained_soft_target, next_multiplier, soft_target_loss
from tests.functional import checks
from tests.reference import soft_target as reference
from tests.reference.divergence import nearest

LABELS = torch.randint(0, 4, (3, 2, 5), generator=torch.Generator().manual_seed(1))


def blended(student, teacher, **kwargs):
    return soft_target_loss(student, teacher, labels=LABELS, weight=0.4, temperature=2.0, **kwargs)


def reversed_blend(student, teacher, **kwargs):
    return soft_target_loss(student, teacher, labels=LABELS, weight=0.3, temperature=5.0, reverse=True, **kwargs)


def constrained(student, teacher, **kwargs):
    return constrained_soft_target(student, teacher, labels=LABELS, multiplier=0.7, bound=0.0, **kwargs).loss


every = pytest.mark.parametrize('loss', [blended, reversed_blend, constrained])


@every
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(loss, masked):
    student, teacher = checks.pair()
    valid = checks.VALID if masked else None
    if loss is constrained:
        # CE + b D is 1 + b times the blend with the weight b / (1 + b).
        want = 1.7 * reference.soft_target(student, teacher, LABELS, 0.7 / 1.7, 1.0, valid=valid)
    else:
        settings = (0.4, 2.0, False) if loss is blended else (0.3, 5.0, True)
        want = reference.soft_target(student, teacher, LABELS, *settings, valid=valid)
    checks.same(loss(student, teacher, valid=valid), want, student)


@every
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(loss, masked):
    student, teacher = checks.pair()
    valid = checks.VALID if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, valid=valid), student)


@every
def test_contract(loss):
    checks.teacher_gets_nothing(loss, *checks.pair())
    checks.ignored_changes_nothing(loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(loss, *checks.pair(), checks.VALID)
    checks.finite_in_half(loss)
    checks.same_under_autocast(loss, *checks.pair(torch.float32))


@every
def test_rows_are_pixels_and_shifts_do_not_matter(loss):
    student, teacher = checks.pair()
    want = loss(student, teacher)
    shift = torch.randn(3, 1, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(loss(student + shift, teacher - shift), want)
    rows = [z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher)]
    settings = {blended: dict(weight=0.4, temperature=2.0)}.get(loss)
    if settings:
        torch.testing.assert_close(soft_target_loss(*rows, labels=LABELS.flatten(), **settings), want)


def test_weights_at_the_ends():
    student, teacher = checks.pair()
    hard = soft_target_loss(student, teacher, labels=LABELS, weight=0)
    torch.testing.assert_close(hard, cross_entropy_loss(student, LABELS))
    soft = soft_target_loss(student, teacher, labels=LABELS, weight=1, temperature=3.0)
    torch.testing.assert_close(soft, pixelwise_kl_loss(student, teacher, temperature=3.0))
    assert soft_target_loss(teacher, teacher, labels=LABELS, weight=1).abs() < 1e-12


def test_a_tensor_as_temperature():
    student, teacher = checks.pair()
    warm = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    loss = functools.partial(soft_target_loss, student.detach(), teacher, labels=LABELS)
    torch.testing.assert_close(loss(temperature=warm), loss(temperature=2.0))
    assert torch.autograd.gradcheck(lambda t: loss(temperature=t), warm)


@pytest.mark.parametrize('bad', [9, -1, 255, 4])
def test_labels_that_are_no_class_do_not_count(bad):
    student, teacher = checks.pair()
    spoiled = torch.where(checks.VALID, LABELS, bad)
    got = soft_target_loss(student, teacher, labels=spoiled, ignore_index=9)
    torch.testing.assert_close(got, soft_target_loss(student, teacher, labels=LABELS, valid=checks.VALID))
    got = cross_entropy_loss(student, spoiled, ignore_index=9)
    want = reference.cross_entropy(student, spoiled)
    checks.same(got, want, student)


def test_labels_of_the_input_size_are_brought_to_the_map():
    student, _ = checks.pair()
    labels = torch.randint(0, 4, (3, 8, 20))
    labels[:, :, 8:] = 255
    losses, counts = label_losses(student, labels)
    assert torch.equal(counts, nearest(labels, (2, 5)) != 255)
    assert not losses[~counts].any()
    checks.same(cross_entropy_loss(student, labels), reference.cross_entropy(student, nearest(labels, (2, 5))), student)


def test_cross_entropy_keeps_its_promises():
    def loss(student, teacher, valid=None):
        return cross_entropy_loss(student, LABELS, valid=valid)

    student, teacher = checks.pair()
    torch.testing.assert_close(loss(student, teacher), torch.nn.functional.cross_entropy(student, LABELS))
    assert torch.autograd.gradcheck(lambda s: loss(s, None, valid=checks.VALID), student)
    checks.ignored_changes_nothing(loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(loss, student, teacher, checks.VALID)
    checks.finite_in_half(loss)


def test_the_multiplier_climbs_while_the_constraint_is_broken():
    student, teacher = checks.pair()
    loss, gap = constrained_soft_target(student, teacher, labels=LABELS, multiplier=torch.tensor(1.0), bound=0.1)
    assert not gap.requires_grad
    torch.testing.assert_close(gap, pixelwise_kl_loss(student, teacher).detach() - 0.1)
    torch.testing.assert_close(loss, cross_entropy_loss(student, LABELS) + pixelwise_kl_loss(student, teacher) - 0.1)
    multiplier = torch.tensor(1.0)
    risen = next_multiplier(multiplier, gap, rate=0.5)
    torch.testing.assert_close(risen, multiplier + 0.5 * gap.float())
    assert next_multiplier(multiplier, -100 * gap, rate=0.5) == 0
    assert multiplier == 1


def test_the_multiplier_gets_no_gradient_of_the_loss():
    student, teacher = checks.pair()
    multiplier = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    constrained_soft_target(student, teacher, labels=LABELS, multiplier=multiplier).loss.backward()
    assert multiplier.grad is None


def test_a_held_learner_ends_at_its_bound():
    """Labels and teacher disagree: ascent on the multiplier keeps the divergence near the bound."""
    teacher = torch.tensor([[2.0, 0.0, 0.0]]).expand(6, 3)
    student = torch.zeros(6, 3, requires_grad=True)
    labels = torch.full((6,), 1)
    multiplier = torch.tensor(1.0)
    for _ in range(4000):
        loss, gap = constrained_soft_target(student, teacher, labels=labels, multiplier=multiplier, bound=0.2)
        (grad,) = torch.autograd.grad(loss, student)
        student = (student - 3.0 * grad).detach().requires_grad_()
        multiplier = next_multiplier(multiplier, gap, rate=0.05)
    assert abs(gap.item()) < 0.01
    assert multiplier > 0.1


@pytest.mark.parametrize('widths', [(1, 1), (1, 2), (2, 1)])
def test_one_channel_is_a_sigmoid(widths):
    student, teacher = checks.pair(shape=(3, widths[0], 2, 5), other=(3, widths[1], 2, 5))
    pairs = [z if z.shape[1] == 2 else torch.cat([torch.zeros_like(z), z], dim=1) for z in (student, teacher)]
    labels = LABELS % 2
    settings = dict(labels=labels, weight=0.4, temperature=2.0)
    checks.same(soft_target_loss(student, teacher, **settings), soft_target_loss(*pairs, **settings), student)
    score = pairs[0][:, 1] - pairs[0][:, 0]
    want = torch.nn.functional.binary_cross_entropy_with_logits(score, labels.double())
    checks.same(cross_entropy_loss(student, labels), want, student)


def test_bad_arguments():
    x, labels = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r'soft_target_loss: `weight` must lie in \[0, 1\], got 1.5'):
        soft_target_loss(x, x, labels=labels, weight=1.5)
    with pytest.raises(ConfigError, match='`weight` must be a finite number of at least 0, got -1'):
        soft_target_loss(x, x, labels=labels, weight=-1)
    with pytest.raises(ConfigError, match='`temperature` must be a finite number above 0, got 0'):
        soft_target_loss(x, x, labels=labels, temperature=0)
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(2, 3, 4, 5\) and \(2, 3, 4, 1\)'):
        soft_target_loss(x, x[..., :1], labels=labels)
    with pytest.raises(ShapeError, match=r'`student` must have shape \(B, C, H, W\) or \(M, C\), got \(3, 4, 5\)'):
        soft_target_loss(x[0], x, labels=labels)
    with pytest.raises(ShapeError, match=r'soft_target_loss: `labels` must have shape \(B, H, W\) with B = 2'):
        soft_target_loss(x, x, labels=labels[:1])
    with pytest.raises(ShapeError, match=r'cross_entropy_loss: `scores` must have shape'):
        cross_entropy_loss(x[0], labels)
    with pytest.raises(ConfigError, match='`multiplier` must be a finite number of at least 0, got -0.1'):
        constrained_soft_target(x, x, labels=labels, multiplier=-0.1)
    with pytest.raises(ConfigError, match='`bound` must be a finite number of at least 0'):
        constrained_soft_target(x, x, labels=labels, multiplier=1.0, bound=-1)
    with pytest.raises(ConfigError, match='next_multiplier: `rate` must be a finite number above 0, got 0'):
        next_multiplier(torch.tensor(1.0), torch.tensor(1.0), rate=0)
