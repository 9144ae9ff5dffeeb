"""Every tile stands where it belongs, in its colours."""

from __future__ import annotations

import numpy as np
import pytest

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.visualization import colour_depth, side_by_side
from mmstructkd.visualization.legend import depth_legend

PALETTE = [(200, 0, 0), (0, 0, 250)]
LOOKS = dict(titles=['truth', 'student\nmIoU 1.0'], classes=['red', 'blue'], palette=PALETTE)


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


def test_depth_maps_share_their_colours_and_have_a_scale():
    near, far = np.full((30, 40), 2.0, np.float32), np.full((30, 40), 8.0, np.float32)
    far[0] = 0
    picture = side_by_side([[near, far]], titles=['truth', 'student'], depth_range=(1.0, 10.0))
    top = 24 + 6
    assert (picture[top : top + 30, 6:46] == colour_depth(near, (1.0, 10.0))).all()
    assert (picture[top + 1 : top + 30, 52:92] == colour_depth(far, (1.0, 10.0))[1:]).all()
    assert (picture[top, 52:92] == 255).all()
    legend = picture[top + 36 :].reshape(-1, 3)
    for depth in (near, far):
        colour = colour_depth(depth, (1.0, 10.0))[-1, -1].astype(int)
        assert np.abs(legend - colour).max(axis=1).min() <= 3  # the scale has as many steps as pixels
    with pytest.raises(ConfigError, match='`depth_range` must be given'):
        side_by_side([[near]], titles=['truth'])


def test_painted_tiles_need_no_legend():
    tile = np.full((10, 200, 3), 9, np.uint8)
    assert side_by_side([[tile]], titles=['image']).shape == (24 + 6 + 10 + 6, 212, 3)


@pytest.mark.parametrize('width', [12, 60, 150, 400, 1500])
def test_scale_of_metres_fits_any_width(width):
    legend = depth_legend((0.5, 24.0), width)
    assert legend.shape[1] == width
    bar = legend[10]
    painted = (bar != bar.max(axis=1, keepdims=True)).any(axis=1).sum()
    assert painted > min(width // 2, width - 24)
