"""Patches of a map pooled into one value each, over the positions that count.

Shape shorthand: B images, D channels, H x W the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import MAX_SIDE, ConfigError, is_count
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.valid import zero_elsewhere

__all__ = ['POOLS', 'check_kernel_size', 'pool_patches']

POOLS = ('avg', 'max')


def _average(features: Tensor, kernel: tuple[int, int], wide_range: bool) -> Tensor:
    """Average over patches in ceil mode; one that hangs over the edge is divided by what it covers."""
    # The sum over a patch is formed before it is divided: near the end of the range that is too late.
    factor = kernel[0] * kernel[1] if wide_range else 1
    if factor > 1:
        features = features / factor
    nodes = torch_functional.avg_pool2d(features, kernel, kernel, ceil_mode=True, count_include_pad=False)
    return nodes * factor if factor > 1 else nodes


@full_precision
def pool_patches(
    features: Tensor, kernel: tuple[int, int], pool: str, valid: Tensor | None, wide_range: bool
) -> tuple[Tensor, Tensor | None]:
    """Pool ``features`` (B, D, H, W) in ceil mode over positions that count; return nodes and which count."""
    # Before anything else, so that whatever stands where nothing counts, NaN included, goes nowhere.
    features = zero_elsewhere(features, valid)
    if kernel == (1, 1):
        return features, valid
    if valid is None:
        if pool == 'max':
            return torch_functional.max_pool2d(features, kernel, kernel, ceil_mode=True), None
        return _average(features, kernel, wide_range), None
    share = _average(valid[:, None].to(features.dtype), kernel, False)
    some = share > 0
    if pool == 'max':
        lowest = torch.finfo(features.dtype).min
        nodes = torch.where(valid[:, None], features, lowest)
        nodes = torch_functional.max_pool2d(nodes, kernel, kernel, ceil_mode=True)
    else:
        nodes = _average(features, kernel, wide_range) / torch.where(some, share, 1)
    return torch.where(some, nodes, 0), some[:, 0]


def check_kernel_size(owner: str, kernel_size: int | Sequence[int]) -> tuple[int, int]:
    """Return ``kernel_size`` as (h, w), or raise :class:`ConfigError`."""
    sizes = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    good = isinstance(sizes, (tuple, list)) and len(sizes) == 2
    if not good or not all(is_count(s) and 0 < s <= MAX_SIDE for s in sizes):
        raise ConfigError(
            f'{owner}: `kernel_size` must be an integer above 0 or two of them (h, w), got {kernel_size!r}. '
            'Use 1 for no pooling.'
        )
    return (sizes[0], sizes[1])
