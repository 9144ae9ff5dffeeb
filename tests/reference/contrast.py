"""Contrast against memories, instances and sets, written out as loops."""

from __future__ import annotations

import itertools

from torch import Tensor

from tests.reference.region import cosine
from tests.reference.relation import kl


def memory_kl(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    temperature: float,
    kd_temperature: float = 1.0,
    valid: Tensor | None = None,
    memory_valid: Tensor | None = None,
) -> Tensor:
    teacher = teacher.detach()
    keys = [m for m in range(memory.shape[0]) if memory_valid is None or memory_valid[m]]
    total, count = student.new_zeros(()), 0
    for i in range(student.shape[0]):
        if keys and (valid is None or valid[i]):
            divisor = temperature * kd_temperature
            total = total + kl(
                [cosine(student[i], memory[m]) / divisor for m in keys],
                [cosine(teacher[i], memory[m]) / divisor for m in keys],
            )
            count += 1
    return kd_temperature**2 * total / max(count, 1)


def region_contrast(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    classes: list[int] | None = None,
    valid: Tensor | None = None,
    memory: Tensor | None = None,
    memory_classes: list[int] | None = None,
    memory_valid: Tensor | None = None,
) -> Tensor:
    teacher = teacher.detach()
    number = student.shape[0]
    here = [i for i in range(number) if valid is None or valid[i]]

    def negatives(i: int) -> list[int]:
        return [j for j in here if (classes[i] != classes[j] if classes is not None else i != j)]

    def one_way(anchors: Tensor, others: Tensor, with_memory: bool) -> Tensor:
        total, count = student.new_zeros(()), 0
        for i in here:
            against = [cosine(anchors[i], others[j]) for j in negatives(i)]
            if with_memory and memory is not None:
                against += [
                    cosine(anchors[i], memory[m])
                    for m in range(memory.shape[0])
                    if (memory_valid is None or memory_valid[m]) and memory_classes[m] != classes[i]
                ]
            if not against:
                continue
            own = (cosine(anchors[i], others[i]) / temperature).exp()
            total = total - (own / (own + sum((a / temperature).exp() for a in against))).log()
            count += 1
        return total / max(count, 1)

    return one_way(student, teacher, True) + one_way(teacher, student, False)


def transport(first: Tensor, second: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn's scalings of exp(-cost / epsilon), not in logarithms."""
    n, m = first.shape[0], second.shape[0]
    cost = [[1 - cosine(first[i], second[j]) for j in range(m)] for i in range(n)]
    kernel = [[(-c / epsilon).exp() for c in row] for row in cost]
    u, v = [first.new_ones(()) for _ in range(n)], [first.new_ones(()) for _ in range(m)]
    for _ in range(iterations):
        u = [1 / sum(kernel[i][j] * v[j] / m for j in range(m)) for i in range(n)]
        v = [1 / sum(kernel[i][j] * u[i] / n for i in range(n)) for j in range(m)]
    return epsilon * (sum(a.log() for a in u) / n + sum(b.log() for b in v) / m)


def entropy_free(first: Tensor, second: Tensor) -> float:
    """Cost of the best assignment of equal sets, over all permutations."""
    n = first.shape[0]
    orders = itertools.permutations(range(n))
    return min(sum(1 - cosine(first[i], second[j]).item() for i, j in enumerate(order)) / n for order in orders)
