"""What networks say about samples of a dataset, beside the truth.

A sample is what a validation dataset of mmseg or mmdet gives: ``inputs``, the
image as uint8 (3, H, W) in BGR, and ``data_samples`` with the truth, which like
every prediction has the size of the file (``ori_shape``), not that of the image.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.model import BaseModel
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.tasks.targets import task_of
from mmstructkd.visualization.paint import class_palette, colour_depth, colour_mask, draw_boxes
from mmstructkd.visualization.side_by_side import side_by_side
from mmstructkd.visualization.text import PAPER

__all__ = ['Looks', 'choose_looks', 'draw_samples', 'paint_image', 'paint_prediction', 'paint_truth']

#: Where a task keeps its truth and its predictions.
FIELDS = {
    'seg': ('gt_sem_seg', 'pred_sem_seg'),
    'depth': ('gt_depth_map', 'pred_depth_map'),
    'det': ('gt_instances', 'pred_instances'),
}


@dataclass(frozen=True)
class Looks:
    """How the samples of one picture are painted, alike for all networks.

    Attributes:
        task: ``'seg'``, ``'depth'`` or ``'det'``.
        classes: names.
        palette: RGB of each class.
        depth_range: metres at both ends of the colours of depth.
        width: pixels of a tile.
        score_threshold: boxes with a lower score are left out.
    """

    task: str
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    depth_range: tuple[float, float] | None = None
    width: int = 256
    score_threshold: float = 0.3


def choose_looks(
    metainfo: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    networks: Sequence[BaseModel],
    *,
    depth_range: tuple[float, float] | None = None,
    **settings: Any,
) -> Looks:
    """Choose colours for samples of a dataset.

    Args:
        metainfo: of the dataset: ``classes``, and ``palette`` if it has one.
        samples: those that will be drawn; their readings give the range of depth.
        networks: those that will be drawn; they tell the task.
        depth_range: metres at both ends, instead of what the samples have.
        **settings: ``width`` and ``score_threshold`` of :class:`Looks`.

    Returns:
        The looks.

    Raises:
        ConfigError: the networks do not share a task, or no sample has a depth
            reading.
    """
    tasks = sorted({task_of(network) for network in networks})
    if len(tasks) != 1:
        raise ConfigError(f'choose_looks: `networks` must share one task, got {tasks}. Draw each task by itself.')
    if tasks[0] == 'depth':
        return Looks('depth', depth_range=depth_range or _range_of(samples), **settings)
    classes = tuple(map(str, metainfo['classes']))
    return Looks(tasks[0], classes, tuple(class_palette(metainfo.get('palette'), len(classes))), **settings)


def _range_of(samples: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Nearest and farthest reading, rounded outwards to half a metre."""
    truth, _ = FIELDS['depth']
    maps = [getattr(sample['data_samples'], truth).data for sample in samples]
    reads = [depth[torch.isfinite(depth) & (depth > 0)] for depth in maps]
    reads = [readings for readings in reads if readings.numel()]
    if not reads:
        raise ConfigError(
            f'choose_looks: `samples` must have a depth reading, got none in {len(maps)}. Give a depth_range.'
        )
    least, most = min(map(torch.min, reads)).item(), max(map(torch.max, reads)).item()
    near, far = math.floor(2 * least) / 2 or least, math.ceil(2 * most) / 2
    return near, far if far > near else 2 * near


def _size(sample: Mapping[str, Any], looks: Looks) -> tuple[int, int]:
    """Width and height of the sample's tiles, as cv2 wants them."""
    height, width = sample['inputs'].shape[-2:]
    return looks.width, max(round(height * looks.width / width), 1)


def paint_image(sample: Mapping[str, Any], looks: Looks) -> np.ndarray:
    """Return the image of a sample in the size of a tile.

    Args:
        sample: see the module.
        looks: of the picture.

    Returns:
        BGR, uint8, ``looks.width`` wide.
    """
    image = sample['inputs'].permute(1, 2, 0).clamp(0, 255).to(torch.uint8).numpy()
    size = _size(sample, looks)
    shrinks = size[0] < image.shape[1]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def paint_truth(sample: Mapping[str, Any], looks: Looks) -> np.ndarray:
    """Paint what is true of a sample.

    Args:
        sample: see the module.
        looks: of the picture.

    Returns:
        BGR, uint8, in the size of :func:`paint_image`; boxes stand on the image.
    """
    truth, _ = FIELDS[looks.task]
    return _paint(getattr(sample['data_samples'], truth), sample, looks)


def paint_prediction(network: BaseModel, sample: Mapping[str, Any], looks: Looks) -> np.ndarray:
    """Paint what a network says about a sample.

    Args:
        network: a segmentor, depth estimator or detector, in eval.
        sample: see the module; left as it is.
        looks: of the picture, for the network's task.

    Returns:
        BGR, uint8, in the size of :func:`paint_image`; boxes stand on the image.
    """
    _, predicted = FIELDS[looks.task]
    # Both frameworks write their prediction into the sample that they are given.
    batch = {'inputs': [sample['inputs']], 'data_samples': [copy.deepcopy(sample['data_samples'])]}
    with torch.no_grad():
        result = network.test_step(batch)[0]
    return _paint(getattr(result, predicted), sample, looks)


def _paint(field: Any, sample: Mapping[str, Any], looks: Looks) -> np.ndarray:
    """Paint a field of a data sample."""
    size = _size(sample, looks)
    if looks.task == 'det':
        height, width = sample['data_samples'].metainfo['ori_shape'][:2]
        boxes = getattr(field.bboxes, 'tensor', field.bboxes)
        return draw_boxes(
            paint_image(sample, looks),
            _array(boxes).reshape(-1, 4) * np.array([size[0] / width, size[1] / height] * 2),
            _array(field.labels),
            classes=looks.classes,
            palette=looks.palette,
            scores=_array(field.scores) if 'scores' in field else None,
            score_threshold=looks.score_threshold,
        )
    values = _array(field.data[0])
    if looks.task == 'depth':
        if looks.depth_range is None:
            raise ConfigError('paint: `looks.depth_range` must be given for depth, got None. Use choose_looks.')
        painted = colour_depth(values, looks.depth_range)
    else:
        painted = colour_mask(values, looks.palette)
    return cv2.resize(painted, size, interpolation=cv2.INTER_NEAREST)


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    """Bring a tensor to numpy."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def draw_samples(samples: Sequence[Mapping[str, Any]], networks: Mapping[str, BaseModel], looks: Looks) -> np.ndarray:
    r"""Set samples in rows: image, truth, and what each network says.

    Args:
        samples: see the module.
        networks: by the title of their column, in which ``'\n'`` starts another
            line; in eval.
        looks: of the picture.

    Returns:
        BGR image, uint8, with titles and a legend.
    """
    rows = [
        [
            paint_image(sample, looks),
            paint_truth(sample, looks),
            *(paint_prediction(network, sample, looks) for network in networks.values()),
        ]
        for sample in samples
    ]
    tallest = max(row[0].shape[0] for row in rows)
    rows = [[_pad(tile, tallest) for tile in row] for row in rows]
    return side_by_side(
        rows,
        titles=['image', 'truth', *networks],
        classes=looks.classes,
        palette=looks.palette,
        depth_range=looks.depth_range,
    )


def _pad(tile: np.ndarray, height: int) -> np.ndarray:
    """Add paper below a tile that is not as tall as others."""
    return cv2.copyMakeBorder(tile, 0, height - tile.shape[0], 0, 0, cv2.BORDER_CONSTANT, value=(PAPER,) * 3)
