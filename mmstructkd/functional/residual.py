r"""What a student leaves over, for an assistant beside it.

Shape shorthand: B images, D channels, H x W the grid, V the positions that count.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import ShapeError, check_ndim, check_same
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.resize import RESIZE_OR_CONNECT
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['residual_loss']


@full_precision
def residual_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    assistant: Tensor,
    joint: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of an assistant's features from what the student's lack.

    .. math:: L = \frac{1}{D |V|} \sum_d \sum_{i \in V} \big(a_{di} - (f^t_{di} - f^s_{di})\big)^2

    Residual Knowledge Distillation (arXiv:2002.09168): where the network is used,
    student and assistant are added. No code of the authors was found; the squared
    distance is our reading.

    The gradient reaches ``assistant``. By default it does not reach ``student``,
    which has its own loss and keeps what it has learned. With ``joint`` it reaches
    both, alike: then this is the squared distance of the sum from the teacher.

    Args:
        student: features, shape (B, D, H, W), any float dtype, of the teacher's
            width. Detached here unless ``joint``.
        teacher: features, same shape. Detached here.
        assistant: features, same shape.
        joint: let the student learn as well.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Scalar in squared units of the feature, at least float32: the mean over
        channels and positions V that count, 0 with a graph if there is none.
        Differences above 1e19 leave float32's range. Time and memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``valid`` is not a
            map of B images.
        ConfigError: ``valid`` is not boolean.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, 1, 1)
        >>> residual_loss(x, 4 * x, assistant=3 * x).item(), residual_loss(x, 4 * x, assistant=x).item()
        (0.0, 4.0)
    """
    owner = 'residual_loss'
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', RESIZE_OR_CONNECT)
    if assistant.shape != student.shape:
        raise ShapeError(
            f'{owner}: `assistant` must have the shape of `student`, got {tuple(assistant.shape)} and '
            f'{tuple(student.shape)}. Project it to the width of the teacher.'
        )
    if not joint:
        student = student.detach()
    gap = assistant + student - teacher.detach()
    valid_mask = valid_pixels(owner, student, valid=valid)
    if valid_mask is None:
        return masked_mean(gap.square())
    # Whatever stands where nothing counts, NaN included, goes nowhere.
    gap = zero_elsewhere(gap, valid_mask)
    return masked_mean(gap.square(), valid_mask[:, None])
