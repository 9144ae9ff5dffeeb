"""Losses between depth maps, written out as loops over images, pixels, pairs and triplets.

``valid`` says where a pixel counts, readings of the teacher included.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _places(valid: Tensor, image: int) -> list[tuple[int, int]]:
    height, width = valid.shape[1:]
    return [(y, x) for y in range(height) for x in range(width) if valid[image, y, x]]


def _mean(values: list[Tensor], like: Tensor) -> Tensor:
    return sum(values) / len(values) if values else like.new_zeros(())


def log(depth: Tensor, eps: float) -> Tensor:
    """Logarithm above eps, the tangent at eps below."""
    return torch.log(depth) if depth > eps else math.log(eps) + (depth - eps) / eps


def l1(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    values = [(student[b, y, x] - teacher[b, y, x]).abs() for b in range(len(student)) for y, x in _places(valid, b)]
    return _mean(values, student)


def silog(
    student: Tensor, teacher: Tensor, valid: Tensor, weight: float, root: bool = False, eps: float = 1e-3
) -> Tensor:
    images = []
    for b in range(len(student)):
        gaps = [log(student[b, y, x], eps) - log(teacher[b, y, x], eps) for y, x in _places(valid, b)]
        if gaps:
            value = sum(g**2 for g in gaps) / len(gaps) - weight * (sum(gaps) / len(gaps)) ** 2
            images.append(value.sqrt() if root else value)
    return _mean(images, student)


def fit(student: Tensor, teacher: Tensor, places: list[tuple[int, int]], image: int) -> tuple[Tensor, Tensor]:
    """Slope and offset from the two normal equations, by Cramer's rule."""
    d = [student[image, y, x] for y, x in places]
    t = [teacher[image, y, x] for y, x in places]
    a, b, n = sum(v * v for v in d), sum(d), len(d)
    p, q = sum(v * w for v, w in zip(d, t, strict=True)), sum(t)
    determinant = a * n - b * b
    return (p * n - b * q) / determinant, (a * q - b * p) / determinant


def scale_shift_invariant(student: Tensor, teacher: Tensor, valid: Tensor, robust: bool = False) -> Tensor:
    values = []
    for b in range(len(student)):
        places = _places(valid, b)
        if not places:
            continue
        if robust:
            sides = []
            for depth in (student, teacher):
                known = [depth[b, y, x] for y, x in places]
                middle = sorted(known, key=lambda d: d.item())[(len(known) - 1) // 2]
                spread = sum((d - middle).abs() for d in known) / len(known)
                sides.append([(d - middle) / spread for d in known])
            values += [(s - t).abs() for s, t in zip(*sides, strict=True)]
        else:
            slope, offset = fit(student, teacher, places, b)
            values += [(slope * student[b, y, x] + offset - teacher[b, y, x]) ** 2 for y, x in places]
    return _mean(values, student)


def gradient_matching(student: Tensor, teacher: Tensor, valid: Tensor, scales: int, align: bool = False) -> Tensor:
    height, width = student.shape[1:]
    steps = [[] for _ in range(scales)]
    for b in range(len(student)):
        places = _places(valid, b)
        slope, offset = fit(student, teacher, places, b) if align and places else (1, 0)
        residual = {(y, x): slope * student[b, y, x] + offset - teacher[b, y, x] for y, x in places}
        for k in range(scales):
            rows, columns = range(0, height, 2**k), range(0, width, 2**k)
            for y in rows:
                for x in columns:
                    for other in ((y, x + 2**k), (y + 2**k, x)):
                        if (y, x) in residual and other in residual:
                            steps[k].append((residual[(y, x)] - residual[other]).abs())
    return _mean([sum(s) / len(s) for s in steps if s], student)


def ordinal_relation(
    student: Tensor, teacher: Tensor, valid: Tensor, pairs: Tensor, threshold: float = 0.03, eps: float = 1e-3
) -> Tensor:
    width = student.shape[2]
    values = []
    for b in range(len(student)):
        for i, j in pairs[b].tolist():
            (yi, xi), (yj, xj) = divmod(i, width), divmod(j, width)
            if i == j or not (valid[b, yi, xi] and valid[b, yj, xj]):
                continue
            gap = log(student[b, yi, xi], eps) - log(student[b, yj, xj], eps)
            ratio = float(teacher[b, yi, xi] / teacher[b, yj, xj])
            if ratio > 1 + threshold:
                values.append(torch.log(1 + torch.exp(-gap)))
            elif ratio < 1 / (1 + threshold):
                values.append(torch.log(1 + torch.exp(gap)))
            else:
                values.append(gap**2)
    return _mean(values, student)


def _cross(a: list, b: list) -> list:
    return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]]


def _length(a: list) -> float:
    return math.sqrt(sum(v.item() ** 2 for v in a))


def virtual_normal(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    triplets: Tensor,
    focal: tuple[float, float],
    min_distance: float,
    min_angle: float,
) -> tuple[Tensor, int]:
    """The loss, and how many triplets counted."""
    height, width = student.shape[1:]
    values = []
    for b in range(len(student)):
        for positions in triplets[b].tolist():
            places = [divmod(p, width) for p in positions]
            if not all(valid[b, y, x] for y, x in places):
                continue
            normals = []
            for depth in (teacher, student):
                points = [
                    [
                        depth[b, y, x] * (x - (width - 1) / 2) / focal[0],
                        depth[b, y, x] * (y - (height - 1) / 2) / focal[1],
                        depth[b, y, x],
                    ]
                    for y, x in places
                ]
                sides = {
                    (k, m): [q - p for p, q in zip(points[k], points[m], strict=True)]
                    for k in range(3)
                    for m in range(3)
                }
                if not normals:
                    if min(_length(sides[0, 1]), _length(sides[0, 2]), _length(sides[1, 2])) < max(min_distance, 1e-6):
                        break
                    angles = [
                        math.degrees(
                            math.acos(
                                max(
                                    -1.0,
                                    min(
                                        1.0,
                                        sum(
                                            p.item() * q.item()
                                            for p, q in zip(sides[k, (k + 1) % 3], sides[k, (k + 2) % 3], strict=True)
                                        )
                                        / _length(sides[k, (k + 1) % 3])
                                        / _length(sides[k, (k + 2) % 3]),
                                    ),
                                )
                            )
                        )
                        for k in range(3)
                    ]
                    if min(angles) < min_angle:
                        break
                normal = _cross(sides[0, 1], sides[0, 2])
                norm = sum(v**2 for v in normal).sqrt()
                normals.append([v / norm for v in normal])
            else:
                values.append(sum((s - t).abs() for t, s in zip(*normals, strict=True)))
    return _mean(values, student), len(values)


def normalize(depth: Tensor, reference: Tensor, valid: Tensor, log_space: bool) -> Tensor:
    out = torch.zeros_like(depth)
    for b in range(len(depth)):
        places = _places(valid, b)
        known = {p: torch.log(reference[(b, *p)]) if log_space else reference[(b, *p)] for p in places}
        for y, x in places:
            value = torch.log(depth[b, y, x]) if log_space else depth[b, y, x]
            mean = sum(known.values()) / len(known)
            out[b, y, x] = (value - mean) / (max(known.values()) - min(known.values()))
    return out
