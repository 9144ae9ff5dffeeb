from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.mean_discrepancy import mean_discrepancy_loss
from tests.reference import feature_pairs as reference

SOURCE_VALID = torch.tensor([True, True, False, True])
TARGET_VALID = torch.tensor([False, True, True])


def sets(dtype=torch.float64):
    source, target = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64) * 2 + 1
    return source.to(dtype).requires_grad_(), target.to(dtype).requires_grad_()


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(('kernels', 'spread'), [(5, 2.0), (1, 2.0), (4, 3.0)])
def test_value_and_gradients_equal_reference(masked, kernels, spread):
    source, target = sets()
    masks = dict(source_valid=SOURCE_VALID, target_valid=TARGET_VALID) if masked else {}
    got = mean_discrepancy_loss(source, target, kernels=kernels, spread=spread, **masks)
    rows = [source, target]
    if masked:
        rows = [z[mask] for z, mask in zip(rows, (SOURCE_VALID, TARGET_VALID), strict=True)]
    want = reference.mean_discrepancy(*rows, kernels, spread)
    torch.testing.assert_close(got, want)
    for learner in (source, target):
        one, two = (torch.autograd.grad(loss, learner, retain_graph=True)[0] for loss in (got, want))
        torch.testing.assert_close(one, two)


def test_invariances():
    source, target = sets()
    want = mean_discrepancy_loss(source, target)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    moved = [3.5 * z @ turn + 100 for z in (source, target)]
    torch.testing.assert_close(mean_discrepancy_loss(*moved), want)
    torch.testing.assert_close(mean_discrepancy_loss(target, source), want)
    torch.testing.assert_close(mean_discrepancy_loss(source.flip(0), target), want)
    assert not torch.isclose(mean_discrepancy_loss(source, target + 1), want)


def test_zero_of_the_same_set_and_at_most_two_a_kernel():
    source, _ = sets()
    assert mean_discrepancy_loss(source, source.flip(0)).abs() < 1e-12
    far = torch.randn(50, 5) * 1e-3
    got = mean_discrepancy_loss(far, far + 1)
    assert 5 < got < 10


def test_a_row_that_does_not_count_is_no_row():
    source, target = sets()
    masks = dict(source_valid=torch.tensor([True, True, True, True, False]))
    padded = torch.cat([source, torch.full((1, 5), float('nan'))])
    torch.testing.assert_close(mean_discrepancy_loss(padded, target, **masks), mean_discrepancy_loss(source, target))


def test_what_does_not_count_changes_nothing():
    source, target = sets()
    masks = dict(source_valid=SOURCE_VALID, target_valid=TARGET_VALID)
    want = mean_discrepancy_loss(source, target, **masks)
    for junk in (1e4, float('inf'), float('nan')):
        spoiled = torch.where(SOURCE_VALID[:, None], source.detach(), junk).requires_grad_()
        got = mean_discrepancy_loss(spoiled, torch.where(TARGET_VALID[:, None], target, junk), **masks)
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got, spoiled)
        torch.testing.assert_close(grad, torch.autograd.grad(want, source, retain_graph=True)[0])


@pytest.mark.parametrize('empty', ['source', 'target', 'both', 'rows'])
def test_one_set_alone_is_zero_with_a_graph(empty):
    source, target = sets()
    masks = {
        f'{name}_valid': torch.zeros(len(z), dtype=torch.bool)
        for name, z in (('source', source), ('target', target))
        if empty in (name, 'both')
    }
    got = mean_discrepancy_loss(source[:0] if empty == 'rows' else source, target, **masks)
    grads = torch.autograd.grad(got, [source, target], allow_unused=True, materialize_grads=True)
    assert got == 0
    assert not any(grad.any() for grad in grads)
    assert mean_discrepancy_loss(source[:0], target[:0]) == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    source = ((2 * torch.rand(4, 5) - 1).to(dtype) * factor).requires_grad_()
    got = mean_discrepancy_loss(source, (2 * torch.rand(3, 5) - 1).to(dtype) * factor)
    (grad,) = torch.autograd.grad(got, source)
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert grad.isfinite().all()


def test_many_rows_far_from_the_origin_keep_their_digits():
    source, target = torch.randn(200, 16, dtype=torch.float64) + 1e4, torch.randn(200, 16, dtype=torch.float64) + 1e4
    want = mean_discrepancy_loss(source, target)
    got = mean_discrepancy_loss(source.float(), target.float())
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=1e-5)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(mean_discrepancy_loss(source.float(), target.float()), got)


def test_training_brings_the_sets_together():
    torch.manual_seed(1)
    source, shift = torch.randn(64, 3), torch.tensor([2.0, 0.0, -1.0], requires_grad=True)
    target = torch.randn(64, 3)
    start = mean_discrepancy_loss(source + shift, target).item()
    for _ in range(200):
        (grad,) = torch.autograd.grad(mean_discrepancy_loss(source + shift, target), shift)
        shift = (shift - 0.5 * grad).detach().requires_grad_()
    assert mean_discrepancy_loss(source + shift, target) < 0.2 * start


def test_bad_arguments():
    x = torch.zeros(4, 5)
    with pytest.raises(ShapeError, match=r'mean_discrepancy_loss: `source` must have shape \(n, D\), got \(4, 5, 1\)'):
        mean_discrepancy_loss(x[..., None], x)
    with pytest.raises(ShapeError, match=r'`source` and `target` must share D, got \(4, 5\) and \(4, 3\)'):
        mean_discrepancy_loss(x, x[:, :3])
    with pytest.raises(ShapeError, match=r'`target_valid` must be boolean of shape \(4,\), got \(3,\) of torch.bool'):
        mean_discrepancy_loss(x, x, target_valid=torch.ones(3, dtype=torch.bool))
    for bad in (0, 2.0, True):
        with pytest.raises(ConfigError, match='`kernels` must be an integer above 0, got'):
            mean_discrepancy_loss(x, x, kernels=bad)
    with pytest.raises(ConfigError, match='`spread` must be a finite number of at least 1, got 0.5'):
        mean_discrepancy_loss(x, x, spread=0.5)
