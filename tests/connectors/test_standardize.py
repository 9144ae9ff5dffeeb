"""Standardising each channel of each image."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.connectors import StandardizeConnector
from mmstructkd.errors import ConfigError, ShapeError


def one(tensor, **kwargs):
    return StandardizeConnector([1], [1], **kwargs)([tensor], [tensor])[0][0]


def reference(tensor, eps):
    out = torch.empty_like(tensor)
    for b in range(tensor.shape[0]):
        for c in range(tensor.shape[1]):
            values = tensor[b, c].flatten().tolist()
            mean = sum(values) / len(values)
            variance = sum((v - mean) ** 2 for v in values) / len(values)
            out[b, c] = (tensor[b, c] - mean) / (variance + eps**2) ** 0.5
    return out


def test_equals_the_formula():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 3 + 1
    torch.testing.assert_close(one(x, eps=0.5), reference(x, 0.5))
    tokens = x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(one(tokens, eps=0.5), reference(x, 0.5).flatten(2).transpose(1, 2))


def test_both_networks_and_every_level():
    students, teachers = [torch.randn(1, 2, 3, 3), torch.randn(1, 3, 2, 2)], [torch.randn(1, 4, 5, 5)] * 2
    made = StandardizeConnector([2, 3], [4, 4])(students, teachers)
    for out in made[0] + made[1]:
        torch.testing.assert_close(out.mean((2, 3)), torch.zeros(out.shape[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.std((2, 3), unbiased=False), torch.ones(out.shape[:2]))


def test_does_not_change_with_scale_and_offset():
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(one(7 * x + 3), one(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('scale', [0.0, 1e-30, 1e30])
@pytest.mark.parametrize('shape', [(1, 2, 3, 3), (1, 2, 1, 1)])
def test_finite_at_the_ends_of_the_range(scale, shape):
    x = (torch.randn(shape) * scale).requires_grad_()
    out = one(x)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_is_promoted(dtype):
    x = torch.randn(1, 2, 4, 4).to(dtype)
    assert one(x).dtype == torch.float32
    torch.testing.assert_close(one(x), one(x.float()))


def test_gradient():
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: one(t, eps=0.1), x)


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match='StandardizeConnector: `eps` must be a finite number above 0, got 0'):
        StandardizeConnector([1], [1], eps=0)
    with pytest.raises(ShapeError, match=r'`students` must have shape .*, got \(2, 3\)'):
        one(torch.zeros(2, 3))
