from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.scores import label_losses
from mmstructkd.functional.sample_selection import (
    confident_pixels,
    filter_by_quantile,
    image_mean,
    joint_confidence,
    score_disagreement,
    value_disagreement,
)
from tests.functional import checks
from tests.reference.logits import kl, probabilities, rows_of


@pytest.mark.parametrize('quantile', [0.0, 0.1, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize('count', [1, 2, 7, 60])
def test_kept_below_the_quantile(quantile, count):
    errors, other = torch.randn(count).abs(), torch.randn(9).abs()
    for reference in (None, other):
        cut = np.quantile((errors if reference is None else other).numpy().astype(np.float64), quantile)
        got = filter_by_quantile(errors, quantile=quantile, reference=reference)
        for kept, error in zip(got.tolist(), errors.tolist(), strict=True):
            # An error that is the cutoff itself is not below it, however it was rounded on the way.
            assert kept == (error < cut - 1e-6)


def test_a_cutoff_for_each_class():
    errors, classes = torch.rand(40), torch.randint(0, 4, (40,)) * 2
    reference, reference_classes = torch.rand(30), torch.randint(0, 3, (30,)) * 2
    got = filter_by_quantile(
        errors, quantile=0.6, reference=reference, classes=classes, reference_classes=reference_classes
    )
    own = filter_by_quantile(errors, quantile=0.6, classes=classes)
    for k in range(0, 8, 2):
        members = classes == k
        known = reference[reference_classes == k]
        # Nothing to compare class 6 with: none of it is kept.
        want = filter_by_quantile(errors[members], quantile=0.6, reference=known)
        assert torch.equal(got[members], want)
        assert not got[members].any() or k < 6
        assert torch.equal(own[members], filter_by_quantile(errors[members], quantile=0.6))


def test_equal_errors_are_not_below():
    assert not filter_by_quantile(torch.ones(5), quantile=1.0).any()
    assert filter_by_quantile(torch.tensor([1.0, 2.0, 2.0]), quantile=1.0).tolist() == [True, False, False]


def test_what_is_no_number_is_never_kept():
    errors = torch.tensor([0.1, float('nan'), 0.2, float('inf')])
    assert filter_by_quantile(errors, quantile=0.5).tolist() == [True, False, False, False]
    assert filter_by_quantile(errors, quantile=1.0, reference=errors).tolist() == [True, False, True, False]
    assert not filter_by_quantile(errors, quantile=0.5, reference=torch.full((3,), float('nan'))).any()
    assert filter_by_quantile(errors[:0], quantile=0.5).tolist() == []
    assert not filter_by_quantile(errors, quantile=0.5, reference=errors[:0]).any()


def test_joint_confidence_is_a_product():
    student, teacher = checks.pair(other=(3, 6, 2, 5))
    sure = [
        torch.tensor([max(p.item() for p in probabilities(r, 1.0)) for r in rows_of(z)]) for z in (student, teacher)
    ]
    for by, want in (('both', sure[0] * sure[1]), ('student', sure[0]), ('teacher', sure[1])):
        got = joint_confidence(student, teacher, by=by)
        torch.testing.assert_close(got.flatten().float(), want)
        assert not got.requires_grad
    mask = confident_pixels(student, teacher, minimum=0.3, valid=checks.VALID)
    assert torch.equal(mask, (joint_confidence(student, teacher) >= 0.3) & checks.VALID)
    assert mask.any()
    assert confident_pixels(student, teacher, minimum=0.0).all()


def test_disagreement_of_scores():
    first, second = checks.pair()
    got = score_disagreement(first, second)
    want = []
    for a, b in zip(rows_of(first), rows_of(second), strict=True):
        p, q = probabilities(a, 1.0), probabilities(b, 1.0)
        m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
        want.append((kl(p, m) + kl(q, m)) / 2)
    torch.testing.assert_close(got.flatten(), torch.stack(want).detach())
    torch.testing.assert_close(score_disagreement(second, first), got)
    assert score_disagreement(first, first + 3).max() < 1e-12
    far = score_disagreement(torch.tensor([[6e4, -6e4]]).half(), torch.tensor([[-6e4, 6e4]]).half())
    torch.testing.assert_close(far.item(), math.log(2))
    impossible = torch.tensor([[0.0, -torch.inf]])
    torch.testing.assert_close(score_disagreement(impossible, impossible), torch.zeros(1))


def test_disagreement_of_values():
    first, second = torch.rand(2, 1, 3, 4) * 10, torch.rand(2, 1, 3, 4) * 10
    got = value_disagreement(first, second)
    torch.testing.assert_close(got, 2 * (first - second).abs() / (first + second), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(value_disagreement(100 * first, 100 * second), got, rtol=1e-4, atol=1e-6)
    assert value_disagreement(torch.zeros(3), torch.zeros(3)).tolist() == [0, 0, 0]


def test_images_by_their_mean():
    student, _ = checks.pair()
    labels = torch.randint(0, 4, (3, 2, 5))
    losses, counts = label_losses(student, labels, valid=checks.VALID)
    got = image_mean(losses, valid=counts)
    for b in range(2):
        torch.testing.assert_close(got[b], losses[b][checks.VALID[b]].mean().detach())
    assert got[2].isnan()
    assert not filter_by_quantile(got, quantile=1.0)[2]
    torch.testing.assert_close(image_mean(losses), losses.detach().mean((1, 2)))


def test_bad_arguments():
    x = torch.zeros(4)
    for bad in (-0.1, 1.1):
        with pytest.raises(ConfigError, match='filter_by_quantile: `quantile` must'):
            filter_by_quantile(x, quantile=bad)
    with pytest.raises(ShapeError, match=r'`errors` must have shape \(n,\), got \(4, 1\)'):
        filter_by_quantile(x[:, None], quantile=0.5)
    with pytest.raises(ShapeError, match=r'`classes` must have shape \(4,\), got \(3,\)'):
        filter_by_quantile(x, quantile=0.5, classes=torch.zeros(3))
    with pytest.raises(ConfigError, match='must be given together, got some and no classes'):
        filter_by_quantile(x, quantile=0.5, reference=x, classes=torch.zeros(4))
    with pytest.raises(ConfigError, match='`reference_classes` must come with `reference`'):
        filter_by_quantile(x, quantile=0.5, reference_classes=torch.zeros(4))
    z = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ConfigError, match="joint_confidence: `by` must be one of .*, got 'all'"):
        joint_confidence(z, z, by='all')
    with pytest.raises(ShapeError, match='joint_confidence: .* must share B, H and W'):
        joint_confidence(z, z[..., :1])
    with pytest.raises(ConfigError, match='confident_pixels: `minimum` must'):
        confident_pixels(z, z, minimum=1.5)
    with pytest.raises(ShapeError, match='score_disagreement: .* must share one shape'):
        score_disagreement(z, z[:1])
    with pytest.raises(ShapeError, match='value_disagreement: .* must share one shape'):
        value_disagreement(z, z[:1])
    with pytest.raises(ShapeError, match=r'image_mean: `values` must have shape \(B, H, W\)'):
        image_mean(x)


def test_one_channel_is_a_sigmoid():
    first, second = torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    pairs = [torch.cat([torch.zeros_like(z), z], dim=1) for z in (first, second)]
    torch.testing.assert_close(score_disagreement(first, second), score_disagreement(*pairs))
    torch.testing.assert_close(joint_confidence(first, second), joint_confidence(*pairs))
