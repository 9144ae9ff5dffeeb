from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.mutual_kl import mutual_kl_losses
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from tests.functional import checks
from tests.reference import soft_target as reference

both = pytest.mark.parametrize('towards', ['others', 'mean'])


def peers_of(count, dtype=torch.float64):
    return [checks.pair(dtype)[0] for _ in range(count)]


@both
@pytest.mark.parametrize('count', [2, 3])
@pytest.mark.parametrize('masked', [False, True])
def test_values_and_gradients_equal_reference(towards, count, masked):
    peers = peers_of(count)
    valid = checks.VALID if masked else None
    got = mutual_kl_losses(peers, temperature=3.0, towards=towards, valid=valid)
    want = reference.mutual(peers, 3.0, towards, valid)
    assert len(got) == count
    for k in range(count):
        checks.same(got[k], want[k], peers[k])
        for j in range(count):
            if j != k:  # what a peer looks up to learns nothing from it
                assert torch.autograd.grad(got[k], peers[j], allow_unused=True, retain_graph=True) == (None,)


@both
def test_contract(towards):
    def loss(student, teacher, **kwargs):
        return mutual_kl_losses([student, teacher.detach()], towards=towards, **kwargs)[0]

    student, teacher = checks.pair()
    checks.ignored_changes_nothing(loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(loss, student, teacher, checks.VALID)
    checks.finite_in_half(loss)
    checks.same_under_autocast(loss, *checks.pair(torch.float32))


def test_gradcheck():
    # Not towards the mean: that moves with the peer, but carries no gradient.
    student, teacher = checks.pair()
    assert torch.autograd.gradcheck(lambda s: mutual_kl_losses([s, teacher], valid=checks.VALID)[0], student)


def test_two_peers_are_two_plain_divergences():
    first, second = peers_of(2)
    got = mutual_kl_losses([first, second])
    torch.testing.assert_close(got[0], pixelwise_kl_loss(first, second))
    torch.testing.assert_close(got[1], pixelwise_kl_loss(second, first))
    torch.testing.assert_close(mutual_kl_losses([first, first])[0].item(), 0.0, atol=1e-12, rtol=0)


def test_labels_leave_pixels_out():
    peers = peers_of(3)
    labels = torch.where(checks.VALID, 1, 7)
    got = mutual_kl_losses(peers, labels=labels, ignore_index=7)
    for a, b in zip(got, mutual_kl_losses(peers, valid=checks.VALID), strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match='mutual_kl_losses: `peers` must be at least 2, got 1'):
        mutual_kl_losses([x])
    with pytest.raises(ShapeError, match=r'must share one shape, got \[\(2, 3, 4, 5\), \(1, 3, 4, 5\)\]'):
        mutual_kl_losses([x, x[:1]])
    with pytest.raises(ConfigError, match="`towards` must be one of .* got 'median'"):
        mutual_kl_losses([x, x], towards='median')


def test_one_channel_is_a_sigmoid():
    peers = [torch.randn(2, 1, 3, 4) for _ in range(2)]
    pairs = [torch.cat([torch.zeros_like(z), z], dim=1) for z in peers]
    for towards in ('others', 'mean'):
        one, two = (torch.stack(mutual_kl_losses(z, towards=towards)) for z in (peers, pairs))
        torch.testing.assert_close(one, two)
        assert one.all()
