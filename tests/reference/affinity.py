"""The pair-wise term, written out as loops over patches and pairs of nodes."""

from __future__ import annotations

import torch
from torch import Tensor


def pool(features: Tensor, kernel: tuple[int, int], kind: str, valid: Tensor | None) -> list[dict]:
    """One dict an image: place of the patch, (row, column) -> its vector over the positions that count."""
    images = []
    for b in range(features.shape[0]):
        nodes = {}
        for y in range(features.shape[2]):
            for x in range(features.shape[3]):
                if valid is None or valid[b, y, x]:
                    nodes.setdefault((y // kernel[0], x // kernel[1]), []).append(features[b, :, y, x])
        images.append(
            {
                place: torch.stack(members).amax(0) if kind == 'max' else sum(members) / len(members)
                for place, members in nodes.items()
            }
        )
    return images


def norm(vector: Tensor, detach: bool) -> Tensor | None:
    """Length of a vector; nothing where it has no direction."""
    square = (vector * vector).sum()
    if square == 0:
        return None
    return square.sqrt().detach() if detach else square.sqrt()


def cosines(nodes: dict, detach_norm: bool) -> dict:
    """Affinity of each ordered pair of places."""
    norms = {place: norm(vector, detach_norm) for place, vector in nodes.items()}
    out = {}
    for i in nodes:
        for j in nodes:
            nothing = norms[i] is None or norms[j] is None
            out[i, j] = 0.0 if nothing else (nodes[i] * nodes[j]).sum() / (norms[i] * norms[j])
    return out


def pairwise_affinity(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = 'avg',
    kernel: tuple[int, int] = (2, 2),
    radius: int | None = None,
    detach_norm: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    images_s = pool(student, kernel, kind, valid)
    images_t = pool(teacher.detach(), kernel, kind, valid)
    total, count = student.new_zeros(()), 0
    for nodes_s, nodes_t in zip(images_s, images_t, strict=True):
        cosines_s, cosines_t = cosines(nodes_s, detach_norm), cosines(nodes_t, False)
        for i, j in cosines_s:
            if radius is not None and max(abs(i[0] - j[0]), abs(i[1] - j[1])) > radius:
                continue
            gap = cosines_s[i, j] - cosines_t[i, j]
            total = total + gap * gap
            count += 1
    return total / max(count, 1)
