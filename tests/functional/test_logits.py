from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import (
    decoupled_kl_loss,
    dist_loss,
    map_logits,
    pixelwise_kl_loss,
    weighted_soft_label_loss,
    zipf_label_loss,
)
from tests.reference import logits as reference
from tests.reference.divergence import nearest

SHAPE = (3, 4, 2, 5)


def dist(student, teacher, labels=None, **kwargs):
    return dist_loss(student, teacher, **kwargs)


def decoupled(student, teacher, labels, **kwargs):
    return decoupled_kl_loss(student, teacher, labels=labels, alpha=1.5, beta=0.5, **kwargs)


def soft(student, teacher, labels, **kwargs):
    return weighted_soft_label_loss(student, teacher, labels=labels, **kwargs)


def zipf(student, teacher, labels, **kwargs):
    return zipf_label_loss(student, labels=labels, kernel_size=3, **kwargs)


LOSSES = [dist, decoupled, soft, zipf]
SOFTENED = [dist, decoupled, soft]
every = pytest.mark.parametrize('loss', LOSSES)
softened = pytest.mark.parametrize('loss', SOFTENED)


def expected(loss, student, teacher, labels, temperature=1.0, valid=None):
    if loss is dist:
        return reference.dist(student, teacher, 1.0, 1.0, temperature, valid)
    if loss is decoupled:
        return reference.decoupled(student, teacher, labels, 1.5, 0.5, temperature, valid)
    if loss is soft:
        return reference.weighted_soft_label(student, teacher, labels, temperature, valid)
    return reference.zipf_label(student, student, labels, 3, valid)


def data(dtype=torch.float64, shape=SHAPE):
    student, teacher = (2 * torch.randn(2, *shape)).to(dtype).unbind()
    labels = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    return student.clone().requires_grad_(), teacher.clone(), labels


def mask():
    """Image 0 whole, image 1 in part, image 2 not at all."""
    valid = torch.ones(3, 2, 5, dtype=torch.bool)
    valid[1] = torch.tensor([[True, False, False, True, True], [False, False, True, False, False]])
    valid[2] = False
    return valid


@softened
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(loss, temperature, masked):
    student, teacher, labels = data()
    valid = mask() if masked else None
    got = loss(student, teacher, labels, temperature=temperature, valid=valid)
    want = expected(loss, student, teacher, labels, temperature, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@pytest.mark.parametrize('kernel_size', [1, 3, 5, 9])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('by_teacher', [False, True])
def test_zipf_equals_reference(kernel_size, masked, by_teacher):
    # Seven classes for few pixels: votes tie, among those without any as well.
    student, teacher, labels = data(shape=(3, 7, 4, 5))
    valid = torch.rand(3, 4, 5) > 0.3 if masked else None
    got = zipf_label_loss(student, teacher if by_teacher else None, labels=labels, kernel_size=kernel_size, valid=valid)
    want = reference.zipf_label(student, teacher if by_teacher else student, labels, kernel_size, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@every
def test_rows_are_pixels(loss):
    student, teacher, labels = data()
    if loss is zipf:
        with pytest.raises(ShapeError, match=r'`student` must have shape \(B, C, H, W\), got \(4, 3\)'):
            zipf(torch.zeros(4, 3), None, torch.zeros(4, dtype=torch.int64))
        return
    valid = mask()
    rows = [z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher)]
    want = loss(student, teacher, labels, temperature=2.0, valid=valid)
    torch.testing.assert_close(loss(*rows, labels.flatten(), temperature=2.0, valid=valid.flatten()), want)


# Not the weighted soft labels: their weights move with the student, but carry no gradient.
@pytest.mark.parametrize('loss', [dist, decoupled, zipf])
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(loss, masked):
    student, teacher, labels = data()
    valid = mask() if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, labels, valid=valid), student)


@softened
def test_a_tensor_as_temperature(loss):
    student, teacher, labels = data()
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    got = loss(student, teacher, labels, temperature=number, valid=mask())
    torch.testing.assert_close(got, loss(student, teacher, labels, temperature=2.0, valid=mask()))
    assert torch.autograd.gradcheck(
        lambda t: loss(student.detach(), teacher, labels, temperature=t, valid=mask()), number
    )
    (want,) = torch.autograd.grad(got, number)
    spoiled = [torch.where(mask()[:, None], z, float('nan')) for z in (student, teacher)]
    (grad,) = torch.autograd.grad(loss(*spoiled, labels, temperature=number, valid=mask()), number)
    torch.testing.assert_close(grad, want)


@pytest.mark.parametrize('loss', [dist, decoupled])
def test_zero_on_itself_and_positive_otherwise(loss):
    student, teacher, labels = data()
    assert abs(loss(teacher, teacher, labels).item()) < 1e-12
    assert loss(student, teacher, labels).item() > 0.01


def test_weighted_soft_label_is_not_zero_on_itself_but_its_gradient_is():
    _, teacher, labels = data()
    student = teacher.clone().requires_grad_()
    got = soft(student, teacher, labels)
    assert got.item() > 0.01
    (grad,) = torch.autograd.grad(got, student)
    assert grad.abs().max() < 1e-12


def test_weights_are_those_of_the_students_lag():
    """Far better than the teacher: hardly distilled; far worse: fully."""
    teacher = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([1])
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum()
    ahead, behind = (torch.tensor([[0.0, z, 0.0]], dtype=torch.float64) for z in (12.0, -12.0))
    cross = [-(teacher.softmax(1) * z.log_softmax(1)).sum() for z in (ahead, behind)]
    got = [weighted_soft_label_loss(z, teacher, labels=labels, temperature=1) for z in (ahead, behind)]
    assert got[0] < 1e-4 * cross[0]
    assert got[1] > 0.99 * cross[1]
    itself = weighted_soft_label_loss(teacher, teacher, labels=labels, temperature=1)
    torch.testing.assert_close(itself, (1 - torch.tensor(-1.0, dtype=torch.float64).exp()) * entropy, rtol=1e-6, atol=0)


@every
def test_blind_to_a_shift_of_a_pixel(loss):
    student, teacher, labels = data()
    shift = torch.randn(3, 1, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(loss(student + shift, teacher, labels), loss(student, teacher, labels))
    other = student + torch.randn(3, 4, 1, 1, dtype=torch.float64)
    assert not torch.isclose(loss(other, teacher, labels), loss(student, teacher, labels))


def test_dist_is_blind_to_affine_maps_of_probabilities():
    student, teacher, _ = data()
    p = student.detach().softmax(1)
    # Towards uniform, pixel by pixel: an affine map of each pixel's probabilities.
    share = 0.2 + 0.8 * torch.rand(3, 1, 2, 5, dtype=torch.float64)
    mixed = (share * p + (1 - share) / 4).log()
    got, want = (dist_loss(z, teacher, intra_weight=0) for z in (mixed, student))
    torch.testing.assert_close(got, want)
    assert not torch.isclose(dist_loss(mixed, teacher, inter_weight=0), dist_loss(student, teacher, inter_weight=0))
    # Towards one distribution, all pixels alike: an affine map of each class's probabilities.
    other = torch.rand(1, 4, 1, 1, dtype=torch.float64)
    mixed = (0.3 * p + 0.7 * other / other.sum()).log()
    got, want = (dist_loss(z, teacher, inter_weight=0) for z in (mixed, student))
    torch.testing.assert_close(got, want)
    assert not torch.isclose(dist_loss(mixed, teacher, intra_weight=0), dist_loss(student, teacher, intra_weight=0))


def test_dist_weights_its_parts():
    student, teacher, _ = data()
    inter, intra = (dist_loss(student, teacher, inter_weight=a, intra_weight=b) for a, b in ((1, 0), (0, 1)))
    got = dist_loss(student, teacher, inter_weight=2.0, intra_weight=0.5)
    torch.testing.assert_close(got, 2 * inter + 0.5 * intra)
    assert dist_loss(student, teacher, inter_weight=0, intra_weight=0).item() == 0


def test_dist_counts_rare_classes():
    """A class of probability 1e-25: its pixels still rank."""
    _, teacher, _ = data(torch.float32)
    low = torch.tensor([0.0, 0.0, 0.0, -60.0]).view(1, 4, 1, 1)
    # The class alone: reversed, it would anticorrelate.
    reversed_s = torch.cat([teacher[:, :3], -teacher[:, 3:]], dim=1) + low
    got = dist_loss(reversed_s, teacher + low, inter_weight=0)
    assert got > 0.25
    assert dist_loss(teacher + low, teacher + low) < 1e-5


def test_dist_leaves_out_what_does_not_vary_in_the_teacher():
    student, teacher, _ = data()
    teacher[0, :, 0, 0] = 3.0
    valid = torch.ones(3, 2, 5, dtype=torch.bool)
    valid[0, 0, 0] = False
    got, want = dist_loss(student, teacher, intra_weight=0), dist_loss(student, teacher, intra_weight=0, valid=valid)
    torch.testing.assert_close(got, want)
    constant = torch.zeros_like(teacher)
    assert dist_loss(student, constant).item() == 0
    # A constant student under a teacher that varies has correlation 0, with a gradient.
    flat = constant.clone().requires_grad_()
    got = dist_loss(flat, teacher)
    torch.testing.assert_close(got, got.new_tensor(2.0))
    (grad,) = torch.autograd.grad(got, flat)
    assert grad.isfinite().all()


def test_decoupled_put_together_is_the_divergence():
    student, teacher, _ = data()
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher))
    labels = torch.randint(0, 4, (len(rows_s),))
    got = reference.plain_from_decoupled(rows_s, rows_t, labels)
    torch.testing.assert_close(got, pixelwise_kl_loss(rows_s, rows_t))
    # The same with the function, row by row.
    parts = []
    for s, t, y in zip(rows_s.split(1), rows_t.split(1), labels.split(1), strict=True):
        share = 1 - t.softmax(1)[0, y].item()
        parts.append(decoupled_kl_loss(s, t, labels=y, alpha=1.0, beta=share))
    torch.testing.assert_close(torch.stack(parts).mean(), got)


def test_decoupled_of_saturated_scores():
    # A summed softmax is 1 here, its complement's logarithm minus infinity.
    teacher = torch.tensor([[200.0, 0.0, 1.0], [-200.0, 0.0, 1.0]])
    student = torch.tensor([[100.0, 1.0, 0.0], [300.0, 1.0, 0.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    got = decoupled_kl_loss(student, teacher, labels=labels, alpha=0)
    (grad,) = torch.autograd.grad(got, student)
    among = (torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    want = pixelwise_kl_loss(among[1][None], among[0][None])
    torch.testing.assert_close(got, want)
    assert grad[:, 1:].any()
    both = decoupled_kl_loss(student, teacher, labels=labels)
    assert both.isfinite()
    # Row 1: the teacher gives the label nothing, the student everything: 300 nats for the rest.
    torch.testing.assert_close(both - got, torch.tensor((300 - 1.3133) / 2), rtol=1e-3, atol=0)


@every
def test_batch_is_the_mean_of_its_images(loss):
    student, teacher, labels = data()
    if loss is dist:
        loss = lambda s, t, y: dist_loss(s, t, intra_weight=0)  # noqa: E731 - the other part mixes the batch
    images = torch.stack([loss(student[b : b + 1], teacher[b : b + 1], labels[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(loss(student, teacher, labels), images.mean())


@every
@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_ignored_pixels_change_nothing(loss, junk):
    student, teacher, labels = data(torch.float32)
    valid = mask()
    want = loss(student, teacher, labels, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled_s = torch.where(valid[:, None], student.detach(), junk).requires_grad_()
    spoiled_t = torch.where(valid[:, None], teacher, -junk)
    got = loss(spoiled_s, spoiled_t, torch.where(valid, labels, 77), valid=valid)
    (grad,) = torch.autograd.grad(got, spoiled_s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[(~valid)[:, None].expand_as(grad)].any()


@every
def test_nothing_counts_is_zero_with_a_graph(loss):
    student, teacher, labels = data()
    got = loss(student, teacher, labels, valid=torch.zeros(3, 2, 5, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize('loss', [decoupled, soft, zipf])
@pytest.mark.parametrize('bad', [9, -1, 255, 4])
def test_labels_that_are_no_class_do_not_count(loss, bad):
    student, teacher, labels = data()
    with_bad = torch.where(mask(), labels, bad)
    got = loss(student, teacher, with_bad, ignore_index=9)
    torch.testing.assert_close(got, loss(student, teacher, labels, valid=mask()))


@every
def test_labels_of_the_input_size_are_brought_to_the_map(loss):
    student, teacher, _ = data()
    labels = torch.randint(0, 4, (3, 8, 20))
    labels[:, :, 8:] = 9
    small = nearest(labels, (2, 5))
    first = dist_loss if loss is dist else loss
    got = first(student, teacher, labels=labels, ignore_index=9)
    torch.testing.assert_close(got, expected(loss, student, teacher, small, 2.0 if loss is soft else 1.0, small != 9))


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(loss, dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    student = ((2 * torch.rand(SHAPE) - 1).to(dtype) * factor).requires_grad_()
    teacher = (2 * torch.rand(SHAPE) - 1).to(dtype) * factor
    got = loss(student, teacher, torch.randint(0, 4, (3, 2, 5)))
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert student.grad.isfinite().all()


@every
@pytest.mark.parametrize('classes', [2, 4])
def test_impossible_class_of_the_teacher(loss, classes):
    student, teacher, labels = data(shape=(3, classes, 2, 5))
    teacher[:, 0, 0] = -torch.inf
    got = loss(student, teacher, labels)
    got.backward()
    assert got.isfinite()
    assert student.grad.isfinite().all()


@every
def test_same_number_inside_autocast_and_channels_last(loss):
    student, teacher, labels = data(torch.float32)
    want = loss(student, teacher, labels)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(student, teacher, labels), want)
    last = [z.to(memory_format=torch.channels_last) for z in (student, teacher)]
    torch.testing.assert_close(loss(*last, labels), want)


@every
def test_one_pixel(loss):
    student = torch.randn(1, 3, 1, 1, requires_grad=True)
    got = loss(student, torch.randn(1, 3, 1, 1), torch.ones(1, 1, 1, dtype=torch.int64))
    got.backward()
    assert got.isfinite()
    assert student.grad.isfinite().all()


@every
def test_bad_arguments(loss):
    x, labels = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
    with pytest.raises(ShapeError, match=r'`student` must have shape \(B, C, H, W\).*, got \(3, 4, 5\)'):
        loss(x[0], x, labels)
    with pytest.raises(ShapeError, match=r'`valid` must have shape \(B, H, W\) with B = 2, got \(1, 4, 5\)'):
        loss(x, x, labels, valid=torch.ones(1, 4, 5, dtype=torch.bool))
    if loss is zipf:
        with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(2, 3, 4, 5\) and \(2, 3, 4, 1\)'):
            zipf_label_loss(x, x[..., :1], labels=labels)
        for bad in (0, 2, 3.0, True):
            with pytest.raises(ConfigError, match='`kernel_size` must be an odd integer above 0, got'):
                zipf_label_loss(x, labels=labels, kernel_size=bad)
        return
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(2, 3, 4, 5\) and \(2, 3, 4, 1\)'):
        loss(x, x[..., :1], labels)
    for bad in (0, -1, float('nan'), 'hot'):
        with pytest.raises(ConfigError, match='`temperature` must be a finite number above 0, got'):
            loss(x, x, labels, temperature=bad)


def test_bad_weights():
    x, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for name in ('inter_weight', 'intra_weight'):
        with pytest.raises(ConfigError, match=f'dist_loss: `{name}` must be a finite number of at least 0, got -1'):
            dist_loss(x, x, **{name: -1})
    for name in ('alpha', 'beta'):
        with pytest.raises(ConfigError, match=f'decoupled_kl_loss: `{name}` must be a finite number of at least 0'):
            decoupled_kl_loss(x, x, labels=labels, **{name: -1})


@pytest.mark.parametrize('numbers', [[1, 0, 1, -1], [0, 1, 2, 3], [3, 1, 0, 2], [0, 0, 0, 0]])
def test_mapping_adds_probabilities(numbers):
    student, _, _ = data()
    got = map_logits(student, numbers)
    want = reference.mapped(student, numbers)
    torch.testing.assert_close(got.exp().movedim(1, -1).reshape(want.shape), want)
    torch.testing.assert_close(map_logits(reference.rows_of(student), numbers).exp(), want)
    weights = torch.randn_like(want)
    grads = [
        torch.autograd.grad((p * weights).sum(), student) for p in (got.exp().movedim(1, -1).reshape(want.shape), want)
    ]
    torch.testing.assert_close(*grads)


def test_mapping_of_extreme_scores_is_finite():
    huge = torch.tensor([[3e38, -3e38, -3e38, -torch.inf]])
    assert map_logits(huge, [0, 1, 1, 1]).isfinite().all()


def test_bad_class_map():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r'must have the 2 classes of `class_map`, got \(2, 3, 4, 5\)'):
        map_logits(x, [0, 1])
    with pytest.raises(ConfigError, match=r'`class_map` must number .* without a gap, got \[0, 2, 2\]'):
        map_logits(x, [0, 2, 2])
    with pytest.raises(ConfigError, match=r'`class_map` must hold integers of at least -1, got \[0, -2, 1\]'):
        map_logits(x, [0, -2, 1])
    with pytest.raises(ConfigError, match='without a gap'):
        map_logits(x, [-1, -1, -1])
