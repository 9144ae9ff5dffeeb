r"""Features compared by where they are strong.

Shape shorthand: B images, D channels, H x W the grid, N = H W, V the positions
that count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, check_ndim, check_one_of, check_same, is_finite_number
from mmstructkd.functional.core.features import REDUCTIONS, mean_over_images, smallest_normal
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['attention_map', 'attention_transfer_loss', 'check_power']

_RESIZE_ONLY = 'Resize the teacher with resize_map; channels may differ.'


def check_power(owner: str, power: Any) -> None:
    """Raise :class:`ConfigError` unless ``power`` is a finite number of at least 1."""
    if not is_finite_number(power) or power < 1:
        raise ConfigError(
            f'{owner}: `power` must be a finite number of at least 1, got {power!r}. '
            'Below 1 the gradient at a feature of 0 has no bound.'
        )


@full_precision
def _attention(features: Tensor, valid_mask: Tensor | None, power: float, floor: float) -> Tensor:
    features = zero_elsewhere(features, valid_mask)
    # The map does not change with the scale of the image: at a largest value of 1 no power overflows,
    # and the norm is at least 1 / D.
    peak = features.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
    nothing = peak <= floor
    scaled = torch.where(nothing, 0, features) / torch.where(nothing, 1, peak)
    strength = (scaled.square() if power == 2 else scaled.abs().pow(power)).mean(dim=1)
    squares = strength.square().sum(dim=(1, 2), keepdim=True)
    return strength / torch.where(nothing[:, 0], 1, squares).sqrt()


def attention_map(features: Tensor, *, power: float = 2, valid: Tensor | None = None) -> Tensor:
    r"""Where a feature is strong: mean power over channels, of norm 1 in each image.

    .. math:: A_i = \frac{m_i}{\sqrt{\sum_{j \in V} m_j^2}}, \quad m_i = \frac{1}{D} \sum_d |f_{di}|^p

    Activation-based attention of arXiv:1612.03928. It does not change when the
    feature of an image is scaled. The gradient reaches ``features``.

    Args:
        features: shape (B, D, H, W), any float dtype.
        power: p, at least 1.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Shape (B, H, W), in [0, 1], at least float32; 0 where nothing counts. An
        image whose largest value is at most 1e-12 (in float16 6e-5) is all 0,
        without a gradient. Time and memory O(B D N).

    Raises:
        ShapeError: ``features`` is not 4-D, or ``valid`` is not a map of B images.
        ConfigError: ``power`` is below 1.

    Example:
        >>> attention_map(torch.tensor([1.0, 0.0, -1.0, 0.0]).view(1, 1, 2, 2), power=1)
        tensor([[[0.7071, 0.0000],
                 [0.7071, 0.0000]]])
    """
    owner = 'attention_map'
    check_power(owner, power)
    check_ndim(owner, 'features', features, 4, '(B, D, H, W)')
    valid_mask = valid_pixels(owner, features, valid=valid)
    strength: Tensor = _attention(features, valid_mask, power, max(1e-12, smallest_normal(features)))
    return strength


def attention_transfer_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 2,
    reduction: str = 'mean',
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of where student and teacher are strong.

    .. math:: L = \frac{1}{|V|} \sum_{i \in V} (A^s_i - A^t_i)^2

    Attention Transfer (arXiv:1612.03928) as dense code computes it, with A from
    :func:`attention_map`. The paper takes the norm of the difference and no
    mean. As A has norm 1, entries shrink as the map grows, and the mean with
    one over N: published weights are large. ``reduction='sum'`` has no such
    dependence.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when the feature of an image is scaled.

    Args:
        student: features, shape (B, D_s, H, W), any float dtype.
        teacher: features, shape (B, D_t, H, W). Detached here.
        power: p, at least 1.
        reduction: ``'mean'`` over positions that count, or ``'sum'``: over those
            of an image, averaged over the images that have one; in [0, 2].
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Scalar, no unit, at least float32, 0 with a graph if no position counts.
        Maps of 1 x 1 are the same everywhere: 0. Time and memory
        O(B (D_s + D_t) N).

    Raises:
        ShapeError: an input is not 4-D, B, H or W differ, or ``valid`` is not a
            map of B images.
        ConfigError: ``power`` is below 1, or ``reduction`` is neither.

    Example:
        >>> x = torch.arange(12.0).view(1, 3, 2, 2)
        >>> attention_transfer_loss(-5 * x, x).item() < 1e-12
        True
        >>> s, t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 1, 1, 2)
        >>> attention_transfer_loss(s, t).item()
        1.0
    """
    owner = 'attention_transfer_loss'
    check_power(owner, power)
    check_one_of(owner, 'reduction', reduction, REDUCTIONS)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(owner, student, teacher, (0, 2, 3), 'B, H and W', _RESIZE_ONLY)
    valid_mask = valid_pixels(owner, student, valid=valid)
    strength_s = attention_map(student, power=power, valid=valid_mask)
    strength_t = attention_map(teacher.detach(), power=power, valid=valid_mask)
    gap = (strength_s - strength_t).square()
    if reduction == 'sum':
        return mean_over_images(gap.flatten(1).sum(dim=1), valid_mask)
    return masked_mean(gap, valid_mask)
