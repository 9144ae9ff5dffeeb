"""Distances of features, written out as loops over images, channels and positions."""

from __future__ import annotations

import torch
from torch import Tensor


def places_of(shape: tuple[int, ...], valid: Tensor | None) -> list[list[tuple[int, int]]]:
    """The positions of each image that count."""
    return [
        [(y, x) for y in range(shape[2]) for x in range(shape[3]) if valid is None or valid[b, y, x]]
        for b in range(shape[0])
    ]


def _standardize(values: list[Tensor], minus: int, eps: float) -> list[Tensor]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / max(len(values) - minus, 1)
    return [(v - mean) / (variance + eps**2) ** 0.5 for v in values]


def standardized_mse(
    student: Tensor, teacher: Tensor, over: str, valid: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    teacher = teacher.detach()
    places = [[(b, y, x) for y, x in some] for b, some in enumerate(places_of(student.shape, valid))]
    groups = places if over == 'image' else [[place for some in places for place in some]]
    total, count = student.new_zeros(()), 0
    for group in groups:
        for d in range(student.shape[1]):
            if not group:
                continue
            minus = 1 if over == 'batch' else 0
            one = _standardize([student[b, d, y, x] for b, y, x in group], minus, eps)
            two = _standardize([teacher[b, d, y, x] for b, y, x in group], minus, eps)
            total = total + sum((s - t) ** 2 for s, t in zip(one, two, strict=True))
            count += len(group)
    return total / max(count, 1)


def feature_mse(student: Tensor, teacher: Tensor, reduction: str, valid: Tensor | None = None) -> Tensor:
    teacher = teacher.detach()
    sums, count = [], 0
    for b, places in enumerate(places_of(student.shape, valid)):
        total = student.new_zeros(())
        for y, x in places:
            for d in range(student.shape[1]):
                total = total + (student[b, d, y, x] - teacher[b, d, y, x]) ** 2
                count += 1
        if places:
            sums.append(total)
    if not sums:
        return student.new_zeros(())
    return sum(sums) / (count if reduction == 'mean' else len(sums))


def attention(features: Tensor, power: float, places: list[tuple[int, int]]) -> list[Tensor]:
    """Of one image (D, H, W): strength at each place, of norm 1."""
    strength = [sum(features[d, y, x].abs() ** power for d in range(len(features))) / len(features) for y, x in places]
    norm = sum(s**2 for s in strength) ** 0.5
    return [s / norm for s in strength]


def attention_transfer(
    student: Tensor, teacher: Tensor, power: float, reduction: str = 'mean', valid: Tensor | None = None
) -> Tensor:
    teacher = teacher.detach()
    sums, count = [], 0
    for b, places in enumerate(places_of(student.shape, valid)):
        if not places:
            continue
        one, two = attention(student[b], power, places), attention(teacher[b], power, places)
        sums.append(sum((s - t) ** 2 for s, t in zip(one, two, strict=True)))
        count += len(places)
    if not sums:
        return student.new_zeros(())
    return torch.stack(sums).sum() / (count if reduction == 'mean' else len(sums))
