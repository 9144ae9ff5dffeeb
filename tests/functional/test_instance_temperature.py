from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.softening import bounded_temperature
from mmstructkd.functional.pixelwise_kl import instance_temperature_kl_loss, pixelwise_kl_loss
from tests.functional import checks
from tests.reference import soft_target as reference

SHAPES = {'position': (3, 1, 2, 5), 'image': (3, 1, 1, 1)}
each = pytest.mark.parametrize('per', SHAPES)


def warm(per, dtype=torch.float64):
    return (0.5 + 4 * torch.rand(SHAPES[per], dtype=dtype)).requires_grad_()


@each
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradients_equal_reference(per, masked):
    student, teacher = checks.pair()
    temperature = warm(per)
    valid = checks.VALID if masked else None
    got = instance_temperature_kl_loss(student, teacher, temperature=temperature, valid=valid)
    rows = temperature.expand(SHAPES['position']).flatten()
    checks.same(got, reference.instance_temperature(student, teacher, rows, valid), student, temperature)


@each
def test_gradcheck(per):
    student, teacher = checks.pair()
    assert torch.autograd.gradcheck(
        lambda s, t: instance_temperature_kl_loss(s, teacher, temperature=t, valid=checks.VALID), (student, warm(per))
    )


@each
def test_contract(per):
    # Below 1 scores at the end of the range would leave it.
    temperature = 1 + warm(per, torch.float32).detach()

    def loss(student, teacher, **kwargs):
        return instance_temperature_kl_loss(student, teacher, temperature=temperature, **kwargs)

    checks.teacher_gets_nothing(loss, *checks.pair(torch.float32))
    checks.ignored_changes_nothing(loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(loss, *checks.pair(torch.float32), checks.VALID)
    checks.finite_in_half(loss)
    checks.same_under_autocast(loss, *checks.pair(torch.float32))


def test_nothing_of_an_ignored_position_reaches_the_temperature():
    student, teacher = checks.pair()
    temperature = warm('position')
    spoiled = [torch.where(checks.VALID[:, None], z, float('nan')) for z in (student, teacher)]
    cold = torch.where(checks.VALID[:, None], temperature.detach(), float('nan')).requires_grad_()
    want = instance_temperature_kl_loss(student, teacher, temperature=temperature, valid=checks.VALID)
    got = instance_temperature_kl_loss(*spoiled, temperature=cold, valid=checks.VALID)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, cold), torch.autograd.grad(want, temperature))


def test_one_temperature_for_all_is_the_plain_divergence():
    student, teacher = checks.pair()
    got = instance_temperature_kl_loss(student, teacher, temperature=torch.full((3, 1, 1, 1), 3.0).double())
    torch.testing.assert_close(got, pixelwise_kl_loss(student, teacher, temperature=3.0))
    rows = [z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher)]
    got = instance_temperature_kl_loss(*rows, temperature=torch.full((30, 1), 3.0).double())
    torch.testing.assert_close(got, pixelwise_kl_loss(student, teacher, temperature=3.0))


def test_one_channel_is_a_sigmoid_and_impossible_classes_are_no_nan():
    z, other, temperature = torch.randn(4, 1), torch.randn(4, 1), warm('image').detach()[:1, :, 0, 0].expand(4, 1)
    pairs = [torch.cat([torch.zeros_like(x), x], dim=1) for x in (z, other)]
    got = instance_temperature_kl_loss(z, other, temperature=temperature)
    torch.testing.assert_close(got, instance_temperature_kl_loss(*pairs, temperature=temperature))
    student, teacher = checks.pair()
    teacher[:, 0] = -torch.inf
    temperature = warm('position')
    got = instance_temperature_kl_loss(student, teacher, temperature=temperature)
    assert got.isfinite()
    for grad in torch.autograd.grad(got, [student, temperature]):
        assert grad.isfinite().all()


def test_bounds():
    got = bounded_temperature(torch.tensor([-1e4, 0.0, 1e4]).half(), lowest=2.0, span=6.0)
    assert got.tolist() == [2.0, 5.0, 8.0]
    assert got.dtype == torch.float32
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bounded_temperature, x)


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r'`temperature` must have shape \(2, 1, 4, 5\) or \(2, 1, 1, 1\), got \(2,\)'):
        instance_temperature_kl_loss(x, x, temperature=torch.ones(2))
    with pytest.raises(ShapeError, match=r'`temperature` must have shape \(4, 1\), got \(4,\)'):
        instance_temperature_kl_loss(torch.zeros(4, 3), torch.zeros(4, 3), temperature=torch.ones(4))
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got'):
        instance_temperature_kl_loss(x, x[:, :2], temperature=torch.ones(2, 1, 1, 1))
    with pytest.raises(ConfigError, match='bounded_temperature: `lowest` must be a finite number above 0, got 0'):
        bounded_temperature(x, lowest=0)
    with pytest.raises(ConfigError, match='`span` must be a finite number of at least 0, got -1'):
        bounded_temperature(x, span=-1)
