"""Every tile stands where it belongs, in its colours."""

from __future__ import annotations

import numpy as np
import pytest

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.visualization import colour_mask, side_by_side

PALETTE = [(200, 0, 0), (0, 0, 250)]
LOOKS = dict(titles=['truth', 'student\nmIoU 1.0'], classes=['red', 'blue'], palette=PALETTE)


def test_mask_is_painted_in_bgr_and_ignored_pixels_are_white():
    painted = colour_mask(np.array([[0, 1, 255]], np.uint8), PALETTE)
    assert painted.tolist() == [[[0, 0, 200], [250, 0, 0], [255, 255, 255]]]


def test_tiles_keep_their_place_and_edges():
    left, right = np.zeros((4, 5), np.int64), np.ones((4, 5), np.int64)
    picture = side_by_side([[left, right], [right, left]], enlarge=3, **LOOKS)
    top = 2 * 24 + 6
    for row, column, colour in [(0, 0, 200), (0, 1, 250), (1, 0, 250), (1, 1, 200)]:
        y, x = top + row * (12 + 6), 6 + column * (15 + 6)
        tile = picture[y : y + 12, x : x + 15]
        assert (tile.max(axis=2) == colour).all()
    assert (picture[top : top + 12, :6] == 255).all()


def test_image_and_legend_are_drawn():
    image = np.full((100, 120, 3), (10, 20, 30), np.uint8)
    mask = np.full((100, 120), 255)
    picture = side_by_side([[image, mask]], **LOOKS)
    assert (picture[60:100, 20:100] == (10, 20, 30)).all()
    legend = picture[54 + 106 :].reshape(-1, 3)
    for red, green, blue in PALETTE:
        assert (legend == (blue, green, red)).all(axis=1).sum() > 100


def test_inputs_are_left_alone():
    mask = np.array([[0, 255]])
    before = mask.copy()
    side_by_side([[mask, mask]], **LOOKS)
    assert (mask == before).all()


@pytest.mark.parametrize('label', [-1, 2])
def test_label_without_colour_is_refused(label):
    with pytest.raises(ConfigError, match=rf'must lie in \[0, 1\] or be 255, got {label} to {label}'):
        colour_mask(np.array([[label, 255]]), PALETTE)


def test_batch_of_masks_is_refused():
    with pytest.raises(ShapeError, match=r'\(1, 2, 2\)'):
        colour_mask(np.zeros((1, 2, 2), int), PALETTE)


def test_rows_that_do_not_fit_are_refused():
    tile = np.zeros((4, 4), int)
    with pytest.raises(ConfigError, match=r'rows of \[2, 1\] for 2 titles'):
        side_by_side([[tile, tile], [tile]], **LOOKS)
    with pytest.raises(ConfigError, match=r'rows of \[\] for 2 titles'):
        side_by_side([], **LOOKS)
    with pytest.raises(ShapeError, match=r'\(4, 4\), \(5, 4\)'):
        side_by_side([[tile, np.zeros((5, 4), int)]], **LOOKS)
    with pytest.raises(ConfigError, match='2 for 1 classes'):
        side_by_side([[tile]], titles=['truth'], classes=['red'], palette=PALETTE)
