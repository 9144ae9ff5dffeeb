"""Means over what counts: the only place where denominators are decided.

B images, H x W pixels. ``valid`` is boolean and True where a position counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ['masked_mean', 'mean_of_sum', 'nan_unless_finite']


def mean_of_sum(total: Tensor, count: Tensor | int) -> Tensor:
    """Return ``total / count``, and ``total`` (an empty sum) where ``count`` is 0.

    Args:
        total: a sum, any shape.
        count: how many terms were added, at least 0.

    Returns:
        The mean, in the dtype of ``total``.

    Example:
        >>> mean_of_sum(torch.tensor(6.0), 3).item()
        2.0
        >>> mean_of_sum(torch.tensor(0.0), 0).item()
        0.0
    """
    if isinstance(count, Tensor):
        return total / count.clamp(min=1).to(total.dtype)
    return total / max(count, 1)


def masked_mean(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean of ``values`` over the positions that count.

    Values elsewhere may be anything, also not finite: they change neither the
    value nor its gradient with respect to ``values``. (Operations *before*
    ``values`` need finite inputs all the same: zero times NaN is NaN.)

    Args:
        values: any shape, floating point.
        valid: bool, broadcastable to the shape of ``values``. ``None``: all.

    Returns:
        Scalar; 0 with a graph where nothing counts.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, float('nan')]), torch.tensor([True, True, False])).item()
        2.0
        >>> masked_mean(torch.ones(2), torch.zeros(2, dtype=torch.bool)).item()
        0.0
    """
    if valid is None:
        return mean_of_sum(values.sum(), values.numel())
    valid = valid.expand_as(values)
    return mean_of_sum(torch.where(valid, values, 0).sum(), valid.sum())


def nan_unless_finite(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return 0, or NaN where a value that counts is not finite.

    To be added to a loss that would hide it: what saturates at infinity, or
    looks at a part of the values.

    Args:
        values: any shape, floating point. Without a gradient here.
        valid: bool, broadcastable to the shape of ``values``. ``None``: all.

    Returns:
        Scalar, without a graph.

    Example:
        >>> nan_unless_finite(torch.tensor([1.0, torch.inf])).item()
        nan
        >>> nan_unless_finite(torch.tensor([1.0, torch.inf]), torch.tensor([True, False])).item()
        0.0
    """
    nothing = 0 * values.detach()
    return (nothing if valid is None else torch.where(valid, nothing, 0)).sum()
