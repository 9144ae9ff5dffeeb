"""Relations among nodes, written out as loops over nodes, places and images."""

from __future__ import annotations

import math

from torch import Tensor

from tests.reference.region import cosine


def counting(nodes: Tensor, valid: Tensor | None) -> list[int]:
    return [i for i in range(nodes.shape[0]) if valid is None or valid[i]]


def similarity_preserving(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Nodes (n, D)."""
    teacher = teacher.detach()
    nodes = counting(student, valid)
    total = student.new_zeros(())
    for i in nodes:
        row_s = [(student[i] * student[j]).sum() for j in nodes]
        row_t = [(teacher[i] * teacher[j]).sum() for j in nodes]
        length_s, length_t = sum(r**2 for r in row_s).sqrt(), sum(r**2 for r in row_t).sqrt()
        for r_s, r_t in zip(row_s, row_t, strict=True):
            total = total + (r_s / length_s - r_t / length_t) ** 2
    return total / max(len(nodes) ** 2, 1)


def smooth(gap: Tensor) -> Tensor:
    return 0.5 * gap**2 if gap.abs() < 1 else gap.abs() - 0.5


def relational(
    student: Tensor,
    teacher: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Nodes (n, D)."""
    teacher = teacher.detach()
    nodes = counting(student, valid)

    def distances(features: Tensor) -> dict[tuple[int, int], Tensor]:
        found = {(i, j): (features[i] - features[j]).norm() for i in nodes for j in nodes if i != j}
        mean = sum(found.values()) / len(found)
        return {pair: d / mean for pair, d in found.items()}

    near_s, near_t = distances(student), distances(teacher)
    total = sum(smooth(near_s[pair] - near_t[pair]) for pair in near_s) * distance_weight / len(nodes) ** 2
    for i in nodes:
        for j in nodes:
            for k in nodes:
                if i not in (j, k):
                    angle_s = cosine(student[j] - student[i], student[k] - student[i])
                    angle_t = cosine(teacher[j] - teacher[i], teacher[k] - teacher[i])
                    total = total + smooth(angle_s - angle_t) * angle_weight / len(nodes) ** 3
    return total


def correlation_congruence(
    student: Tensor, teacher: Tensor, gamma: float = 0.4, order: int = 2, valid: Tensor | None = None
) -> Tensor:
    """Nodes (n, D)."""
    teacher = teacher.detach()
    nodes = counting(student, valid)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        near = cosine(a, b)
        return math.exp(-2 * gamma) * sum((2 * gamma) ** p / math.factorial(p) * near**p for p in range(order + 1))

    total = student.new_zeros(())
    for i in nodes:
        for j in nodes:
            total = total + (kernel(student[i], student[j]) - kernel(teacher[i], teacher[j])) ** 2
    return total / max(len(nodes) ** 2, 1)


def adjacent_correlation(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Nodes (n, D)."""
    teacher = teacher.detach()
    total, count = student.new_zeros(()), 0
    for i in range(student.shape[0] - 1):
        if valid is None or (valid[i] and valid[i + 1]):
            for d in range(student.shape[1]):
                total = total + (student[i, d] - teacher[i, d]).abs() * (student[i + 1, d] - teacher[i + 1, d]).abs()
            count += 1
    return total / max(count, 1)


def kl(scores_s: list[Tensor], scores_t: list[Tensor]) -> Tensor:
    exp_s, exp_t = [s.exp() for s in scores_s], [t.exp() for t in scores_t]
    total = scores_s[0] * 0
    for s, t in zip(exp_s, exp_t, strict=True):
        p_s, p_t = s / sum(exp_s), t / sum(exp_t)
        total = total + p_t * (p_t / p_s).log()
    return total


def local_structure(
    student: Tensor,
    teacher: Tensor,
    radius: int = 1,
    temperature: float = 0.1,
    include_self: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    teacher = teacher.detach()
    batch, _, height, width = student.shape
    total, count = student.new_zeros(()), 0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if valid is not None and not valid[b, y, x]:
                    continue
                window = [
                    (v, u)
                    for v in range(max(0, y - radius), min(height, y + radius + 1))
                    for u in range(max(0, x - radius), min(width, x + radius + 1))
                    if (include_self or (v, u) != (y, x)) and (valid is None or valid[b, v, u])
                ]
                if not window:
                    continue
                near_s = [cosine(student[b, :, y, x], student[b, :, v, u]) / temperature for v, u in window]
                near_t = [cosine(teacher[b, :, y, x], teacher[b, :, v, u]) / temperature for v, u in window]
                total = total + kl(near_s, near_t)
                count += 1
    return total / max(count, 1)


def cross_image(student: Tensor, teacher: Tensor, temperature: float = 0.1, valid: Tensor | None = None) -> Tensor:
    teacher = teacher.detach()
    batch, _, height, width = student.shape
    every = [
        [(y, x) for y in range(height) for x in range(width) if valid is None or valid[b, y, x]] for b in range(batch)
    ]
    total, count = student.new_zeros(()), 0
    for a in range(batch):
        for b in range(batch):
            for y, x in every[a]:
                if not every[b]:
                    continue
                near_s = [cosine(student[a, :, y, x], student[b, :, v, u]) / temperature for v, u in every[b]]
                near_t = [cosine(teacher[a, :, y, x], teacher[b, :, v, u]) / temperature for v, u in every[b]]
                total = total + kl(near_s, near_t)
                count += 1
    return total / max(count, 1)
