"""Batches to try a config with: the first real one, or noise with labels of the kind that training has."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmstructkd.errors import ConfigError
from mmstructkd.tasks.targets import head_of, task_of

__all__ = [
    'Needs',
    'fixed_size',
    'input_size',
    'needs_of',
    'pipeline_size',
    'real_batch',
    'synthetic_batch',
    'training_info',
]

OWNER = 'Preflight'
DEFAULT_SIZE = (512, 512)


def real_batch(cfg: Config, model: BaseModel, *, batch_size: int | None = None) -> dict[str, Any]:
    """Take the first batch of the train dataloader, preprocessed.

    Args:
        cfg: the config.
        model: whose data preprocessor is used; the batch goes to its device.
        batch_size: replaces the config's.

    Returns:
        ``inputs`` (B, 3, H, W) and ``data_samples``.

    Raises:
        ConfigError: there is no dataloader, or its data are not there.
    """
    settings = copy.deepcopy(cfg.get('train_dataloader'))
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f'{OWNER}: the config must define `train_dataloader`, got {settings!r}. Add it, or pass --synthetic.'
        )
    settings.update(num_workers=0, persistent_workers=False)
    settings.pop('prefetch_factor', None)
    if batch_size is not None:
        settings['batch_size'] = batch_size
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        batch = next(iter(Runner.build_dataloader(settings, seed=(cfg.get('randomness') or {}).get('seed') or 0)))
    except (OSError, StopIteration, ConfigError) as err:
        reason = 'no batch at all' if isinstance(err, StopIteration) else f'{type(err).__name__}: {err}'
        raise ConfigError(
            f'{OWNER}: `train_dataloader` must give a batch, got {reason}. Put the data there, or pass --synthetic.'
        ) from err
    with training_info(cfg):
        return model.data_preprocessor(batch, True)


# --- how large training's images are -------------------------------------------------------------------------


def _pair(value: Any) -> tuple[int, int] | None:
    """Two sides of one number or two; ``None`` for anything else."""
    sides = [value, value] if isinstance(value, (int, float)) else list(value) if isinstance(value, Sequence) else []
    if len(sides) != 2 or not all(isinstance(side, (int, float)) and side >= 1 for side in sides):
        return None
    return (int(sides[0]), int(sides[1]))


def fixed_size(network: nn.Module) -> tuple[int, int] | None:
    """Size of the input that a network itself is made for, where it says so.

    Asked in this order: the size that its data preprocessor makes or pads to,
    the size of the position embeddings of a transformer (``img_size``), that of
    SSD's anchors, the windows of its sliding inference.

    Args:
        network: a segmentor, depth estimator or detector.

    Returns:
        (H, W), or ``None`` where it says nothing.
    """
    preprocessor = getattr(network, 'data_preprocessor', None)
    sizes = [getattr(preprocessor, 'size', None)]
    sizes += [getattr(augment, 'size', None) for augment in getattr(preprocessor, 'batch_augments', None) or ()]
    for name in ('backbone', 'image_encoder'):
        sizes.append(getattr(getattr(network, name, None), 'img_size', None))
    anchors = getattr(getattr(network, 'bbox_head', None), 'prior_generator', None)
    sizes.append(getattr(anchors, 'input_size', None))
    test = getattr(network, 'test_cfg', None)
    sizes.append(test.get('crop_size') if isinstance(test, Mapping) else None)
    return next((pair for pair in map(_pair, sizes) if pair is not None), None)


def _steps(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every dict with a ``type`` below a value, in the order of the text."""
    if isinstance(value, Mapping):
        if 'type' in value:
            yield value
        for entry in value.values():
            yield from _steps(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _steps(entry)


def _training_steps(cfg: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of the train pipeline, those of wrapped datasets first."""
    loader = cfg.get('train_dataloader')
    dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
    if not isinstance(dataset, Mapping):
        return []  # none, or one that is built already
    inner = list(_steps(dataset.get('dataset') or dataset.get('datasets') or ()))
    return [*inner, *_steps(dataset.get('pipeline') or ())]


def pipeline_size(cfg: Mapping[str, Any]) -> tuple[int, int] | None:
    """Size that a train pipeline makes.

    Args:
        cfg: the config.

    Returns:
        (H, W) after the last step that resizes, crops or pads to a size; ``None``
        where none does.
    """
    size = None
    for step in _training_steps(cfg):
        kind = str(step['type']).rsplit('.', 1)[-1]
        scale = step.get('scale', step.get('img_scale', step.get('scales')))
        while isinstance(scale, Sequence) and scale and isinstance(scale[0], Sequence):
            scale = scale[-1]  # of several the largest, as configs list them
        if kind == 'RandomCrop' and step.get('crop_type', 'absolute') == 'absolute':
            size = _pair(step.get('crop_size')) or size
        elif kind == 'Pad':
            padded = step.get('size')
            size = (padded[1], padded[0]) if _pair(padded) else size
        elif 'Resize' in kind or kind in ('Mosaic', 'MixUp', 'CachedMosaic', 'CachedMixUp'):
            sides = _pair(scale)
            if sides and step.get('keep_ratio'):
                sides = (max(sides), min(sides))  # the longest and the shortest, of an image that is wider than high
            size = (sides[1], sides[0]) if sides else size
    return size


def input_size(cfg: Config, model: BaseModel) -> tuple[int, int]:
    """Size that training feeds.

    The preprocessor's or, without one, ``crop_size`` of the config, what its
    train pipeline ends with, what the network is made for, and else 512x512.

    Args:
        cfg: the config.
        model: the model with its data preprocessor, or a distiller of one.

    Returns:
        (H, W).
    """
    network = getattr(model, 'student', model)
    made = _pair(getattr(model.data_preprocessor, 'size', None))
    size = made or _pair(cfg.get('crop_size')) or pipeline_size(cfg) or fixed_size(network)
    return size or DEFAULT_SIZE


# --- what training's samples hold ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What the samples of a network hold besides boxes, or besides class maps.

    Attributes:
        masks: a mask for each box.
        semantic: number of classes of the class map beside the boxes; 0: none.
        edges: a map of the edges between the classes.
        proposals: regions that stand in for a region proposal network.
        semantic_scale: sides of that class map by those of the image.
    """

    masks: bool = False
    semantic: int = 0
    edges: bool = False
    proposals: bool = False
    semantic_scale: float = 1.0


def needs_of(network: nn.Module, cfg: Mapping[str, Any] | None = None) -> Needs:
    """Find out what the samples of a network must hold.

    A network with a mask head needs masks; of any other the train pipeline says
    whether it loads them, and without one the names of the network's modules.

    Args:
        network: a segmentor, depth estimator or detector.
        cfg: the config that trains it, where it is at hand.

    Returns:
        What they must hold.
    """
    kinds = {type(module).__name__ for module in network.modules()}
    # heads for masks, not masked convolutions; and not where none is asked for: some assigners take any that are there
    masks = any(re.search(r'Mask(?!ed)|Ins[A-Z]', kind) for kind in kinds)
    steps = [] if cfg is None else _training_steps(cfg)
    loads = [step for step in steps if str(step['type']).rsplit('.', 1)[-1].startswith('Load')]
    asked = [step.get('with_mask', 'Panoptic' in str(step['type'])) for step in loads if 'Annot' in str(step['type'])]
    if asked and task_of(network) == 'det':
        masks = any(asked)
    masks = masks or bool(getattr(network, 'with_mask', False))
    panoptic = getattr(network, 'panoptic_head', None)
    semantic = 0
    for head in (panoptic, getattr(network, 'semantic_head', None)):
        stuff = getattr(head, 'num_stuff_classes', 0) or 0
        if stuff:
            semantic = stuff + (getattr(head, 'num_things_classes', 0) or 0)
    fused = getattr(getattr(network, 'roi_head', None), 'semantic_head', None)
    if fused is not None:
        semantic = getattr(fused, 'num_classes', 0) or 2
    edges = 'PIDHead' in kinds or any('GenerateEdge' in str(step['type']) for step in steps)
    proposals = hasattr(network, 'roi_head') and getattr(network, 'rpn_head', None) is None
    scales = [step.get('scale_factor', 1) for step in steps if str(step['type']).rsplit('.', 1)[-1] == 'SegRescale']
    scale = float(scales[-1]) if scales else 1.0
    return Needs(masks=masks, semantic=int(semantic), edges=edges, proposals=proposals, semantic_scale=scale)


@contextlib.contextmanager
def training_info(cfg: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Let mmengine's message hub know what it knows at the first iteration of a training.

    Some networks ask it how far the training is. What it knows already stays,
    and what was added is gone afterwards.

    Args:
        cfg: the config, for the length of the training.

    Yields:
        Nothing.
    """
    train = {} if cfg is None else cfg.get('train_cfg') or {}
    lengths = {name: train.get(name) or 1 for name in ('max_iters', 'max_epochs')}
    known = {'iter': 0, 'epoch': 0, **lengths}
    hub = MessageHub.get_current_instance()
    added = [name for name in known if name not in hub.runtime_info]
    for name in added:
        hub.update_info(name, known[name])
    try:
        yield
    finally:
        for name in added:
            hub.pop_info(name)
            hub._resumed_keys.pop(name, None)  # the hub cannot be saved with a key that it no longer has


def synthetic_batch(
    model: BaseModel,
    size: tuple[int, int],
    batch_size: int = 2,
    *,
    seed: int = 0,
    training: bool = True,
    needs: Needs | None = None,
) -> dict[str, Any]:
    """Make a batch of noise with random labels, and preprocess it as real data.

    Segmentors get class masks and depth maps, detectors boxes, and both what
    else they ask for, see :class:`Needs`.

    Args:
        model: a segmentor, depth estimator, detector, or a distiller of one.
        size: (H, W) of the images.
        batch_size: number of images.
        seed: of the noise; the global random stream is not used.
        training: handed to the data preprocessor.
        needs: of the network; ``None``: found by :func:`needs_of`.

    Returns:
        ``inputs`` (B, 3, H, W) and ``data_samples``.
    """
    network = getattr(model, 'student', model)
    needs = needs_of(network) if needs is None else needs
    generator = torch.Generator().manual_seed(seed)
    classes = getattr(head_of(network), 'num_classes', None) or 2
    make = _detection_sample if task_of(network) == 'det' else _segmentation_sample
    meta = {'img_shape': size, 'ori_shape': size, 'pad_shape': size, 'scale_factor': (1.0, 1.0), 'flip': False}
    mean = getattr(model.data_preprocessor, 'mean', None)
    channels = max(3, 0 if mean is None else mean.numel())
    data = {
        'inputs': [
            torch.randint(0, 256, (channels, *size), generator=generator, dtype=torch.uint8) for _ in range(batch_size)
        ],
        'data_samples': [make(size, classes, meta, generator, needs) for _ in range(batch_size)],
    }
    with training_info():
        return model.data_preprocessor(data, training)


def _areas(size: tuple[int, int], classes: int, generator: torch.Generator) -> Tensor:
    """A class map of up to sixteen areas, (1, H, W)."""
    coarse = torch.randint(0, classes, (4, 4), generator=generator)
    rows, columns = (torch.arange(side) * 4 // side for side in size)
    return coarse[rows[:, None], columns[None, :]][None]


def _edges(labels: Tensor) -> Tensor:
    """Where a class map changes, (1, H, W), 1 on both sides of the border."""
    edges = torch.zeros_like(labels)
    for axis in (1, 2):
        length = labels.shape[axis] - 1
        differs = labels.narrow(axis, 0, length) != labels.narrow(axis, 1, length)
        edges.narrow(axis, 0, length)[differs] = 1
        edges.narrow(axis, 1, length)[differs] = 1
    return edges


def _segmentation_sample(
    size: tuple[int, int], classes: int, meta: dict, generator: torch.Generator, needs: Needs
) -> Any:
    """Labels and depth in metres of one image."""
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=meta)
    labels = _areas(size, classes, generator)
    sample.gt_sem_seg = PixelData(data=labels)
    sample.set_data({'gt_depth_map': PixelData(data=torch.rand(1, *size, generator=generator) * 9 + 1)})
    if needs.edges:
        sample.set_data({'gt_edge_map': PixelData(data=_edges(labels).to(torch.uint8))})
    return sample


def _detection_sample(size: tuple[int, int], classes: int, meta: dict, generator: torch.Generator, needs: Needs) -> Any:
    """Three boxes of one image, each with the mask of its whole area where masks are wanted."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    scale = torch.tensor([size[1], size[0]])
    corners = torch.rand(3, 2, generator=generator) * 0.5
    sides = torch.rand(3, 2, generator=generator) * 0.4 + 0.1
    boxes = torch.cat([corners * scale, (corners + sides) * scale], dim=1)
    masks = np.zeros((3, *size), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(0, classes, (3,), generator=generator))
    if needs.masks:
        sample.gt_instances.masks = BitmapMasks(masks, *size)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    if needs.semantic:
        height, width = (max(round(side * needs.semantic_scale), 1) for side in size)
        sample.gt_sem_seg = PixelData(sem_seg=_areas((height, width), needs.semantic, generator))
    if needs.proposals:
        shifts = torch.rand(5, 3, 4, generator=generator) * 0.2 - 0.1
        near = boxes + shifts * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        near = near.flatten(0, 1).clamp(min=0)
        near = torch.minimum(near, scale.repeat(2).float())
        sample.proposals = InstanceData(bboxes=near, scores=torch.rand(len(near), generator=generator))
    return sample
