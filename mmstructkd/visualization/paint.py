"""Class masks, depth maps and boxes as pictures.

H x W a picture, n boxes. Images are BGR, as mmcv and cv2 read and write them;
palettes are RGB, as mmseg and mmdet keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.visualization.text import text_width, write

__all__ = ['class_palette', 'colour_depth', 'colour_mask', 'draw_boxes']

UNKNOWN = (255, 255, 255)
COLOURS_OF_DEPTH = cv2.COLORMAP_VIRIDIS  # near is dark, far is yellow, and none of them white
LABEL_SCALE = 0.35
LABEL_HEIGHT = 12


def class_palette(palette: Sequence[Sequence[int]] | None, count: int) -> list[tuple[int, int, int]]:
    """Return one colour a class: those of a dataset, or a wheel of hues where it has none.

    Args:
        palette: RGB of each class; ``None`` or too short: none are given.
        count: number of classes.

    Returns:
        RGB of each class.

    Example:
        >>> class_palette(None, 2)
        [(230, 46, 46), (46, 230, 230)]
    """
    if palette is not None and len(palette) >= count:
        return [(int(colour[0]), int(colour[1]), int(colour[2])) for colour in palette[:count]]
    hues = np.array([[(180 * index / count, 204, 230) for index in range(count)]], np.uint8)
    return [tuple(colour) for colour in cv2.cvtColor(hues, cv2.COLOR_HSV2RGB)[0].tolist()] if count else []


def colour_mask(labels: np.ndarray, palette: Sequence[Sequence[int]], *, ignore_index: int = 255) -> np.ndarray:
    """Paint each class in its colour.

    Args:
        labels: integers, shape (H, W), index into ``palette``.
        palette: RGB of each class.
        ignore_index: label that is left white.

    Returns:
        BGR image, uint8, shape (H, W, 3).

    Raises:
        ShapeError: ``labels`` is not 2-D.
        ConfigError: a label has no colour.

    Example:
        >>> colour_mask(np.array([[0, 255]]), [(1, 2, 3)]).tolist()
        [[[3, 2, 1], [255, 255, 255]]]
    """
    if labels.ndim != 2:
        raise ShapeError(f'colour_mask: `labels` must have shape (H, W), got {labels.shape}. Pick one image.')
    known = labels != ignore_index
    if known.any() and not 0 <= labels[known].min() <= labels[known].max() < len(palette):
        raise ConfigError(
            f'colour_mask: `labels` must lie in [0, {len(palette) - 1}] or be {ignore_index}, '
            f'got {labels[known].min()} to {labels[known].max()}. Give a colour for each class.'
        )
    painted = np.full((*labels.shape, 3), UNKNOWN, np.uint8)
    painted[known] = np.asarray(palette, np.uint8)[labels[known]][:, ::-1]
    return painted


def colour_depth(depth: np.ndarray, depth_range: tuple[float, float]) -> np.ndarray:
    """Paint metres, from dark (near) to yellow (far).

    Colours follow the logarithm: the same share of the depth is the same step.

    Args:
        depth: metres, shape (H, W); what is not finite or not above 0 is no reading.
        depth_range: metres at both ends of the colours, the same for all maps
            that are compared; beyond them the colour stays that of the end.

    Returns:
        BGR image, uint8, shape (H, W, 3), white where there is no reading.

    Raises:
        ShapeError: ``depth`` is not 2-D.
        ConfigError: the range does not run upwards between finite numbers above 0.

    Example:
        >>> painted = colour_depth(np.array([[0.0, 1.0, 2.0, 9.0]]), (1.0, 2.0))
        >>> painted[0, 0].tolist(), bool((painted[0, 2] == painted[0, 3]).all())
        ([255, 255, 255], True)
    """
    if depth.ndim != 2:
        raise ShapeError(f'colour_depth: `depth` must have shape (H, W), got {depth.shape}. Pick one image.')
    near, far = depth_range
    if not (np.isfinite(far) and 0 < near < far):
        raise ConfigError(
            f'colour_depth: `depth_range` must be (near, far) in metres, above 0 and upwards, got {depth_range!r}.'
        )
    reads = np.isfinite(depth) & (depth > 0)
    share = np.log(np.where(reads, depth, near) / near) / np.log(far / near)
    levels = np.rint(np.clip(share, 0, 1) * 255).astype(np.uint8)
    painted = cv2.applyColorMap(levels, COLOURS_OF_DEPTH).reshape(*depth.shape, 3)
    painted[~reads] = UNKNOWN
    return painted


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    scores: np.ndarray | None = None,
    score_threshold: float = 0.3,
) -> np.ndarray:
    """Draw boxes with the names of their classes, the surest on top.

    Args:
        image: BGR, uint8, shape (H, W, 3).
        boxes: ``xyxy`` in pixels of ``image``, shape (n, 4).
        labels: index into ``classes``, shape (n,).
        classes: names.
        palette: RGB of each class.
        scores: confidence of each box, shape (n,), written beside the name;
            ``None`` for the truth.
        score_threshold: boxes with a lower score are left out.

    Returns:
        A copy of ``image`` with the boxes.

    Raises:
        ShapeError: the arrays do not fit together.
        ConfigError: a label has no name or colour.

    Example:
        >>> image = np.zeros((20, 30, 3), np.uint8)
        >>> looks = dict(classes=['a'], palette=[(9, 8, 7)])
        >>> drawn = draw_boxes(image, np.array([[2, 3, 9, 9]]), np.array([0]), scores=np.array([0.2]), **looks)
        >>> bool((drawn == image).all())
        True
    """
    sizes = [boxes.shape, labels.shape, labels.shape if scores is None else scores.shape]
    if sizes != [(len(labels), 4), (len(labels),), (len(labels),)] or image.ndim != 3:
        raise ShapeError(
            f'draw_boxes: `image`, `boxes`, `labels` and `scores` must have shapes (H, W, 3), (n, 4), (n,) and (n,), '
            f'got {image.shape}, {", ".join(map(str, sizes))}.'
        )
    known = min(len(classes), len(palette))
    if len(labels) and not 0 <= labels.min() <= labels.max() < known:
        raise ConfigError(
            f'draw_boxes: `labels` must lie in [0, {known - 1}], got {labels.min()} to {labels.max()}. '
            'Give a name and a colour for each class.'
        )
    canvas = np.ascontiguousarray(image).copy()
    order = range(len(labels)) if scores is None else np.argsort(scores, kind='stable').tolist()
    for index in order:
        if scores is not None and not scores[index] >= score_threshold:
            continue
        name = str(classes[labels[index]])
        words = name if scores is None else f'{name} {scores[index]:.2f}'
        red, green, blue = (int(value) for value in palette[labels[index]])
        _draw_box(canvas, boxes[index], words, (blue, green, red))
    return canvas


def _draw_box(canvas: np.ndarray, box: np.ndarray, words: str, colour: tuple[int, int, int]) -> None:
    """Draw one box; its label stands above it where there is room, else inside, always within the picture."""
    height, width = canvas.shape[:2]
    limits = np.array([width - 1, height - 1] * 2)
    left, top, right, bottom = np.clip(np.rint(np.nan_to_num(box)), 0, limits).astype(int).tolist()
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, 1)
    wide = text_width(words, LABEL_SCALE) + 2
    x = max(min(left, width - wide), 0)
    y = top - LABEL_HEIGHT if top >= LABEL_HEIGHT else top
    cv2.rectangle(canvas, (x, y), (min(x + wide, width - 1), min(y + LABEL_HEIGHT - 1, height - 1)), colour, -1)
    blue, green, red = colour
    bright = 0.114 * blue + 0.587 * green + 0.299 * red > 128
    write(canvas, words, x + 1, y + 9, scale=LABEL_SCALE, ink=(0, 0, 0) if bright else (255, 255, 255))
