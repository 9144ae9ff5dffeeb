"""One picture: images and masks in columns, with titles and a legend.

Shape shorthand: H x W a tile before it is enlarged. Images are BGR, as mmcv and
cv2 read and write them; palettes are RGB, as mmseg keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mmstructkd.errors import ConfigError, ShapeError

__all__ = ['colour_mask', 'side_by_side']

GAP = 6
INK = (40, 40, 40)
PAPER = 255
UNKNOWN = (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX
LINE = 24  # height of a line of text


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


def _text(canvas: np.ndarray, words: str, x: int, y: int, scale: float = 0.5) -> None:
    """Write a line whose baseline starts at (x, y)."""
    cv2.putText(canvas, words, (x, y), FONT, scale, INK, 1, cv2.LINE_AA)


def _width(words: str, scale: float = 0.5) -> int:
    """Pixels a line takes."""
    return cv2.getTextSize(words, FONT, scale, 1)[0][0]


def _legend(classes: Sequence[str], palette: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Name the colours, in as many lines as they need."""
    box, places, x, y = 14, [], GAP, 0
    for name in classes:
        wide = box + 6 + _width(name) + 16
        if x > GAP and x + wide > width:
            x, y = GAP, y + LINE
        places.append((x, y))
        x += wide
    canvas = np.full((y + LINE, width, 3), PAPER, np.uint8)
    for name, colour, (left, top) in zip(classes, palette, places, strict=True):
        red, green, blue = (int(value) for value in colour)
        cv2.rectangle(canvas, (left, top + 5), (left + box, top + 5 + box), (blue, green, red), -1)
        cv2.rectangle(canvas, (left, top + 5), (left + box, top + 5 + box), INK, 1)
        _text(canvas, name, left + box + 6, top + 17)
    return canvas


def side_by_side(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    titles: Sequence[str],
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    enlarge: int = 1,
) -> np.ndarray:
    r"""Set images and masks in rows and columns.

    Args:
        rows: one sequence of tiles a row, each an image (uint8 BGR, (H, W, 3))
            or a mask (integers, (H, W)), all of one size.
        titles: one for each column; ``'\n'`` starts a second line.
        classes: names for the legend.
        palette: RGB of each class.
        enlarge: factor by which tiles grow; masks keep their edges.

    Returns:
        BGR image, uint8: titles above, legend below, ignored pixels white.

    Raises:
        ConfigError: there is no row, or a row, the titles and the classes do
            not match in number.
        ShapeError: tiles differ in size.

    Example:
        >>> tile = np.zeros((40, 60), np.uint8)
        >>> picture = side_by_side([[tile, tile]], titles=['truth', 'student'], classes=['road'], palette=[(9, 9, 9)])
        >>> picture.shape[1]
        138
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ConfigError(
            f'side_by_side: `rows` must have one tile per title each, got rows of {[len(row) for row in rows]} '
            f'for {len(titles)} titles.'
        )
    if len(classes) != len(palette):
        raise ConfigError(
            f'side_by_side: `palette` must have one colour per class, got {len(palette)} for {len(classes)} classes.'
        )
    sizes = {tile.shape[:2] for row in rows for tile in row}
    if len(sizes) > 1:
        raise ShapeError(f'side_by_side: `rows` must hold tiles of one size, got {sorted(sizes)}. Resize them first.')
    height, width = (side * enlarge for side in sizes.pop())
    lines = [title.split('\n') for title in titles]
    top = LINE * max(len(line) for line in lines) + GAP
    total = GAP + len(titles) * (width + GAP)
    canvas = np.full((top + len(rows) * (height + GAP), total, 3), PAPER, np.uint8)
    for column, words in enumerate(lines):
        left = GAP + column * (width + GAP)
        for number, line in enumerate(words):
            scale = min(0.5, 0.5 * width / max(_width(line), 1))
            _text(canvas, line, left, (number + 1) * LINE - 6, scale)
    for index, row in enumerate(rows):
        y = top + index * (height + GAP)
        for column, tile in enumerate(row):
            x = GAP + column * (width + GAP)
            painted = tile if tile.ndim == 3 else colour_mask(tile, palette)
            how = cv2.INTER_CUBIC if tile.ndim == 3 else cv2.INTER_NEAREST
            canvas[y : y + height, x : x + width] = cv2.resize(painted, (width, height), interpolation=how)
    return np.concatenate([canvas, _legend(classes, palette, total)])
