r"""Whether features point the same way.

Shape shorthand: B images, D channels, H x W the grid, n rows, V what counts.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_ndim, check_same
from mmstructkd.functional.core.nodes import norm_floor, unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['cosine_distance_loss']


@full_precision
def _distance(student: Tensor, teacher: Tensor, floor: float, valid: Tensor | None) -> Tensor:
    valid_mask = valid_pixels('cosine_distance_loss', student, valid=valid)
    # Whatever stands where nothing counts, NaN included, goes nowhere.
    student, teacher = (zero_elsewhere(f, valid_mask) for f in (student, teacher))
    gap = unit_vectors(student, 1, floor) - unit_vectors(teacher.detach(), 1, floor)
    # |a - b|^2 = 2 - 2 cos(a, b) of unit vectors, exact also where they nearly agree.
    return masked_mean(gap.square().sum(dim=1), valid_mask)


def cosine_distance_loss(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Squared distance of features brought to length 1.

    .. math:: L = \frac{1}{|V|} \sum_{i \in V} (2 - 2 \cos(f^s_i, f^t_i))

    What SimReg (BMVC 2021) lets a projection of the student's feature regress,
    with one projection a teacher where there are several; and, less the constant,
    twice the negative cosine of siamese self-distillation (arXiv:2209.01311),
    whose student carries a predictor and whose other view is detached. There an
    image is one vector; here every position is.

    The gradient reaches ``student`` only: two views that teach each other are two
    losses. The value does not change when a feature is multiplied by a positive
    number, position by position. A feature whose norm is zero (at most 1e-12, in
    half precision at most the smallest normal number) has no direction: it is at a
    distance of 1 from any that has, and no gradient.

    Args:
        student: features, shape (B, D, H, W) or (n, D), any float dtype, projected
            to the teacher's width.
        teacher: features, same shape. Detached here.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest, or (n,). ``None``: all.

    Returns:
        Scalar in [0, 4], no unit, at least float32: the mean over the positions V
        that count, 0 with a graph if there is none. Time and memory O(B D N).

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, the shapes differ, or
            ``valid`` does not fit.
        ConfigError: ``valid`` is not boolean.

    Example:
        >>> import torch
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> cosine_distance_loss(2 * x, x).item(), round(cosine_distance_loss(-x, x).item(), 4)
        (0.0, 4.0)
    """
    owner = 'cosine_distance_loss'
    for name, tensor in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, tensor, (2, 4), '(B, D, H, W) or (n, D)')
    axes, shared = (range(4), 'B, D, H and W') if student.dim() == 4 else (range(2), 'n and D')
    way_out = 'Resize the teacher with resize_map, or put a connector in front of the student.'
    check_same(owner, student, teacher, axes, shared, way_out)
    loss: Tensor = _distance(student, teacher, norm_floor(student, teacher), valid)
    return loss
