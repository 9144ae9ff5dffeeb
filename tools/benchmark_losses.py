"""Each loss alone against its plain implementation in ``benchmark_plain.py``, as sizes grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import benchmark_plain as plain
import torch
from benchmark_measure import extra_memory, in_turn, seconds, spread
from torch import Tensor

from mmstructkd import functional as F

__all__ = ['CASES', 'measure']

Loss = Callable[..., Tensor]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]
Both = tuple[Loss, Loss]

NODES, CLASSES, WIDTHS, SIDES = (256, 1024, 4096, 8192), (19, 60, 150), (128, 512), (64, 128, 256)


@dataclass(frozen=True)
class Case:
    """A loss, its plain counterpart, and what grows.

    Attributes:
        unit: what the sizes count.
        sizes: the sizes.
        make: size -> shapes of student and teacher.
        losses: size -> our loss and the plain one.
        positive: the inputs are depths, from 1 to 10.
        counted: the largest size at which memory is counted; ``None``: any. The record of
            each allocation of a loop over 22,500 pairs does not fit into 24 GB.
    """

    unit: str
    sizes: tuple[int, ...]
    make: Callable[[int], Shapes]
    losses: Callable[[int], Both]
    positive: bool = False
    counted: int | None = None


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _same(*losses: Loss) -> Callable[[int], Both]:
    """Losses that need nothing but the two inputs."""
    ours, other = losses
    return lambda size: (ours, other)


def _nodes(*widths: int, batch: int = 1) -> Callable[[int], Shapes]:
    """Maps of as many nodes, square or twice as wide as high."""

    def make(nodes: int) -> Shapes:
        height = 2 ** ((nodes.bit_length() - 1) // 2)
        student, teacher = ((batch, channels, height, nodes // height) for channels in widths)
        return student, teacher

    return make


def _maps(side: int) -> Callable[[int], Shapes]:
    """Two maps of a side, with as many channels as the size says."""
    return lambda channels: ((2, channels, side, side),) * 2


def _rows(size: int) -> Shapes:
    return ((size, 128),) * 2


def _depths(size: int) -> Shapes:
    return ((2, 1, size, size),) * 2


# --- what some losses are given besides ----------------------------------------------------------------------


def _labelled(ours: Loss, other: Loss) -> Callable[[int], Both]:
    """With labels of as many classes."""

    def losses(classes: int) -> Both:
        labels = torch.randint(0, classes, (2, 64, 64), generator=_noise())
        return partial(ours, labels=labels), partial(other, labels)

    return losses


def _classes_of_pixels(classes: int) -> Both:
    labels = torch.randint(0, classes, (2, 64, 64), generator=_noise())
    ours = partial(F.intra_class_variation_loss, labels=labels, num_classes=classes)
    return ours, partial(plain.plain_variation, labels, classes)


def _memory(size: int) -> Both:
    memory = torch.randn(size, 128, generator=_noise())
    return partial(F.memory_kl_loss, memory=memory), partial(plain.plain_memory, memory)


def _boxes(number: int) -> Both:
    corners = torch.rand(2, number, 4, generator=_noise())
    low, high = corners[..., :2] * 200, corners[..., :2] * 200 + 10 + corners[..., 2:] * 40
    boxes = list(torch.cat([low, high], dim=2).unbind())
    focal = partial(F.focal_feature_loss, boxes=boxes, input_size=(256, 256))
    return focal, partial(plain.plain_focal, boxes, (256, 256))


def _places(ours: Loss, other: Loss, argument: str, corners: int, **settings: float) -> Callable[[int], Both]:
    """With as many different pixels a set as it has corners."""

    def losses(side: int) -> Both:
        places = torch.rand(2, 5000, side * side // 8, generator=_noise()).argsort(-1)[..., :corners] * 8
        return partial(ours, **{argument: places}, **settings), partial(other, places)

    return losses


def _centers_of_classes(classes: int) -> Both:
    labels = torch.randint(0, classes, (2, 32, 32), generator=_noise())
    ours = partial(F.prototype_contrast_loss, labels=labels, num_classes=classes)
    return ours, partial(plain.plain_prototypes, labels, classes)


def _warm(classes: int) -> Both:
    temperature = 1 + torch.rand(2, 1, 64, 64, generator=_noise())
    ours = partial(F.instance_temperature_kl_loss, temperature=temperature)
    return ours, partial(plain.plain_instance_temperature, temperature)


def _chains(labels: int) -> Both:
    return partial(F.chain_cross_entropy_loss, transitions=torch.zeros(labels, labels)), plain.plain_chain


# --- the cases -----------------------------------------------------------------------------------------------

CASES: dict[str, Case] = {
    'pairwise_affinity_loss': Case(
        'nodes (D 128 and 512)',
        NODES,
        _nodes(128, 512),
        _same(partial(F.pairwise_affinity_loss, kernel_size=1), plain.plain_affinity),
    ),
    'cross_image_kl_loss': Case(
        'nodes an image, 2 images (D 128)',
        (256, 1024, 2048),
        _nodes(128, 128, batch=2),
        _same(F.cross_image_kl_loss, plain.plain_cross_image),
    ),
    'local_structure_loss': Case(
        'nodes (D 128)', NODES, _nodes(128, 128), _same(F.local_structure_loss, plain.plain_local)
    ),
    'interclass_similarity_loss': Case(
        'classes (32x32)',
        CLASSES,
        _maps(32),
        _same(partial(F.interclass_similarity_loss, normalize=False), plain.plain_interclass),
        counted=60,
    ),
    'category_similarity_loss': Case(
        'classes (32x32)',
        CLASSES,
        _maps(32),
        _same(partial(F.category_similarity_loss, kernel_size=1), plain.plain_category),
        counted=60,
    ),
    'intra_class_variation_loss': Case(
        'classes (D 128)', CLASSES, lambda classes: ((2, 128, 64, 64),) * 2, _classes_of_pixels
    ),
    'pixelwise_kl_loss': Case('classes', CLASSES, _maps(64), _same(F.pixelwise_kl_loss, plain.plain_pixelwise)),
    'channelwise_kl_loss': Case('classes', CLASSES, _maps(64), _same(F.channelwise_kl_loss, plain.plain_channelwise)),
    'dist_loss': Case('classes', CLASSES, _maps(64), _same(F.dist_loss, plain.plain_dist)),
    'decoupled_kl_loss': Case('classes', CLASSES, _maps(64), _labelled(F.decoupled_kl_loss, plain.plain_decoupled)),
    'weighted_soft_label_loss': Case(
        'classes', CLASSES, _maps(64), _labelled(F.weighted_soft_label_loss, plain.plain_soft_labels)
    ),
    'zipf_label_loss': Case('classes', CLASSES, _maps(64), _labelled(F.zipf_label_loss, plain.plain_zipf)),
    'soft_target_loss': Case('classes', CLASSES, _maps(64), _labelled(F.soft_target_loss, plain.plain_soft_target)),
    'instance_temperature_kl_loss': Case('classes', CLASSES, _maps(64), _warm),
    'chain_cross_entropy_loss': Case('labels, 16 positions', (9, 60), lambda labels: ((8, 16, labels),) * 2, _chains),
    'spatial_mean_loss': Case('channels', WIDTHS, _maps(64), _same(F.spatial_mean_loss, plain.plain_spatial_mean)),
    'cosine_distance_loss': Case('channels', WIDTHS, _maps(64), _same(F.cosine_distance_loss, plain.plain_cosine)),
    'mean_discrepancy_loss': Case(
        'rows (D 128)', (64, 512), _rows, _same(F.mean_discrepancy_loss, plain.plain_discrepancy)
    ),
    'prototype_contrast_loss': Case(
        'classes (D 128)', (19, 60), lambda classes: ((2, 128, 32, 32),) * 2, _centers_of_classes
    ),
    'cross_view_similarity_loss': Case(
        'rows (D 128)', (64, 512), _rows, _same(F.cross_view_similarity_loss, plain.plain_cross_view)
    ),
    'feature_mse_loss': Case('channels', WIDTHS, _maps(64), _same(F.feature_mse_loss, torch.nn.functional.mse_loss)),
    'standardized_mse_loss': Case(
        'channels', WIDTHS, _maps(64), _same(F.standardized_mse_loss, plain.plain_standardized)
    ),
    'attention_transfer_loss': Case(
        'channels', WIDTHS, _maps(64), _same(F.attention_transfer_loss, plain.plain_attention)
    ),
    'pixel_similarity_loss': Case(
        'channels', WIDTHS, _maps(64), _same(F.pixel_similarity_loss, plain.plain_pixel_similarity)
    ),
    'hierarchical_context_loss': Case(
        'channels', WIDTHS, _maps(64), _same(F.hierarchical_context_loss, plain.plain_context)
    ),
    'similarity_preserving_loss': Case(
        'images (D 256, 16x16)',
        (2, 16),
        lambda images: ((images, 256, 16, 16),) * 2,
        _same(F.similarity_preserving_loss, plain.plain_similarity),
    ),
    'relational_loss': Case('rows (D 128)', (32, 64, 128), _rows, _same(F.relational_loss, plain.plain_relational)),
    'correlation_congruence_loss': Case(
        'rows (D 128)', (256, 1024, 4096), _rows, _same(F.correlation_congruence_loss, plain.plain_congruence)
    ),
    'adjacent_correlation_loss': Case(
        'rows (D 128)', (256, 4096), _rows, _same(F.adjacent_correlation_loss, plain.plain_adjacent)
    ),
    'region_contrast_loss': Case(
        'rows (D 128)', (32, 256), _rows, _same(F.region_contrast_loss, plain.plain_region_contrast)
    ),
    'memory_kl_loss': Case('keys, 2048 anchors (D 128)', (256, 4096, 16384), lambda keys: _rows(2048), _memory),
    'focal_feature_loss': Case('boxes an image (D 256, 32x32)', (4, 64), lambda boxes: _maps(32)(256), _boxes),
    'binary_kl_loss': Case('classes', (20, 80), _maps(64), _same(F.binary_kl_loss, plain.plain_binary)),
    'localization_kl_loss': Case(
        'bins of 4 edges',
        (16, 32),
        lambda bins: _maps(64)(4 * bins),
        _same(F.localization_kl_loss, plain.plain_localization),
    ),
    'depth_l1_loss': Case('side', SIDES, _depths, _same(F.depth_l1_loss, plain.plain_depth_l1), positive=True),
    'silog_loss': Case('side', SIDES, _depths, _same(F.silog_loss, plain.plain_silog), positive=True),
    'scale_shift_invariant_loss': Case(
        'side', SIDES, _depths, _same(F.scale_shift_invariant_loss, plain.plain_scale_shift), positive=True
    ),
    'gradient_matching_loss': Case(
        'side', SIDES, _depths, _same(F.gradient_matching_loss, plain.plain_gradient_matching), positive=True
    ),
    'ordinal_relation_loss': Case(
        'side, 5000 pairs',
        SIDES,
        _depths,
        _places(F.ordinal_relation_loss, plain.plain_ordinal, 'pairs', 2),
        positive=True,
    ),
    'virtual_normal_loss': Case(
        'side, 5000 triplets',
        SIDES,
        _depths,
        _places(F.virtual_normal_loss, plain.plain_virtual_normal, 'triplets', 3, min_distance=0.0, min_angle=0.0),
        positive=True,
    ),
}


def _moved(value: Any, device: str) -> Any:
    """A tensor, or a list of them, on the device; anything else as it is."""
    if isinstance(value, list):
        return [_moved(entry, device) for entry in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _on(loss: Loss, device: str) -> Loss:
    """A loss with what it is given besides on the device."""
    if not isinstance(loss, partial):
        return loss
    keywords = {name: _moved(value, device) for name, value in loss.keywords.items()}
    return partial(loss.func, *(_moved(value, device) for value in loss.args), **keywords)


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
    case, generator = CASES[name], _noise()
    draw = torch.rand if case.positive else torch.randn
    student, teacher = (draw(shape, generator=generator).to(device) for shape in case.make(size))
    if case.positive:
        student, teacher = 1 + 9 * student, 1 + 9 * teacher
    student.requires_grad_(True)
    losses = dict(zip(('ours', 'plain'), (_on(loss, device) for loss in case.losses(size)), strict=True))
    results: dict[str, tuple[Tensor, Tensor]] = {}

    def run(kind: str) -> None:
        value = losses[kind](student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        results[kind] = (value.detach(), gradient)

    def timed(kind: str) -> float:
        results.pop(kind, None)
        return seconds(partial(run, kind), device)

    times = in_turn({kind: partial(timed, kind) for kind in losses}, rounds=rounds, warmup=warmup)
    out: dict[str, Any] = {'loss': name, 'unit': case.unit, 'size': size}
    pairs = zip(results['ours'], results['plain'], strict=True)
    value, gradient = ((one - two).double().norm() / two.double().norm() for one, two in pairs)
    out.update(value_differs=float(value), gradient_differs=float(gradient))
    results.clear()
    for kind in losses:
        out[kind] = spread(times[kind])
        if device == 'cuda' or case.counted is None or size <= case.counted:
            out[kind]['extra_bytes'] = extra_memory(partial(run, kind), device)
        results.clear()
    return out
