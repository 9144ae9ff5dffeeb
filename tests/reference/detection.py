"""Losses on the outputs of dense heads, written out as loops over positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.logits import kl, probabilities


def edges_of(maps: Tensor, edges: int) -> list[list[Tensor]]:
    """For each position its distributions' logits, position by position."""
    batch, channels, height, width = maps.shape
    bins = channels // edges
    return [
        [maps[b, e * bins : (e + 1) * bins, y, x] for e in range(edges)]
        for b in range(batch)
        for y in range(height)
        for x in range(width)
    ]


def localization_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    edges: int = 4,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    bin_mean: bool = False,
    summed: bool = False,
) -> Tensor:
    teacher = teacher.detach()
    if student.dim() == 2:
        sides = ([[row] for row in student], [[row] for row in teacher])
    else:
        sides = (edges_of(student, edges), edges_of(teacher, edges))
    total, count = student.new_zeros(()), 0
    for i, (own, other) in enumerate(zip(*sides, strict=True)):
        if valid is not None and not valid.flatten()[i]:
            continue
        value = student.new_zeros(())
        for s, t in zip(own, other, strict=True):
            one = kl(probabilities(t, temperature), probabilities(s, temperature))
            value = value + (one / len(s) if bin_mean else one)
        weight = 1.0 if weights is None else weights.flatten()[i]
        total = total + weight * value / len(own)
        count += 1
    return temperature**2 * total / (1 if summed else max(count, 1))


def binary_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    anchors: int = 1,
    normalizer: str | float = 'weights',
    valid: Tensor | None = None,
) -> Tensor:
    teacher = teacher.detach()
    if student.dim() == 2:
        sides = ([[row] for row in student], [[row] for row in teacher])
    else:
        sides = (edges_of(student, anchors), edges_of(teacher, anchors))
    total, weight_sum, count = student.new_zeros(()), student.new_zeros(()), 0
    for i, (own, other) in enumerate(zip(*sides, strict=True)):
        if valid is not None and not valid.flatten()[i]:
            continue
        for s, t in zip(own, other, strict=True):
            weight = max(1 / (1 + math.exp(-float(z))) for z in t)
            for z_s, z_t in zip(s, t, strict=True):
                p_s, p_t = 1 / (1 + (-z_s / temperature).exp()), 1 / (1 + (-z_t / temperature).exp())
                total = total + weight * kl([p_t, 1 - p_t], [p_s, 1 - p_s])
            weight_sum = weight_sum + weight
            count += 1
    divisor = {'weights': weight_sum, 'positions': count}.get(normalizer, normalizer)
    return temperature**2 * total / divisor if count else total


def inside_boxes(boxes: list[list[list[float]]], size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
    out = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for b, image in enumerate(boxes):
        for y in range(size[0]):
            for x in range(size[1]):
                cy, cx = (y + 0.5) * input_size[0] / size[0], (x + 0.5) * input_size[1] / size[1]
                out[b, y, x] = any(x1 <= cx <= x2 and y1 <= cy <= y2 for x1, y1, x2, y2 in image)
    return out
