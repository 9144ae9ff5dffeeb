"""One channel of a sigmoid stands for two classes, in every loss over classes, beside one channel and beside two."""

from __future__ import annotations

import math

import pytest
import torch

from mmstructkd import functional as F
from mmstructkd.errors import ShapeError
from tests.reference import classes as class_reference
from tests.reference import divergence, logits
from tests.reference.logits import rows_of

SHAPE = (2, 3, 4)
WIDTHS = [(1, 1), (1, 2), (2, 1)]

widths = pytest.mark.parametrize('widths', WIDTHS, ids=lambda w: f'{w[0]}-{w[1]}')


def pair(widths):
    student, teacher = (torch.randn(2, wide, 3, 4, dtype=torch.float64) for wide in widths)
    return student.requires_grad_(), teacher


def written_out(scores):
    """Both classes of a binary head, pixel by pixel: only the difference of two scores means anything."""
    batch, wide, height, width = scores.shape
    out = scores.new_zeros(batch, 2, height, width)
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                z = [scores[b, c, y, x] for c in range(wide)]
                out[b, 1, y, x] = z[0] if wide == 1 else z[1] - z[0]
    return out


def labels():
    made = torch.randint(0, 2, SHAPE)
    made[0, 0] = 255
    return made


CASES = {
    'pixelwise': (
        lambda s, t, y: F.pixelwise_kl_loss(s, t, temperature=2.0, labels=y),
        lambda s, t, y: divergence.pixelwise_kl(s, t, 2.0, y != 255),
    ),
    'dist': (
        lambda s, t, y: F.dist_loss(s, t, temperature=2.0, labels=y),
        lambda s, t, y: logits.dist(s, t, 1.0, 1.0, 2.0, y != 255),
    ),
    'decoupled': (
        lambda s, t, y: F.decoupled_kl_loss(s, t, labels=y, alpha=0.5, beta=2.0, temperature=2.0),
        lambda s, t, y: logits.decoupled(s, t, y.clamp(max=1), 0.5, 2.0, 2.0, y != 255),
    ),
    'soft label': (
        lambda s, t, y: F.weighted_soft_label_loss(s, t, labels=y, temperature=2.0),
        lambda s, t, y: logits.weighted_soft_label(s, t, y.clamp(max=1), 2.0, y != 255),
    ),
    'inter-class': (
        lambda s, t, y: F.interclass_similarity_loss(s, t, normalize=False, valid=y != 255),
        lambda s, t, y: class_reference.interclass_similarity(s, t, normalize=False, valid=y != 255),
    ),
    'category': (
        lambda s, t, y: F.category_similarity_loss(s, t, valid=y != 255),
        lambda s, t, y: class_reference.category_similarity(s, t, valid=y != 255),
    ),
}

every = pytest.mark.parametrize('case', CASES.values(), ids=list(CASES))


@every
@widths
def test_equals_the_loops_over_two_classes(case, widths):
    loss, reference = case
    student, teacher = pair(widths)
    given = labels()
    got = loss(student, teacher, given)
    want = reference(written_out(student), written_out(teacher), given)
    torch.testing.assert_close(got, want)
    (got_grad,), (want_grad,) = (torch.autograd.grad(value, student) for value in (got, want))
    torch.testing.assert_close(got_grad, want_grad)
    assert got_grad.any()
    assert not got_grad[0, :, 0].any()


@every
@widths
def test_two_channels_on_both_sides_are_what_they_were(case, widths):
    """A pair of two-class heads is not touched: its value is that of the expanded pair for losses over classes."""
    loss, _ = case
    student, teacher = pair(widths)
    given = labels()
    two_s, two_t = written_out(student.detach()).requires_grad_(), written_out(teacher)
    got, want = loss(student, teacher, given), loss(two_s, two_t, given)
    torch.testing.assert_close(got, want)
    assert F.as_two_classes(two_s, two_t)[0] is two_s


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_the_divergence_is_that_of_two_coins(temperature):
    """By the sigmoids themselves, with no softmax anywhere."""
    student, teacher = pair((1, 1))
    total = 0.0
    for z_s, z_t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True):
        p, q = (1 / (1 + math.exp(-z / temperature)) for z in (z_s, z_t))
        total += q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    want = temperature**2 * total / student.numel()
    assert F.pixelwise_kl_loss(student, teacher, temperature=temperature).item() == pytest.approx(want)


@pytest.mark.parametrize('widths', [(1, 1), (1, 2), (2, 1)])
def test_rows(widths):
    student, teacher = (torch.randn(7, wide, dtype=torch.float64) for wide in widths)
    student.requires_grad_()
    given = torch.tensor([0, 1, 1, 0, 255, 1, 0])
    maps_s, maps_t = (x.detach().T[None, :, :, None] for x in (student, teacher))
    as_map = given[None, :, None]
    for loss in (
        lambda s, t, y: F.pixelwise_kl_loss(s, t, labels=y),
        lambda s, t, y: F.dist_loss(s, t, labels=y),
        lambda s, t, y: F.decoupled_kl_loss(s, t, labels=y),
        lambda s, t, y: F.weighted_soft_label_loss(s, t, labels=y),
    ):
        got = loss(student, teacher, given)
        torch.testing.assert_close(got, loss(maps_s, maps_t, as_map))
        assert torch.autograd.grad(got, student)[0].any()


@pytest.mark.parametrize('widths', [(1, 2), (2, 1)])
def test_channels_over_positions_compare_the_difference_of_two_scores(widths):
    student, teacher = pair(widths)
    got = F.channelwise_kl_loss(student, teacher, temperature=2.0)
    want = divergence.channelwise_kl(written_out(student), written_out(teacher), 2.0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))
    # A softmax does not feel what both scores share, and neither does the student of it.
    if widths == (1, 2):
        torch.testing.assert_close(
            F.channelwise_kl_loss(student, teacher + torch.randn(2, 1, 3, 4), temperature=2.0), got
        )


def test_channels_over_positions_take_one_channel_as_it_is():
    student, teacher = pair((1, 1))
    got = F.channelwise_kl_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(got, divergence.channelwise_kl(student, teacher, 2.0))


def test_zipf_of_two_classes_has_nothing_to_rank():
    student, teacher = pair((1, 2))
    assert F.zipf_label_loss(student, teacher, labels=labels()).item() == 0


@pytest.mark.parametrize('order', [[0, 1], [1, 0]])
def test_a_map_of_two_classes_from_one_channel(order):
    _, teacher = pair((1, 1))
    got = F.map_logits(teacher, order).exp()
    want = logits.mapped(written_out(teacher), order)
    torch.testing.assert_close(rows_of(got), want)


@widths
def test_gradcheck(widths):
    student, teacher = (torch.randn(2, wide, 1, 2, dtype=torch.float64) for wide in widths)
    student.requires_grad_()
    for loss in (F.pixelwise_kl_loss, F.dist_loss, F.channelwise_kl_loss):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, teacher), student)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    student, teacher = (torch.randn(2, 1, 3, 4).to(dtype) for _ in range(2))
    got = F.pixelwise_kl_loss(student.requires_grad_(), teacher)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.pixelwise_kl_loss(student.float(), teacher.float()))


def test_sure_sigmoids_are_finite():
    student = torch.tensor([[1e4], [-1e4], [3e38]], requires_grad=True)
    got = F.pixelwise_kl_loss(student, -student.detach())
    got.backward()
    assert got.isfinite()
    assert student.grad.isfinite().all()


def test_what_is_no_pair_of_binary_heads_is_left_alone():
    for shapes in (((2, 1, 3, 4), (2, 3, 3, 4)), ((5, 2), (5, 2)), ((2, 1, 4), (2, 1, 4)), ((2, 1), (2, 1, 3, 4))):
        student, teacher = (torch.randn(shape) for shape in shapes)
        got = F.as_two_classes(student, teacher)
        assert got[0] is student
        assert got[1] is teacher
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(2, 1, 3, 4\) and \(2, 19, 3, 4\)'):
        F.pixelwise_kl_loss(torch.zeros(2, 1, 3, 4), torch.zeros(2, 19, 3, 4))
    with pytest.raises(ShapeError, match=r'two_class_logits: `logits` must have shape'):
        F.two_class_logits(torch.zeros(3))
