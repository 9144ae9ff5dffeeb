r"""Depth maps compared up to a scale and a shift of each image.

Shape shorthand: B images, H x W the grid, N = H W, K pairs or triplets an image.
Depth is in metres, see :mod:`mmstructkd.functional.core.depth`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_flag, check_positive
from mmstructkd.functional.core.depth import align_to_teacher, mean_of_each_image, prepare_depths
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean

__all__ = ['scale_shift_invariant_loss']


def _median(values: Tensor, valid_mask: Tensor) -> Tensor:
    """Lower median of each image over what counts, shape (B, 1, 1); 0 where nothing does."""
    number = valid_mask.flatten(1).sum(dim=1, keepdim=True)
    ordered = values.masked_fill(~valid_mask, torch.inf).flatten(1).sort(dim=1).values
    middle = ordered.gather(1, ((number - 1) // 2).clamp(min=0))
    return torch.where(number > 0, middle, 0)[:, :, None]


@full_precision
def scale_shift_invariant_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    robust: bool = False,
    eps: float = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Distance between two depth maps once scale and offset of each image are taken out.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} (a_b d^s_i + c_b - d^t_i)^2,
        \quad (a_b, c_b) = \arg\min \sum_{i \in V_b} (a d^s_i + c - d^t_i)^2

    and, with ``robust``,

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \left| \frac{d^s_i - m^s_b}{\sigma^s_b} - \frac{d^t_i - m^t_b}{\sigma^t_b}
        \right|, \quad m = \mathrm{median}, \; \sigma = \overline{|d - m|}

    Both are of MiDaS (arXiv:1907.01341). Differs from that code: the mean is
    over all pixels of the batch that count, without the half of the quadratic
    form; no share of the residuals is cut off. MiDaS compares inverse depth: hand
    over that where the teacher gives it. The median is the lower one.

    The gradient reaches ``student`` only, through slope and offset as well. The
    quadratic value does not change under ``a * student + c`` with any a but 0
    (it does not tell a map from its negative); the robust one with a above 0.

    Args:
        student: metres (or any unit), shape (B, 1, H, W) or (B, H, W), any float
            dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        robust: median and mean deviation on both sides instead of least squares.
        eps: in the maps' unit, above 0; a spread of the student (standard or
            mean deviation) below it counts as ``eps``, so that flat maps have a
            finite gradient. ``robust`` bounds the teacher's too.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar in square metres (``robust``: no unit), at least float32: the mean
        over pixels that count, 0 with a graph if there is none. Time O(B N), with
        ``robust`` O(B N log N); memory O(B N).

    Raises:
        ShapeError: an input is no depth map, or B, H or W differ.
        ConfigError: ``eps`` is not above 0.

    Example:
        >>> t = torch.tensor([[[1.0, 2.0, 4.0, 7.0]]])
        >>> scale_shift_invariant_loss(0.5 * t + 3, t).item() < 1e-10
        True
        >>> scale_shift_invariant_loss(0.5 * t + 3, t, robust=True).item() < 1e-6
        True
    """
    owner = 'scale_shift_invariant_loss'
    check_positive(owner, 'eps', eps)
    check_flag(owner, 'robust', robust)
    depth_s, depth_t, valid_mask = prepare_depths(owner, student, teacher, valid)
    if not robust:
        return masked_mean((align_to_teacher(depth_s, depth_t, valid_mask, eps) - depth_t) ** 2, valid_mask)

    def standardized(depth: Tensor) -> Tensor:
        centred = depth - _median(depth, valid_mask)
        return centred / mean_of_each_image(centred.abs(), valid_mask).clamp(min=eps)

    return masked_mean((standardized(depth_s) - standardized(depth_t)).abs(), valid_mask)
