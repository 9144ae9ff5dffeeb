from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.softening import check_temperature, kl_along, scale_gradient, standardize_logits
from tests.reference import logits as reference

SHAPE = (3, 4, 2, 5)


def scores(dtype=torch.float64):
    return (2 * torch.randn(SHAPE) + 1).to(dtype).requires_grad_()


def mask():
    valid = torch.rand(3, 2, 5) > 0.4
    valid[0, 0, :2], valid[2] = True, False
    return valid


def test_classes_equal_reference():
    z = scores()
    rows = reference.rows_of(z)
    want = torch.stack([reference.standardized(row) for row in rows])
    torch.testing.assert_close(standardize_logits(rows), want)
    got = standardize_logits(z)
    torch.testing.assert_close(reference.rows_of(got), want)
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad((p * weights).sum(), z, retain_graph=True) for p in (reference.rows_of(got), want)]
    torch.testing.assert_close(*grads)


def test_positions_equal_reference():
    z = scores()
    valid = mask()
    got = standardize_logits(z, dim=(2, 3), valid=valid)
    for b in range(3):
        for c in range(4):
            chosen = z[b, c][valid[b]]
            if len(chosen) > 1:
                torch.testing.assert_close(got[b, c][valid[b]], reference.standardized(chosen))
    assert not got[(~valid)[:, None].expand_as(got)].any()


@pytest.mark.parametrize('dim', [1, (2, 3)])
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(dim, masked):
    valid = mask() if masked else None
    assert torch.autograd.gradcheck(lambda z: standardize_logits(z, dim=dim, valid=valid), scores())


@pytest.mark.parametrize('dim', [1, (2, 3)])
def test_blind_to_scale_and_shift(dim):
    z = scores()
    shape = (3, 1, 2, 5) if dim == 1 else (3, 4, 1, 1)
    scale, shift = 0.1 + torch.rand(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(standardize_logits(scale * z + shift, dim=dim), standardize_logits(z, dim=dim))
    torch.testing.assert_close(standardize_logits(-z, dim=dim), -standardize_logits(z, dim=dim))


@pytest.mark.parametrize('dim', [1, (2, 3)])
def test_ignored_positions_change_nothing(dim):
    z, valid = scores(), mask()
    weights = torch.randn(SHAPE, dtype=torch.float64)
    want = standardize_logits(z, dim=dim, valid=valid)
    spoiled = torch.where(valid[:, None], z.detach(), float('nan')).requires_grad_()
    got = standardize_logits(spoiled, dim=dim, valid=valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad((got * weights).sum(), spoiled), torch.autograd.grad((want * weights).sum(), z)
    )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('value', [0.0, 1e-7, 1.0, 1e4, 'huge'])
@pytest.mark.parametrize('dim', [1, (2, 3)])
def test_finite_also_where_all_are_equal(dtype, value, dim):
    factor = torch.finfo(dtype).max if value == 'huge' else value
    for z in (torch.full(SHAPE, factor, dtype=dtype), (2 * torch.rand(SHAPE) - 1).to(dtype) * factor):
        z.requires_grad_()
        got = standardize_logits(z, dim=dim)
        assert got.dtype == torch.float32
        assert got.isfinite().all()
        assert got.abs().max() < 4
        (grad,) = torch.autograd.grad(got.square().sum() + got.sum(), z)
        assert grad.isfinite().all()
    equal = standardize_logits(torch.full(SHAPE, 3.0), dim=dim)
    assert not equal.any()


def test_scale_gradient_keeps_the_value():
    x = torch.tensor([0.1, -3.7], requires_grad=True)
    for factor in (0.0, -0.0, -1.0, 0.3):
        got = scale_gradient(x, factor)
        assert torch.equal(got, x)
        torch.testing.assert_close(torch.autograd.grad((got * 2).sum(), x)[0], torch.full((2,), 2 * factor))


def test_kl_of_impossible_classes_is_finite():
    nothing = torch.tensor([0.0, -torch.inf])
    assert kl_along(nothing, nothing, 0).item() == 0
    assert kl_along(nothing, torch.tensor([-torch.inf, 0.0]), 0).isfinite()


def test_temperatures():
    check_temperature('x', 0.5)
    check_temperature('x', torch.tensor(0.5))
    with pytest.raises(
        ShapeError, match=r'x: `temperature` must be a number or a tensor without axes, got shape \(1,\)'
    ):
        check_temperature('x', torch.ones(1))
    with pytest.raises(ConfigError, match='x: `temperature` must be a finite number above 0, got 0'):
        check_temperature('x', 0)
