"""What the colours of a picture mean."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mmstructkd.visualization.paint import colour_depth
from mmstructkd.visualization.text import GAP, INK, LINE, PAPER, text_width, write

__all__ = ['class_legend', 'depth_legend']

BOX = 14
MARKS = 5  # of the scale of metres, where there is room
NO_READING = 'no reading'


def class_legend(classes: Sequence[str], palette: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Name the colours, in as many lines as they need.

    Args:
        classes: names.
        palette: RGB of each.
        width: of the legend, in pixels.

    Returns:
        BGR image, uint8, ``width`` wide.
    """
    places, x, y = [], GAP, 0
    for name in classes:
        wide = BOX + 6 + text_width(name) + 16
        if x > GAP and x + wide > width:
            x, y = GAP, y + LINE
        places.append((x, y))
        x += wide
    canvas = np.full((y + LINE, width, 3), PAPER, np.uint8)
    for name, colour, (left, top) in zip(classes, palette, places, strict=True):
        red, green, blue = (int(value) for value in colour)
        _swatch(canvas, left, top, (blue, green, red))
        write(canvas, name, left + BOX + 6, top + 17)
    return canvas


def depth_legend(depth_range: tuple[float, float], width: int) -> np.ndarray:
    """Draw a scale of metres, and what stands for no reading.

    Args:
        depth_range: metres at both ends of the colours.
        width: of the legend, in pixels.

    Returns:
        BGR image, uint8, ``width`` wide.
    """
    near, far = depth_range
    canvas = np.full((2 * LINE, width, 3), PAPER, np.uint8)
    aside = BOX + 6 + text_width(NO_READING) + 16
    # In a narrow picture the scale has the first line for itself.
    beside = width >= 3 * aside
    length = max(width - 2 * GAP - (aside if beside else 0), 1)
    metres = np.geomspace(near, far, length)[None].repeat(BOX, axis=0)
    canvas[5 : 5 + BOX, GAP : GAP + length] = colour_depth(metres, depth_range)
    marks = [f'{value:.{0 if value >= 10 else 1}f} m' for value in np.geomspace(near, far, MARKS)]
    if sum(text_width(mark) + 2 * GAP for mark in marks) > length:
        marks = [marks[0], marks[-1]]
    baseline = LINE + 12
    for number, mark in enumerate(marks):
        wide = text_width(mark)
        place = GAP + round(number / (len(marks) - 1) * (length - 1))
        left = min(max(place - wide // 2, GAP), max(GAP + length - wide, GAP))
        cv2.line(canvas, (place, 5 + BOX), (place, 8 + BOX), INK, 1)
        write(canvas, mark, left, baseline)
    if beside:
        left = width - aside + 8
        _swatch(canvas, left, 0, (PAPER,) * 3)
        write(canvas, NO_READING, left + BOX + 6, 17)
        return canvas
    extra = np.full((LINE, width, 3), PAPER, np.uint8)
    _swatch(extra, GAP, 0, (PAPER,) * 3)
    write(extra, NO_READING, GAP + BOX + 6, 17)
    return np.concatenate([canvas, extra])


def _swatch(canvas: np.ndarray, left: int, top: int, colour: tuple[int, ...]) -> None:
    """Draw a framed square of a colour at the upper end of a line."""
    cv2.rectangle(canvas, (left, top + 5), (left + BOX, top + 5 + BOX), colour, -1)
    cv2.rectangle(canvas, (left, top + 5), (left + BOX, top + 5 + BOX), INK, 1)
