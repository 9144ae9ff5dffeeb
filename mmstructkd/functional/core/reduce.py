"""Means over what counts: the only place where denominators are decided.

B images, H x W pixels. ``valid`` is boolean and True where a position counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.resize import resize_labels, resize_mask
from mmstructkd.functional.core.sharing import once

__all__ = ['masked_mean', 'mean_of_sum', 'nan_unless_finite', 'valid_pixels']


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


def valid_pixels(
    owner: str,
    reference: Tensor,
    *,
    labels: Tensor | None = None,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor | None:
    """Return which pixels (or rows) of ``reference`` count, from labels and a mask.

    Args:
        owner: who asks, for messages.
        reference: a map, shape (B, C, H, W), or rows, shape (M, C).
        labels: integer classes, shape (B, h, w), brought to H x W by nearest;
            for rows (M,).
        ignore_index: the label that does not count.
        valid: bool, shape (B, h, w), brought to H x W by nearest; for rows (M,).

    Returns:
        Bool, shape (B, H, W) or (M,), on the device of ``reference``; ``None``:
        all count.

    Raises:
        ShapeError: ``labels`` or ``valid`` is no map of B images, or not of M rows.
        ConfigError: ``valid`` is not boolean.

    Example:
        >>> valid_pixels('doc', torch.zeros(1, 3, 1, 2), labels=torch.tensor([[[0, 255]]]))
        tensor([[[ True, False]]])
    """
    rows = reference.dim() == 2
    number = reference.shape[0]
    out = None
    for name, given in (('labels', labels), ('valid', valid)):
        if given is None:
            continue
        if given.dim() != (1 if rows else 3) or given.shape[0] != number:
            layout = f'(M,) with M = {number}' if rows else f'(B, H, W) with B = {number}'
            way_out = '' if rows else ' Drop a channel axis with squeeze(1).'
            raise ShapeError(f'{owner}: `{name}` must have shape {layout}, got {tuple(given.shape)}.{way_out}')
        if rows and name == 'valid' and given.dtype != torch.bool:
            raise ConfigError(f'{owner}: `valid` must be boolean, got {given.dtype}. Compare it first, e.g. mask > 0.')
        if not rows:
            size = (reference.shape[-2], reference.shape[-1])
            given = once(resize_labels if name == 'labels' else resize_mask, given, size)
        mask = (given != ignore_index if name == 'labels' else given).to(reference.device)
        out = mask if out is None else out & mask
    return out
