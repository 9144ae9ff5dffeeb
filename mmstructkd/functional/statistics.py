r"""Features compared as they are, without offset and scale, or by where they are strong.

Shape shorthand: B images, D channels, H x W the grid, N = H W, V the positions
that count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, check_ndim, check_one_of, check_positive, check_same, is_finite_number
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import masked_mean, mean_of_sum, valid_pixels

__all__ = [
    'OVER',
    'REDUCTIONS',
    'attention_map',
    'attention_transfer_loss',
    'check_power',
    'feature_mse_loss',
    'standardized_mse_loss',
]

OVER = ('image', 'batch')
REDUCTIONS = ('mean', 'sum')

_RESIZE = 'Resize the teacher with resize_map, or put a connector in front of the student.'
_RESIZE_ONLY = 'Resize the teacher with resize_map; channels may differ.'


def _check_pair(owner: str, student: Tensor, teacher: Tensor) -> None:
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', _RESIZE)


def _only(features: Tensor, counts: Tensor | None) -> Tensor:
    """Blank what does not count, first of all: whatever stands there, NaN included, goes nowhere."""
    return features if counts is None else torch.where(counts[:, None], features, 0)


def _smallest(*tensors: Tensor) -> float:
    """The smallest normal number of the coarsest dtype: in half precision, what lies below has lost its digits."""
    return max(float(torch.finfo(t.dtype).tiny) for t in tensors)


def _mean_over_images(per_image: Tensor, counts: Tensor | None) -> Tensor:
    """Mean of (B,) over the images with a position that counts."""
    return masked_mean(per_image, None if counts is None else counts.flatten(1).any(dim=1))


def _standardized(
    features: Tensor,
    counts: Tensor | None,
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
        if counts is not None:
            centred = torch.where(counts, centred, 0)
    variance = mean_of_sum(centred.square().sum(dim=axes, keepdim=True), number - correction)
    floor = (eps / peak).clamp(min=1e-12)
    return centred / (variance + floor.square()).sqrt()


@full_precision
def _standardized_mse(student: Tensor, teacher: Tensor, over: str, eps: float, valid: Tensor | None) -> Tensor:
    counts = valid_pixels('standardized_mse_loss', student, valid=valid)
    student, teacher = (_only(f, counts).flatten(2) for f in (student, teacher.detach()))
    axes = (2,) if over == 'image' else (0, 2)
    number: Tensor | int = student.shape[2] * (1 if over == 'image' else student.shape[0])
    if counts is not None:
        counts = counts.flatten(1)[:, None]
        number = counts.sum(dim=axes, keepdim=True)
    # The published code of the batch form divides by one less.
    correction = 0 if over == 'image' else 1
    standard_s, standard_t = (_standardized(f, counts, axes, number, correction, eps) for f in (student, teacher))
    return masked_mean((standard_s - standard_t).square(), counts)


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
    _check_pair(owner, student, teacher)
    loss: Tensor = _standardized_mse(student, teacher, over, max(eps, _smallest(student, teacher)), valid)
    return loss


@full_precision
def feature_mse_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: str = 'mean',
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of raw features.

    .. math:: L = \frac{1}{D |V|} \sum_{d} \sum_{i \in V} (f^s_{di} - f^t_{di})^2

    Hints of FitNets (arXiv:1412.6550), trained along with the task as it is done
    today, not in a stage before it. The channels with the largest values decide:
    :func:`standardized_mse_loss` weighs them alike.

    The gradient reaches ``student`` only.

    Args:
        student: features, shape (B, D, H, W), any float dtype.
        teacher: same shape. Detached here.
        reduction: ``'mean'``, or ``'sum'``: the sum over channels and positions
            that count, averaged over the images that have one. It grows with
            the size of the map.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Scalar in squared units of the feature, at least float32: the mean over
        channels and positions V that count, 0 with a graph if there is none.
        Differences above 1e19 leave float32's range. Time and memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``valid`` is not
            a map of B images.
        ConfigError: ``reduction`` is neither.

    Example:
        >>> x = torch.zeros(2, 3, 2, 2)
        >>> feature_mse_loss(x + 2, x).item()
        4.0
        >>> feature_mse_loss(x + 2, x, reduction='sum').item()
        48.0
    """
    owner = 'feature_mse_loss'
    check_one_of(owner, 'reduction', reduction, REDUCTIONS)
    _check_pair(owner, student, teacher)
    counts = valid_pixels(owner, student, valid=valid)
    gap = (_only(student, counts) - _only(teacher.detach(), counts)).square()
    if reduction == 'sum':
        return _mean_over_images(gap.flatten(1).sum(dim=1), counts)
    return masked_mean(gap, None if counts is None else counts[:, None])


def check_power(owner: str, power: Any) -> None:
    """Raise :class:`ConfigError` unless ``power`` is a finite number of at least 1."""
    if not is_finite_number(power) or power < 1:
        raise ConfigError(
            f'{owner}: `power` must be a finite number of at least 1, got {power!r}. '
            'Below 1 the gradient at a feature of 0 has no bound.'
        )


@full_precision
def _attention(features: Tensor, counts: Tensor | None, power: float, floor: float) -> Tensor:
    features = _only(features, counts)
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
    counts = valid_pixels(owner, features, valid=valid)
    strength: Tensor = _attention(features, counts, power, max(1e-12, _smallest(features)))
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
    counts = valid_pixels(owner, student, valid=valid)
    strength_s = attention_map(student, power=power, valid=counts)
    strength_t = attention_map(teacher.detach(), power=power, valid=counts)
    gap = (strength_s - strength_t).square()
    if reduction == 'sum':
        return _mean_over_images(gap.flatten(1).sum(dim=1), counts)
    return masked_mean(gap, counts)
