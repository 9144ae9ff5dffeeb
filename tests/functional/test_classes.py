from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import (
    category_similarity_loss,
    interclass_kl_matrix,
    interclass_similarity_loss,
    present_classes,
)
from tests.reference import classes as reference

SHAPE = (3, 4, 3, 5)
FORMS = {
    'paper': lambda s, t, **k: interclass_similarity_loss(s, t, **k),
    'plain': lambda s, t, **k: interclass_similarity_loss(s, t, normalize=False, **k),
    'code': lambda s, t, **k: interclass_similarity_loss(s, t, mode='released_code', **k),
    'category': category_similarity_loss,
}

every = pytest.mark.parametrize('name', FORMS)


def pair(dtype=torch.float64, scale=2.0, shape=SHAPE):
    student, teacher = (scale * torch.randn(2, *shape)).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher.clone()


def mask():
    """Image 0 whole, image 1 in part, image 2 not at all."""
    valid = torch.ones(3, 3, 5, dtype=torch.bool)
    valid[1] = torch.rand(3, 5) > 0.5
    valid[1, 0, :2] = torch.tensor([True, False])
    valid[2] = False
    return valid


def assert_same(got, want, student):
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], torch.autograd.grad(want, student)[0])


@pytest.mark.parametrize('temperature', [0.5, 1.0, 3.0])
def test_matrix_equals_reference(temperature):
    student, _ = pair()
    got = interclass_kl_matrix(student, temperature=temperature)
    want = reference.kl_matrix(student, temperature)
    assert got.shape == (3, 4, 4)
    assert not got.diagonal(dim1=1, dim2=2).any()
    weight = torch.randn_like(got)
    assert_same((got * weight).sum(), (want * weight).sum(), student)


def test_matrix_with_a_mask():
    student, _ = pair()
    valid = mask()
    got = interclass_kl_matrix(student, valid=valid)
    torch.testing.assert_close(got[:2], reference.kl_matrix(student[:2], valid=valid[:2]))
    assert not got[2].any()


def test_matrix_keeps_its_digits_where_classes_are_alike():
    # All entries are about 1e-6 nats: differences of sums of 8 nats, good to 1e-6 where nothing is done about it.
    logits = 1e-3 * torch.randn(1, 3, 64, 64)
    want = interclass_kl_matrix(logits.double())
    torch.testing.assert_close(interclass_kl_matrix(logits).double(), want, rtol=0, atol=2e-7)


@pytest.mark.parametrize('normalize', [False, True])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('some', [False, True])
def test_interclass_equals_reference(normalize, masked, some):
    student, teacher = pair()
    present = torch.tensor([[True, False, True, True], [True, True, False, True], [True] * 4]) if some else None
    options = dict(normalize=normalize, present=present, valid=mask() if masked else None, temperature=1.5)
    got = interclass_similarity_loss(student, teacher, **options)
    assert_same(got, reference.interclass_similarity(student, teacher, **options), student)


def test_released_code_equals_reference():
    student, teacher = pair(shape=(2, 3, 2, 3))
    got = interclass_similarity_loss(student, teacher, mode='released_code', temperature=2.0)
    assert_same(got, reference.released_code(student, teacher, 2.0), student)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('kernel', [1, 2])
def test_category_equals_reference(masked, kernel):
    student, teacher = pair()
    valid = mask() if masked else None
    got = category_similarity_loss(student, teacher, temperature=2.0, kernel_size=kernel, valid=valid)
    assert_same(got, reference.category_similarity(student, teacher, 2.0, kernel, valid), student)


def test_category_defaults():
    student, teacher = pair()
    want = reference.category_similarity(student, teacher, 4.0, 2)
    torch.testing.assert_close(category_similarity_loss(student, teacher), want)


@every
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(name, masked):
    student, teacher = pair(shape=(3, 3, 3, 5))
    valid = mask() if masked else None
    assert torch.autograd.gradcheck(lambda s: FORMS[name](s, teacher, valid=valid), student)


@every
def test_zero_on_itself_and_positive_otherwise(name):
    student, teacher = pair()
    assert FORMS[name](teacher, teacher).item() == 0
    assert FORMS[name](student, teacher).item() > 1e-5


@every
def test_blind_to_a_shift_of_a_channel(name):
    student, teacher = pair()
    channel, pixel = torch.randn(3, 4, 1, 1).double(), torch.randn(3, 1, 3, 5).double()
    loss = FORMS[name]
    torch.testing.assert_close(loss(student + channel, teacher), loss(student, teacher))
    assert not torch.isclose(loss(student + pixel, teacher), loss(student, teacher))


@pytest.mark.parametrize('name', ['paper', 'plain', 'category'])
def test_batch_is_the_mean_of_its_images(name):
    student, teacher = pair()
    images = torch.stack([FORMS[name](student[b : b + 1], teacher[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(FORMS[name](student, teacher), images.mean())


def test_present_classes():
    labels = torch.tensor([[[0, 2, 255]], [[1, 1, -1]]])
    got = present_classes(labels, 3)
    assert got.tolist() == [[True, False, True], [False, True, False]]
    valid = torch.tensor([[[True, False, True]], [[False, False, True]]])
    assert present_classes(labels, 3, valid=valid).tolist() == [[True, False, False], [False, False, False]]


def test_no_class_present_is_zero_with_a_graph():
    student, teacher = pair()
    got = interclass_similarity_loss(student, teacher, present=torch.zeros(3, 4, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert not student.grad.any()


@every
@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_ignored_pixels_change_nothing(name, junk):
    student, teacher = pair(torch.float32)
    valid = mask()
    want = FORMS[name](student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled_s = torch.where(valid[:, None], student.detach(), junk).requires_grad_()
    got = FORMS[name](spoiled_s, torch.where(valid[:, None], teacher, -junk), valid=valid)
    (grad,) = torch.autograd.grad(got, spoiled_s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[(~valid)[:, None].expand_as(grad)].any()
    assert grad.any()


@every
def test_nothing_counts_is_zero_with_a_graph(name):
    student, teacher = pair()
    got = FORMS[name](student, teacher, valid=torch.zeros(3, 3, 5, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert not student.grad.any()


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(name, dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    student = ((2 * torch.rand(SHAPE) - 1).to(dtype) * factor).requires_grad_()
    teacher = (2 * torch.rand(SHAPE) - 1).to(dtype) * factor
    got = FORMS[name](student, teacher)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert student.grad.isfinite().all()


@every
def test_same_number_inside_autocast_and_channels_last(name):
    student, teacher = pair(torch.float32)
    want = FORMS[name](student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(FORMS[name](student, teacher), want)
    last = (t.detach().to(memory_format=torch.channels_last) for t in (student, teacher))
    torch.testing.assert_close(FORMS[name](*last), want.detach())


@every
@pytest.mark.parametrize('shape', [(1, 3, 1, 1), (1, 1, 2, 3), (1, 3, 1, 5)])
def test_small_maps(name, shape):
    student, teacher = pair(torch.float32, shape=shape)
    got = FORMS[name](student, teacher)
    got.backward()
    assert got.isfinite()
    assert student.grad.isfinite().all()


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    for loss in (interclass_similarity_loss, category_similarity_loss):
        name = loss.__name__
        with pytest.raises(ShapeError, match=rf'{name}: `student` must have shape \(B, C, H, W\), got \(3, 4, 5\)'):
            loss(x[0], x)
        with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(2, 3, 4, 5\) and \(2, 1, 4, 5\)'):
            loss(x, x[:, :1])
        with pytest.raises(ConfigError, match=f'{name}: `temperature` must be a finite number above 0, got 0'):
            loss(x, x, temperature=0)
        with pytest.raises(ShapeError, match=r'`valid` must have shape'):
            loss(x, x, valid=torch.ones(1, 4, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"`mode` must be one of \['paper', 'released_code'\], got 'papr'"):
        interclass_similarity_loss(x, x, mode='papr')
    with pytest.raises(ShapeError, match=r'`present` must have shape \(B, C\) = \(2, 3\), got \(3,\)'):
        interclass_similarity_loss(x, x, present=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="`present` must be None with mode='released_code'"):
        interclass_similarity_loss(x, x, mode='released_code', present=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match='interclass_kl_matrix: `logits` must have shape'):
        interclass_kl_matrix(x[0])
    with pytest.raises(ConfigError, match='`kernel_size` must be an integer above 0'):
        category_similarity_loss(x, x, kernel_size=0)
