from __future__ import annotations

import pytest
import torch
from torch import nn

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.holistic import adversarial_loss, critic_loss, gradient_penalty
from tests.reference import adversarial as reference

SHAPE = (2, 1, 2, 5)


def scores(seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(2, *SHAPE, generator=generator, dtype=dtype)).unbind()
    return student.requires_grad_(), teacher.requires_grad_()


def smooth_critic(channels=2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 3, 2), nn.Tanh(), nn.Conv2d(3, 1, 1)).double()


@pytest.mark.parametrize('mode', ['wgan', 'hinge'])
def test_critic_loss_equals_reference(mode):
    student, teacher = scores()
    got = critic_loss(student, teacher, mode=mode)
    want = reference.critic_loss(student, teacher, mode)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (student, teacher)), torch.autograd.grad(want, (student, teacher))
    )


@pytest.mark.parametrize('mode', ['wgan', 'hinge'])
def test_adversarial_loss_equals_reference(mode):
    student, _ = scores()
    got = adversarial_loss(student, mode=mode)
    want = reference.adversarial_loss(student)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_hinge_is_flat_where_the_critic_is_sure():
    student = torch.full(SHAPE, -1.5, requires_grad=True)
    teacher = torch.full(SHAPE, 1.5, requires_grad=True)
    loss = critic_loss(student, teacher, mode='hinge')
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    assert not teacher.grad.any()


@pytest.mark.parametrize('mode', ['wgan', 'hinge'])
def test_images_that_do_not_count_change_nothing(mode):
    student, teacher = (t.detach() for t in scores())
    counts = torch.tensor([False, True])
    want = critic_loss(student[1:], teacher[1:], mode=mode), adversarial_loss(student[1:], mode=mode)
    student, teacher = student.clone(), teacher.clone()
    student[0], teacher[0] = float('inf'), float('nan')
    got = (
        critic_loss(student, teacher, mode=mode, valid=counts),
        adversarial_loss(student, mode=mode, valid=counts),
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('mode', ['wgan', 'hinge'])
def test_no_image_counts(mode):
    student, teacher = scores()
    counts = torch.zeros(2, dtype=torch.bool)
    loss = critic_loss(student, teacher, mode=mode, valid=counts) + adversarial_loss(student, mode=mode, valid=counts)
    loss.backward()
    assert loss.item() == 0
    assert not student.grad.any()
    assert not teacher.grad.any()


def test_half_scores_are_promoted():
    student, teacher = scores(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        loss = critic_loss(student.bfloat16(), teacher.bfloat16(), mode='wgan')
    assert loss.dtype == torch.float32
    assert adversarial_loss(student.half(), mode='wgan').dtype == torch.float32


def test_gradient_penalty_equals_reference():
    critic = smooth_critic()
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 3, 2, 3, 4, generator=generator, dtype=torch.float64).unbind()
    u = torch.tensor([0.25, 0.5, 0.875], dtype=torch.float64)
    got = gradient_penalty(critic, student, teacher, weights=u)
    want = reference.gradient_penalty(critic, student, teacher, u)
    torch.testing.assert_close(got, want)
    parameters = list(critic.parameters())
    got_grads = torch.autograd.grad(got, parameters, allow_unused=True)
    want_grads = torch.autograd.grad(want, parameters, allow_unused=True)
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in got_grads) >= 3
    torch.testing.assert_close(got_grads, want_grads)


def test_gradient_penalty_passes_gradcheck():
    critic = smooth_critic(channels=1)
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 2, 1, 3, 3, generator=generator, dtype=torch.float64).unbind()
    names = [name for name, _ in critic.named_parameters()]
    u = torch.tensor([0.3, 0.6], dtype=torch.float64)

    def penalty(*values):
        def call(maps):
            return torch.func.functional_call(critic, dict(zip(names, values, strict=True)), (maps,))

        return gradient_penalty(call, student, teacher, weights=u)

    assert torch.autograd.gradcheck(penalty, tuple(p.detach().requires_grad_() for p in critic.parameters()))


@pytest.mark.parametrize(('norm', 'want'), [(1.0, 0.0), (3.0, 4.0)])
def test_gradient_penalty_of_a_linear_critic(norm, want):
    direction = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    direction = norm * direction / direction.norm()
    student, teacher = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64).unbind()
    got = gradient_penalty(lambda z: (z * direction).sum(dim=(1, 2, 3)), student, teacher)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_gradient_penalty_at_slope_zero():
    scale = torch.zeros((), requires_grad=True)
    student, teacher = torch.randn(2, 2, 1, 3, 3).unbind()
    loss = gradient_penalty(lambda z: (z * scale).sum(dim=(1, 2, 3)), student, teacher)
    (grad,) = torch.autograd.grad(loss, scale)
    assert loss.item() == 1
    assert grad.item() == 0


def test_gradient_penalty_detaches_both_maps():
    critic = smooth_critic()
    student, teacher = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64).unbind()
    student.requires_grad_()
    teacher.requires_grad_()
    gradient_penalty(critic, student, teacher).backward()
    assert student.grad is None
    assert teacher.grad is None


def test_gradient_penalty_without_gradients_is_the_same_value():
    critic = smooth_critic()
    student, teacher = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64).unbind()
    u = torch.tensor([0.1, 0.9])
    want = gradient_penalty(critic, student, teacher, weights=u)
    with torch.no_grad():
        got = gradient_penalty(critic, student, teacher, weights=u)
    assert not got.requires_grad
    torch.testing.assert_close(got, want.detach())


def test_gradient_penalty_draws_from_the_generator_alone():
    critic = smooth_critic()
    student, teacher = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64).unbind()
    before = torch.get_rng_state()
    first, second = (
        gradient_penalty(critic, student, teacher, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)
    )
    again = gradient_penalty(critic, student, teacher, generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again
    assert first != second


def test_gradient_penalty_runs_the_critic_in_full_precision():
    critic = nn.Conv2d(2, 1, 2)
    student, teacher = torch.randn(2, 2, 2, 3, 4).unbind()
    u = torch.tensor([0.1, 0.9])
    want = gradient_penalty(critic, student, teacher, weights=u)
    with torch.autocast('cpu', torch.bfloat16):
        got = gradient_penalty(critic, student, teacher, weights=u)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ('call', 'error', 'match'),
    [
        (lambda s, t: critic_loss(s, t, mode='wgan-gp'), ConfigError, r"`mode` must be one of .*'wgan-gp'.*'wgan'"),
        (lambda s, t: adversarial_loss(s, mode='bce'), ConfigError, r"`mode` must be one of .*got 'bce'"),
        (lambda s, t: critic_loss(s, t[:1], mode='wgan'), ShapeError, r'\(2, 1, 2, 5\) and \(1, 1, 2, 5\)'),
        (lambda s, t: adversarial_loss(s, mode='wgan', valid=torch.ones(3)), ShapeError, r'`valid`.*got \(3,\)'),
        (lambda s, t: gradient_penalty(torch.sin, s[0], t[0]), ShapeError, r'`student_map`.*got \(1, 2, 5\)'),
        (lambda s, t: gradient_penalty(torch.sin, s, t[..., :4]), ShapeError, r'\(2, 1, 2, 5\) and \(2, 1, 2, 4\)'),
        (
            lambda s, t: gradient_penalty(torch.sin, s, t, weights=torch.ones(3)),
            ShapeError,
            r'`weights` must have shape \(2,\), got \(3,\)',
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call(*scores())
