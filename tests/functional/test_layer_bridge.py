from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.layer_bridge import bridge_loss, mix_layers
from tests.functional import checks
from tests.reference import feature_pairs as reference


def setting(dtype=torch.float64):
    student, first = checks.pair(dtype)
    layers = [first, checks.pair(dtype)[1], checks.pair(dtype)[1]]
    scores = torch.randn(3, dtype=dtype).requires_grad_()
    return student, layers, scores


def tail(mix):
    """What stands for the rest of the student and its task loss."""
    return (mix.sin() * torch.linspace(0, 1, mix.numel(), dtype=mix.dtype).view_as(mix)).mean()


@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradients_equal_reference(masked):
    student, layers, scores = setting()
    valid = checks.VALID if masked else None
    mix = mix_layers(layers, scores)
    want_mix = reference.mixed(layers, scores)
    torch.testing.assert_close(mix, want_mix)
    got = bridge_loss(
        student, layers, scores=scores, task_loss=tail(mix), imitation_weight=0.7, injection_weight=3.0, valid=valid
    )
    zero = torch.zeros_like(student)
    # The residual of a target A from nothing is the squared distance itself, with the gradient of the target.
    want = 0.7 * reference.residual(student, zero, -want_mix, valid) + 3.0 * tail(want_mix)
    checks.same(got, want, student, scores)


def test_gradcheck():
    student, layers, scores = setting()
    assert torch.autograd.gradcheck(
        lambda s, b: bridge_loss(s, layers, scores=b, task_loss=tail(mix_layers(layers, b)), valid=checks.VALID),
        (student, scores),
    )


def test_contract():
    _, layers, scores = setting(torch.float32)

    def loss(student, teacher, **kwargs):
        return bridge_loss(student, [teacher, teacher / 2], scores=scores[:2], task_loss=torch.zeros(()), **kwargs)

    checks.teacher_gets_nothing(loss, *checks.pair(torch.float32))
    checks.ignored_changes_nothing(loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(loss, *checks.pair(torch.float32), checks.VALID)
    checks.finite_in_half(loss, most=1e15)
    checks.same_under_autocast(loss, *checks.pair(torch.float32))
    assert mix_layers([layer.half() for layer in layers], scores.half()).dtype == torch.float32


def test_imitation_draws_to_the_easy_layer_and_injection_to_the_useful_one():
    student = torch.zeros(1, 1, 1, 1)
    easy, useful = torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)

    def slope(injection):
        scores = torch.zeros(2, requires_grad=True)
        task = (mix_layers([easy, useful], scores) - 2).square().mean()
        loss = bridge_loss(student, [easy, useful], scores=scores, task_loss=task, injection_weight=injection)
        return torch.autograd.grad(loss, scores)[0]

    assert slope(0.0)[0] < 0 < slope(0.0)[1]
    assert slope(5.0)[1] < 0 < slope(5.0)[0]


def test_bad_arguments():
    x, scores = torch.zeros(2, 3, 4, 5), torch.zeros(2)
    with pytest.raises(ShapeError, match=r'mix_layers: `scores` must have shape \(1,\), got \(2,\)'):
        mix_layers([x], scores)
    with pytest.raises(ShapeError, match=r'`layers` must be maps of one shape, got \[\]'):
        mix_layers([], scores)
    with pytest.raises(ShapeError, match=r'`layers` must be maps of one shape, got \[\(2, 3, 4, 5\), \(2, 2, 4, 5\)\]'):
        mix_layers([x, x[:, :2]], scores)
    with pytest.raises(ShapeError, match=r'bridge_loss: `teacher` must hold layers of the shape of `student`'):
        bridge_loss(x, [x, x[:, :2]], scores=scores, task_loss=torch.zeros(()))
    with pytest.raises(ShapeError, match=r'`task_loss` must be a scalar, got shape \(2,\)'):
        bridge_loss(x, [x, x], scores=scores, task_loss=torch.zeros(2))
    with pytest.raises(ConfigError, match='`injection_weight` must be a finite number of at least 0, got -1'):
        bridge_loss(x, [x, x], scores=scores, task_loss=torch.zeros(()), injection_weight=-1)
