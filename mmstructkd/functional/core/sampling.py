"""Random draws that depend on nothing but a seed, a step and a number.

B images, K draws an image, each of M places out of N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, is_count

__all__ = ['draw', 'draw_positions', 'hashed_uniform']

_BITS32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B1
# Odd, and below 2^31: products of 32-bit numbers with it stay inside int64.
_SPREAD = 0x1E3779B1


def scramble(x: Tensor) -> Tensor:
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
    key = scramble((seed + _GOLDEN) & _BITS32)
    key = scramble((key + (seed >> 32)) & _BITS32)
    key = scramble((key + step * _GOLDEN) & _BITS32)
    keys = scramble((key + (images + 1) * _GOLDEN) & _BITS32)
    draws = torch.arange(count * arity, device=images.device)
    bits = scramble((keys[:, None] + draws * _GOLDEN) & _BITS32)
    return ((scramble(bits ^ keys[:, None]) * size) >> 32).view(-1, count, arity)


def hashed_uniform(index: Tensor, step: Tensor | int) -> Tensor:
    """Return numbers that look uniform in [0, 1], a function of index and step alone.

    The same on every device and in every process, with no generator whose state
    would have to be saved, and no synchronisation.

    Args:
        index: integers of at least 0, any shape.
        step: which draw it is, an integer or an int64 scalar.

    Returns:
        Float32, the shape of ``index``.

    Example:
        >>> hashed_uniform(torch.arange(3), 0).tolist() == hashed_uniform(torch.arange(3), 0).tolist()
        True
    """
    key = scramble((torch.as_tensor(step) & _BITS32) * _SPREAD & _BITS32).to(index.device)
    bits = scramble((index.long() & _BITS32) * _SPREAD + key & _BITS32)
    return scramble(bits ^ key).to(torch.float32) / 2.0**32


def draw(candidates: Tensor, amount: int, step: Tensor | int) -> tuple[Tensor, Tensor]:
    """Pick entries of the last axis at random, without replacement and without synchronisation.

    Args:
        candidates: bool, shape (..., n): what may be picked.
        amount: how many, above 0; n where that is less.
        step: which draw it is, see :func:`hashed_uniform`.

    Returns:
        Indices (..., amount) and whether each is a candidate, for there may be
        fewer of them than asked for.

    Example:
        >>> index, good = draw(torch.tensor([False, True, False]), 2, 0)
        >>> index[0].item(), good.tolist()
        (1, [True, False])
    """
    size = candidates.shape[-1]
    luck = hashed_uniform(torch.arange(candidates.numel(), device=candidates.device), step).view(candidates.shape)
    value, index = torch.where(candidates, luck, -1).topk(min(amount, size), dim=-1)
    return index, value >= 0
