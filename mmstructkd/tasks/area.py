"""Which part of a padded batch lies inside its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ['image_sizes', 'valid_area']


def image_sizes(data_samples: Sequence[Any] | None) -> list[tuple[int, int]] | None:
    """Unpadded (h, w) of each image, or ``None`` where it is not known."""
    if not data_samples:
        return None
    sizes = [sample.metainfo.get('img_shape') for sample in data_samples]
    return None if any(size is None for size in sizes) else [tuple(size[:2]) for size in sizes]


def valid_area(inputs: Tensor, data_samples: Sequence[Any] | None) -> Tensor | None:
    """Pixels inside the images, i.e. not padding.

    Args:
        inputs: the batch, shape (B, C, H, W), padded at the right and bottom.
        data_samples: one per image, with ``img_shape`` in their metainfo.

    Returns:
        Bool, shape (B, H, W); ``None`` where nothing is padded.
    """
    height, width = inputs.shape[-2:]
    sizes = image_sizes(data_samples)
    if sizes is None or all(h >= height and w >= width for h, w in sizes):
        return None
    sides = torch.tensor(sizes, device=inputs.device)
    rows = torch.arange(height, device=inputs.device)[None, :, None] < sides[:, 0, None, None]
    columns = torch.arange(width, device=inputs.device)[None, None, :] < sides[:, 1, None, None]
    return rows & columns
