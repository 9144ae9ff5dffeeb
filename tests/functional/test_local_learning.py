from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.local_learning import gate_gradient, local_learning_loss
from tests.functional import checks
from tests.reference import statistics as reference


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('reduction', ['sum', 'mean'])
def test_value_and_gradients_equal_reference(masked, reduction):
    student, teacher = checks.pair()
    valid = checks.VALID if masked else None
    got = local_learning_loss(
        student,
        teacher,
        hidden_loss=student.sin().mean(),
        balance=0.3,
        feature_weight=0.2,
        reduction=reduction,
        valid=valid,
    )
    want = 0.3 * student.sin().mean() + 0.7 * reference.attention_transfer(student, teacher, 2, reduction, valid)
    checks.same(got, want + 0.2 * reference.feature_mse(student, teacher, 'mean', valid), student)


def test_contract():
    student, teacher = checks.pair()
    assert torch.autograd.gradcheck(lambda s: local_learning_loss(s, teacher, valid=checks.VALID), student)
    checks.teacher_gets_nothing(local_learning_loss, *checks.pair())
    checks.ignored_changes_nothing(local_learning_loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(local_learning_loss, *checks.pair(), checks.VALID)
    checks.finite_in_half(local_learning_loss, most=1e15)
    checks.same_under_autocast(local_learning_loss, *checks.pair(torch.float32))


def test_widths_may_differ_without_the_features():
    student, teacher = checks.pair(other=(3, 2, 2, 5))
    assert local_learning_loss(student, teacher, feature_weight=0.0) > 0
    with pytest.raises(ShapeError, match='must share B, D, H and W'):
        local_learning_loss(student, teacher)


def test_a_gate_cuts_or_damps():
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    closed = gate_gradient(x)
    assert torch.equal(closed, x)
    assert not closed.requires_grad
    for share in (0.25, 1.0):
        (grad,) = torch.autograd.grad(gate_gradient(x, share=share).square().sum(), x)
        torch.testing.assert_close(grad, 2 * share * x)


def test_stages_behind_a_gate_learn_from_their_own_losses_only():
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    hidden = first(torch.ones(1, 2))
    (second(gate_gradient(hidden)).square().sum() + hidden.sum()).backward()
    torch.testing.assert_close(first.weight.grad, torch.ones(2, 2))
    assert second.weight.grad.any()


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    for share in (-0.1, 1.5):
        with pytest.raises(ConfigError, match='gate_gradient: `share` must'):
            gate_gradient(x, share=share)
    with pytest.raises(ConfigError, match=r'local_learning_loss: `balance` must lie in \[0, 1\], got 2'):
        local_learning_loss(x, x, balance=2)
    with pytest.raises(ConfigError, match='`feature_weight` must be a finite number of at least 0'):
        local_learning_loss(x, x, feature_weight=-1)
    with pytest.raises(ShapeError, match=r'`hidden_loss` must be a scalar, got shape \(1,\)'):
        local_learning_loss(x, x, hidden_loss=torch.zeros(1))
