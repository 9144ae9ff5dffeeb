r"""Which of two places lies nearer, learnt from the teacher's depth.

Shape shorthand: B images, H x W the grid, N = H W, K pairs or triplets an image.
Depth is in metres, see :mod:`mmstructkd.functional.core.depth`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import check_finite_number, check_positive
from mmstructkd.functional.core.depth import given_or_drawn, log_depth, prepare_depths, values_at
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean, nan_unless_finite

__all__ = ['ordinal_relation_loss']


@full_precision
def ordinal_relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    pairs: Tensor | None = None,
    num_pairs: int = 5000,
    seed: int = 0,
    ratio_threshold: float = 0.03,
    eps: float = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Ranking loss on pairs of pixels: which is nearer, or are they equally far.

    .. math::
        L = \frac{1}{|P|} \sum_{(i,j) \in P} \begin{cases}
        \log(1 + e^{-r_{ij} (\ell_i - \ell_j)}) & r_{ij} = \pm 1 \\
        (\ell_i - \ell_j)^2 & r_{ij} = 0 \end{cases}, \quad \ell = \log d^s

    :math:`r_{ij}` is the order that the teacher sees: 0 where the larger of its
    two depths is at most :math:`1 + \tau` times the smaller. The loss of Chen et
    al. (arXiv:1604.03901) with the ratio rule of Xian et al. (CVPR 2020),
    :math:`\tau` = 0.03. Differs from both: the order is the teacher's, and the
    student's numbers are logarithms of depth, so that a margin is a ratio too.

    It does not become 0 on itself: a wider gap in the right order always
    scores better, ever more slowly. The gradient reaches ``student`` only. The
    value does not change when an image's depth is multiplied by a factor.

    Args:
        student: metres, shape (B, 1, H, W) or (B, H, W), any float dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        pairs: flat positions (row * W + column), int64, shape (B, K, 2).
            ``None``: drawn uniformly.
        num_pairs: K, how many to draw an image.
        seed: of the draw, a function of nothing else
            (:func:`~mmstructkd.functional.core.sampling.draw_positions`).
        ratio_threshold: :math:`\tau`, at least 0.
        eps: metres, above 0; below it the student's logarithm goes on as its
            tangent.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar without a unit, at least float32: the mean over the pairs of the
        batch whose two pixels differ and count, 0 with a graph if there is none.
        Time and memory O(B (N + K)).

    Raises:
        ShapeError: an input is no depth map, B, H or W differ, or ``pairs`` has
            another shape.
        ConfigError: ``num_pairs``, ``ratio_threshold`` or ``eps`` is out of range.

    Example:
        >>> t = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> good, bad = ordinal_relation_loss(t, t), ordinal_relation_loss(1 / t, t)
        >>> bool(good < bad)
        True
    """
    owner = 'ordinal_relation_loss'
    check_positive(owner, 'eps', eps)
    check_finite_number(owner, 'ratio_threshold', ratio_threshold, minimum=0)
    depth_s, depth_t, valid_mask = prepare_depths(owner, student, teacher, valid)
    pairs = given_or_drawn(owner, 'pairs', pairs, depth_s, num_pairs, 2, seed)
    gap_s, gap_t = (-values_at(log_depth(depth, eps), pairs).diff(dim=-1)[..., 0] for depth in (depth_s, depth_t))
    order = gap_t.sign() * (gap_t.abs() > math.log1p(ratio_threshold))
    ranked = torch_functional.softplus(-order * gap_s)
    there = values_at(valid_mask, pairs).all(dim=-1) & (pairs[..., 0] != pairs[..., 1])
    # Also where no draw meets the pixel.
    return masked_mean(torch.where(order == 0, gap_s**2, ranked), there) + nan_unless_finite(depth_s, valid_mask)
