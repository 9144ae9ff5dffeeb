"""Losses of two features, or two sets of them, written out as loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.reference.region import cosine
from tests.reference.statistics import places_of


def spatial_mean(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Maps of one size."""
    teacher = teacher.detach()
    total, count = student.new_zeros(()), 0
    for b, places in enumerate(places_of(student.shape, valid)):
        for d in range(student.shape[1]):
            if places:
                mean_s, mean_t = (sum(f[b, d, y, x] for y, x in places) / len(places) for f in (student, teacher))
                total = total + (mean_s - mean_t) ** 2
                count += 1
    return total / max(count, 1)


def cosine_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    teacher = teacher.detach()
    total, count = student.new_zeros(()), 0
    for b, places in enumerate(places_of(student.shape, valid)):
        for y, x in places:
            total = total + 2 - 2 * cosine(student[b, :, y, x], teacher[b, :, y, x])
            count += 1
    return total / max(count, 1)


def residual(student: Tensor, teacher: Tensor, assistant: Tensor, valid: Tensor | None = None) -> Tensor:
    total, count = student.new_zeros(()), 0
    for b, places in enumerate(places_of(student.shape, valid)):
        for y, x in places:
            for d in range(student.shape[1]):
                lacking = teacher.detach()[b, d, y, x] - student[b, d, y, x]
                total = total + (assistant[b, d, y, x] - lacking) ** 2
                count += 1
    return total / max(count, 1)


def mixed(layers: Sequence[Tensor], scores: Tensor) -> Tensor:
    powers = [score.exp() for score in scores]
    return sum(power / sum(powers) * layer for power, layer in zip(powers, layers, strict=True))


def mean_discrepancy(source: Sequence[Tensor], target: Sequence[Tensor], kernels: int, spread: float) -> Tensor:
    """Rows that count only."""
    rows = [*source, *target]
    distances = [((a - b) ** 2).sum().detach() for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
    width = sum(distances) / len(distances)
    widths = [width * spread**q / spread ** (kernels // 2) for q in range(kernels)]

    def near(a: Tensor, b: Tensor) -> Tensor:
        return sum((-((a - b) ** 2).sum() / h).exp() for h in widths)

    def mean(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        return sum(near(a, b) for a in first for b in second) / (len(first) * len(second))

    return mean(source, source) + mean(target, target) - 2 * mean(source, target)


def covariance(rows: Sequence[Tensor], d: int, e: int) -> Tensor:
    mean_d, mean_e = (sum(row[k] for row in rows) / len(rows) for k in (d, e))
    return sum((row[d] - mean_d) * (row[e] - mean_e) for row in rows) / (len(rows) - 1)


def variance_hinge(rows: Sequence[Tensor], target: float, eps: float) -> Tensor:
    width = len(rows[0])
    short = [(target - (covariance(rows, d, d) + eps).sqrt()).clamp(min=0) for d in range(width)]
    return sum(short) / width


def covariance_sum(rows: Sequence[Tensor]) -> Tensor:
    width = len(rows[0])
    return sum(covariance(rows, d, e) ** 2 for d in range(width) for e in range(width) if d != e) / width


def contrast(anchors: Sequence[Tensor], keys: Sequence[Tensor], classes: Sequence[int], temperature: float) -> Tensor:
    """Rows that count only; an anchor's own place is no key of it."""
    terms = []
    for a, anchor in enumerate(anchors):
        scores = {k: (anchor * key).sum() / temperature for k, key in enumerate(keys) if k != a}
        below = sum(score.exp() for score in scores.values()).log()
        positives = [k for k in scores if classes[k] == classes[a]]
        if positives:
            terms.append(-sum(scores[k] - below for k in positives) / len(positives))
    return sum(terms) / len(terms) if terms else sum((anchor.sum() * 0 for anchor in anchors), torch.zeros(()))


def row_divergence(student: Sequence[Sequence[Tensor]], teacher: Sequence[Sequence[Tensor]], kd: float) -> Tensor:
    total = 0
    for row_s, row_t in zip(student, teacher, strict=True):
        powers_s, powers_t = [(z / kd).exp() for z in row_s], [(z.detach() / kd).exp() for z in row_t]
        for s, t in zip(powers_s, powers_t, strict=True):
            p_s, p_t = s / sum(powers_s), t / sum(powers_t)
            total = total + p_t * (p_t / p_s).log()
    return kd**2 * total / len(student)


def likeness(first: Sequence[Tensor], second: Sequence[Tensor], temperature: float) -> list[list[Tensor]]:
    return [[(a * b).sum() / temperature for b in second] for a in first]


def mutual_contrast(
    peers: Sequence[Sequence[Tensor]], classes: Sequence[int], temperature: float, kd: float
) -> list[Tensor]:
    parts = [0.0, 0.0, 0.0, 0.0]
    for i, one in enumerate(peers):
        parts[0] = parts[0] + contrast(one, one, classes, temperature)
        for j, other in enumerate(peers):
            if i == j:
                continue
            own, theirs = likeness(one, one, temperature), likeness(other, other, temperature)
            parts[1] = parts[1] + row_divergence(own, theirs, kd)
            parts[2] = parts[2] + contrast(one, other, classes, temperature)
            across = likeness(one, other, temperature)
            parts[3] = parts[3] + row_divergence(across, likeness(other, one, temperature), kd)
    return parts
