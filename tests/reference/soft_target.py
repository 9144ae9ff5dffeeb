"""Losses of labels and soft targets, written out as loops over rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.logits import chosen_rows, kl, probabilities, rows_of


def cross_entropy(student: Tensor, labels: Tensor, valid: Tensor | None = None) -> Tensor:
    """Labels that are no class are left out."""
    total, count = student.new_zeros(()), 0
    for row, y, counts in zip(
        rows_of(student),
        labels.flatten().tolist(),
        [True] * labels.numel() if valid is None else valid.flatten().tolist(),
        strict=True,
    ):
        if counts and 0 <= y < len(row):
            total = total - probabilities(row, 1.0)[y].log()
            count += 1
    return total / max(count, 1)


def soft_target(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    weight: float,
    temperature: float,
    reverse: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Every label is a class here."""
    soft = student.new_zeros(())
    rows = chosen_rows(student, teacher, valid)
    for s, t, _ in rows:
        p_s, p_t = probabilities(s, temperature), probabilities(t, temperature)
        soft = soft + (kl(p_s, p_t) if reverse else kl(p_t, p_s))
    soft = temperature**2 * soft / max(len(rows), 1)
    return (1 - weight) * cross_entropy(student, labels, valid) + weight * soft


def mutual(peers: Sequence[Tensor], temperature: float, towards: str, valid: Tensor | None = None) -> list[Tensor]:
    losses = []
    for k, peer in enumerate(peers):
        others = [other for j, other in enumerate(peers) if j != k]
        if towards == 'mean':
            others = [sum(peers) / len(peers)]
        parts = []
        for other in others:
            rows = chosen_rows(peer, other, valid)
            gaps = [kl(probabilities(t, temperature), probabilities(s, temperature)) for s, t, _ in rows]
            parts.append(temperature**2 * sum(gaps, peer.new_zeros(())) / max(len(rows), 1))
        losses.append(sum(parts) / len(parts))
    return losses


def instance_temperature(student: Tensor, teacher: Tensor, temperature: Tensor, valid: Tensor | None = None) -> Tensor:
    """Temperature of each row, (rows,)."""
    rows = chosen_rows(student, teacher, valid)
    total = student.new_zeros(())
    for s, t, i in rows:
        warm = temperature[i]
        p_s = [(z / warm).exp() for z in s]
        p_t = [(z / warm).exp() for z in t]
        total = total + warm**2 * kl([p / sum(p_t) for p in p_t], [p / sum(p_s) for p in p_s])
    return total / max(len(rows), 1)


def confidence(row: Tensor, by: str) -> float:
    p = sorted((x.item() for x in probabilities(row, 1.0)), reverse=True)
    if by == 'maximum':
        return p[0]
    if by == 'margin':
        return p[0] - p[1]
    return 1 + sum(x * math.log(x) for x in p) / math.log(len(p))


def fused(
    teachers: Sequence[Tensor], weights: Sequence[float], by: str | None, sharpness: float, of: str
) -> list[Tensor]:
    """One row a pixel: scores, or the logarithm of the mixture."""
    out = []
    for rows in zip(*(rows_of(teacher) for teacher in teachers), strict=True):
        say = [w * (1 if by is None else confidence(r, by) ** sharpness) for w, r in zip(weights, rows, strict=True)]
        say = [s / sum(say) for s in say]
        if of == 'scores':
            out.append(sum(s * r for s, r in zip(say, rows, strict=True)))
        else:
            out.append(sum(s * torch.stack(probabilities(r, 1.0)) for s, r in zip(say, rows, strict=True)).log())
    return out
