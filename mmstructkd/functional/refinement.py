r"""How a pyramid of features refines itself: down from the coarsest level, and up again.

Levels go from fine to coarse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_positive
from mmstructkd.functional.core.resize import resize_map

__all__ = ['fuse_maps', 'refine_pyramid']

Layer = Callable[[Tensor], Tensor]


def _nearest(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(tensor.shape[-2:]) == size:
        return tensor
    return torch_functional.interpolate(tensor, size=size, mode='nearest')


def refine_pyramid(
    levels: Sequence[Tensor], *, up: Sequence[Layer], down: Sequence[Layer] | None = None
) -> list[Tensor]:
    r"""Pass a pyramid from its coarsest level to its finest, and back.

    .. math::
        u_{n-1} = c_{n-1}(x_{n-1}), \quad u_l = c_l(x_l + \mathrm{bilinear}(u_{l+1})); \qquad
        o_0 = u_0, \quad o_l = c'_l(x_l + u_l + \mathrm{nearest}(o_{l-1}))

    Self-teacher of FRSKD (arXiv:2103.08273) in its segmentation code, whose layers c
    are a scale and bias a channel, a BatchNorm and a ReLU. Without ``down`` the u are
    the result: its last layer. Differs from that code: levels are brought to their
    neighbour's size, not by the ratio of their widths, so that any sizes fit, also
    equal ones.

    A level that no head reads gets no gradient unless it lies on the way to one that
    is read: end with ``up`` where the finest level is read, with ``down`` where the
    coarsest is.

    Args:
        levels: shape (B, D, H_l, W_l), from fine to coarse, all of one width.
        up: one layer a level: c.
        down: one layer for each level but the finest: c'. ``None``: no way back.

    Returns:
        One tensor a level.

    Raises:
        ShapeError: there is no level, one is not 4-D, or B or D differ.
        ConfigError: there is not one layer for each.

    Example:
        >>> fine, coarse = torch.ones(1, 1, 4, 4), torch.full((1, 1, 2, 2), 2.0)
        >>> same = lambda x: x
        >>> [x.unique().item() for x in refine_pyramid([fine, coarse], up=[same, same])]
        [3.0, 2.0]
        >>> [x.unique().item() for x in refine_pyramid([fine, coarse], up=[same, same], down=[same])]
        [3.0, 7.0]
    """
    owner = 'refine_pyramid'
    if not levels:
        raise ShapeError(f'{owner}: `levels` must hold at least one tensor, got none.')
    for level in levels:
        check_ndim(owner, 'levels', level, 4, '(B, D, H, W)')
    if any(level.shape[:2] != levels[0].shape[:2] for level in levels):
        raise ShapeError(
            f'{owner}: `levels` must share B and D, got {[tuple(level.shape) for level in levels]}. '
            'Project them to one width first.'
        )
    for argument, layers, wanted in (('up', up, len(levels)), ('down', down, len(levels) - 1)):
        if layers is not None and len(layers) != wanted:
            raise ConfigError(f'{owner}: `{argument}` must hold {wanted} layers, got {len(layers)}.')
    sizes = [(level.shape[2], level.shape[3]) for level in levels]
    raised = [up[-1](levels[-1])]
    for level, size, layer in zip(levels[-2::-1], sizes[-2::-1], up[-2::-1], strict=True):
        raised.insert(0, layer(level + resize_map(raised[0], size)))
    if down is None:
        return raised
    out = [raised[0]]
    for level, higher, size, layer in zip(levels[1:], raised[1:], sizes[1:], down, strict=True):
        out.append(layer(level + higher + _nearest(out[-1], size)))
    return out


def fuse_maps(maps: Sequence[Tensor], weights: Tensor, *, eps: float = 1e-6) -> Tensor:
    r"""Sum of maps with learned shares.

    .. math:: f = \sum_k \frac{\max(w_k, 0)}{\sum_j \max(w_j, 0) + \epsilon} \, x_k

    Fast normalised fusion of EfficientDet (arXiv:1911.09070), as the self-teacher of
    FRSKD's classification code has it.

    Args:
        maps: tensors of one shape.
        weights: w, shape (number of maps,).
        eps: :math:`\epsilon`, above 0.

    Returns:
        The same shape, differentiable in all.

    Raises:
        ShapeError: there is no map, the shapes differ, or there is not one weight a
            map.
        ConfigError: ``eps`` is not above 0.

    Example:
        >>> fuse_maps([torch.zeros(2), torch.ones(2)], torch.tensor([1.0, 3.0])).round(decimals=3)
        tensor([0.7500, 0.7500])
    """
    owner = 'fuse_maps'
    check_positive(owner, 'eps', eps)
    if not maps or any(one.shape != maps[0].shape for one in maps):
        raise ShapeError(f'{owner}: `maps` must be of one shape, got {[tuple(one.shape) for one in maps]}.')
    if tuple(weights.shape) != (len(maps),):
        raise ShapeError(f'{owner}: `weights` must have shape ({len(maps)},), got {tuple(weights.shape)}.')
    positive = torch.relu(weights)
    shares = positive / (positive.sum() + eps)
    return torch.stack([share * one for share, one in zip(shares, maps, strict=True)]).sum(dim=0)
