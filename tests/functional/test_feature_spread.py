from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.feature_spread import covariance_loss, variance_hinge_loss
from tests.reference import feature_pairs as reference

VALID = torch.tensor([True, False, True, True, False, True])


def hinge(features, **kwargs):
    return variance_hinge_loss(features, target=1.2, **kwargs)


every = pytest.mark.parametrize('loss', [hinge, covariance_loss])


def rows(dtype=torch.float64):
    return torch.randn(6, 4, dtype=torch.float64).to(dtype).requires_grad_()


@every
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(loss, masked):
    features = rows()
    got = loss(features, valid=VALID if masked else None)
    kept = list(features[VALID] if masked else features)
    want = reference.variance_hinge(kept, 1.2, 1e-4) if loss is hinge else reference.covariance_sum(kept)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, features), torch.autograd.grad(want, features))
    assert torch.autograd.gradcheck(lambda f: loss(f, valid=VALID if masked else None), features)


@every
def test_what_does_not_count_changes_nothing(loss):
    features = rows()
    want = loss(features, valid=VALID)
    for junk in (1e4, float('inf'), float('nan')):
        spoiled = torch.where(VALID[:, None], features.detach(), junk).requires_grad_()
        got = loss(spoiled, valid=VALID)
        (grad,) = torch.autograd.grad(got, spoiled)
        torch.testing.assert_close(got, want)
        assert not grad[~VALID].any()
        assert grad[VALID].any()


@every
def test_less_than_two_rows_is_zero_with_a_graph(loss):
    features = rows()
    alone = torch.arange(6) == 2
    for got in (loss(features, valid=alone), loss(features, valid=torch.zeros_like(alone)), loss(features[:1])):
        (grad,) = torch.autograd.grad(got, features)
        assert got == 0
        assert not grad.any()


@every
def test_shifts_do_not_matter(loss):
    features = rows()
    want = loss(features)
    torch.testing.assert_close(loss(features + torch.randn(4, dtype=torch.float64)), want)
    torch.testing.assert_close(loss(features * torch.tensor([1, -1, 1, -1])), want)


def test_ends():
    assert variance_hinge_loss(torch.randn(100, 3) * 5) == 0
    features = torch.ones(5, 3, requires_grad=True)
    got = variance_hinge_loss(features)
    torch.testing.assert_close(got.item(), 0.99)
    assert torch.autograd.grad(got, features)[0].isfinite().all()
    independent = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert covariance_loss(independent) == 0


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [0.0, 1e-5, 1.0, 6e4])
def test_finite_in_half_precision(loss, dtype, scale):
    features = ((2 * torch.rand(6, 4) - 1) * scale).to(dtype).requires_grad_()
    got = loss(features)
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert torch.autograd.grad(got, features)[0].isfinite().all() or scale == 6e4
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(features), got)


def test_bad_arguments():
    x = torch.zeros(4, 5)
    with pytest.raises(ShapeError, match=r'variance_hinge_loss: `features` must have shape \(n, D\), got \(4, 5, 1\)'):
        variance_hinge_loss(x[..., None])
    with pytest.raises(ShapeError, match=r'`valid` must be boolean of shape \(4,\), got \(4,\) of torch.f'):
        covariance_loss(x, valid=torch.ones(4))
    with pytest.raises(ConfigError, match='`target` must be a finite number of at least 0'):
        variance_hinge_loss(x, target=-1)
    with pytest.raises(ConfigError, match='`eps` must be a finite number above 0'):
        variance_hinge_loss(x, eps=0)
