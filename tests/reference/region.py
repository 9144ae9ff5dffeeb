"""Centres of classes and boxes, and variation around them, written out as loops."""

from __future__ import annotations

from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> Tensor:
    if not a.any() or not b.any():
        return (a.sum() + b.sum()) * 0
    return (a * b).sum() / ((a * a).sum().sqrt() * (b * b).sum().sqrt())


def center(features: Tensor, labels: Tensor, b: int, k: int) -> Tensor:
    members = [
        features[b, :, y, x] for y in range(labels.shape[1]) for x in range(labels.shape[2]) if labels[b, y, x] == k
    ]
    return sum(members) / len(members)


def intra_class_variation(
    student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int, count_ignored: bool = True
) -> Tensor:
    teacher = teacher.detach()
    batch, _, height, width = student.shape
    total, count = student.new_zeros(()), 0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                k = int(labels[b, y, x])
                if not 0 <= k < num_classes:
                    count += count_ignored
                    continue
                likeness_s = cosine(student[b, :, y, x], center(student, labels, b, k))
                likeness_t = cosine(teacher[b, :, y, x], center(teacher, labels, b, k))
                total = total + (likeness_s - likeness_t) ** 2
                count += 1
    return total / max(count, 1)


def box_average(features: Tensor, box: Tensor, b: int, input_size: tuple[int, int], valid: Tensor | None) -> Tensor:
    """One box, by cutting every cell into 8 x 8 points; boxes on the points' lattice make that exact."""
    height, width = features.shape[2:]
    total, count = features.new_zeros(features.shape[1]), 0
    for v in range(8 * height):
        for u in range(8 * width):
            y, x = (v + 0.5) * input_size[0] / (8 * height), (u + 0.5) * input_size[1] / (8 * width)
            inside = box[0] < x < box[2] and box[1] < y < box[3]
            if inside and (valid is None or valid[b, v // 8, u // 8]):
                total = total + features[b, :, v // 8, u // 8]
                count += 1
    return total / max(count, 1)
