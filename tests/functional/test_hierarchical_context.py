"""What is particular to the hierarchical loss; the rest is in test_statistics.py with the other distances."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.functional import feature_mse_loss, hierarchical_context_loss
from tests.reference import pyramid as reference


def pair(*shape):
    student, teacher = torch.randn(2, *shape, dtype=torch.float64).unbind()
    return student.clone().requires_grad_(), teacher.clone()


@pytest.mark.parametrize('sizes', [(4, 2, 1), (3,), (1, 2)])
@pytest.mark.parametrize('grid', [(7, 9), (5, 3), (4, 6), (3, 8), (2, 2)])
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(grid, sizes, masked):
    student, teacher = pair(2, 2, *grid)
    valid = torch.rand(2, *grid) > 0.5 if masked else None
    if masked:
        valid[1, : grid[0] // 2 + 1] = False
    got = hierarchical_context_loss(student, teacher, sizes=sizes, valid=valid)
    want = reference.hierarchical_context(student, teacher, sizes, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_grids_with_as_many_rows_as_the_map_take_no_part():
    student, teacher = pair(2, 3, 4, 9)
    with_4 = hierarchical_context_loss(student, teacher, sizes=(4, 2, 1))
    torch.testing.assert_close(with_4, hierarchical_context_loss(student, teacher, sizes=(2, 1)))
    assert with_4 != hierarchical_context_loss(student, teacher, sizes=(3, 2, 1))


@pytest.mark.parametrize('grid', [(1, 1), (1, 6)])
def test_one_row_is_the_mean_square(grid):
    student, teacher = pair(2, 3, *grid)
    torch.testing.assert_close(hierarchical_context_loss(student, teacher), feature_mse_loss(student, teacher))
    torch.testing.assert_close(
        hierarchical_context_loss(student, teacher, sizes=()), feature_mse_loss(student, teacher)
    )


def test_a_constant_difference_weighs_the_same_at_every_level():
    _, teacher = pair(2, 3, 9, 7)
    torch.testing.assert_close(hierarchical_context_loss(teacher + 3, teacher).item(), 9.0)
    # A difference without a mean is seen at the fine level alone.
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(4)
    board = (sign[:, None] * sign[None])[None, None]
    got = hierarchical_context_loss(board, torch.zeros_like(board))
    torch.testing.assert_close(got.item(), 1 / 1.875)


@pytest.mark.parametrize('sizes', [(0,), (2.0,), 4, '42', (True,), None])
def test_bad_sizes(sizes):
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ConfigError, match='hierarchical_context_loss: `sizes` must be a sequence of integers above 0'):
        hierarchical_context_loss(x, x, sizes=sizes)
