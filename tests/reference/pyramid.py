"""Averages over coarser and coarser grids, written out as loops over their cells."""

from __future__ import annotations

import math

from torch import Tensor


def _span(index: int, cells: int, length: int) -> range:
    return range(math.floor(index * length / cells), math.ceil((index + 1) * length / cells))


def _mean_square(student: Tensor, teacher: Tensor, rows: int, columns: int, valid: Tensor | None) -> Tensor:
    batch, channels, height, width = student.shape
    total, count = student.new_zeros(()), 0
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                cell = [
                    (y, x)
                    for y in _span(i, rows, height)
                    for x in _span(j, columns, width)
                    if valid is None or valid[b, y, x]
                ]
                for d in range(channels if cell else 0):
                    one = sum(student[b, d, y, x] for y, x in cell) / len(cell)
                    two = sum(teacher[b, d, y, x] for y, x in cell) / len(cell)
                    total = total + (one - two) ** 2
                    count += 1
    return total / max(count, 1)


def hierarchical_context(
    student: Tensor, teacher: Tensor, sizes: tuple[int, ...] = (4, 2, 1), valid: Tensor | None = None
) -> Tensor:
    teacher = teacher.detach()
    height, width = student.shape[2:]
    levels = [(height, width)] + [(s, s) for s in sizes if s < height]
    parts = [_mean_square(student, teacher, *level, valid) for level in levels]
    weights = [0.5**k for k in range(len(levels))]
    return sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights)
