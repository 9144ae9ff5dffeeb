"""Batches to try a config with: the first real one, or noise with labels of the task."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmstructkd.distillers.targets import head_of, task_of
from mmstructkd.errors import ConfigError

__all__ = ['input_size', 'real_batch', 'synthetic_batch']

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
    except (OSError, StopIteration) as err:
        reason = 'no batch at all' if isinstance(err, StopIteration) else f'{type(err).__name__}: {err}'
        raise ConfigError(
            f'{OWNER}: `train_dataloader` must give a batch, got {reason}. Put the data there, or pass --synthetic.'
        ) from err
    return model.data_preprocessor(batch, True)


def input_size(cfg: Config, model: BaseModel) -> tuple[int, int]:
    """Size that training feeds: the preprocessor's, else ``crop_size``, else 512x512.

    Args:
        cfg: the config.
        model: the model with its data preprocessor.

    Returns:
        (H, W).
    """
    size = getattr(model.data_preprocessor, 'size', None) or cfg.get('crop_size') or DEFAULT_SIZE
    return (int(size[0]), int(size[1])) if isinstance(size, Sequence) else (int(size), int(size))


def synthetic_batch(
    model: BaseModel, size: tuple[int, int], batch_size: int = 2, *, seed: int = 0, training: bool = True
) -> dict[str, Any]:
    """Make a batch of noise with random labels, and preprocess it as real data.

    Segmentors get class masks and depth maps, detectors boxes and masks.

    Args:
        model: a segmentor, depth estimator, detector, or a distiller of one.
        size: (H, W) of the images.
        batch_size: number of images.
        seed: of the noise; the global random stream is not used.
        training: handed to the data preprocessor.

    Returns:
        ``inputs`` (B, 3, H, W) and ``data_samples``.
    """
    network = getattr(model, 'student', model)
    generator = torch.Generator().manual_seed(seed)
    classes = getattr(head_of(network), 'num_classes', None) or 2
    make = _segmentation_sample
    if task_of(network) == 'det':
        # not for those without a mask head: some assigners take masks, of another type, wherever there are any
        make = functools.partial(_detection_sample, with_masks=bool(getattr(network, 'with_mask', False)))
    meta = {'img_shape': size, 'ori_shape': size, 'pad_shape': size, 'scale_factor': (1.0, 1.0), 'flip': False}
    data = {
        'inputs': [
            torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(batch_size)
        ],
        'data_samples': [make(size, classes, meta, generator) for _ in range(batch_size)],
    }
    return model.data_preprocessor(data, training)


def _segmentation_sample(size: tuple[int, int], classes: int, meta: dict, generator: torch.Generator) -> Any:
    """Labels and depth in metres of one image."""
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=meta)
    sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *size), generator=generator))
    sample.set_data({'gt_depth_map': PixelData(data=torch.rand(1, *size, generator=generator) * 9 + 1)})
    return sample


def _detection_sample(
    size: tuple[int, int], classes: int, meta: dict, generator: torch.Generator, *, with_masks: bool
) -> Any:
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
    if with_masks:
        sample.gt_instances.masks = BitmapMasks(masks, *size)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return sample
