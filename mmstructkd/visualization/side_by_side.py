"""One picture: images, masks and depth maps in columns, with titles and a legend.

H x W a tile before it is enlarged. Images are BGR, palettes RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.visualization.legend import class_legend, depth_legend
from mmstructkd.visualization.paint import colour_depth, colour_mask
from mmstructkd.visualization.text import GAP, LINE, PAPER, text_width, write

__all__ = ['side_by_side']

TITLE_SCALE = 0.5


def side_by_side(
    rows: Sequence[Sequence[np.ndarray]],
    *,
    titles: Sequence[str],
    classes: Sequence[str] = (),
    palette: Sequence[Sequence[int]] = (),
    depth_range: tuple[float, float] | None = None,
    enlarge: int = 1,
) -> np.ndarray:
    r"""Set images, masks and depth maps in rows and columns.

    Args:
        rows: one sequence of tiles a row, all of one size, each an image (uint8
            BGR, (H, W, 3)), a class mask (integers, (H, W)), or a depth map
            (metres, floating point, (H, W)).
        titles: one for each column; ``'\n'`` starts another line.
        classes: names for the legend; none, no such legend.
        palette: RGB of each class.
        depth_range: metres at both ends of the colours of depth; given, the
            legend has the scale.
        enlarge: factor by which tiles grow; masks and depth maps keep their edges.

    Returns:
        BGR image, uint8: titles above, legend below; ignored pixels and those
        without a reading are white.

    Raises:
        ConfigError: there is no row, or a row, the titles and the classes do
            not match in number; a depth map without ``depth_range``.
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
            scale = min(TITLE_SCALE, TITLE_SCALE * width / max(text_width(line, TITLE_SCALE), 1))
            write(canvas, line, left, (number + 1) * LINE - 6, scale=scale)
    for index, row in enumerate(rows):
        y = top + index * (height + GAP)
        for column, tile in enumerate(row):
            x = GAP + column * (width + GAP)
            how = cv2.INTER_CUBIC if tile.ndim == 3 else cv2.INTER_NEAREST
            painted = _painted(tile, palette, depth_range)
            canvas[y : y + height, x : x + width] = cv2.resize(painted, (width, height), interpolation=how)
    parts = [canvas]
    if classes:
        parts.append(class_legend(classes, palette, total))
    if depth_range is not None:
        parts.append(depth_legend(depth_range, total))
    return np.concatenate(parts)


def _painted(tile: np.ndarray, palette: Sequence[Sequence[int]], depth_range: tuple[float, float] | None) -> np.ndarray:
    """Paint a tile by what it is."""
    if tile.ndim == 3:
        return tile
    if not np.issubdtype(tile.dtype, np.floating):
        return colour_mask(tile, palette)
    if depth_range is None:
        raise ConfigError(
            'side_by_side: `depth_range` must be given for depth maps, got None. Give (near, far) in metres.'
        )
    return colour_depth(tile, depth_range)
