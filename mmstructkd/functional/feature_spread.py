r"""Guards of features against collapse: enough variance in each channel, none shared by two.

Shape shorthand: n rows with D entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_finite_number, check_ndim, check_positive
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.valid import valid_entries, zero_elsewhere

__all__ = ['covariance_loss', 'variance_hinge_loss']


def _centred(owner: str, features: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows less their mean, 0 where they do not count, and how many count."""
    check_ndim(owner, 'features', features, 2, '(n, D)')
    valid = valid_entries(owner, features.shape[:1], valid, like=features)
    number = valid.sum().to(features.dtype)
    features = zero_elsewhere(features, valid)
    # Divided before the sum: that of large features may leave the range, their mean does not.
    mean = (features / number.clamp(min=1)).sum(dim=0)
    return zero_elsewhere(features - mean, valid), number


@full_precision
def variance_hinge_loss(
    features: Tensor, *, target: float = 1.0, eps: float = 1e-4, valid: Tensor | None = None
) -> Tensor:
    r"""By how much the standard deviation of channels falls short of a target.

    .. math:: L = \frac{1}{D} \sum_d \max\!\big(0, \gamma - \sqrt{\mathrm{Var}(f_d) + \epsilon}\big)

    From VICReg (arXiv:2105.04906), as the code of squeeze-and-span
    (yangyu12/squeeze-and-span) has it; the variance divides by n - 1. A guard
    where a network learns from itself: equal features everywhere are the easiest
    agreement of two views.

    The gradient reaches ``features``. The value does not change when a channel is
    shifted.

    Args:
        features: rows of a batch, shape (n, D), any float dtype. For maps, the
            rows of sampled positions or cells.
        target: :math:`\gamma`, at least 0.
        eps: :math:`\epsilon`, above 0; it bounds the gradient of a constant
            channel.
        valid: rows that count, bool, shape (n,). ``None``: all.

    Returns:
        Scalar in units of the feature, in [0, target], at least float32: the mean
        over channels, 0 with a graph where less than two rows count. Time and
        memory O(n D).

    Raises:
        ShapeError: ``features`` is not 2-D, or ``valid`` does not fit.
        ConfigError: ``target`` is negative or ``eps`` not above 0.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
        >>> round(variance_hinge_loss(x).item(), 4)
        0.495
    """
    owner = 'variance_hinge_loss'
    check_finite_number(owner, 'target', target, minimum=0)
    check_positive(owner, 'eps', eps)
    centred, number = _centred(owner, features, valid)
    deviation = (centred.square().sum(dim=0) / (number - 1).clamp(min=1) + eps).sqrt()
    loss = mean_of_sum((target - deviation).clamp(min=0).sum(), features.shape[1])
    return torch.where(number > 1, loss, 0 * loss)


@full_precision
def covariance_loss(features: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Squared covariances of different channels.

    .. math:: L = \frac{1}{D} \sum_{d \ne e} \mathrm{Cov}(f_d, f_e)^2

    From VICReg (arXiv:2105.04906), as the code of squeeze-and-span has it;
    covariances divide by n - 1. It keeps channels from saying the same.

    The gradient reaches ``features``. The value does not change when a channel is
    shifted, or its sign turned.

    Args:
        features: rows of a batch, shape (n, D), any float dtype.
        valid: rows that count, bool, shape (n,). ``None``: all.

    Returns:
        Scalar in units of the feature to the fourth, at least float32: a sum over
        pairs divided by D, 0 with a graph where less than two rows count. Values
        above 1e9 leave float32's range. Time O(n D^2), memory O(n D + D^2).

    Raises:
        ShapeError: ``features`` is not 2-D, or ``valid`` does not fit.

    Example:
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        >>> covariance_loss(x).item()
        4.0
    """
    centred, number = _centred('covariance_loss', features, valid)
    with exact_matmul(features.device.type):
        covariance = centred.mT @ centred / (number - 1).clamp(min=1)
    between = covariance - torch.diag_embed(covariance.diagonal())
    return mean_of_sum(between.square().sum(), features.shape[1])
