"""Lines of text on a picture."""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ['GAP', 'INK', 'LINE', 'PAPER', 'text_width', 'write']

GAP = 6  # pixels between tiles
LINE = 24  # height of a line of text
INK = (40, 40, 40)
PAPER = 255
FONT = cv2.FONT_HERSHEY_SIMPLEX
SCALE = 0.5


def text_width(words: str, scale: float = SCALE) -> int:
    """Pixels that a line takes."""
    return cv2.getTextSize(words, FONT, scale, 1)[0][0]


def write(
    canvas: np.ndarray, words: str, x: int, y: int, *, scale: float = SCALE, ink: tuple[int, int, int] = INK
) -> None:
    """Write a line onto ``canvas``, its baseline starting at (x, y).

    Args:
        canvas: BGR image, uint8, changed in place.
        words: ASCII; the font has no other signs.
        x: pixels from the left.
        y: pixels from the top.
        scale: size of the letters.
        ink: BGR.
    """
    cv2.putText(canvas, words, (x, y), FONT, scale, ink, 1, cv2.LINE_AA)
