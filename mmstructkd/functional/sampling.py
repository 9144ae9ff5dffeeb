"""Random places that depend on nothing but a seed, a step and an image's number.

B images, K draws an image, each of M places out of N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, is_count

__all__ = ['draw_positions']

_BITS32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1


def _scramble(x: Tensor) -> Tensor:
    """Mix the bits of integers in [0, 2**32), one to one (a multiply and xor-shift hash).

    The factor has 27 bits, so that no product leaves int64.
    """
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & _BITS32
    return (x >> 16) ^ x


def draw_positions(stream: Tensor, images: Tensor, *, count: int, arity: int, size: int) -> Tensor:
    """Draw places of a map, uniformly and independently, with replacement.

    A hash of (seed, step, image, number of the draw), computed where ``stream``
    lies: the global generators are neither read nor moved, the host does not
    wait for the device, and every device gives the same numbers. Several
    processes that number their images as parts of one batch draw what one
    process would.

    Args:
        stream: seed and step, int64, shape (2,).
        images: number of each image, int64, shape (B,), on the same device.
        count: K, draws an image.
        arity: M, places a draw: 2 for pairs, 3 for triplets.
        size: N, places there are, e.g. H * W; at most 2**31.

    Returns:
        Int64 in [0, N), shape (B, K, M). Time and memory O(B K M).

    Raises:
        ShapeError: ``stream`` is not of shape (2,), or ``images`` not 1-D.
        ConfigError: ``count``, ``arity`` or ``size`` is no integer in its range.

    Example:
        >>> first = draw_positions(torch.tensor([0, 0]), torch.arange(2), count=5, arity=3, size=7)
        >>> first.shape, bool((first < 7).all())
        (torch.Size([2, 5, 3]), True)
        >>> again = draw_positions(torch.tensor([0, 0]), torch.tensor([1]), count=5, arity=3, size=7)
        >>> torch.equal(again[0], first[1])
        True
    """
    owner = 'draw_positions'
    if tuple(stream.shape) != (2,):
        raise ShapeError(f'{owner}: `stream` must have shape (2,), seed and step, got {tuple(stream.shape)}.')
    if images.dim() != 1:
        raise ShapeError(f'{owner}: `images` must have shape (B,), got {tuple(images.shape)}.')
    for name, value in (('count', count), ('arity', arity), ('size', size)):
        if not is_count(value) or not 0 < value <= 2**31:
            raise ConfigError(f'{owner}: `{name}` must be an integer from 1 to 2**31, got {value!r}.')
    seed, step = stream[0], stream[1]
    # One round for each number: all of them enter the hash, and 0 is no fixed point.
    key = _scramble((seed + _GOLDEN) & _BITS32)
    key = _scramble((key + (seed >> 32)) & _BITS32)
    key = _scramble((key + step * _GOLDEN) & _BITS32)
    keys = _scramble((key + (images + 1) * _GOLDEN) & _BITS32)
    draws = torch.arange(count * arity, device=images.device)
    bits = _scramble((keys[:, None] + draws * _GOLDEN) & _BITS32)
    return ((_scramble(bits ^ keys[:, None]) * size) >> 32).view(-1, count, arity)
