"""Collects what a batch's data samples know into :class:`~mmstructkd.structures.Targets`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmstructkd.errors import ShapeError
from mmstructkd.functional.core.resize import resize_labels, resize_mask
from mmstructkd.structures import Targets
from mmstructkd.tasks.area import valid_area

__all__ = [
    'branches_of',
    'collect_targets',
    'head_at',
    'head_of',
    'num_classes_of',
    'point_targets',
    'probe_samples',
    'probe_targets',
    'region_targets',
    'repeat_targets',
    'task_of',
]

FOREGROUND_IOU = 0.5


def head_of(network: nn.Module) -> nn.Module | None:
    """The head that knows the classes: the last decode head, or the box head."""
    for holder, name in (
        (network, 'decode_head'),
        (network, 'bbox_head'),
        (getattr(network, 'roi_head', None), 'bbox_head'),
    ):
        head = getattr(holder, name, None)
        if head is not None:
            return head[-1] if isinstance(head, nn.ModuleList) else head
    return None


def head_at(network: nn.Module | None, path: str) -> nn.Module | None:
    """The head that a module lies in, or where it lies in none the one that knows the classes.

    Args:
        network: the network; ``None``: there is none.
        path: dotted name of a module of it.

    Returns:
        The innermost module on the way that is called a head and says what it
        predicts, or :func:`head_of`.
    """
    if network is None:
        return None
    parts = path.split('.')
    for end in range(len(parts), 0, -1):
        # One of several heads is called by its number: 'decode_head.1'.
        name = parts[end - 2] if parts[end - 1].isdigit() and end > 1 else parts[end - 1]
        if 'head' not in name:
            continue
        module = network.get_submodule('.'.join(parts[:end]))
        if any(isinstance(getattr(module, fact, None), (int, float)) for fact in ('num_classes', 'max_depth')):
            return module
    return head_of(network)


def num_classes_of(head: nn.Module | None) -> int | None:
    """Number of classes that a head tells apart; two where one channel is the score of a sigmoid."""
    number = getattr(head, 'num_classes', None)
    # mmseg takes num_classes=1 for such a head as well; the labels are 0 and 1 either way.
    binary = number == 1 and getattr(head, 'out_channels', None) == 1 and not hasattr(head, 'max_depth')
    return 2 if binary else number


def task_of(network: nn.Module) -> str:
    """``'det'`` for a detector of mmdet, ``'depth'`` for mmseg's depth estimator, else ``'seg'``."""
    bases = type(network).__mro__
    if any(base.__module__.split('.')[0] == 'mmdet' for base in bases):
        return 'det'
    return 'depth' if any(base.__name__ == 'DepthEstimator' for base in bases) else 'seg'


def collect_targets(network: nn.Module, inputs: Tensor, data_samples: Sequence[Any] | None) -> Targets:
    """Gather labels, boxes, depth and the area that counts.

    Args:
        network: the student: its head says which label is ignored.
        inputs: the preprocessed batch, shape (B, 3, H, W).
        data_samples: one per image; what not all of them have is ``None``.

    Returns:
        The targets, on the device of ``inputs``. ``inside`` is what is not
        padding; ``valid`` what of it is labelled: has a class, or for a depth
        estimator a reading. Padding and what is no reading (not finite, or not
        above 0) is 0 in ``depth``.
    """
    head = head_of(network)
    ignore_index = getattr(head, 'ignore_index', 255)
    area = valid_area(inputs, data_samples)
    size = (int(inputs.shape[-2]), int(inputs.shape[-1]))
    labels = _maps(data_samples, 'gt_sem_seg', inputs.device, torch.int64, size, ignore_index)
    depth = _maps(data_samples, 'gt_depth_map', inputs.device, torch.float32, size, 0)
    if depth is not None:
        reads = torch.isfinite(depth) & (depth > 0)
        depth = torch.where(reads if area is None else reads & area, depth, 0)
    known = None
    if depth is not None and task_of(network) == 'depth':
        known = depth > 0
    elif labels is not None:
        known = labels != ignore_index
    if known is not None and area is not None:
        # The semantic maps of some detectors are smaller than their input.
        known = resize_mask(known, (area.shape[1], area.shape[2])) & area
    return Targets(
        labels=labels,
        valid=area if known is None else known,
        inside=area,
        ignore_index=ignore_index,
        num_classes=num_classes_of(head),
        images=inputs,
        input_size=tuple(inputs.shape[-2:]),
        boxes=_instances(data_samples, 'bboxes', inputs.device),
        box_labels=_instances(data_samples, 'labels', inputs.device),
        depth=depth,
    )


def _maps(
    samples: Sequence[Any] | None, name: str, device: torch.device, dtype: torch.dtype, size: tuple[int, int], pad: int
) -> Tensor | None:
    """Maps of one kind of all samples at the size of the input, (B, H, W); ``None`` where one of them has none."""
    if not samples or not all(hasattr(sample, name) for sample in samples):
        return None
    maps = [_map_of(getattr(sample, name), name).to(device, dtype) for sample in samples]
    fitted = [_fit(values, sample, size, pad) for values, sample in zip(maps, samples, strict=True)]
    return torch.stack(fitted)


def _map_of(field: Any, name: str) -> Tensor:
    """The one map of a field, (H, W): mmseg stores it as ``data``, mmdet as ``sem_seg``, others as they like."""
    values = dict(field.items()) if isinstance(field, BaseDataElement) else {'data': field}
    maps = {key: value for key, value in values.items() if isinstance(value, (Tensor, np.ndarray)) and value.ndim >= 2}
    key = 'data' if 'data' in maps else 'sem_seg' if 'sem_seg' in maps else next(iter(maps), None)
    if key is None or (len(maps) > 1 and key not in ('data', 'sem_seg')):
        raise ShapeError(
            f'collect_targets: `{name}` must hold one map, got the fields {sorted(values)}. '
            'Store it as PixelData(data=...) or PixelData(sem_seg=...), with shape (1, H, W).'
        )
    found = torch.as_tensor(maps[key])
    if found.numel() != found.shape[-2] * found.shape[-1]:
        raise ShapeError(f'collect_targets: `{name}` must have shape (1, H, W), got {tuple(found.shape)}.')
    return found.reshape(found.shape[-2:])


def _fit(values: Tensor, sample: Any, size: tuple[int, int], pad: int) -> Tensor:
    """Bring a map to the size of the input, nearest; one of the image without its padding is padded first.

    A map of lower resolution (mmdet's semantic maps may have a stride) covers
    the padded input if its sides are to that as they are to each other, else
    the unpadded image.
    """
    if values.shape == size:
        return values
    image = tuple(sample.metainfo.get('img_shape', size)[:2])
    if image != size and _ratio_gap(values, image) < _ratio_gap(values, size):
        inner = values if values.shape == image else resize_labels(values[None], image)[0]
        whole = values.new_full(size, pad)
        whole[: image[0], : image[1]] = inner[: size[0], : size[1]]
        return whole
    return resize_labels(values[None], size)[0]


def _ratio_gap(values: Tensor, size: tuple[int, int]) -> float:
    """How far a map is from being a scaled one of a size."""
    return abs(math.log(values.shape[0] * size[1] / (values.shape[1] * size[0])))


def _instances(samples: Sequence[Any] | None, name: str, device: torch.device) -> tuple[Tensor, ...] | None:
    """One field of the true instances of each image."""
    if not samples or not all(name in getattr(sample, 'gt_instances', ()) for sample in samples):
        return None
    fields = [getattr(sample.gt_instances, name) for sample in samples]
    return tuple(getattr(value, 'tensor', value).to(device) for value in fields)  # mmdet may wrap boxes


def branches_of(network: nn.Module) -> int:
    """How many copies of the batch a network trains on: the branches of a TridentNet, else 1."""
    return int(getattr(getattr(network, 'backbone', None), 'num_branch', 1))


def repeat_targets(targets: Targets, times: int) -> Targets:
    """The targets of a batch that a network has copied, one copy after the other.

    Args:
        targets: of the batch.
        times: number of copies.

    Returns:
        What is known of each row.
    """

    def repeated(value: Any) -> Any:
        if isinstance(value, tuple):
            return value * times
        return None if value is None else value.repeat(times, *[1] * (value.dim() - 1))

    fields = ('labels', 'valid', 'inside', 'images', 'boxes', 'box_labels', 'depth')
    return dataclasses.replace(targets, **{name: repeated(getattr(targets, name)) for name in fields})


def region_targets(targets: Targets, regions: Tensor | None) -> Targets:
    """What is known of pooled regions: their labels; maps of the image do not apply.

    A region has the label of the true box that it overlaps most, at an IoU of
    at least 0.5, and else ``num_classes``, which is mmdet's background.

    Args:
        targets: of the batch.
        regions: shape (R, 5), the number of the image first, which goes on
            behind the batch where a network has copied that; ``None``: not known.

    Returns:
        ``labels`` of shape (R,), where the batch has boxes; no masks.
    """
    labels = None
    known = None not in (targets.boxes, targets.box_labels, targets.num_classes)
    if known and regions is not None:
        labels = torch.full((len(regions),), targets.num_classes, dtype=torch.int64, device=regions.device)
        images = regions[:, 0].remainder(len(targets.boxes))
        for image, (boxes, classes) in enumerate(zip(targets.boxes, targets.box_labels, strict=True)):
            if len(boxes):
                overlap, nearest = _iou(regions[:, 1:], boxes).max(dim=1)
                mine = (images == image) & (overlap >= FOREGROUND_IOU)
                labels = torch.where(mine, classes[nearest], labels)
    return Targets(labels=labels, ignore_index=-1, num_classes=targets.num_classes, input_size=targets.input_size)


def point_targets(targets: Targets, points: Tensor) -> Targets:
    """What is known at points of the images, as maps of P rows and one column.

    Args:
        targets: of the batch.
        points: shape (B, P, 2), (x, y) in [0, 1] of the padded input.

    Returns:
        ``labels``, ``valid`` and ``depth`` of shape (B, P, 1), as far as the
        batch has them; no image and no boxes, which are no points.
    """

    def at_points(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        sides = torch.tensor([values.shape[2], values.shape[1]], device=values.device)
        place = (points.to(values.device) * sides).long().clamp(min=0)
        columns, rows = torch.minimum(place, sides - 1).unbind(dim=-1)
        images = torch.arange(len(values), device=values.device)[:, None]
        return values[images, rows, columns][..., None]

    return Targets(
        labels=at_points(targets.labels),
        valid=at_points(targets.valid),
        ignore_index=targets.ignore_index,
        num_classes=targets.num_classes,
        input_size=(points.shape[1], 1),
        depth=at_points(targets.depth),
    )


def _iou(first: Tensor, second: Tensor) -> Tensor:
    """Overlap of each pair of boxes, (n, 4) and (m, 4) to (n, m)."""
    corners = (
        torch.maximum(first[:, None, :2], second[None, :, :2]),
        torch.minimum(first[:, None, 2:], second[None, :, 2:]),
    )
    shared = (corners[1] - corners[0]).clamp(min=0).prod(dim=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=-1) for boxes in (first, second)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp(min=1e-6)


def probe_samples(images: int, size: tuple[int, int]) -> list[BaseDataElement]:
    """Samples of whole images without labels, for a forward pass that asks for sizes."""
    meta = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
    meta = {**meta, 'scale_factor': (1.0, 1.0), 'flip': False}
    return [BaseDataElement(metainfo=meta) for _ in range(images)]


def probe_targets(task: str, images: int, num_classes: int | None, size: tuple[int, int]) -> Targets:
    """What the batches of a task know, to try a loss with: a loss that needs more fails here.

    Args:
        task: of :func:`task_of`.
        images: number of images.
        num_classes: of the student.
        size: (H, W) of the input.

    Returns:
        Targets of such an input.
    """
    everywhere = torch.ones(images, *size, dtype=torch.bool)
    known = Targets(
        valid=everywhere,
        inside=everywhere,
        num_classes=num_classes,
        images=torch.zeros(images, 3, *size),
        input_size=size,
    )
    extra: dict[str, Any] = {}
    if task == 'seg':
        extra['labels'] = torch.zeros(images, *size, dtype=torch.int64)
    elif task == 'depth':
        extra['depth'] = torch.ones(images, *size)
    else:
        extra['boxes'] = (torch.tensor([[4.0, 4.0, 28.0, 20.0]]),) * images
        extra['box_labels'] = (torch.zeros(1, dtype=torch.int64),) * images
    return dataclasses.replace(known, **extra)
