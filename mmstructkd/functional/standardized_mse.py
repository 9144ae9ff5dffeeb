r"""Features compared without the offset and the scale of their channels.

Shape shorthand: B images, D channels, H x W the grid, N = H W, V the positions
that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_one_of, check_positive
from mmstructkd.functional.core.features import check_same_features, smallest_normal
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean, mean_of_sum
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['OVER', 'standardized_mse_loss']

OVER = ('image', 'batch')


def _standardized(
    features: Tensor,
    valid_mask: Tensor | None,
    axes: tuple[int, ...],
    number: Tensor | int,
    correction: int,
    eps: float,
) -> Tensor:
    """Offset and scale of (B, D, N) taken out along ``axes``; 0 where nothing counts."""
    # A channel with values beyond 1 is brought into [-1, 1], and eps with it: the result is the same,
    # but squares stay inside the range of the dtype.
    peak = features.detach().abs().amax(dim=axes, keepdim=True).clamp(min=1)
    centred = features / peak
    # Twice: what the first mean of a constant channel is off by would pass for its variation.
    for _ in range(2):
        centred = centred - mean_of_sum(centred.sum(dim=axes, keepdim=True), number)
        if valid_mask is not None:
            centred = torch.where(valid_mask, centred, 0)
    variance = mean_of_sum(centred.square().sum(dim=axes, keepdim=True), number - correction)
    floor = (eps / peak).clamp(min=1e-12)
    return centred / (variance + floor.square()).sqrt()


@full_precision
def _standardized_mse(student: Tensor, teacher: Tensor, over: str, eps: float, valid: Tensor | None) -> Tensor:
    valid_mask = valid_pixels('standardized_mse_loss', student, valid=valid)
    student, teacher = (zero_elsewhere(f, valid_mask).flatten(2) for f in (student, teacher.detach()))
    axes = (2,) if over == 'image' else (0, 2)
    number: Tensor | int = student.shape[2] * (1 if over == 'image' else student.shape[0])
    if valid_mask is not None:
        valid_mask = valid_mask.flatten(1)[:, None]
        number = valid_mask.sum(dim=axes, keepdim=True)
    # The published code of the batch form divides by one less.
    correction = 0 if over == 'image' else 1
    standard_s, standard_t = (_standardized(f, valid_mask, axes, number, correction, eps) for f in (student, teacher))
    return masked_mean((standard_s - standard_t).square(), valid_mask)


def standardized_mse_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    over: str = 'image',
    eps: float = 1e-6,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of features whose channels have mean 0 and standard deviation 1.

    .. math::
        L = \frac{1}{D |V|} \sum_{d} \sum_{i \in V} (\hat f^s_{di} - \hat f^t_{di})^2,
        \quad \hat f = \frac{f - \mu}{\sqrt{\sigma^2 + \epsilon^2}}

    ``over='image'``: mean and variance of each channel of each image, over its
    positions that count. Normalized Feature Distillation (arXiv:2207.05256).
    The variance divides by the number n of positions, so that
    :math:`L = 2 (1 - r)` with r the correlation of a student's channel with the
    teacher's over these positions. The value does not change when a channel of
    an image is shifted, or scaled by a positive number.

    ``over='batch'``: mean and variance of each channel over all images of this
    process. Twice the loss of PKD (arXiv:2207.02039), whose code halves it, and
    like that code with a variance that divides by n - 1:
    :math:`L = 2 (1 - r) (n - 1) / n`. Here the value does not change when a
    channel of the batch is shifted or scaled.

    Differs from the published forms, which divide by :math:`\sigma + \epsilon`:
    the root here has a gradient also where a channel is constant. That code
    counts padding; here ``valid`` can leave it out of statistics and sum.

    The gradient reaches ``student`` only. It grows as one over a channel's
    standard deviation, up to one over ``eps``. A constant channel is all 0: it
    has no correlation with anything.

    Args:
        student: features, shape (B, D, H, W), any float dtype.
        teacher: same shape. Detached here.
        over: ``'image'`` or ``'batch'``.
        eps: standard deviation below which a channel counts as constant, above
            0. In float16 at least that dtype's smallest normal number, 6e-5.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Scalar in [0, 4], no unit, at least float32: the mean over channels and
        positions V that count, 0 with a graph if there is none. A single
        position has no variation: maps of 1 x 1 give 0 with ``over='image'``,
        and so do those of one image with ``over='batch'``. Time and memory
        O(B D N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``valid`` is not
            a map of B images.
        ConfigError: ``over`` is neither, or ``eps`` is not above 0.

    Example:
        >>> x = torch.arange(8.0).view(1, 2, 2, 2)
        >>> standardized_mse_loss(3 * x + 5, x).item() < 1e-10
        True
        >>> round(standardized_mse_loss(-x, x).item(), 4)
        4.0
    """
    owner = 'standardized_mse_loss'
    check_one_of(owner, 'over', over, OVER)
    check_positive(owner, 'eps', eps)
    check_same_features(owner, student, teacher)
    loss: Tensor = _standardized_mse(student, teacher, over, max(eps, smallest_normal(student, teacher)), valid)
    return loss
