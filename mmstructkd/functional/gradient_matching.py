r"""The slopes of depth maps, compared at several scales.

Shape shorthand: B images, H x W the grid, N = H W, K pairs or triplets an image.
Depth is in metres, see :mod:`mmstructkd.functional.core.depth`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_flag, check_positive
from mmstructkd.functional.core.depth import align_to_teacher, check_at_least_one, prepare_depths
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean, mean_of_sum

__all__ = ['gradient_matching_loss']


@full_precision
def gradient_matching_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    scales: int = 4,
    align: bool = False,
    eps: float = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Difference of the slopes of two depth maps, on a pyramid of grids.

    .. math::
        L = \frac{1}{S} \sum_{k=0}^{S-1} \frac{1}{|P_k|} \sum_{(i,j) \in P_k} |r_i - r_j|,
        \quad r = d^s - d^t

    :math:`P_k` are the pairs of horizontal and vertical neighbours on the grid of
    every :math:`2^k`-th row and column, both of which count. Edges of the teacher
    shall be edges of the student. Multi-scale gradient matching of MegaDepth
    (arXiv:1804.00607) and MiDaS (arXiv:1907.01341). Differs from the code of the
    latter: the mean is over pairs, not over pixels, and over scales, not their
    sum; the maps are aligned only with ``align``.

    The gradient reaches ``student`` only. The value does not change when a
    constant is added to an image.

    Args:
        student: metres, shape (B, 1, H, W) or (B, H, W), any float dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        scales: S, number of grids, at least 1; grids without a pair leave the
            mean.
        align: first map the student of each image onto the teacher by least
            squares, as :func:`scale_shift_invariant_loss` does.
        eps: metres, above 0; smallest standard deviation ``align`` divides by.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar in metres a grid step, at least float32, 0 with a graph if no pair
        counts. Time and memory O(B N).

    Raises:
        ShapeError: an input is no depth map, or B, H or W differ.
        ConfigError: ``scales`` is no integer of at least 1, ``eps`` not above 0.

    Example:
        >>> t = torch.tensor([[[1.0, 2.0, 4.0, 7.0]]])
        >>> gradient_matching_loss(t + 5, t).item()
        0.0
        >>> gradient_matching_loss(2 * t, t, scales=1).item()
        2.0
    """
    owner = 'gradient_matching_loss'
    check_positive(owner, 'eps', eps)
    check_flag(owner, 'align', align)
    check_at_least_one(owner, 'scales', scales)
    depth_s, depth_t, valid_mask = prepare_depths(owner, student, teacher, valid)
    if align:
        depth_s = align_to_teacher(depth_s, depth_t, valid_mask, eps)
    residual = depth_s - depth_t
    means, some = [], []
    for scale in range(scales):
        step = 2**scale
        coarse, there = residual[:, ::step, ::step], valid_mask[:, ::step, ::step]
        across, down = coarse.diff(dim=2).abs(), coarse.diff(dim=1).abs()
        pairs_across, pairs_down = there[:, :, 1:] & there[:, :, :-1], there[:, 1:] & there[:, :-1]
        total = torch.where(pairs_across, across, 0).sum() + torch.where(pairs_down, down, 0).sum()
        number = pairs_across.sum() + pairs_down.sum()
        means.append(mean_of_sum(total, number))
        some.append(number > 0)
    return masked_mean(torch.stack(means), torch.stack(some))
