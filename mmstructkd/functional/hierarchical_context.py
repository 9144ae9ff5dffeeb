r"""Maps compared at several coarsenesses.

Shape shorthand: B images, D channels, H x W the grid, N = H W, V the positions
that count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import MAX_SIDE, ConfigError, check_ndim, check_same, is_count
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['check_sizes', 'hierarchical_context_loss']


def check_sizes(owner: str, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return ``sizes`` as a tuple, or raise :class:`ConfigError`."""
    good = isinstance(sizes, (tuple, list))
    if not good or not all(is_count(s) and 0 < s <= MAX_SIDE for s in sizes):
        raise ConfigError(
            f'{owner}: `sizes` must be a sequence of integers above 0, got {sizes!r}. Use () for the map alone.'
        )
    if len(set(sizes)) < len(sizes):
        raise ConfigError(f'{owner}: `sizes` must name each size once, got {sizes!r}.')
    return tuple(sizes)


@full_precision
def hierarchical_context_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    sizes: Sequence[int] = (4, 2, 1),
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of features, of the map and of its averages over coarser and coarser grids.

    .. math::
        L = \frac{\sum_{k=0}^{K} 2^{-k} \overline{(P_k f^s - P_k f^t)^2}}{\sum_{k=0}^{K} 2^{-k}}

    Hierarchical context loss of ReviewKD (arXiv:2104.09044). :math:`P_0` is the
    map itself and :math:`P_k` its average over the cells of the k-th grid of
    ``sizes`` that has fewer rows than the map; the others take no part, in the
    divisor neither. That is the rule of the authors' code, which looks at H
    alone: of a map that is narrower than a grid, cells repeat columns. There the
    levels of a pyramid are added up, and no position is left out.

    The gradient reaches ``student`` only.

    Args:
        student: features, shape (B, D, H, W), any float dtype.
        teacher: same shape. Detached here.
        sizes: cells of a side of the coarser grids, each above 0, in order.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest: a cell is the average over these, and one without any does
            not count. ``None``: all.

    Returns:
        Scalar in squared units of the feature, at least float32: the weighted
        mean of means over channels and cells that count, 0 with a graph if there
        is none. A map of one row has no coarser grid: its mean squared error.
        Differences above 1e19 leave float32's range. Time and memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``valid`` is not
            a map of B images.
        ConfigError: ``sizes`` are no sizes.

    Example:
        >>> x = torch.zeros(1, 2, 8, 8)
        >>> hierarchical_context_loss(x + 3, x).item()
        9.0
    """
    owner = 'hierarchical_context_loss'
    sizes = check_sizes(owner, sizes)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    way_out = 'Resize the teacher with resize_map, or put a connector in front of the student.'
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', way_out)
    valid_mask = valid_pixels(owner, student, valid=valid)
    teacher = teacher.detach()
    # First of all: whatever stands where nothing counts, NaN included, goes nowhere.
    student = zero_elsewhere(student, valid_mask)
    teacher = zero_elsewhere(teacher, valid_mask)
    # Averages are linear: that of the difference is the difference of the averages.
    gap = student - teacher
    total = masked_mean(gap.square(), None if valid_mask is None else valid_mask[:, None])
    weight = divisor = 1.0
    for size in sizes:
        if size >= gap.shape[2]:
            continue
        cells = torch_functional.adaptive_avg_pool2d(gap, size)
        some = None
        if valid_mask is not None:
            share = torch_functional.adaptive_avg_pool2d(valid_mask[:, None].to(gap.dtype), size)
            some = share > 0
            cells = cells / torch.where(some, share, 1)
        weight /= 2
        total = total + weight * masked_mean(cells.square(), some)
        divisor += weight
    return total / divisor
