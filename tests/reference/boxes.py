"""Masks of boxes and the focal distance, written out as loops over boxes and cells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.reference.statistics import places_of


def masks(
    boxes: list[Tensor], size: tuple[int, int], input_size: tuple[int, int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    foreground = torch.zeros(len(boxes), *size, dtype=torch.float64)
    background = torch.zeros_like(foreground)
    for b, places in enumerate(places_of((len(boxes), 0, *size), valid)):
        covered = {}
        for x1, y1, x2, y2 in boxes[b].tolist():
            left, right = math.floor(x1 * size[1] / input_size[1]), math.ceil(x2 * size[1] / input_size[1])
            top, bottom = math.floor(y1 * size[0] / input_size[0]), math.ceil(y2 * size[0] / input_size[0])
            cells = (right - left + 1) * (bottom - top + 1)
            for y, x in places:
                if top <= y <= bottom and left <= x <= right:
                    covered[y, x] = min(covered.get((y, x), cells), cells)
        for y, x in places:
            if (y, x) in covered:
                foreground[b, y, x] = 1 / covered[y, x]
            else:
                background[b, y, x] = 1 / (len(places) - len(covered))
    return foreground, background


def _softmax(values: list[Tensor]) -> list[Tensor]:
    exps = [v.exp() for v in values]
    return [len(values) * e / sum(exps) for e in exps]


def attention(features: Tensor, temperature: float, places: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Of one image (D, H, W): weights of the places, and of the channels."""
    channels = range(len(features))
    positions = [sum(features[d, y, x].abs() for d in channels) / len(features) / temperature for y, x in places]
    means = [sum(features[d, y, x].abs() for y, x in places) / len(places) / temperature for d in channels]
    return _softmax(positions), _softmax(means)


def focal_feature(
    student: Tensor,
    teacher: Tensor,
    boxes: list[Tensor],
    input_size: tuple[int, int],
    weights: tuple[float, float, float],
    temperature: float,
    valid: Tensor | None = None,
) -> Tensor:
    teacher = teacher.detach()
    foreground, background = masks(boxes, student.shape[2:], input_size, valid)
    images = []
    for b, places in enumerate(places_of(student.shape, valid)):
        if not places:
            continue
        positions_s, channels_s = attention(student[b], temperature, places)
        positions_t, channels_t = attention(teacher[b], temperature, places)
        total = student.new_zeros(())
        for k, (y, x) in enumerate(places):
            share = weights[0] * foreground[b, y, x] + weights[1] * background[b, y, x]
            for d in range(student.shape[1]):
                gap = (student[b, d, y, x] - teacher[b, d, y, x]) ** 2
                total = total + share * positions_t[k] * channels_t[d] * gap
        for one, two in ((positions_s, positions_t), (channels_s, channels_t)):
            total = total + weights[2] * sum((s - t).abs() for s, t in zip(one, two, strict=True))
        images.append(total)
    return sum(images) / len(images) if images else student.new_zeros(())
