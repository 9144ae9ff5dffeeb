"""Pixel- and channel-wise divergence, written out as loops over pixels, channels and positions."""

from __future__ import annotations

import torch
from torch import Tensor


def _kl(scores_s: list[Tensor], scores_t: list[Tensor], temperature: float) -> Tensor:
    exp_s = [(s / temperature).exp() for s in scores_s]
    exp_t = [(t / temperature).exp() for t in scores_t]
    total = scores_s[0] * 0
    for s, t in zip(exp_s, exp_t, strict=True):
        p_s, p_t = s / sum(exp_s), t / sum(exp_t)
        total = total + p_t * (p_t / p_s).log()
    return total


def pixelwise_kl(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    teacher = teacher.detach()
    batch, classes, height, width = student.shape
    total, count = student.new_zeros(()), 0
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                if valid is not None and not valid[b, y, x]:
                    continue
                scores_s = [student[b, c, y, x] for c in range(classes)]
                scores_t = [teacher[b, c, y, x] for c in range(classes)]
                total = total + _kl(scores_s, scores_t, temperature)
                count += 1
    return temperature**2 * total / max(count, 1)


def channelwise_kl(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    teacher = teacher.detach()
    batch, channels, height, width = student.shape
    total, count = student.new_zeros(()), 0
    for b in range(batch):
        places = [(y, x) for y in range(height) for x in range(width) if valid is None or valid[b, y, x]]
        if not places:
            continue
        for c in range(channels):
            scores_s = [student[b, c, y, x] for y, x in places]
            scores_t = [teacher[b, c, y, x] for y, x in places]
            total = total + _kl(scores_s, scores_t, temperature)
            count += 1
    return temperature**2 * total / max(count, 1)


def nearest(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    out = tensor.new_zeros((tensor.shape[0], *size))
    for b in range(tensor.shape[0]):
        for y in range(size[0]):
            for x in range(size[1]):
                out[b, y, x] = tensor[b, int(y * tensor.shape[1] / size[0]), int(x * tensor.shape[2] / size[1])]
    return out


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    chosen = [v for v, keep in zip(values.reshape(-1), valid.reshape(-1), strict=True) if keep]
    return torch.stack(chosen).sum() / len(chosen) if chosen else values.new_zeros(())
