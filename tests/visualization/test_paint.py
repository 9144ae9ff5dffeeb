"""Classes, metres and boxes have the colours and places that they say."""

from __future__ import annotations

import numpy as np
import pytest

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.visualization import colour_depth, colour_mask, draw_boxes
from mmstructkd.visualization.paint import class_palette

PALETTE = [(200, 0, 0), (0, 0, 250)]
WHITE = [255, 255, 255]


def test_mask_is_painted_in_bgr_and_ignored_pixels_are_white():
    painted = colour_mask(np.array([[0, 1, 255]], np.uint8), PALETTE)
    assert painted.tolist() == [[[0, 0, 200], [250, 0, 0], WHITE]]


@pytest.mark.parametrize('label', [-1, 2])
def test_label_without_colour_is_refused(label):
    with pytest.raises(ConfigError, match=rf'must lie in \[0, 1\] or be 255, got {label} to {label}'):
        colour_mask(np.array([[label, 255]]), PALETTE)


def test_batch_of_masks_is_refused():
    with pytest.raises(ShapeError, match=r'\(1, 2, 2\)'):
        colour_mask(np.zeros((1, 2, 2), int), PALETTE)


def test_colour_of_a_depth_does_not_follow_the_map():
    near = colour_depth(np.array([[2.0, 5.0]], np.float32), (1.0, 10.0))
    far = colour_depth(np.array([[5.0, 9.0]], np.float64), (1.0, 10.0))
    assert (near[0, 1] == far[0, 0]).all()
    assert len({tuple(pixel) for pixel in (*near[0].tolist(), *far[0].tolist())}) == 3


def test_depth_beyond_the_range_has_the_colour_of_its_end():
    painted = colour_depth(np.array([[0.5, 1.0, 4.0, 99.0]]), (1.0, 4.0))
    assert (painted[0, 0] == painted[0, 1]).all()
    assert (painted[0, 2] == painted[0, 3]).all()
    assert (painted[0, 1] != painted[0, 2]).any()


def test_same_share_of_the_depth_is_the_same_step():
    levels = colour_depth(np.array([[1.0, 4.0, 16.0]]), (1.0, 16.0))
    middle = colour_depth(np.array([[1.0, 2.5, 4.0]]), (1.0, 4.0))
    assert (levels[0, [0, 2]] == middle[0, [0, 2]]).all()
    halfway = colour_depth(np.array([[2.0]]), (1.0, 4.0))
    assert (levels[0, 1] == halfway[0, 0]).all()


def test_no_reading_is_white_and_no_reading_else():
    none = colour_depth(np.array([[0.0, -1.0, np.nan, np.inf, -np.inf]]), (1.0, 4.0))
    assert none.tolist() == [[WHITE] * 5]
    every = colour_depth(np.linspace(1, 4, 500)[None], (1.0, 4.0))
    assert not (every == 255).all(axis=2).any()


@pytest.mark.parametrize('given', [(4.0, 1.0), (1.0, 1.0), (1.0, np.inf), (np.nan, 2.0), (0.0, 2.0)])
def test_range_that_is_none_is_refused(given):
    with pytest.raises(ConfigError, match=r'must be \(near, far\) in metres'):
        colour_depth(np.ones((2, 2)), given)


def test_batch_of_depth_maps_is_refused():
    with pytest.raises(ShapeError, match=r'\(1, 2, 2\)'):
        colour_depth(np.ones((1, 2, 2)), (1.0, 4.0))


def drawn(boxes, labels, **kwargs):
    image = np.full((60, 90, 3), 128, np.uint8)
    picture = draw_boxes(image, np.array(boxes, float), np.array(labels), classes='ab', palette=PALETTE, **kwargs)
    assert (image == 128).all()
    return picture


def test_box_is_a_frame_in_the_colour_of_its_class():
    picture = drawn([[20, 20, 50, 40]], [1])
    blue = (picture == (250, 0, 0)).all(axis=2)
    assert blue[20, 20:51].all()
    assert blue[40, 20:51].all()
    assert blue[20:41, 20].all()
    assert blue[20:41, 50].all()
    assert (picture[22:39, 22:49] == 128).all()
    assert (picture[:20] != 128).any()  # the label stands above
    assert (picture[41:] == 128).all()


def test_boxes_below_the_threshold_are_left_out():
    boxes, labels = [[20, 20, 50, 40], [60, 30, 80, 50]], [0, 1]
    picture = drawn(boxes, labels, scores=np.array([0.5, 0.3]), score_threshold=0.4)
    assert (picture == (0, 0, 200)).all(axis=2).any()
    assert not (picture == (250, 0, 0)).all(axis=2).any()
    assert (drawn(boxes, labels, scores=np.array([0.5, np.nan]))[30:51, 60:81] == 128).all()


def test_surest_box_lies_on_top():
    same = [[20, 20, 50, 40]] * 2
    for scores, colour in (([0.9, 0.5], (0, 0, 200)), ([0.5, 0.9], (250, 0, 0))):
        picture = drawn(same, [0, 1], scores=np.array(scores))
        assert (picture[40, 20:51] == colour).all()


def test_label_of_a_box_at_the_upper_edge_stands_inside():
    picture = drawn([[60, 0, 89, 30]], [0])
    assert (picture[1:10, 61:70] == (0, 0, 200)).all(axis=2).any()


@pytest.mark.parametrize('box', [[-50, -9, 400, 300], [200, 200, 300, 300], [0, 0, 0, 0], [np.inf, 0, np.nan, 9]])
def test_box_beyond_the_image_is_clipped(box):
    assert drawn([box], [0]).shape == (60, 90, 3)


def test_no_boxes_no_change():
    empty = draw_boxes(np.ones((5, 5, 3), np.uint8), np.zeros((0, 4)), np.zeros(0, int), classes='a', palette=PALETTE)
    assert (empty == 1).all()


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r'got \(60, 90, 3\), \(2, 4\), \(1,\), \(1,\)'):
        drawn([[0, 0, 1, 1]] * 2, [0])
    with pytest.raises(ShapeError, match=r'\(1,\), \(2,\)'):
        drawn([[0, 0, 1, 1]], [0], scores=np.ones(2))
    with pytest.raises(ConfigError, match=r'must lie in \[0, 1\], got 2 to 2'):
        drawn([[0, 0, 1, 1]], [2])


def test_palette_of_a_dataset_is_cut_and_a_missing_one_is_made():
    assert class_palette([[1, 2, 3], [4, 5, 6], [7, 8, 9]], 2) == [(1, 2, 3), (4, 5, 6)]
    for given in (None, [[1, 2, 3]]):
        made = class_palette(given, 20)
        assert len(set(made)) == 20
    assert class_palette(None, 0) == []
