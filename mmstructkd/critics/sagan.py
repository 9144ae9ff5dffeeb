"""The critic of Structured Knowledge Distillation: a SAGAN discriminator.

Shorthand: B maps of C channels and H x W positions; P the positions of a
feature inside the critic.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from mmstructkd.critics.input_norm import JointBatchNorm
from mmstructkd.errors import ConfigError, ShapeError, check_count, check_flag, check_ndim, is_count
from mmstructkd.registry import MODELS

__all__ = ['SAGANCritic', 'SpatialSelfAttention']

# Four halvings leave 4 x 4 of 64, the kernel of the last convolution.
_SMALLEST_SIDE = 64
# What smaller maps are enlarged to: the published input, a 512 x 512 crop at stride 8.
_PUBLISHED_SIDE = 65
_LARGEST_SIDE = 4096
#: More than any map or critic has; numbers above are slips that would fill the memory.
MAX_WIDTH, MAX_BASE = 2**16, 1024


class SpatialSelfAttention(nn.Module):
    r"""Every position takes values from all positions, added with a learnt scale.

    .. math:: y = x + \gamma \, V \, \mathrm{softmax}(Q^\top K)^\top, \qquad \gamma = 0 \text{ at first}

    Self-attention of SAGAN (arXiv:1805.08318) without its scaling of the
    product, as in the code of Structured Knowledge Distillation. Query and key
    have an eighth of the channels. Written out in plain products, as the fused
    kernels have no second derivative, which the gradient penalty needs.

    Args:
        channels: channels of the feature.

    Cost:
        Memory :math:`O(B P^2)`; the critic keeps P small.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query = nn.Conv2d(channels, inner, 1)
        self.key = nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Return a feature of the shape of ``x``, (B, D, h, w)."""
        query = self.query(x).flatten(2).transpose(1, 2)
        key = self.key(x).flatten(2)
        attention = torch.softmax(query @ key, dim=-1)
        mixed = self.value(x).flatten(2) @ attention.transpose(1, 2)
        out: Tensor = x + self.gamma * mixed.reshape(x.shape)
        return out


@MODELS.register_module()
class SAGANCritic(nn.Module):
    """Scores whole maps: how much they look like the teacher's.

    Optional BatchNorm over the channels of the map, four blocks of a
    convolution (4 x 4, stride 2, spectral norm) and LeakyReLU 0.1, of 64, 128,
    256 and 512 channels, self-attention after the third and the fourth, and a
    convolution 4 x 4 to one channel. 65 x 65 -> 32 -> 16 -> 8 -> 4 -> 1.

    Structured Knowledge Distillation (arXiv:1903.04197), the authors' master
    branch; ``batch_norm=False, image_channels=3`` is their first one. Differs
    from the authors' code: images shrink with anti-aliasing and without
    ``align_corners``; spectral norm starts from 15 power iterations and stands
    still in eval mode (both torch's); maps of any size are taken.

    Maps whose shorter side is below 64 are enlarged so that it is 65 (bilinear,
    the aspect is kept); maps whose longer side is above ``max_side`` are shrunk,
    which bounds the memory of the attention, quadratic in the positions:
    at ``max_side=256`` it sees at most 32 x 32 of them.

    Args:
        in_channels: channels C of the maps (classes; 1 for depth).
        image_channels: channels of the image that is concatenated to the map;
            0: not conditional.
        base_channels: width of the first block; each next one doubles it.
        batch_norm: normalise the map's channels first. In training the
            statistics are those of the batch over all processes
            (:class:`~mmstructkd.critics.JointBatchNorm`), teacher and student apart.
        size: work at this size, a side or (h, w), each at least 64. ``None``:
            at the map's own, within the bounds above.
        max_side: the longest side that is taken as it is, at least 65.

    Shape:
        - maps: :math:`(B, C, H, W)`
        - images: :math:`(B, C_{image}, H_i, W_i)`, any size; only if conditional
        - output: :math:`(B, 1, h, w)`, no unit, unbounded; 1 x 1 for 65 x 65

    Raises:
        ConfigError: a number is out of range.
        ShapeError: maps or images have other channels or axes.

    Example:
        >>> critic = SAGANCritic(in_channels=19, base_channels=8)
        >>> critic(torch.zeros(2, 19, 65, 65)).shape
        torch.Size([2, 1, 1, 1])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        image_channels: int = 0,
        base_channels: int = 64,
        batch_norm: bool = True,
        size: int | Sequence[int] | None = None,
        max_side: int = 256,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self._arguments = dict(
            in_channels=in_channels,
            image_channels=image_channels,
            base_channels=base_channels,
            batch_norm=batch_norm,
            size=size,
            max_side=max_side,
        )
        check_count(owner, 'in_channels', in_channels, maximum=MAX_WIDTH)
        check_count(owner, 'image_channels', image_channels, 0, maximum=MAX_WIDTH)
        check_count(owner, 'base_channels', base_channels, maximum=MAX_BASE)
        check_flag(owner, 'batch_norm', batch_norm)
        check_count(owner, 'max_side', max_side, _PUBLISHED_SIDE)
        self.in_channels = in_channels
        self.image_channels = image_channels
        self.max_side = max_side
        self.size = _as_size(owner, size)

        widths = [base_channels * factor for factor in (1, 2, 4, 8)]
        self.input_norm = JointBatchNorm(in_channels) if batch_norm else nn.Identity()
        self.block1 = self._make_block(in_channels + image_channels, widths[0])
        self.block2 = self._make_block(widths[0], widths[1])
        self.block3 = self._make_block(widths[1], widths[2])
        self.attention3 = SpatialSelfAttention(widths[2])
        self.block4 = self._make_block(widths[2], widths[3])
        self.attention4 = SpatialSelfAttention(widths[3])
        self.score = nn.Conv2d(widths[3], 1, 4)

    @staticmethod
    def _make_block(in_channels: int, out_channels: int) -> nn.Sequential:
        conv = spectral_norm(nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1))
        return nn.Sequential(conv, nn.LeakyReLU(0.1))

    def __deepcopy__(self, memo: dict[int, Any]) -> SAGANCritic:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce__(self) -> tuple:
        """Pickle by arguments and weights: torch refuses to pickle the spectral norm's own classes."""
        return _rebuild, (type(self), self._arguments, self.state_dict(), self.training)

    def working_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size (h, w) at which maps of ``size`` are scored.

        Example:
            >>> SAGANCritic(in_channels=1, base_channels=8).working_size((45, 60))
            (65, 87)
        """
        if self.size is not None:
            return self.size
        scale = 1.0
        if min(size) < _SMALLEST_SIDE:
            scale = _PUBLISHED_SIDE / min(size)
        if max(size) * scale > self.max_side:
            scale = self.max_side / max(size)
        if scale == 1.0:
            return size
        # A map much longer than wide cannot keep its aspect between both bounds.
        height, width = (min(max(round(side * scale), _PUBLISHED_SIDE), self.max_side) for side in size)
        return height, width

    def forward(self, maps: Tensor, images: Tensor | None = None) -> Tensor:
        """Return the scores of ``maps``, shape (B, 1, h, w)."""
        owner = type(self).__name__
        check_ndim(owner, 'maps', maps, 4, '(B, C, H, W)')
        if maps.shape[1] != self.in_channels:
            raise ShapeError(f'{owner}: `maps` must have {self.in_channels} channels, got {tuple(maps.shape)}.')
        size = self.working_size((maps.shape[2], maps.shape[3]))
        features = self.input_norm(_resize(maps, size))
        if self.image_channels:
            if images is None or images.dim() != 4 or images.shape[1] != self.image_channels:
                got = None if images is None else tuple(images.shape)
                raise ShapeError(
                    f'{owner}: `images` must have shape (B, {self.image_channels}, H, W), got {got}. '
                    'Build the critic with image_channels=0 for one that does not see the image.'
                )
            features = torch.cat([_resize(images.to(features), size), features], dim=1)
        features = self.block2(self.block1(features))
        features = self.attention3(self.block3(features))
        features = self.attention4(self.block4(features))
        scores: Tensor = self.score(features)
        return scores


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize bilinearly, averaging where it shrinks; the tensor itself where nothing changes."""
    height, width = maps.shape[-2:]
    if (height, width) == size:
        return maps
    shrinks = size[0] < height or size[1] < width
    return functional.interpolate(maps, size=size, mode='bilinear', align_corners=False, antialias=shrinks)


def _as_size(owner: str, size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    whole = all(map(is_count, sides))
    if len(sides) != 2 or not whole or not _SMALLEST_SIDE <= min(sides) <= max(sides) <= _LARGEST_SIDE:
        raise ConfigError(
            f'{owner}: `size` must be a side or (h, w) of at least {_SMALLEST_SIDE} each, got {size!r}. '
            'Four strided convolutions and a 4 x 4 kernel need as much; '
            f'above {_LARGEST_SIDE} the attention fills any memory.'
        )
    return sides[0], sides[1]


def _rebuild(
    kind: type[SAGANCritic], arguments: dict[str, Any], weights: dict[str, Tensor], training: bool
) -> SAGANCritic:
    """Make a critic again from what was pickled; the global random stream stays as it is."""
    with torch.random.fork_rng():
        critic = kind(**arguments)
    critic.load_state_dict(weights)
    return critic.train(training)
