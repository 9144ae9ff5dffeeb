from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.score_fusion import CONFIDENCES, fuse_scores, score_confidence
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from tests.functional import checks
from tests.reference import soft_target as reference
from tests.reference.logits import rows_of

WEIGHTS = [0.2, 1.0, 0.5]


def teachers(dtype=torch.float64):
    return [checks.pair(dtype)[1] for _ in WEIGHTS]


@pytest.mark.parametrize('of', ['scores', 'probabilities'])
@pytest.mark.parametrize('by', [None, *CONFIDENCES])
@pytest.mark.parametrize('sharpness', [0.5, 1.0, 3.0])
def test_equals_reference(of, by, sharpness):
    given = teachers()
    got = fuse_scores(given, weights=WEIGHTS, confidence=by, sharpness=sharpness, of=of)
    assert got.shape == given[0].shape
    want = reference.fused(given, WEIGHTS, by, sharpness, of)
    torch.testing.assert_close(rows_of(got), torch.stack(want))
    rows = [rows_of(z) for z in given]
    got = fuse_scores(rows, weights=WEIGHTS, confidence=by, sharpness=sharpness, of=of)
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize('by', CONFIDENCES)
def test_confidence_equals_reference(by):
    student, _ = checks.pair()
    got = score_confidence(student, by=by)
    want = [reference.confidence(row, by) for row in rows_of(student)]
    torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda z: score_confidence(z, by=by), student)
    certain = torch.tensor([[1e4, 0.0, 0.0], [-torch.inf, 0.0, -torch.inf]])
    torch.testing.assert_close(score_confidence(certain, by=by), torch.ones(2))
    lowest = 1 / 3 if by == 'maximum' else 0.0
    torch.testing.assert_close(score_confidence(torch.zeros(1, 3), by=by), torch.full((1,), lowest), atol=1e-6, rtol=0)


def test_a_mixture_is_a_distribution():
    got = fuse_scores(teachers(), confidence='entropy', of='probabilities')
    torch.testing.assert_close(got.exp().sum(1), torch.ones(3, 2, 5, dtype=torch.float64))


def test_one_teacher_is_itself():
    (teacher, other, _) = teachers()
    torch.testing.assert_close(fuse_scores([teacher]), teacher)
    # Who has no weight has no say, NaN included.
    got = fuse_scores([teacher, torch.full_like(other, float('nan'))], weights=[2, 0], confidence='maximum')
    torch.testing.assert_close(got, teacher)
    assert pixelwise_kl_loss(fuse_scores([teacher], of='probabilities'), teacher).abs() < 1e-12


def test_the_sharper_the_more_the_surest_speaks():
    sure, unsure = torch.tensor([[6.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.1, 0.0]])
    torch.testing.assert_close(fuse_scores([sure, unsure], confidence='maximum', sharpness=100), sure)
    torch.testing.assert_close(fuse_scores([sure, unsure], confidence='maximum', sharpness=0), (sure + unsure) / 2)


def test_nobody_is_sure():
    flat = torch.zeros(2, 4)
    got = fuse_scores([flat, flat + 3], weights=[1, 3], confidence='margin')
    torch.testing.assert_close(got, torch.full((2, 4), 2.25))


def test_a_target_has_no_graph_and_half_precision_is_promoted():
    given = [z.requires_grad_() for z in teachers(torch.bfloat16)]
    got = fuse_scores(given, confidence='maximum')
    assert not got.requires_grad
    assert got.dtype == torch.float32
    huge = [torch.full((1, 3), 6e4, dtype=torch.float16), torch.zeros(1, 3, dtype=torch.float16)]
    for of in ('scores', 'probabilities'):
        for by in (None, *CONFIDENCES):
            assert fuse_scores(huge, confidence=by, of=of).isfinite().all()
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(fuse_scores(given, confidence='maximum'), got)


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match='fuse_scores: `teachers` must hold at least one tensor, got none'):
        fuse_scores([])
    with pytest.raises(ShapeError, match=r'must share one shape, got \[\(2, 3, 4, 5\), \(2, 3, 4, 1\)\]'):
        fuse_scores([x, x[..., :1]])
    with pytest.raises(ShapeError, match=r'`teachers` must have shape'):
        fuse_scores([x[0]])
    for bad in ([1.0], [0.0, 0.0]):
        with pytest.raises(ConfigError, match='`weights` must be one number a teacher, not all 0, got'):
            fuse_scores([x, x], weights=bad)
    with pytest.raises(ConfigError, match='`weights` must be a finite number of at least 0, got -1'):
        fuse_scores([x, x], weights=[1, -1])
    with pytest.raises(ConfigError, match="`confidence` must be one of .*, got 'entropie'. Did you mean 'entropy'"):
        fuse_scores([x, x], confidence='entropie')
    with pytest.raises(ConfigError, match='`of` must be one of'):
        fuse_scores([x, x], of='logits')
    with pytest.raises(ConfigError, match='`sharpness` must be a finite number of at least 0'):
        fuse_scores([x, x], sharpness=-1)


@pytest.mark.parametrize('by', CONFIDENCES)
def test_one_channel_is_a_sigmoid(by):
    z = torch.randn(2, 1, 3, 4)
    both = torch.cat([torch.zeros_like(z), z], dim=1)
    torch.testing.assert_close(score_confidence(z, by=by), score_confidence(both, by=by))
    other = torch.randn(2, 1, 3, 4)
    got = fuse_scores([z, other], confidence=by)
    assert got.shape == z.shape
    pairs = [both, torch.cat([torch.zeros_like(other), other], dim=1)]
    torch.testing.assert_close(got, fuse_scores(pairs, confidence=by)[:, 1:])
    got = fuse_scores([z, other], of='probabilities')
    torch.testing.assert_close(got.exp()[:, 1:], (z.sigmoid() + other.sigmoid()) / 2)
