from __future__ import annotations

import functools

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import (
    attention_map,
    attention_transfer_loss,
    feature_mse_loss,
    hierarchical_context_loss,
    standardized_mse_loss,
)
from tests.reference import pyramid as pyramid_reference
from tests.reference import statistics as reference

SHAPE = (3, 4, 2, 5)

#: Each loss with its settings, and what it is by definition.
LOSSES = {
    'image': (
        functools.partial(standardized_mse_loss, over='image'),
        lambda s, t, valid: reference.standardized_mse(s, t, 'image', valid),
    ),
    'batch': (
        functools.partial(standardized_mse_loss, over='batch'),
        lambda s, t, valid: reference.standardized_mse(s, t, 'batch', valid),
    ),
    'mse': (feature_mse_loss, lambda s, t, valid: reference.feature_mse(s, t, 'mean', valid)),
    'mse-sum': (
        functools.partial(feature_mse_loss, reduction='sum'),
        lambda s, t, valid: reference.feature_mse(s, t, 'sum', valid),
    ),
    'attention': (attention_transfer_loss, lambda s, t, valid: reference.attention_transfer(s, t, 2, valid=valid)),
    'attention-p1': (
        functools.partial(attention_transfer_loss, power=1),
        lambda s, t, valid: reference.attention_transfer(s, t, 1, valid=valid),
    ),
    'attention-p3-sum': (
        functools.partial(attention_transfer_loss, power=3, reduction='sum'),
        lambda s, t, valid: reference.attention_transfer(s, t, 3, 'sum', valid),
    ),
    'context': (
        hierarchical_context_loss,
        lambda s, t, valid: pyramid_reference.hierarchical_context(s, t, (4, 2, 1), valid),
    ),
}
SQUARES = ('mse', 'mse-sum', 'context')

every = pytest.mark.parametrize('name', LOSSES)


def pair(dtype=torch.float64, shape=SHAPE):
    student, teacher = (2 * torch.randn(2, *shape) + 1).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher.clone()


def mask():
    """Image 0 whole, image 1 in part, image 2 not at all."""
    valid = torch.ones(3, 2, 5, dtype=torch.bool)
    valid[1] = torch.tensor([[True, False, False, True, True], [False, False, True, False, False]])
    valid[2] = False
    return valid


@every
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(name, masked):
    loss, want_of = LOSSES[name]
    student, teacher = pair()
    valid = mask() if masked else None
    got, want = loss(student, teacher, valid=valid), want_of(student, teacher, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@every
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(name, masked):
    student, teacher = pair(shape=(3, 2, 2, 5))
    valid = mask() if masked else None
    assert torch.autograd.gradcheck(lambda s: LOSSES[name][0](s, teacher, valid=valid), student)


@every
def test_zero_on_itself_and_positive_otherwise(name):
    loss = LOSSES[name][0]
    student, teacher = pair()
    assert loss(teacher, teacher).item() == 0
    assert loss(student, teacher).item() > 1e-3


@every
def test_teacher_gets_no_gradient(name):
    student, teacher = pair()
    LOSSES[name][0](student, teacher.requires_grad_()).backward()
    assert teacher.grad is None
    assert student.grad.any()


@every
@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_ignored_pixels_change_nothing(name, junk):
    loss = LOSSES[name][0]
    student, teacher = pair(torch.float32)
    valid = mask()
    want = loss(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled_s = torch.where(valid[:, None], student.detach(), junk).requires_grad_()
    got = loss(spoiled_s, torch.where(valid[:, None], teacher, -junk), valid=valid)
    (grad,) = torch.autograd.grad(got, spoiled_s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[(~valid)[:, None].expand_as(grad)].any()


@every
def test_nothing_counts_is_zero_with_a_graph(name):
    student, teacher = pair()
    got = LOSSES[name][0](student, teacher, valid=torch.zeros(3, 2, 5, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@every
def test_mask_of_the_input_size(name):
    loss = LOSSES[name][0]
    student, teacher = pair()
    large = mask().repeat_interleave(4, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(loss(student, teacher, valid=large), loss(student, teacher, valid=mask()))


@every
def test_channels_last_equals_contiguous(name):
    loss = LOSSES[name][0]
    student, teacher = pair()
    last = student.detach().to(memory_format=torch.channels_last).requires_grad_()
    want, got = loss(student, teacher), loss(last, teacher.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, last), torch.autograd.grad(want, student))


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_at_every_scale(name, dtype, scale):
    info = torch.finfo(dtype)
    # A mean square has a range of its own.
    huge = min(info.max, 1e15) if name in SQUARES else info.max
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': huge}[scale]
    student = ((2 * torch.rand(SHAPE) - 1) * factor).to(dtype).requires_grad_()
    teacher = ((2 * torch.rand(SHAPE) - 1) * factor).to(dtype)
    got = LOSSES[name][0](student, teacher)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    if not (name in SQUARES and scale == 'huge'):
        assert student.grad.isfinite().all()


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_dead_channels_of_one_network(name, dtype):
    student, teacher = (x.detach().to(dtype) for x in pair())
    for value in (0.0, 7.3):
        student[:, 1] = value
        got = LOSSES[name][0](student.requires_grad_(), teacher)
        (grad,) = torch.autograd.grad(got, student)
        student = student.detach()
        assert got.isfinite()
        assert grad.isfinite().all()
        assert LOSSES[name][0](teacher, student).isfinite()


@every
def test_same_number_inside_autocast(name):
    student, teacher = pair(torch.float32)
    want = LOSSES[name][0](student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(LOSSES[name][0](student, teacher), want)


@every
@pytest.mark.parametrize('batch', [1, 3])
def test_one_pixel(name, batch):
    student, teacher = pair(shape=(batch, 3, 1, 1))
    got = LOSSES[name][0](student, teacher)
    (grad,) = torch.autograd.grad(got, student)
    assert grad.isfinite().all()
    # One position has no variation; over a batch of three there is some.
    nothing = name == 'image' or name.startswith('attention') or (name == 'batch' and batch == 1)
    assert (abs(got.item()) < 1e-12) == nothing


@every
def test_maps_must_agree(name):
    loss = LOSSES[name][0]
    owner = getattr(loss, 'func', loss).__name__
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=rf'{owner}: `student` must have shape \(B, D, H, W\), got \(3, 4, 5\)'):
        loss(x[0], x)
    with pytest.raises(ShapeError, match=rf'{owner}: `teacher` must have shape \(B, D, H, W\), got \(3, 4, 5\)'):
        loss(x, x[0])
    with pytest.raises(ShapeError, match=r'must share B.* H and W, got \(2, 3, 4, 5\) and \(2, 3, 4, 1\)\. Resize'):
        loss(x, x[..., :1])
    with pytest.raises(ShapeError, match=rf'{owner}: `valid` must have shape \(B, H, W\) with B = 2, got \(1, 4, 5\)'):
        loss(x, x, valid=torch.ones(1, 4, 5, dtype=torch.bool))
    if not name.startswith('attention'):
        with pytest.raises(ShapeError, match=r'must share B, D, H and W, got \(2, 3, 4, 5\) and \(2, 1, 4, 5\)'):
            loss(x, x[:, :1])


# Standardised features


def correlation(one, two):
    one, two = one - one.mean(-1, keepdim=True), two - two.mean(-1, keepdim=True)
    return (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1))


def test_image_form_is_one_minus_the_correlation():
    student, teacher = pair()
    r = correlation(student.flatten(2), teacher.flatten(2))
    torch.testing.assert_close(standardized_mse_loss(student, teacher), 2 * (1 - r).mean(), rtol=1e-9, atol=0)


def test_batch_form_is_one_minus_the_correlation():
    student, teacher = pair()
    r = correlation(student.transpose(0, 1).flatten(1), teacher.transpose(0, 1).flatten(1))
    n = student[:, 0].numel()
    want = 2 * (1 - r).mean() * (n - 1) / n
    torch.testing.assert_close(standardized_mse_loss(student, teacher, over='batch'), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('over', ['image', 'batch'])
def test_blind_to_offset_and_scale(over, masked):
    student, teacher = pair()
    valid = mask() if masked else None
    axes = (3, 4, 1, 1) if over == 'image' else (1, 4, 1, 1)
    scale = torch.logspace(-3, 3, axes[0] * 4, dtype=torch.float64)[torch.randperm(axes[0] * 4)].view(axes)
    shift = 10 * torch.randn(axes, dtype=torch.float64)
    want = standardized_mse_loss(student, teacher, over=over, valid=valid)
    for changed in ((student * scale + shift, teacher), (student, teacher * scale + shift)):
        got = standardized_mse_loss(*changed, over=over, valid=valid)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    flipped = standardized_mse_loss(-student, teacher, over=over, valid=valid)
    assert abs(flipped.item() - want.item()) > 1e-3


def test_batch_form_sees_offsets_between_images():
    student, teacher = pair()
    shift = 10 * torch.randn(3, 4, 1, 1, dtype=torch.float64)
    want = standardized_mse_loss(student, teacher, over='batch')
    assert abs(standardized_mse_loss(student + shift, teacher, over='batch').item() - want.item()) > 0.01


def test_both_forms_agree_on_one_image_up_to_the_correction():
    student, teacher = pair(shape=(1, 4, 3, 5))
    want = standardized_mse_loss(student, teacher) * 14 / 15
    torch.testing.assert_close(standardized_mse_loss(student, teacher, over='batch'), want, rtol=1e-9, atol=0)


@pytest.mark.parametrize('over', ['image', 'batch'])
@pytest.mark.parametrize('value', [0.0, 7.3, -1e4, 1e30])
def test_constant_channel_is_zero(over, value):
    _, teacher = pair(torch.float32, (2, 3, 16, 17))
    student = torch.full_like(teacher, value)
    got = standardized_mse_loss(student, teacher, over=over)
    n = 16 * 17 * (1 if over == 'image' else 2)
    want = 1.0 if over == 'image' else (n - 1) / n
    torch.testing.assert_close(got.item(), want, rtol=1e-4, atol=0)


def test_eps_is_a_floor_of_the_deviation():
    student, teacher = pair()
    got = standardized_mse_loss(student, teacher, eps=0.7)
    torch.testing.assert_close(got, reference.standardized_mse(student, teacher, 'image', eps=0.7))


def test_bad_arguments_of_standardized_mse():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ConfigError, match=r"`over` must be one of \['image', 'batch'\], got 'imag'\. Did you"):
        standardized_mse_loss(x, x, over='imag')
    for bad in (0, -1, float('nan'), 'small'):
        with pytest.raises(ConfigError, match='standardized_mse_loss: `eps` must be a finite number above 0, got'):
            standardized_mse_loss(x, x, eps=bad)


# Raw features


def test_sum_is_the_mean_times_the_entries_of_an_image():
    student, teacher = pair()
    got = feature_mse_loss(student, teacher, reduction='sum')
    torch.testing.assert_close(got, feature_mse_loss(student, teacher) * 40)


@pytest.mark.parametrize('loss', [feature_mse_loss, attention_transfer_loss])
def test_bad_reduction(loss):
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ConfigError, match=rf"{loss.__name__}: `reduction` must be one of \['mean', 'sum'\], got 'avg'"):
        loss(x, x, reduction='avg')


# Attention


@pytest.mark.parametrize('power', [1, 2, 2.5, 4])
def test_attention_is_blind_to_the_scale_of_an_image_and_to_signs(power):
    student, teacher = pair()
    scale = torch.tensor([1e-9, -3.0, 1e12], dtype=torch.float64).view(3, 1, 1, 1)
    want = attention_transfer_loss(student, teacher, power=power)
    torch.testing.assert_close(attention_transfer_loss(student * scale, teacher, power=power), want)
    torch.testing.assert_close(attention_transfer_loss(student, teacher * scale, power=power), want)
    signs = torch.where(torch.rand(SHAPE) > 0.5, 1.0, -1.0).double()
    torch.testing.assert_close(attention_transfer_loss(student * signs, teacher, power=power), want)


def test_attention_needs_no_equal_widths():
    student, _ = pair()
    teacher = torch.randn(3, 7, 2, 5, dtype=torch.float64)
    got = attention_transfer_loss(student, teacher, valid=mask())
    torch.testing.assert_close(got, reference.attention_transfer(student, teacher, 2, valid=mask()))


@pytest.mark.parametrize('power', [1, 2, 3])
def test_attention_map(power):
    student, _ = pair()
    got = attention_map(student, power=power, valid=mask())
    assert got.shape == (3, 2, 5)
    for b, places in enumerate(reference.places_of(SHAPE, mask())):
        want = torch.zeros(2, 5, dtype=torch.float64)
        for (y, x), value in zip(places, reference.attention(student[b], power, places) if places else [], strict=True):
            want[y, x] = value
        torch.testing.assert_close(got[b], want)
    torch.testing.assert_close(got.square().sum((1, 2))[:2], torch.ones(2, dtype=torch.float64))


def test_attention_of_nothing_is_zero_without_a_gradient():
    student, teacher = pair(torch.float32)
    with torch.no_grad():
        student[1] = 1e-13
    got = attention_transfer_loss(student, teacher, reduction='sum')
    (grad,) = torch.autograd.grad(got, student)
    assert not grad[1].any()
    assert grad[0].any()
    assert not attention_map(student)[1].any()


def test_nan_of_a_position_that_counts_reaches_the_loss():
    for name, (loss, _) in LOSSES.items():
        student, teacher = pair(torch.float32)
        with torch.no_grad():
            student[0, 0, 0, 0] = float('nan')
        assert loss(student, teacher).isnan(), name


@pytest.mark.parametrize('power', [0, 0.5, -2, float('nan'), float('inf'), '2', True])
def test_bad_power(power):
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(
        ConfigError, match='attention_transfer_loss: `power` must be a finite number of at least 1, got'
    ):
        attention_transfer_loss(x, x, power=power)
    with pytest.raises(ConfigError, match='attention_map: `power` must be a finite number of at least 1, got'):
        attention_map(x, power=power)
