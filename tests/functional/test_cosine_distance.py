from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ShapeError
from mmstructkd.functional.cosine_distance import cosine_distance_loss
from tests.functional import checks
from tests.reference import feature_pairs as reference


@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(masked):
    student, teacher = checks.pair()
    valid = checks.VALID if masked else None
    got = cosine_distance_loss(student, teacher, valid=valid)
    checks.same(got, reference.cosine_distance(student, teacher, valid), student)
    assert torch.autograd.gradcheck(lambda s: cosine_distance_loss(s, teacher, valid=valid), student)


def test_contract():
    checks.teacher_gets_nothing(cosine_distance_loss, *checks.pair())
    checks.ignored_changes_nothing(cosine_distance_loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(cosine_distance_loss, *checks.pair(), checks.VALID)
    checks.finite_in_half(cosine_distance_loss)
    checks.same_under_autocast(cosine_distance_loss, *checks.pair(torch.float32))


def test_only_the_direction_matters():
    student, teacher = checks.pair()
    want = cosine_distance_loss(student, teacher)
    scale = torch.rand(3, 1, 2, 5, dtype=torch.float64) + 0.1
    torch.testing.assert_close(cosine_distance_loss(scale * student, teacher / scale), want)
    assert cosine_distance_loss(scale * teacher, teacher) < 1e-12
    torch.testing.assert_close(cosine_distance_loss(-scale * teacher, teacher).item(), 4.0)
    rows = [z.movedim(1, -1).reshape(-1, 4) for z in (student, teacher)]
    torch.testing.assert_close(cosine_distance_loss(*rows), want)
    torch.testing.assert_close(
        cosine_distance_loss(*rows, valid=checks.VALID.flatten()),
        cosine_distance_loss(student, teacher, valid=checks.VALID),
    )


def test_no_direction():
    zero = torch.zeros(1, 3, requires_grad=True)
    got = cosine_distance_loss(zero, torch.ones(1, 3))
    torch.testing.assert_close(got.item(), 1.0)
    (grad,) = torch.autograd.grad(got, zero)
    assert not grad.any()
    assert cosine_distance_loss(zero, torch.zeros(1, 3)) == 0


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r'cosine_distance_loss: .* must share B, D, H and W, got'):
        cosine_distance_loss(x, x[:, :2])
    with pytest.raises(ShapeError, match='must share n and D'):
        cosine_distance_loss(x[:, :, 0, 0], x[:1, :, 0, 0])
    with pytest.raises(ShapeError, match=r'`teacher` must have shape .* got \(3, 4, 5\)'):
        cosine_distance_loss(x, x[0])
