"""Which pixels count: the one place that decides it, and what is done with the others.

B images, C classes, H x W pixels, M rows. ``valid`` is boolean and True where a
position counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.resize import resize_labels, resize_mask
from mmstructkd.functional.core.sharing import once

__all__ = ['labelled_pixels', 'valid_entries', 'valid_pixels', 'zero_elsewhere']


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


def labelled_pixels(
    owner: str,
    reference: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the class of each pixel (or row) of ``reference``, and which have one.

    A label outside the classes does not count: as an index it would be an error of
    the device.

    Args:
        owner: who asks, for messages.
        reference: a map, shape (B, D, H, W), or rows, shape (M, D).
        labels: integer classes, shape (B, h, w), brought to H x W by nearest; for
            rows (M,).
        num_classes: C.
        ignore_index: the label that does not count.
        valid: as in :func:`valid_pixels`.

    Returns:
        Classes, int64, 0 where none counts, and where one does, bool; both of shape
        (B, H, W) or (M,), on the device of ``reference``.

    Raises:
        ShapeError: ``labels`` or ``valid`` is no map of B images, or not of M rows.
        ConfigError: ``valid`` is not boolean.

    Example:
        >>> labelled_pixels('doc', torch.zeros(3, 2), torch.tensor([1, 255, 7]), num_classes=2)
        (tensor([1, 0, 0]), tensor([ True, False, False]))
    """
    there = valid_pixels(owner, reference, labels=labels, ignore_index=ignore_index, valid=valid)
    assert there is not None
    if reference.dim() == 4:
        labels = resize_labels(labels, (reference.shape[2], reference.shape[3]))
    labels = labels.to(reference.device, torch.int64)
    there = there & (labels >= 0) & (labels < num_classes)
    return torch.where(there, labels, 0), there


def valid_entries(
    owner: str, shape: Sequence[int], valid: Tensor | None, *, like: Tensor, name: str = 'valid'
) -> Tensor:
    """Return a mask of exactly this shape; all count where none is given.

    Args:
        owner: who asks, for messages.
        shape: what the mask must have, such as one entry a row.
        valid: bool. ``None``: all.
        like: the result lies on its device.
        name: what the argument is called, for messages.

    Returns:
        Bool, of that shape.

    Raises:
        ShapeError: ``valid`` has another shape, or is not boolean.

    Example:
        >>> valid_entries('doc', (2,), None, like=torch.zeros(2, 3))
        tensor([True, True])
    """
    if valid is None:
        return torch.ones(tuple(shape), dtype=torch.bool, device=like.device)
    if tuple(valid.shape) != tuple(shape) or valid.dtype != torch.bool:
        raise ShapeError(
            f'{owner}: `{name}` must be boolean of shape {tuple(shape)}, got {tuple(valid.shape)} of {valid.dtype}.'
        )
    return valid.to(like.device)


def zero_elsewhere(values: Tensor, valid: Tensor | None) -> Tensor:
    """Put 0 where nothing counts, before anything else: whatever stands there, NaN included, goes nowhere.

    Args:
        values: a map, shape (B, D, ...), or rows, shape (M, D).
        valid: bool, the same without the axis of D. ``None``: all count.

    Returns:
        Same shape as ``values``.

    Example:
        >>> zero_elsewhere(torch.tensor([[torch.nan], [2.0]]), torch.tensor([False, True]))
        tensor([[0.],
                [2.]])
    """
    return values if valid is None else torch.where(valid.unsqueeze(1), values, 0)
