"""Maps, labels and masks onto one grid.

B images, C channels, (H, W) the grid of the input, ``size`` the wanted one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim

__all__ = ['RESIZE_OR_CONNECT', 'check_size', 'resize_labels', 'resize_map', 'resize_mask']

RESIZE_OR_CONNECT = 'Resize the teacher with resize_map, or put a connector in front of the student.'


def check_size(owner: str, size: tuple[int, int]) -> tuple[int, int]:
    """Return ``size`` as (h, w), or raise :class:`ConfigError`."""
    good = isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(s, int) and s > 0 for s in size)
    if not good:
        raise ConfigError(f'{owner}: `size` must be two integers (h, w) above 0, got {size!r}.')
    return (int(size[0]), int(size[1]))


def resize_map(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a map bilinearly, with ``align_corners=False``.

    Args:
        tensor: shape (B, C, H, W), floating point.
        size: (h, w).

    Returns:
        Shape (B, C, h, w), differentiable; the tensor itself if it fits.

    Raises:
        ShapeError: ``tensor`` is not 4-D.
        ConfigError: ``size`` is not a size.

    Example:
        >>> resize_map(torch.tensor([[[[0.0, 2.0]]]]), (1, 1)).item()
        1.0
    """
    size = check_size('resize_map', size)
    check_ndim('resize_map', 'tensor', tensor, 4, '(B, C, H, W)')
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    return torch_functional.interpolate(tensor, size=size, mode='bilinear', align_corners=False)


def _nearest(owner: str, argument: str, tensor: Tensor, size: tuple[int, int]) -> Tensor:
    size = check_size(owner, size)
    check_ndim(owner, argument, tensor, 3, '(B, H, W)')
    height, width = tensor.shape[-2:]
    if (height, width) == size:
        return tensor
    if height == 0 or width == 0:
        raise ShapeError(f'{owner}: `{argument}` must hold pixels, got {tuple(tensor.shape)}.')
    # The rule of torch's and mmseg's 'nearest', floor(i * H / h), in integers: no detour through floats,
    # and exact for every size. At stride 8 it takes pixel 8i, where a network of strided 3x3
    # convolutions with padding 1 centres its receptive field.
    rows = torch.arange(size[0], device=tensor.device) * height // size[0]
    columns = torch.arange(size[1], device=tensor.device) * width // size[1]
    return tensor[:, rows[:, None], columns]


def resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels by nearest neighbour; no new label appears.

    Output pixel i takes input pixel floor(i * H / h), as torch's ``'nearest'``.

    Args:
        labels: any dtype, shape (B, H, W).
        size: (h, w).

    Returns:
        Same dtype, shape (B, h, w); the tensor itself if it fits.

    Raises:
        ShapeError: ``labels`` is not 3-D.
        ConfigError: ``size`` is not a size.

    Example:
        >>> resize_labels(torch.tensor([[[1, 2, 255, 3]]]), (1, 2))
        tensor([[[  1, 255]]])
    """
    return _nearest('resize_labels', 'labels', labels, size)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a boolean mask by nearest neighbour, as :func:`resize_labels`.

    Args:
        mask: bool, shape (B, H, W).
        size: (h, w).

    Returns:
        Bool, shape (B, h, w); the tensor itself if it fits.

    Raises:
        ShapeError: ``mask`` is not 3-D.
        ConfigError: ``size`` is not a size, or ``mask`` is not boolean.

    Example:
        >>> resize_mask(torch.tensor([[[True, False]]]), (1, 4))
        tensor([[[ True,  True, False, False]]])
    """
    if mask.dtype != torch.bool:
        raise ConfigError(f'resize_mask: `mask` must be boolean, got {mask.dtype}. Compare it first, e.g. mask > 0.')
    return _nearest('resize_mask', 'mask', mask, size)
