"""A neck that fuses the features of several networks, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, check_count, shown
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.layers import check_layers
from mmstructkd.registry import MODELS

__all__ = ['FusionNeck']

MAX_WIDTH = 2**14


@MODELS.register_module()
class FusionNeck(BaseModule):
    """Concatenates maps of several networks, and brings them back to the width of the first.

    A depthwise 3x3 convolution over all channels, then a 1x1 one, each with
    normalisation and ReLU: the form of the nearest released code (SJLeo/FFSD) for the
    fused teacher of MFEF (arXiv:2206.08224). A level that is not fused hands on the
    first network's map.

    Args:
        in_channels: for each level the widths of all networks, the first one's first.
        levels: numbers of the levels that are fused, negative from the end.
            ``None``: all. A level that no head reads would have parameters without a
            gradient.
        norm_cfg: normalisation.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> neck = FusionNeck([[4, 6], [8, 8]], levels=[-1])
        >>> maps = [[torch.zeros(2, 4, 8, 8), torch.zeros(2, 6, 8, 8)], [torch.zeros(2, 8, 4, 4)] * 2]
        >>> [tuple(level.shape) for level in neck(maps)]
        [(2, 4, 8, 8), (2, 8, 4, 4)]
    """

    def __init__(
        self,
        in_channels: Sequence[Sequence[int]],
        levels: Sequence[int] | None = None,
        norm_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        norm_cfg = dict(type='BN') if norm_cfg is None else dict(norm_cfg)
        if not _is_list(in_channels) or not all(_is_list(widths) for widths in in_channels):
            raise ConfigError(
                f'{owner}: `in_channels` must be a list with a list of widths for each level, got {shown(in_channels)}.'
            )
        for widths in in_channels:
            for width in widths:
                check_count(owner, 'in_channels', width, maximum=MAX_WIDTH)
        self.widths = tuple(tuple(widths) for widths in in_channels)
        number = len(in_channels)
        wanted = list(range(number)) if levels is None else list(levels)
        if not wanted or not all(isinstance(level, int) and -number <= level < number for level in wanted):
            raise ConfigError(
                f'{owner}: `levels` must be numbers of the {number} levels, at least one, got {shown(levels)}.'
            )
        self.levels = sorted({level % number for level in wanted})
        self.fusions = nn.ModuleDict()
        for level in self.levels:
            total, width = sum(in_channels[level]), in_channels[level][0]
            check_layers(owner, width, norm_cfg=norm_cfg)
            self.fusions[str(level)] = nn.Sequential(
                ConvModule(total, total, 3, padding=1, groups=total, norm_cfg=norm_cfg),
                ConvModule(total, width, 1, norm_cfg=norm_cfg),
            )

    def forward(self, features: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Fuse each level.

        Args:
            features: for each level the maps (B, C, H, W) of all networks; those of
                others are brought to the size of the first one's.

        Returns:
            One map a level, with the width and the size of the first network's.

        Raises:
            ShapeError: a level has other widths than the neck was built for.
        """
        out = []
        for level, maps in enumerate(features):
            first = maps[0]
            if level in self.levels:
                fusion = self.fusions[str(level)]
                whole = torch.cat([first, *(resize_map(m, tuple(first.shape[2:])) for m in maps[1:])], dim=1)
                if whole.shape[1] != fusion[0].in_channels:
                    raise ShapeError(
                        f'{type(self).__name__}: `features` of level {level} must have {fusion[0].in_channels} '
                        f'channels together, got {[m.shape[1] for m in maps]}.'
                    )
                first = fusion(whole)
            out.append(first)
        return tuple(out)


def _is_list(value: Any) -> bool:
    """Whether a config's value is a list with something in it."""
    return isinstance(value, (list, tuple)) and len(value) > 0
