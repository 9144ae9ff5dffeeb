"""Neighbours on a grid: pairs of places a given offset apart, as two views of one map."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ['half_of_offsets', 'shifted_views']


def half_of_offsets(grid: tuple[int, int], radius: int) -> Iterator[tuple[int, int]]:
    """Half of the offsets in range: of each pair of opposite ones, one; and (0, 0)."""
    height, width = min(radius, grid[0] - 1), min(radius, grid[1] - 1)
    for dy in range(height + 1):
        for dx in range(-width if dy else 0, width + 1):
            yield dy, dx


def shifted_views(maps: Tensor, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    """Views of (..., h, w) maps such that places in the second lie (dy, dx) after those in the first."""
    height, width = maps.shape[-2:]
    left, right = max(0, -dx), max(0, dx)
    first = maps[..., : height - dy, left : width - right]
    second = maps[..., dy:, left + dx : width - right + dx]
    return first, second
