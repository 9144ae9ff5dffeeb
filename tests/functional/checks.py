"""What every loss of two tensors promises, checked the same way for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Loss = Callable[..., Tensor]

#: Older releases of torch always multiply exactly on a CPU: there is nothing to switch.
needs_matmul_switch = pytest.mark.skipif(
    not hasattr(getattr(torch.backends.mkldnn, 'matmul', None), 'fp32_precision'),
    reason='this torch has no switch for matrix products on the CPU',
)

#: Image 0 whole, image 1 in part, image 2 not at all.
VALID = torch.tensor(
    [
        [[True, True, True, True, True], [True, True, True, True, True]],
        [[True, False, False, True, True], [False, False, True, False, False]],
        [[False, False, False, False, False], [False, False, False, False, False]],
    ]
)
SHAPE = (3, 4, 2, 5)


def pair(
    dtype: torch.dtype = torch.float64, shape: Sequence[int] = SHAPE, other: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """A student with a graph and a teacher, of mean 1 and standard deviation 2."""
    student = (2 * torch.randn(*shape, dtype=torch.float64) + 1).to(dtype).requires_grad_()
    return student, (2 * torch.randn(*(other or shape), dtype=torch.float64) + 1).to(dtype)


def same(got: Tensor, want: Tensor, *learners: Tensor) -> None:
    """The same value and the same gradient, also where there is none."""
    torch.testing.assert_close(got, want)
    for learner in learners:
        first, second = (
            torch.autograd.grad(loss, learner, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for loss in (got, want)
        )
        torch.testing.assert_close(first, second)
        assert first.any()


def _on(valid: Tensor, like: Tensor) -> Tensor:
    """The mask with an axis of channels, to be spread over a tensor."""
    return valid.reshape(len(valid), 1, *valid.shape[1:]) if like.dim() > valid.dim() else valid


def teacher_gets_nothing(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    teacher = teacher.clone().requires_grad_()
    before = (student.detach().clone(), teacher.detach().clone())
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.any()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def ignored_changes_nothing(loss: Loss, student: Tensor, teacher: Tensor, valid: Tensor) -> None:
    """Whatever stands where nothing counts: a large number, infinity, NaN."""
    want = loss(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    for junk in (1e4, float('inf'), float('nan')):
        spoiled = torch.where(_on(valid, student), student.detach(), junk).requires_grad_()
        got = loss(spoiled, torch.where(_on(valid, teacher), teacher, -junk), valid=valid)
        (grad,) = torch.autograd.grad(got, spoiled)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grad, want_grad)
        assert not grad[~_on(valid, grad).expand_as(grad)].any()


def nothing_counts_is_zero(loss: Loss, student: Tensor, teacher: Tensor, valid: Tensor) -> None:
    got = loss(student, teacher, valid=torch.zeros_like(valid))
    (grad,) = torch.autograd.grad(got, student)
    assert got.item() == 0
    assert not grad.any()


def finite_in_half(loss: Loss, shape: Sequence[int] = SHAPE, other: Sequence[int] | None = None, *, most: float = 1.0):
    """Zero, tiny, plain and huge numbers in both half precisions.

    Args:
        loss: of student and teacher.
        shape: of the student.
        other: of the teacher, where it differs.
        most: what the largest number of the type is divided by, for losses whose value is in squared units.
    """
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        largest = min(info.max, 3e38 if most == 1 else most)
        for factor in (0.0, info.tiny, 1.0, largest):
            student = ((2 * torch.rand(*shape) - 1) * factor).to(dtype).requires_grad_()
            teacher = ((2 * torch.rand(*(other or shape)) - 1) * factor).to(dtype)
            got = loss(student, teacher)
            (grad,) = torch.autograd.grad(got, student)
            assert got.dtype == torch.float32
            assert got.isfinite(), (dtype, factor)
            assert grad.isfinite().all(), (dtype, factor)


def same_under_autocast(loss: Loss, student: Tensor, teacher: Tensor) -> None:
    """The same number, also for channels that lie last."""
    want = loss(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(student, teacher), want)
    if student.dim() == 4:
        last = [z.contiguous(memory_format=torch.channels_last) for z in (student, teacher)]
        torch.testing.assert_close(loss(*last), want)
