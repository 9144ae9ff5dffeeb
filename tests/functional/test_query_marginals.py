from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from mmstructkd.functional.query_marginals import pool_probabilities, query_marginals
from tests.reference import marginals as reference


def queries(dtype=torch.float64):
    classes, masks = torch.randn(2, 5, 4, dtype=torch.float64), 2 * torch.randn(2, 5, 2, 3, dtype=torch.float64)
    return [z.to(dtype).requires_grad_() for z in (classes, masks)]


@pytest.mark.parametrize('rule', ['sum', 'noisy_or'])
@pytest.mark.parametrize('background', [True, False])
def test_equals_reference(rule, background):
    classes, masks = queries()
    got = query_marginals(classes, masks, rule=rule, background=background, eps=0.01)
    want = reference.queries(classes, masks, rule, background, 0.01)
    torch.testing.assert_close(got.exp(), want)
    torch.testing.assert_close(got.softmax(1), want)
    weights = torch.randn_like(want)
    for one, two in zip(
        torch.autograd.grad((got.exp() * weights).sum(), [classes, masks]),
        torch.autograd.grad((want * weights).sum(), [classes, masks]),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize('rule', ['sum', 'noisy_or'])
def test_gradcheck(rule):
    assert torch.autograd.gradcheck(lambda c, m: query_marginals(c, m, rule=rule, eps=0.1), tuple(queries()))


def test_nobody_says_anything():
    got = query_marginals(torch.zeros(1, 3, 5), torch.full((1, 3, 2, 2), -200.0))
    torch.testing.assert_close(got.exp(), torch.full((1, 4, 2, 2), 0.25))


def test_many_weak_instances_make_a_sure_pixel():
    """Ten instances of a class at one half each: almost surely one is there; a sum would say five."""
    classes = torch.tensor([20.0, 0.0, 0.0]).expand(1, 10, 3)
    got = query_marginals(classes, torch.zeros(1, 10, 1, 1), rule='noisy_or')
    assert got.exp()[0, 0] > 0.999
    # A certain presence keeps a gradient that is a number.
    masks = torch.full((1, 10, 1, 1), 50.0, requires_grad=True)
    query_marginals(classes, masks, rule='noisy_or').sum().backward()
    assert masks.grad.isfinite().all()


@pytest.mark.parametrize('rule', ['sum', 'noisy_or'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(rule, dtype):
    classes, masks = queries(dtype)
    for scale in (0.0, 1.0, 1e4):
        got = query_marginals(classes * scale, masks * scale, rule=rule)
        assert got.dtype == torch.float32
        assert got.isfinite().all()
        for grad in torch.autograd.grad(got.sum(), [classes, masks]):
            assert grad.isfinite().all()
    want = query_marginals(classes, masks, rule=rule)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(query_marginals(classes, masks, rule=rule), want)


def test_a_pixelwise_student_can_learn_from_it():
    classes, masks = queries(torch.float32)
    target = query_marginals(classes, masks).detach()
    student = torch.zeros(2, 3, 2, 3, requires_grad=True)
    for _ in range(300):
        (grad,) = torch.autograd.grad(pixelwise_kl_loss(student, target), student)
        student = (student - 5 * grad).detach().requires_grad_()
    torch.testing.assert_close(student.softmax(1), target.exp(), atol=1e-3, rtol=0)


def test_pooling_is_the_mean_of_probabilities():
    scores = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    got = pool_probabilities(scores, (2, 3), temperature=2.0)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                cell = (scores[b, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] / 2.0).softmax(0).flatten(1)
                torch.testing.assert_close(got[b, :, y, x].exp(), cell.mean(1))
    torch.testing.assert_close(got.exp().sum(1), torch.ones(2, 2, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda z: pool_probabilities(z, (2, 2)), scores)
    torch.testing.assert_close(pool_probabilities(scores, (4, 6)), scores.log_softmax(1))
    assert pool_probabilities(torch.tensor([[-6e4, 6e4]]).half().view(1, 2, 1, 1), (1, 1)).isfinite().all()


def test_bad_arguments():
    classes, masks = torch.zeros(2, 5, 4), torch.zeros(2, 5, 2, 3)
    with pytest.raises(ShapeError, match=r'must share B and Q, got \(2, 5, 4\) and \(2, 4, 2, 3\)'):
        query_marginals(classes, masks[:, :4])
    with pytest.raises(ShapeError, match=r'`class_scores` must have at least one class, got \(2, 5, 1\)'):
        query_marginals(classes[..., :1], masks)
    with pytest.raises(ShapeError, match=r'`mask_scores` must have shape \(B, Q, H, W\)'):
        query_marginals(classes, masks[0])
    with pytest.raises(ConfigError, match="`rule` must be one of .*, got 'or'"):
        query_marginals(classes, masks, rule='or')
    with pytest.raises(ConfigError, match='`eps` must be a finite number above 0'):
        query_marginals(classes, masks, eps=0)
    with pytest.raises(ConfigError, match=r'`size` must be at most \(2, 3\), got \(4, 3\)'):
        pool_probabilities(masks, (4, 3))
    with pytest.raises(ConfigError, match='`size` must be two integers'):
        pool_probabilities(masks, 2)


def test_pooling_the_one_channel_of_a_sigmoid():
    z = torch.randn(1, 1, 2, 2)
    got = pool_probabilities(z, (1, 1)).exp().flatten()
    torch.testing.assert_close(got[1], z.sigmoid().mean())
    torch.testing.assert_close(got.sum(), torch.ones(()))
