from __future__ import annotations

import pytest
import torch

from mmstructkd.functional.core.precision import exact_matmul, full_precision, promote
from tests.functional.checks import needs_matmul_switch


@full_precision
def product(a, b, *, more=()):
    return a @ b, a.dtype, [m.dtype for m in more]


@pytest.mark.parametrize(
    ('given', 'used'),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_goes_up_and_nothing_goes_down(given, used):
    a = torch.eye(2, dtype=given)
    out, dtype, more = product(a, a, more=(a, torch.ones(1, dtype=torch.int64)))
    assert (out.dtype, dtype, more) == (used, used, [used, torch.int64])


def test_autocast_is_off_inside_and_on_again_after():
    a = torch.full((1, 3), 1 + 2**-12)
    want = a.double() @ a.double().mT
    with torch.autocast('cpu', torch.bfloat16):
        inside, _, _ = product(a, a.mT)
        after = a @ a.mT
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside.double(), want, rtol=1e-7, atol=0)
    assert after.dtype == torch.bfloat16


def test_gradient_comes_back_in_the_dtype_that_was_given():
    x = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    product(x, x)[0].sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert x.grad.eq(4).all()


def test_promote_leaves_what_fits():
    x, i = torch.ones(2), torch.ones(2, dtype=torch.int64)
    assert promote(x) is x
    assert promote(i) is i


def test_wrapper_keeps_name_and_docstring():
    @full_precision
    def loss(x):
        """Say something."""

    assert loss.__name__ == 'loss'
    assert loss.__doc__ == 'Say something.'


@needs_matmul_switch
def test_exact_matmul_sets_and_restores():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = 'bf16'
        seen = []

        def fail():
            with exact_matmul('cpu'):
                seen.append(matmul.fp32_precision)
                raise KeyError('x')

        with pytest.raises(KeyError, match='x'):
            fail()
        assert seen == ['ieee']
        assert matmul.fp32_precision == 'bf16'
    finally:
        matmul.fp32_precision = before


def test_exact_matmul_passes_by_other_devices():
    with exact_matmul('meta'):
        pass
