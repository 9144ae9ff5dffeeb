"""Each loss alone against a plain implementation of the same formula, as sizes grow.

The plain ones are what one writes from the paper: autograd through dense graphs,
loops over classes and pairs of classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nn_functional
from benchmark_measure import extra_memory, in_turn, seconds, spread
from torch import Tensor

from mmstructkd import functional as F

__all__ = ['CASES', 'measure']

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A loss, its plain counterpart, and what grows.

    Attributes:
        unit: what the sizes count.
        sizes: the sizes.
        make: size -> shapes of student and teacher.
        ours: size -> the loss.
        plain: size -> the plain one.
    """

    unit: str
    sizes: tuple[int, ...]
    make: Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]
    ours: Callable[[int], Loss]
    plain: Callable[[int], Loss]


# --- plain implementations -----------------------------------------------------------------------------------


def plain_affinity(student: Tensor, teacher: Tensor) -> Tensor:
    """Dense graphs of cosines."""
    graphs = []
    for features in (student, teacher):
        nodes = nn_functional.normalize(features.flatten(2), dim=1)
        graphs.append(nodes.transpose(1, 2) @ nodes)
    return (graphs[0] - graphs[1]).square().mean()


def plain_interclass(student: Tensor, teacher: Tensor) -> Tensor:
    """Loops over pairs of classes."""
    matrices = []
    for logits in (student, teacher):
        shares = logits.flatten(2).softmax(dim=2)
        rows = []
        for first in range(logits.shape[1]):
            row = [
                (shares[:, first] * (shares[:, first] / shares[:, second]).log()).sum(dim=1)
                for second in range(logits.shape[1])
            ]
            rows.append(torch.stack(row, dim=1))
        matrices.append(torch.stack(rows, dim=1))
    return (matrices[0] - matrices[1]).square().mean()


def plain_channelwise(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of softmax over positions."""
    log_s, share_t = student.flatten(2).div(4).log_softmax(2), teacher.flatten(2).div(4).softmax(2)
    return 16 * (share_t * (share_t.log() - log_s)).sum(2).mean()


def plain_pixelwise(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of softmax over classes."""
    log_s, share_t = student.log_softmax(1), teacher.softmax(1)
    return (share_t * (share_t.log() - log_s)).sum(1).mean()


def plain_standardized(student: Tensor, teacher: Tensor) -> Tensor:
    """Square distance after standardising each channel of each image."""

    def standard(features: Tensor) -> Tensor:
        std, mean = torch.std_mean(features, dim=(2, 3), keepdim=True, correction=0)
        return (features - mean) / std

    return nn_functional.mse_loss(standard(student), standard(teacher))


def plain_similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Gram matrices of the batch."""
    grams = [nn_functional.normalize(x.flatten(1) @ x.flatten(1).T, dim=1) for x in (student, teacher)]
    return (grams[0] - grams[1]).square().sum() / student.shape[0] ** 2


def plain_category(student: Tensor, teacher: Tensor) -> Tensor:
    """Loops over pairs of classes: how much their maps overlap."""
    matrices = []
    for logits in (student, teacher):
        shares = (logits.flatten(2) / 4).softmax(2)
        rows = []
        for first in range(logits.shape[1]):
            row = [(shares[:, first] * shares[:, second]).sum(1) for second in range(logits.shape[1])]
            rows.append(torch.stack(row, dim=1))
        matrices.append(torch.stack(rows, dim=1))
    return (matrices[0] - matrices[1]).square().mean()


def plain_cross_image(student: Tensor, teacher: Tensor) -> Tensor:
    """Every pixel against every pixel of the batch, image by image."""
    rows = []
    for first in range(student.shape[0]):
        for second in range(student.shape[0]):
            near = []
            for features in (student, teacher):
                units = nn_functional.normalize(features.flatten(2), dim=1)
                near.append(units[first].T @ units[second] / 0.1)
            share_t = near[1].softmax(1)
            rows.append((share_t * (share_t.log() - near[0].log_softmax(1))).sum(1).mean())
    return torch.stack(rows).mean()


def plain_relational(student: Tensor, teacher: Tensor) -> Tensor:
    """All distances and all angles, (N, N) and (N, N, N)."""

    def relations(rows: Tensor) -> tuple[Tensor, Tensor]:
        gaps = rows[None] - rows[:, None]
        distances = gaps.norm(dim=2)
        units = nn_functional.normalize(gaps, dim=2)
        return distances / distances[distances > 0].mean(), units @ units.transpose(1, 2)

    (distance_s, angle_s), (distance_t, angle_t) = relations(student), relations(teacher)
    distance = nn_functional.smooth_l1_loss(distance_s, distance_t)
    return 25 * distance + 50 * nn_functional.smooth_l1_loss(angle_s, angle_t)


def plain_variation(labels: Tensor, classes: int, student: Tensor, teacher: Tensor) -> Tensor:
    """A loop over classes: the cosine of each pixel with the centre of its class."""
    near = []
    for features in (student, teacher):
        centres = torch.zeros_like(features)
        for number in range(classes):
            mask = (labels == number).to(features.dtype)[:, None]
            centre = (features * mask).sum((2, 3)) / (mask.sum((2, 3)) + 1e-6)
            centres = centres + mask * centre[:, :, None, None]
        near.append(nn_functional.cosine_similarity(features, centres, dim=1))
    return nn_functional.mse_loss(near[0], near[1])


def _labels(size: int) -> Tensor:
    return torch.randint(0, size, (2, 64, 64), generator=torch.Generator().manual_seed(0))


def _nodes(width: tuple[int, int], batch: int = 1) -> Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]:
    """Maps of as many nodes, twice as wide as high or square."""

    def make(nodes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        height = 2 ** ((nodes.bit_length() - 1) // 2)
        return tuple((batch, channels, height, nodes // height) for channels in width)

    return make


def _scores(size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return ((2, size, 64, 64),) * 2


def _small_scores(size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the plain one keeps several maps for each pair of classes: 64x64 takes 20 GB for 150 of them."""
    return ((2, size, 32, 32),) * 2


NODES, CLASSES = (256, 1024, 4096, 8192), (19, 60, 150)


def _always(loss: Loss) -> Callable[[int], Loss]:
    return lambda size: loss


CASES: dict[str, Case] = {
    'pairwise_affinity_loss': Case(
        'nodes (D 128 and 512)',
        NODES,
        _nodes((128, 512)),
        _always(partial(F.pairwise_affinity_loss, kernel_size=1)),
        _always(plain_affinity),
    ),
    'interclass_similarity_loss': Case(
        'classes',
        CLASSES,
        _small_scores,
        _always(partial(F.interclass_similarity_loss, normalize=False)),
        _always(plain_interclass),
    ),
    'category_similarity_loss': Case(
        'classes',
        CLASSES,
        _small_scores,
        _always(partial(F.category_similarity_loss, kernel_size=1)),
        _always(plain_category),
    ),
    'cross_image_kl_loss': Case(
        'nodes an image, 2 images (D 128)',
        (256, 1024, 2048),
        _nodes((128, 128), batch=2),
        _always(F.cross_image_kl_loss),
        _always(plain_cross_image),
    ),
    'relational_loss': Case(
        'rows (D 128)',
        (32, 64, 128),
        lambda n: ((n, 128), (n, 128)),
        _always(F.relational_loss),
        _always(plain_relational),
    ),
    'intra_class_variation_loss': Case(
        'classes',
        CLASSES,
        lambda n: ((2, 128, 64, 64),) * 2,
        lambda n: partial(F.intra_class_variation_loss, labels=_labels(n), num_classes=n),
        lambda n: partial(plain_variation, _labels(n), n),
    ),
    'channelwise_kl_loss': Case(
        'classes', CLASSES, _scores, _always(F.channelwise_kl_loss), _always(plain_channelwise)
    ),
    'pixelwise_kl_loss': Case('classes', CLASSES, _scores, _always(F.pixelwise_kl_loss), _always(plain_pixelwise)),
    'standardized_mse_loss': Case(
        'channels',
        (128, 512),
        _scores,
        _always(F.standardized_mse_loss),
        _always(plain_standardized),
    ),
    'similarity_preserving_loss': Case(
        'images (D 256, 16x16)',
        (2, 16),
        lambda n: ((n, 256, 16, 16),) * 2,
        _always(F.similarity_preserving_loss),
        _always(plain_similarity),
    ),
}


def measure(name: str, size: int, *, device: str, rounds: int, warmup: int) -> dict[str, Any]:
    """Time one loss at one size, value and gradient, against the plain one.

    Args:
        name: key of :data:`CASES`.
        size: what grows.
        device: ``'cpu'`` or ``'cuda'``.
        rounds: turns that count.
        warmup: turns before.

    Returns:
        For ``ours`` and ``plain`` the times and extra bytes, and how far the
        values and gradients differ, relatively.
    """
    case = CASES[name]
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(shape, generator=generator).to(device) for shape in case.make(size))
    student.requires_grad_(True)
    results: dict[str, tuple[Tensor, Tensor]] = {}
    losses = {'ours': case.ours(size), 'plain': case.plain(size)}
    for kind, loss in losses.items():
        if isinstance(loss, partial):
            moved = [a.to(device) if isinstance(a, Tensor) else a for a in loss.args]
            kept = {k: a.to(device) if isinstance(a, Tensor) else a for k, a in loss.keywords.items()}
            losses[kind] = partial(loss.func, *moved, **kept)

    def run(kind: str) -> None:
        value = losses[kind](student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        results[kind] = (value.detach(), gradient)

    def timed(kind: str) -> float:
        results.pop(kind, None)
        return seconds(partial(run, kind), device)

    times = in_turn({kind: partial(timed, kind) for kind in losses}, rounds=rounds, warmup=warmup)
    out: dict[str, Any] = {'loss': name, 'unit': case.unit, 'size': size}
    value, gradient = ((a - b).double().norm() / b.double().norm() for a, b in zip(*results.values(), strict=True))
    out.update(value_differs=float(value), gradient_differs=float(gradient))
    results.clear()
    for kind in losses:
        out[kind] = dict(spread(times[kind]), extra_bytes=extra_memory(partial(run, kind), device))
        results.clear()
    return out
