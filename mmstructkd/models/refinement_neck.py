"""The neck of a self-teacher: every level of a pyramid refined by all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as torch_functional
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, check_count, check_one_of, shown
from mmstructkd.registry import MODELS

__all__ = ['RefinementNeck']

#: No limits of sense: more is a slip, and would fill the memory.
MAX_WIDTH, MAX_LAYERS = 2**14, 64
CONVOLUTIONS = ('scale', 'separable')
ENDS = ('coarse', 'fine')


def _block(channels: int, conv: str) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU, all of one width."""
    if conv == 'scale':
        layers: list[nn.Module] = [nn.Conv2d(channels, channels, 1, groups=channels)]
    else:
        layers = [
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
                nn.Conv2d(channels, channels, 1),
            )
        ]
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())


@MODELS.register_module()
class RefinementNeck(BaseModule):
    r"""Refine each level of a pyramid by its neighbours, top-down and then bottom-up.

    With levels 0 (fine) to n - 1 (coarse), one layer computes

    .. math::
        u_{n-1} = c(x_{n-1}), \quad u_l = c(x_l + \mathrm{up}(u_{l+1})), \quad
        y_0 = u_0, \quad y_l = c(x_l + u_l + \mathrm{down}(y_{l-1}))

    with bilinear ``up`` and nearest ``down``. It is the self-teacher's network in
    Feature Refinement via Self-Knowledge Distillation (arXiv:2103.08273), in the
    form of its released code for segmentation (BiFPN without fusion weights).
    Differs from that code: neighbours are resized to the size of the level and
    not by a factor taken from the width, so that any sizes and equal strides
    work; and levels may have widths of their own, in which case a 1x1 convolution
    brings a neighbour to the width of the level.

    A last layer that ends ``'fine'`` has no bottom-up pass: its outputs are the
    :math:`u_l`. Every output then lies on the way to a head that reads the finest
    level; with ``'coarse'``, on the way to one that reads the coarsest. A head that
    reads all levels may take either. Choose by the head: levels that it does not
    depend on would never be trained.

    Args:
        in_channels: width of each level, fine to coarse; the outputs have the same.
        layers: how many layers, at least 1.
        conv: ``'scale'``, as released (a scale and a bias for each channel), or
            ``'separable'`` (depthwise 3x3, then 1x1).
        end: ``'coarse'`` or ``'fine'``, see above.

    Shape:
        - input, output: as many maps :math:`(B, C_l, H_l, W_l)` as ``in_channels``.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: another number of maps.

    Example:
        >>> import torch
        >>> neck = RefinementNeck(in_channels=[4, 8])
        >>> [tuple(y.shape) for y in neck([torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)])]
        [(2, 4, 8, 8), (2, 8, 4, 4)]
    """

    def __init__(
        self, in_channels: Sequence[int], layers: int = 1, conv: str = 'separable', end: str = 'coarse'
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_one_of(owner, 'conv', conv, CONVOLUTIONS)
        check_one_of(owner, 'end', end, ENDS)
        if not isinstance(in_channels, (list, tuple)) or not in_channels:
            raise ConfigError(
                f'{owner}: `in_channels` must be a list with the width of each level, got {shown(in_channels)}.'
            )
        for width in in_channels:
            check_count(owner, 'in_channels', width, maximum=MAX_WIDTH)
        check_count(owner, 'layers', layers, maximum=MAX_LAYERS)
        widths = tuple(in_channels)
        self.widths, self.layers, self.end = widths, layers, end
        levels = len(widths)
        upward = layers if end == 'coarse' else layers - 1  # layers that have a bottom-up pass
        # Flat lists: the block of layer k and level l is up[k * n + l] and down[k * (n - 1) + l - 1].
        self.up = nn.ModuleList(_block(widths[level], conv) for _ in range(layers) for level in range(levels))
        self.down = nn.ModuleList(_block(widths[level], conv) for _ in range(upward) for level in range(1, levels))
        self.match_up = nn.ModuleList(
            self._match(widths[level + 1], widths[level]) for _ in range(layers) for level in range(levels - 1)
        )
        self.match_down = nn.ModuleList(
            self._match(widths[level - 1], widths[level]) for _ in range(upward) for level in range(1, levels)
        )

    @staticmethod
    def _match(in_channels: int, out_channels: int) -> nn.Module:
        """Bring a neighbour to the width of a level."""
        return nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the refined levels."""
        if len(inputs) != len(self.widths):
            raise ShapeError(
                f'{type(self).__name__}: `inputs` must be {len(self.widths)} maps, got {len(inputs)}. '
                'Give `in_channels` one width for each level.'
            )
        levels = tuple(inputs)
        for layer in range(self.layers):
            levels = self._layer(layer, levels)
        return levels

    def _layer(self, layer: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """One top-down pass and, but for a last layer that ends fine, one bottom-up pass."""
        count = len(inputs)
        first, between = layer * count, layer * (count - 1)
        refined: list[Tensor] = [self.up[first + count - 1](inputs[-1])]
        for level in range(count - 2, -1, -1):
            above = self.match_up[between + level](refined[0])
            size = inputs[level].shape[-2:]
            above = torch_functional.interpolate(above, size=size, mode='bilinear', align_corners=False)
            refined.insert(0, self.up[first + level](inputs[level] + above))
        if self.end == 'fine' and layer == self.layers - 1:
            return tuple(refined)
        outputs = [refined[0]]
        for level in range(1, count):
            below = self.match_down[between + level - 1](outputs[-1])
            below = torch_functional.interpolate(below, size=inputs[level].shape[-2:], mode='nearest')
            outputs.append(self.down[between + level - 1](inputs[level] + refined[level] + below))
        return tuple(outputs)
