"""Losses on class scores, written out as loops over rows; a map is the rows of its pixels."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(scores: Tensor) -> Tensor:
    """(B, C, H, W) as (B H W, C); rows stay."""
    if scores.dim() == 2:
        return scores
    return torch.stack(
        [
            scores[b, :, y, x]
            for b in range(scores.shape[0])
            for y in range(scores.shape[2])
            for x in range(scores.shape[3])
        ]
    )


def probabilities(row: Tensor, temperature: float) -> list[Tensor]:
    powers = [(z / temperature).exp() for z in row]
    return [power / sum(powers) for power in powers]


def kl(p_t: list[Tensor], p_s: list[Tensor]) -> Tensor:
    return sum(t * (t / s).log() for t, s in zip(p_t, p_s, strict=True))


def pearson(a: list[Tensor], b: list[Tensor]) -> Tensor:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    joint = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread_a = sum((x - mean_a) ** 2 for x in a)
    spread_b = sum((y - mean_b) ** 2 for y in b)
    return joint / (spread_a * spread_b).sqrt()


def chosen_rows(student: Tensor, teacher: Tensor, valid: Tensor | None) -> list[tuple[Tensor, Tensor, int]]:
    rows_s, rows_t = rows_of(student), rows_of(teacher.detach())
    keep = [True] * len(rows_s) if valid is None else valid.flatten().tolist()
    return [(s, t, i) for i, (s, t) in enumerate(zip(rows_s, rows_t, strict=True)) if keep[i]]


def dist(
    student: Tensor, teacher: Tensor, inter: float, intra: float, temperature: float, valid: Tensor | None = None
) -> Tensor:
    rows = chosen_rows(student, teacher, valid)
    p_s = [probabilities(s, temperature) for s, _, _ in rows]
    p_t = [probabilities(t, temperature) for _, t, _ in rows]
    among_classes = sum(1 - pearson(s, t) for s, t in zip(p_s, p_t, strict=True)) / len(rows)
    classes = range(len(p_s[0]))
    among_rows = sum(1 - pearson([s[c] for s in p_s], [t[c] for t in p_t]) for c in classes) / len(classes)
    return temperature**2 * (inter * among_classes + intra * among_rows)


def decoupled(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    valid: Tensor | None = None,
) -> Tensor:
    rows = chosen_rows(student, teacher, valid)
    total = student.new_zeros(())
    for s, t, i in rows:
        y = int(labels.flatten()[i])
        p_s, p_t = probabilities(s, temperature), probabilities(t, temperature)
        others = [k for k in range(len(p_s)) if k != y]
        total = total + alpha * kl([p_t[y], 1 - p_t[y]], [p_s[y], 1 - p_s[y]])
        total = total + beta * kl([p_t[k] / (1 - p_t[y]) for k in others], [p_s[k] / (1 - p_s[y]) for k in others])
    return temperature**2 * total / max(len(rows), 1)


def plain_from_decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The divergence put together again: the first part plus (1 - p) times the second, row by row."""
    total = student.new_zeros(())
    for i, (s, t) in enumerate(zip(student, teacher.detach(), strict=True)):
        one = (s[None], t[None], labels[i : i + 1])
        share = 1 - probabilities(t, 1.0)[int(labels[i])]
        total = total + decoupled(*one, 1.0, 0.0, 1.0) + share * decoupled(*one, 0.0, 1.0, 1.0)
    return total / len(student)


def weighted_soft_label(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    rows = chosen_rows(student, teacher, valid)
    total = student.new_zeros(())
    for s, t, i in rows:
        y = int(labels.flatten()[i])
        hard_s, hard_t = (-probabilities(z.detach(), 1.0)[y].log() for z in (s, t))
        weight = 1 - (-hard_s / (hard_t + 1e-7)).exp()
        soft = zip(probabilities(t, temperature), probabilities(s, temperature), strict=True)
        total = total + weight * -sum(p * q.log() for p, q in soft)
    return temperature**2 * total / max(len(rows), 1)


def zipf_label(student: Tensor, voter: Tensor, labels: Tensor, kernel_size: int, valid: Tensor | None = None) -> Tensor:
    batch, classes, height, width = student.shape
    if valid is None:
        valid = torch.ones(batch, height, width, dtype=torch.bool)
    total, count = student.new_zeros(()), 0
    half = kernel_size // 2
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if not valid[b, y, x]:
                    continue
                votes = [0] * classes
                for v in range(max(y - half, 0), min(y + half + 1, height)):
                    for u in range(max(x - half, 0), min(x + half + 1, width)):
                        if valid[b, v, u]:
                            votes[int(voter[b, :, v, u].argmax())] += 1
                label = int(labels[b, y, x])
                others = [k for k in range(classes) if k != label]
                ranks = [1 + sum(votes[j] > votes[k] for j in others) for k in others]
                norm = sum(1 / r for r in ranks)
                wanted = [student.new_tensor(1 / r / norm) for r in ranks]
                total = total + kl(wanted, probabilities(student[b, others, y, x], 1.0))
                count += 1
    return total / max(count, 1)


def mapped(scores: Tensor, numbers: list[int]) -> Tensor:
    """Probabilities of coarse classes, one row a pixel, not renormalised."""
    out = []
    for row in rows_of(scores):
        p = probabilities(row, 1.0)
        out.append(torch.stack([sum(p[j] for j, m in enumerate(numbers) if m == k) for k in range(max(numbers) + 1)]))
    return torch.stack(out)


def standardized(row: Tensor) -> Tensor:
    mean = sum(row) / len(row)
    deviation = (sum((z - mean) ** 2 for z in row) / (len(row) - 1)).sqrt()
    return torch.stack([(z - mean) / deviation for z in row])
