"""Targets of a batch: maps under any name and at any resolution, and what is known at points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import BaseDataElement, PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmstructkd.errors import ShapeError
from mmstructkd.structures import Targets
from mmstructkd.tasks.targets import collect_targets, point_targets

SIZE = (8, 12)


def sample(field: Any, size: tuple[int, int] = SIZE, kind: type = SegDataSample, name: str = 'gt_sem_seg') -> Any:
    made = kind(metainfo=dict(img_shape=size))
    made.set_field(field, name)
    return made


def labels_of(*samples: Any) -> torch.Tensor:
    return collect_targets(nn.Identity(), torch.zeros(len(samples), 3, *SIZE), list(samples)).labels


@pytest.mark.parametrize('kind', [SegDataSample, DetDataSample])
@pytest.mark.parametrize('name', ['data', 'sem_seg', 'semantic_map', 'labels_of_pixels'])
def test_a_map_has_any_name(name: str, kind: type) -> None:
    """mmseg says ``data``, mmdet ``sem_seg``, a dataset of one's own what it likes."""
    values = torch.arange(96).view(1, *SIZE)
    assert torch.equal(labels_of(sample(PixelData(**{name: values}), kind=kind)), values)
    assert torch.equal(labels_of(*[sample(PixelData(**{name: values}), kind=kind)] * 2), values.repeat(2, 1, 1))


def test_other_forms_of_a_map() -> None:
    values = torch.arange(96).view(1, *SIZE)
    element = BaseDataElement()
    element.set_field(values[0], 'map')
    assert torch.equal(labels_of(sample(element, kind=BaseDataElement)), values)
    both = PixelData(data=values, weight=torch.ones(1, *SIZE))
    assert torch.equal(labels_of(sample(both)), values)
    arrays = BaseDataElement()
    arrays.set_field(values.numpy().astype(np.uint8), 'sem_seg')
    assert torch.equal(labels_of(sample(arrays, kind=BaseDataElement)), values)
    assert torch.equal(labels_of(sample(values, kind=BaseDataElement)), values)


def test_what_is_no_map_is_named() -> None:
    for field, message in (
        (PixelData(one=torch.zeros(1, *SIZE), two=torch.zeros(1, *SIZE)), r"got the fields \['one', 'two'\]"),
        (PixelData(), r'got the fields \[\]'),
        (PixelData(data=torch.zeros(3, *SIZE)), r'shape \(1, H, W\), got \(3, 8, 12\)'),
    ):
        with pytest.raises(ShapeError, match=message):
            labels_of(sample(field))


@pytest.mark.parametrize('stride', [2, 4])
def test_maps_of_a_stride_are_brought_to_the_input(stride: int) -> None:
    """HTC's and SCNet's semantic maps may be eight times smaller; nearest, so that no label appears."""
    small = torch.tensor([[0, 3, 255], [255, 7, 1]]) if stride == 4 else torch.arange(24).view(4, 6)
    got = labels_of(sample(PixelData(sem_seg=small[None]), kind=DetDataSample))[0]
    assert torch.equal(got, small.repeat_interleave(stride, 0).repeat_interleave(stride, 1))


def test_maps_larger_than_the_input() -> None:
    large = torch.arange(96).view(*SIZE).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(labels_of(sample(PixelData(data=large[None])))[0], torch.arange(96).view(*SIZE))


@pytest.mark.parametrize('stride', [1, 2])
def test_maps_of_the_image_without_its_padding(stride: int) -> None:
    image = (8, 6)
    small = torch.arange(48).view(*image)[::stride, ::stride]
    got = labels_of(sample(PixelData(sem_seg=small[None]), image, DetDataSample))[0]
    assert torch.equal(got[:, :6], small.repeat_interleave(stride, 0).repeat_interleave(stride, 1))
    assert (got[:, 6:] == 255).all()


def test_depth_is_brought_to_the_input_as_well() -> None:
    depth = torch.tensor([[1.0, float('nan'), 2.0], [0.0, 4.0, 9.0]])
    made = sample(PixelData(depth=depth[None]), name='gt_depth_map')
    found = collect_targets(nn.Identity(), torch.zeros(1, 3, *SIZE), [made])
    assert torch.equal(found.depth[0, ::4, ::4], torch.tensor([[1.0, 0.0, 2.0], [0.0, 4.0, 9.0]]))
    assert found.depth.shape == (1, *SIZE)


def test_what_is_known_at_points() -> None:
    labels = torch.arange(96).view(1, *SIZE)
    points = torch.tensor([[[0.0, 0.0], [1.0, 1.0], [0.5, 0.25], [0.999, 0.0]]])  # (x, y)
    found = point_targets(Targets(labels=labels, valid=labels > 5, depth=labels.float(), num_classes=4), points)
    assert found.labels[0, :, 0].tolist() == [0, 95, 2 * 12 + 6, 11]
    assert found.valid[0, :, 0].tolist() == [False, True, True, True]
    assert torch.equal(found.depth, found.labels.float())
    assert found.input_size == (4, 1)
    assert point_targets(Targets(), points).labels is None
