from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.turning import TURNS, joint_labels, turn_back, turn_maps
from tests.reference import blending as reference

KEEPING = ['none', 'half', 'flip', 'flip_half']


@pytest.mark.parametrize('shape', [(2, 3, 4, 4), (2, 4, 4), (2, 3, 1, 1)])
def test_rows_equal_reference(shape):
    maps = torch.randn(shape)
    got = turn_maps(maps, turns=TURNS)
    assert got.shape == (12, *shape[1:])
    for b in range(2):
        for k, name in enumerate(TURNS):
            assert torch.equal(got[6 * b + k], reference.turned(maps[b], name))
    assert torch.equal(turn_back(got, turns=TURNS), maps.repeat_interleave(6, 0))


def test_turns_that_keep_a_shape():
    maps = torch.randn(2, 3, 2, 5)
    got = turn_maps(maps, turns=KEEPING)
    assert got.shape == (8, 3, 2, 5)
    assert torch.equal(turn_back(got, turns=KEEPING), maps.repeat_interleave(4, 0))


def test_four_are_the_quarters():
    maps = torch.randn(2, 3, 4, 4)
    assert torch.equal(turn_maps(maps), turn_maps(maps, turns=['none', 'quarter', 'half', 'three_quarters']))
    x = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(turn_maps, x)


def test_joint_labels_of_images():
    assert joint_labels(torch.tensor([2, 0, 255])).tolist() == [8, 9, 10, 11, 0, 1, 2, 3, 255, 255, 255, 255]
    assert joint_labels(torch.tensor([1, 5]), turns=['none', 'flip'], ignore_index=5).tolist() == [2, 3, 5, 5]


def test_joint_labels_of_maps_turn_along():
    labels = torch.randint(0, 3, (2, 3, 5))
    labels[0, 0, 1] = 255
    got = joint_labels(labels, turns=KEEPING)
    for b in range(2):
        for k, name in enumerate(KEEPING):
            turned = reference.turned(labels[b], name)
            want = [[255 if y == 255 else 4 * int(y) + k for y in row] for row in turned]
            assert got[4 * b + k].tolist() == want


def test_many_classes_need_another_number_for_none():
    labels = torch.tensor([63, 255])
    assert joint_labels(labels)[3] == 255  # class 63 in its last turn, which would be ignored
    got = joint_labels(labels, joint_ignore_index=-1)
    assert got.tolist() == [252, 253, 254, 255, -1, -1, -1, -1]


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r'turn_maps: `maps` must be square .* got \(2, 3, 4, 5\). Turns that keep'):
        turn_maps(x)
    with pytest.raises(ShapeError, match='turn_back: `maps` must be square'):
        turn_back(x, turns=['quarter'])
    with pytest.raises(ShapeError, match=r'`maps` must have 4 rows an image, got \(6, 2, 2\)'):
        turn_back(torch.zeros(6, 2, 2))
    with pytest.raises(ShapeError, match=r'`maps` must have shape \(B, C, H, W\) or \(B, H, W\), got \(2, 3\)'):
        turn_maps(x[..., 0, 0])
    with pytest.raises(ShapeError, match=r'joint_labels: `labels` must have shape'):
        joint_labels(x)
    with pytest.raises(ShapeError, match='joint_labels: `maps` must be square'):
        joint_labels(torch.zeros(2, 3, 5))
    with pytest.raises(ConfigError, match="`turns` must be one of .*, got 'quater'. Did you mean 'quarter'"):
        turn_maps(x, turns=['none', 'quater'])
    for bad in (3, [], 'half', ['half', 'half'], True):
        with pytest.raises(ConfigError, match='`turns` must be 4 or different names'):
            turn_maps(x, turns=bad)
