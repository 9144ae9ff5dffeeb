from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ShapeError
from mmstructkd.functional.feature_mse import feature_mse_loss
from mmstructkd.functional.residual import residual_loss
from tests.functional import checks
from tests.reference import feature_pairs as reference


@pytest.mark.parametrize('joint', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(joint, masked):
    student, teacher = checks.pair()
    assistant, _ = checks.pair()
    valid = checks.VALID if masked else None
    got = residual_loss(student, teacher, assistant=assistant, joint=joint, valid=valid)
    want = reference.residual(student, teacher, assistant, valid)
    checks.same(got, want, assistant)
    if joint:
        checks.same(got, want, student)
        torch.testing.assert_close(got, feature_mse_loss(student + assistant, teacher, valid=valid))
    else:
        assert torch.autograd.grad(got, student, allow_unused=True) == (None,)


@pytest.mark.parametrize('joint', [False, True])
def test_contract(joint):
    assistant, _ = checks.pair(torch.float32)

    def loss(learner, teacher, **kwargs):
        # Who learns: the assistant, or the student.
        given = (assistant.detach(), learner)
        student, helper = reversed(given) if joint else given
        return residual_loss(student, teacher, assistant=helper, joint=joint, **kwargs)

    checks.teacher_gets_nothing(loss, *checks.pair(torch.float32))
    checks.ignored_changes_nothing(loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(loss, *checks.pair(torch.float32), checks.VALID)
    checks.finite_in_half(loss, most=1e15)
    checks.same_under_autocast(loss, *checks.pair(torch.float32))
    student, teacher = checks.pair()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, valid=checks.VALID), student)


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r'`assistant` must have the shape of `student`, got \(2, 2, 4, 5\) and'):
        residual_loss(x, x, assistant=x[:, :2])
    with pytest.raises(ShapeError, match='must share B, D, H and W'):
        residual_loss(x, x[:, :2], assistant=x)
