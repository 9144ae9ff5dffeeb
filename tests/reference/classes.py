"""Relations between classes, written out as loops over images, classes and positions."""

from __future__ import annotations

import torch
from torch import Tensor


def distribution(scores: list[Tensor], temperature: float) -> list[Tensor]:
    exps = [(s / temperature).exp() for s in scores]
    return [e / sum(exps) for e in exps]


def places(valid: Tensor | None, b: int, height: int, width: int) -> list[tuple[int, int]]:
    return [(y, x) for y in range(height) for x in range(width) if valid is None or valid[b, y, x]]


def kl_matrix(logits: Tensor, temperature: float = 1.0, valid: Tensor | None = None) -> Tensor:
    batch, classes, height, width = logits.shape
    images = []
    for b in range(batch):
        where = places(valid, b, height, width)
        probs = [distribution([logits[b, c, y, x] for y, x in where], temperature) for c in range(classes)]
        rows = []
        for i in range(classes):
            for j in range(classes):
                entry = logits.new_zeros(())
                for p, q in zip(probs[i], probs[j], strict=True):
                    entry = entry + p * (p / q).log()
                rows.append(entry)
        images.append(torch.stack(rows).view(classes, classes))
    return torch.stack(images)


def interclass_similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool,
    temperature: float = 1.0,
    present: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    matrix_s, matrix_t = kl_matrix(student, temperature, valid), kl_matrix(teacher.detach(), temperature, valid)
    batch, classes = student.shape[:2]
    total, count = student.new_zeros(()), 0
    for b in range(batch):
        if valid is not None and not valid[b].any():
            continue
        here = [c for c in range(classes) if present is None or present[b, c]]
        for i in here:
            length_s = sum(matrix_s[b, i, j] ** 2 for j in here).sqrt() if normalize and len(here) > 1 else 1
            length_t = sum(matrix_t[b, i, j] ** 2 for j in here).sqrt() if normalize and len(here) > 1 else 1
            for j in here:
                total = total + (matrix_s[b, i, j] / length_s - matrix_t[b, i, j] / length_t) ** 2
                count += 1
    return total / max(count, 1)


def released_code(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    batch, classes, height, width = student.shape

    def matrix(logits: Tensor) -> list[list[Tensor]]:
        probs = [
            [
                [distribution([logits[b, c, y, x] for y in range(height)], temperature) for x in range(width)]
                for c in range(classes)
            ]
            for b in range(batch)
        ]
        out = [[logits.new_zeros(()) for _ in range(classes)] for _ in range(classes)]
        for i in range(classes):
            for j in range(i, classes):
                entry = logits.new_zeros(())
                for b in range(batch):
                    for x in range(width):
                        for y in range(height):
                            # A probability stands where its logarithm should.
                            p, q = probs[b][i][x][y], probs[b][j][x][y]
                            entry = entry + q * (q.log() - p)
                out[i][j] = out[j][i] = entry / batch
        return [[entry / sum(e**2 for e in row).sqrt() for entry in row] for row in out]

    total = student.new_zeros(())
    for row_s, row_t in zip(matrix(student), matrix(teacher.detach()), strict=True):
        for s, t in zip(row_s, row_t, strict=True):
            total = total + (s - t) ** 2
    return total / classes**2 / batch


def average(features: Tensor, kernel: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Patches in ceil mode, over what counts."""
    batch, channels, height, width = features.shape
    high, wide = -(-height // kernel), -(-width // kernel)
    some = torch.zeros(batch, high, wide, dtype=torch.bool)
    nodes = []
    for b in range(batch):
        for c in range(channels):
            for y in range(high):
                for x in range(wide):
                    inside = [
                        features[b, c, v, u]
                        for v in range(y * kernel, min((y + 1) * kernel, height))
                        for u in range(x * kernel, min((x + 1) * kernel, width))
                        if valid is None or valid[b, v, u]
                    ]
                    some[b, y, x] = bool(inside)
                    nodes.append(sum(inside) / len(inside) if inside else features.new_zeros(()))
    return torch.stack(nodes).view(batch, channels, high, wide), some


def category_similarity(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, kernel: int = 2, valid: Tensor | None = None
) -> Tensor:
    batch, classes = student.shape[:2]
    nodes_s, some = average(student, kernel, valid)
    nodes_t, _ = average(teacher.detach(), kernel, valid)
    total, count = student.new_zeros(()), 0
    for b in range(batch):
        where = places(some, b, *some.shape[1:])
        if not where:
            continue
        q_s, q_t = (
            [distribution([nodes[b, c, y, x] for y, x in where], temperature) for c in range(classes)]
            for nodes in (nodes_s, nodes_t)
        )
        for i in range(classes):
            for j in range(classes):
                product_s = sum(p * q for p, q in zip(q_s[i], q_s[j], strict=True))
                product_t = sum(p * q for p, q in zip(q_t[i], q_t[j], strict=True))
                total = total + (product_s - product_t) ** 2
                count += 1
    return total / max(count, 1)
