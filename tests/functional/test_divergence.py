from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import channelwise_kl_loss, pixelwise_kl_loss
from tests.reference import divergence as reference

LOSSES = [pixelwise_kl_loss, channelwise_kl_loss]
REFERENCE = {pixelwise_kl_loss: reference.pixelwise_kl, channelwise_kl_loss: reference.channelwise_kl}
SHAPE = (3, 4, 2, 5)

both = pytest.mark.parametrize('loss', LOSSES)


def pair(dtype=torch.float64, scale=2.0):
    student, teacher = (scale * torch.randn(2, *SHAPE)).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher.clone()


def mask():
    """Image 0 whole, image 1 in part, image 2 not at all."""
    valid = torch.ones(3, 2, 5, dtype=torch.bool)
    valid[1] = torch.tensor([[True, False, False, True, True], [False, False, True, False, False]])
    valid[2] = False
    return valid


@both
@pytest.mark.parametrize('temperature', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(loss, temperature, masked):
    student, teacher = pair()
    valid = mask() if masked else None
    got = loss(student, teacher, temperature=temperature, valid=valid)
    want = REFERENCE[loss](student, teacher, temperature, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@both
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(loss, masked):
    student, teacher = pair()
    valid = mask() if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, temperature=2.0, valid=valid), student)


@both
def test_default_temperature(loss):
    student, teacher = pair()
    default = {pixelwise_kl_loss: 1.0, channelwise_kl_loss: 4.0}[loss]
    torch.testing.assert_close(loss(student, teacher), REFERENCE[loss](student, teacher, default))


@both
def test_zero_on_itself_and_positive_otherwise(loss):
    student, teacher = pair()
    assert loss(teacher, teacher).item() == 0
    assert loss(student, teacher).item() > 0.01


def test_pixelwise_is_blind_to_a_shift_of_a_pixel():
    student, teacher = pair()
    shift = torch.randn(3, 1, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(pixelwise_kl_loss(student + shift, teacher), pixelwise_kl_loss(student, teacher))
    assert not torch.isclose(channelwise_kl_loss(student + shift, teacher), channelwise_kl_loss(student, teacher))


def test_channelwise_is_blind_to_a_shift_of_a_channel():
    student, teacher = pair()
    shift = torch.randn(3, 4, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(channelwise_kl_loss(student + shift, teacher), channelwise_kl_loss(student, teacher))
    assert not torch.isclose(pixelwise_kl_loss(student + shift, teacher), pixelwise_kl_loss(student, teacher))


@both
def test_batch_is_the_mean_of_its_images(loss):
    student, teacher = pair()
    images = torch.stack([loss(student[b : b + 1], teacher[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(loss(student, teacher), images.mean())


def test_temperature_keeps_the_scale_of_the_gradient():
    # Hinton's reason for the factor: for high temperatures the gradient does not depend on it.
    student, teacher = pair()
    first, second = (
        torch.autograd.grad(pixelwise_kl_loss(student, teacher, temperature=t), student)[0] for t in (1e3, 1e4)
    )
    assert (first - second).norm() < 0.01 * first.norm()


@both
@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_ignored_pixels_change_nothing(loss, junk):
    student, teacher = pair(torch.float32)
    valid = mask()
    want = loss(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled_s = torch.where(valid[:, None], student.detach(), junk).requires_grad_()
    spoiled_t = torch.where(valid[:, None], teacher, -junk)
    got = loss(spoiled_s, spoiled_t, valid=valid)
    (grad,) = torch.autograd.grad(got, spoiled_s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[(~valid)[:, None].expand_as(grad)].any()


@both
def test_nothing_counts_is_zero_with_a_graph(loss):
    student, teacher = pair()
    got = loss(student, teacher, valid=torch.zeros(3, 2, 5, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_labels_select_pixels_and_join_valid():
    student, teacher = pair()
    labels = torch.randint(0, 4, (3, 2, 5))
    labels[0, :, 1:3] = 9
    want = reference.pixelwise_kl(student, teacher, 1.0, (labels != 9) & mask())
    got = pixelwise_kl_loss(student, teacher, labels=labels, ignore_index=9, valid=mask())
    torch.testing.assert_close(got, want)
    every = pixelwise_kl_loss(student, teacher, labels=labels)
    torch.testing.assert_close(every, pixelwise_kl_loss(student, teacher))


def test_labels_of_the_input_size_are_brought_to_the_map():
    student, teacher = pair()
    labels = torch.randint(0, 4, (3, 8, 20))
    labels[:, :, 8:] = 255
    want = reference.pixelwise_kl(student, teacher, 1.0, reference.nearest(labels, (2, 5)) != 255)
    torch.testing.assert_close(pixelwise_kl_loss(student, teacher, labels=labels), want)


@both
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(loss, dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    student = ((2 * torch.rand(SHAPE) - 1).to(dtype) * factor).requires_grad_()
    teacher = (2 * torch.rand(SHAPE) - 1).to(dtype) * factor
    got = loss(student, teacher)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert student.grad.isfinite().all()


@both
def test_impossible_class_of_the_teacher(loss):
    student, teacher = pair()
    teacher[:, 0, 0] = -torch.inf
    got = loss(student, teacher)
    got.backward()
    assert got.isfinite()
    assert student.grad.isfinite().all()


@both
def test_same_number_inside_autocast(loss):
    student, teacher = pair(torch.float32)
    want = loss(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(student, teacher), want)


@both
def test_one_pixel(loss):
    student = torch.randn(1, 3, 1, 1, requires_grad=True)
    got = loss(student, torch.randn(1, 3, 1, 1))
    got.backward()
    assert got.isfinite()
    assert student.grad.isfinite().all()
    if loss is channelwise_kl_loss:
        assert got.item() == 0


@both
def test_bad_arguments(loss):
    name = loss.__name__
    x = torch.zeros(2, 3, 4, 5)
    shape = r'\(B, C, H, W\)' + (r' or \(M, C\)' if loss is pixelwise_kl_loss else '')
    with pytest.raises(ShapeError, match=rf'{name}: `student` must have shape {shape}, got \(3, 4, 5\)'):
        loss(x[0], x)
    with pytest.raises(ShapeError, match=rf'{name}: `teacher` must have shape {shape}, got \(3, 4, 5\)'):
        loss(x, x[0])
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(2, 3, 4, 5\) and \(2, 3, 4, 1\)\. Resize'):
        loss(x, x[..., :1])
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(2, 3, 4, 5\) and \(2, 1, 4, 5\)'):
        loss(x, x[:, :1])
    with pytest.raises(ShapeError, match=rf'{name}: `valid` must have shape \(B, H, W\) with B = 2, got \(1, 4, 5\)'):
        loss(x, x, valid=torch.ones(1, 4, 5, dtype=torch.bool))
    for bad in (0, -1, float('nan'), float('inf'), 'hot'):
        with pytest.raises(ConfigError, match=rf'{name}: `temperature` must be a finite number above 0, got'):
            loss(x, x, temperature=bad)


def test_rows_are_pixels():
    student, teacher = pair()
    rows_s, rows_t = (z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher))
    labels = torch.randint(0, 4, (3, 2, 5))
    labels[0, :, 1:3] = 9
    valid = mask()
    for given in ({}, {'labels': labels, 'ignore_index': 9}, {'valid': valid}):
        flat = {k: v.flatten() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        got = pixelwise_kl_loss(rows_s, rows_t, temperature=2.0, **flat)
        torch.testing.assert_close(got, pixelwise_kl_loss(student, teacher, temperature=2.0, **given))


def test_bad_rows():
    x = torch.zeros(5, 3)
    with pytest.raises(ShapeError, match=r'must share M and C, got \(5, 3\) and \(5, 2\)'):
        pixelwise_kl_loss(x, x[:, :2])
    with pytest.raises(ShapeError, match=r'must share M and C, got \(5, 3\) and \(5, 3, 1, 1\)'):
        pixelwise_kl_loss(x, x[..., None, None])
    with pytest.raises(ShapeError, match=r'`labels` must have shape \(M,\) with M = 5, got \(4,\)'):
        pixelwise_kl_loss(x, x, labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r'`valid` must be boolean, got torch\.int64'):
        pixelwise_kl_loss(x, x, valid=torch.zeros(5, dtype=torch.int64))


@both
@pytest.mark.parametrize('masked', [False, True])
def test_a_tensor_as_temperature(loss, masked):
    student, teacher = pair()
    valid = mask() if masked else None
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        loss(student, teacher, temperature=number, valid=valid), loss(student, teacher, temperature=2.0, valid=valid)
    )
    assert torch.autograd.gradcheck(lambda s, t: loss(s, teacher, temperature=t, valid=valid), (student, number))
    with pytest.raises(ShapeError, match=r'`temperature` must be a number or a tensor without axes, got shape \(1,\)'):
        loss(student, teacher, temperature=torch.ones(1))


@both
def test_ignored_pixels_do_not_reach_the_temperature(loss):
    student, teacher = pair()
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(loss(student, teacher, temperature=number, valid=mask()), number)
    spoiled = [torch.where(mask()[:, None], z, float('nan')) for z in (student, teacher)]
    (got,) = torch.autograd.grad(loss(*spoiled, temperature=number, valid=mask()), number)
    torch.testing.assert_close(got, want)
