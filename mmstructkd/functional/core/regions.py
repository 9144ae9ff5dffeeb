r"""Regions: centres of classes and averages over boxes.

Shape shorthand: B images, D channels, K classes, H x W the grid, N = H W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ShapeError, check_ndim, check_positive
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.valid import labelled_pixels, valid_pixels, zero_elsewhere

__all__ = ['box_average', 'centers_of_classes', 'class_centers']


def centers_of_classes(features: Tensor, classes: Tensor, inside: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Centres (B, K, D) and pixel counts (B, K) of features (B, D, N) that are 0 where nothing counts."""
    index = torch.arange(num_classes, device=features.device)
    members = (classes.flatten(1)[:, None] == index[:, None]) & inside.flatten(1)[:, None]
    count = members.sum(dim=2)
    # Divided before the sum: that of many large features may leave the range, their mean does not.
    share = members.to(features.dtype) / count.clamp(min=1).to(features.dtype)[:, :, None]
    with exact_matmul(features.device.type):
        return torch.bmm(share, features.mT), count


@full_precision
def class_centers(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Average the features of each class of each image, in one product with one-hot labels.

    Args:
        features: shape (B, D, H, W), any float dtype. Not detached.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest.
            What is no class (below 0, from ``num_classes`` on) does not count.
        num_classes: K.
        ignore_index: pixels with this label do not count.
        valid: pixels that count, bool, shape (B, h, w), likewise. ``None``: all.

    Returns:
        Centres (B, K, D), at least float32, 0 for a class that an image lacks,
        and numbers of pixels (B, K). Time O(B K D N), memory O(B (K + D) N).

    Raises:
        ShapeError: ``features`` is not 4-D, or labels or mask are no map of B
            images.
        ConfigError: ``num_classes`` is not above 0.

    Example:
        >>> x = torch.tensor([1.0, 3.0, 9.0]).view(1, 1, 1, 3)
        >>> centers, count = class_centers(x, torch.tensor([[[0, 0, 255]]]), 2)
        >>> centers.squeeze().tolist(), count.tolist()
        ([2.0, 0.0], [[2, 0]])
    """
    owner = 'class_centers'
    check_ndim(owner, 'features', features, 4, '(B, D, H, W)')
    check_positive(owner, 'num_classes', num_classes)
    classes, inside = labelled_pixels(
        owner, features, labels, num_classes=num_classes, ignore_index=ignore_index, valid=valid
    )
    # Before the product, so that whatever stands where nothing counts, NaN included, goes nowhere.
    features = zero_elsewhere(features, inside)
    return centers_of_classes(features.flatten(2), classes, inside, num_classes)


def _coverage(low: Tensor, high: Tensor, cells: int, length: int) -> Tensor:
    """Share of each of ``cells`` cells of an axis of ``length`` pixels that [low, high] covers, (n, cells)."""
    edges = torch.arange(cells + 1, device=low.device, dtype=low.dtype) * (length / cells)
    inner = torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])
    return inner.clamp(min=0) * (cells / length)


@full_precision
def box_average(
    features: Tensor,
    boxes: Sequence[Tensor],
    input_size: tuple[int, int],
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Average the features inside each box, cells at its rim by the share that it covers.

    Args:
        features: shape (B, D, H, W), any float dtype. Not detached.
        boxes: one tensor an image, (n_b, 4), ``xyxy`` in pixels of the input.
        input_size: (h, w) of the input that the map covers.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Averages (n, D) of the boxes of all images in order, at least float32,
        and which cover a position that counts (n,); the others are 0. Time
        O(n D N), memory O(n D W).

    Raises:
        ShapeError: ``features`` is not 4-D, or there is not one set of boxes an
            image.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
        >>> box_average(x, [torch.tensor([[0.0, 0.0, 6.0, 4.0]])], (4, 8))[0].round(decimals=4)
        tensor([[1.6667]])
    """
    owner = 'box_average'
    check_ndim(owner, 'features', features, 4, '(B, D, H, W)')
    if len(boxes) != features.shape[0] or any(b.dim() != 2 or b.shape[-1] != 4 for b in boxes):
        raise ShapeError(
            f'{owner}: `boxes` must hold one tensor (n, 4) an image for {features.shape[0]} images, '
            f'got {[tuple(b.shape) for b in boxes]}.'
        )
    valid_mask = valid_pixels(owner, features, valid=valid)
    features = zero_elsewhere(features, valid_mask)
    averages, covered = [], []
    for b, some in enumerate(boxes):
        corners = some.to(features)
        rows = _coverage(corners[:, 1], corners[:, 3], features.shape[2], input_size[0])
        columns = _coverage(corners[:, 0], corners[:, 2], features.shape[3], input_size[1])
        if valid_mask is None:
            area = rows.sum(dim=1) * columns.sum(dim=1)
        else:
            area = torch.einsum('nh,hw,nw->n', rows, valid_mask[b].to(features.dtype), columns)
        rows = rows / torch.where(area > 0, area, 1)[:, None]
        averages.append(torch.einsum('nh,dhw,nw->nd', rows, features[b], columns))
        covered.append(area > 0)
    return torch.cat(averages), torch.cat(covered)
