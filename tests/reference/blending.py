"""Turned and blended images, written out as loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.logits import kl, probabilities
from tests.reference.region import cosine


def turned(image: Tensor, name: str) -> Tensor:
    """One image (..., H, W), pixel by pixel."""
    height, width = image.shape[-2:]
    source = {
        'none': lambda y, x: (y, x),
        'quarter': lambda y, x: (x, width - 1 - y),
        'half': lambda y, x: (height - 1 - y, width - 1 - x),
        'three_quarters': lambda y, x: (height - 1 - x, y),
        'flip': lambda y, x: (y, width - 1 - x),
        'flip_half': lambda y, x: (height - 1 - y, x),
    }[name]
    out = torch.empty_like(image)
    for y in range(height):
        for x in range(width):
            v, u = source(y, x)
            out[..., y, x] = image[..., v, u]
    return out


def kept(scores: Sequence[Sequence[float]], own: Sequence[int], keep: float) -> list[bool]:
    ranks = []
    for row, k in zip(scores, own, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        ranks.append(order.index(k))
    right = [i for i, rank in enumerate(ranks) if rank == 0]
    wrong = sorted((i for i, rank in enumerate(ranks) if rank > 0), key=lambda i: (ranks[i], i))
    chosen = right + wrong[: int(len(wrong) * keep)]
    return [i in chosen for i in range(len(ranks))]


def cross_view(
    student: Tensor, teacher: Tensor, keep: float, temperature: float, views: int, rows: Sequence[bool] | None = None
) -> Tensor:
    teacher = teacher.detach()
    images = len(student) // views
    upright = [views * b for b in range(images)]
    turned_rows = [i for i in range(len(student)) if i % views]
    near_s, near_t = ([[cosine(e[i], e[j]) for j in upright] for i in turned_rows] for e in (student, teacher))
    if rows is None:
        own = [i // views for i in turned_rows]
        rows = kept([[z.item() for z in row] for row in near_t], own, keep)
    terms = [
        kl(probabilities(torch.stack(row_t), temperature), probabilities(torch.stack(row_s), temperature))
        for row_s, row_t, some in zip(near_s, near_t, rows, strict=True)
        if some
    ]
    return temperature**2 * sum(terms, student.sum() * 0) / max(len(terms), 1)


def blend(values: Tensor, index: Sequence[int], shares: Sequence[float]) -> Tensor:
    return torch.stack([shares[b] * values[b] + (1 - shares[b]) * values[index[b]] for b in range(len(values))])


def blended_cross_entropy(
    student: Tensor, labels: Tensor, index: Sequence[int], shares: Sequence[float], valid: Tensor | None = None
) -> Tensor:
    """Maps; what is no class is left out."""
    batch, classes, height, width = student.shape
    total = student.new_zeros(())
    for first in (True, False):
        terms = []
        for b in range(batch):
            for y in range(height):
                for x in range(width):
                    label = int(labels[b if first else index[b], y, x])
                    if (valid is None or valid[b, y, x]) and 0 <= label < classes:
                        share = shares[b] if first else 1 - shares[b]
                        terms.append(-share * probabilities(student[b, :, y, x], 1.0)[label].log())
        total = total + sum(terms, student.sum() * 0) / max(len(terms), 1)
    return total


def blended_mse(
    student: Tensor, teacher: Tensor, index: Sequence[int], shares: Sequence[float], valid: Tensor | None = None
) -> Tensor:
    """Positions that count in both parts of a blend."""
    blended = blend(teacher, index, shares)
    terms = []
    for b in range(len(student)):
        for y in range(student.shape[2]):
            for x in range(student.shape[3]):
                if valid is None or (valid[b, y, x] and valid[index[b], y, x]):
                    terms += [(student[b, d, y, x] - blended[b, d, y, x]) ** 2 for d in range(student.shape[1])]
    return sum(terms, student.sum() * 0) / max(len(terms), 1)
