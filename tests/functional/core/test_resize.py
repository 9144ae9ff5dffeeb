from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.resize import resize_labels, resize_map, resize_mask
from tests.reference import divergence as reference

SIZES = [(1, 1), (2, 3), (5, 4), (7, 9), (13, 2)]


@pytest.mark.parametrize('size', SIZES)
def test_labels_equal_reference_and_torch(size):
    labels = torch.randint(0, 256, (2, 5, 6))
    got = resize_labels(labels, size)
    assert got.dtype == torch.int64
    torch.testing.assert_close(got, reference.nearest(labels, size))
    want = torch.nn.functional.interpolate(labels[:, None].double(), size=size, mode='nearest')[:, 0].long()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('size', SIZES)
def test_masks_follow_labels(size):
    labels = torch.randint(0, 2, (2, 5, 6))
    torch.testing.assert_close(resize_mask(labels > 0, size), resize_labels(labels, size) > 0)


def test_labels_of_any_dtype():
    for dtype in (torch.uint8, torch.int32, torch.float32):
        assert resize_labels(torch.ones(1, 2, 2, dtype=dtype), (4, 4)).dtype == dtype


@pytest.mark.parametrize('size', SIZES)
def test_map_keeps_a_plane_inside(size):
    # Bilinear, pixel centres aligned: a ramp stays the same ramp, up to the border.
    ramp = torch.arange(12, dtype=torch.float64).expand(1, 1, 10, 12)
    got = resize_map(ramp, size)[0, 0, 0]
    centres = (torch.arange(size[1], dtype=torch.float64) + 0.5) * 12 / size[1] - 0.5
    torch.testing.assert_close(got, centres.clamp(0, 11))


def test_map_has_a_gradient():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: resize_map(t, (5, 3)), x)


def test_equal_size_is_the_tensor_itself():
    x, labels = torch.randn(1, 2, 3, 4), torch.zeros(1, 3, 4, dtype=torch.int64)
    assert resize_map(x, (3, 4)) is x
    assert resize_labels(labels, (3, 4)) is labels
    assert resize_mask(labels > 0, (3, 4)).shape == (1, 3, 4)


@pytest.mark.parametrize('size', [(0, 2), (2,), 3, (2.0, 2), None])
def test_bad_size(size):
    with pytest.raises(ConfigError, match=r'`size` must be two integers \(h, w\) above 0, got'):
        resize_map(torch.zeros(1, 1, 2, 2), size)
    with pytest.raises(ConfigError, match='`size` must be'):
        resize_labels(torch.zeros(1, 2, 2), size)


def test_bad_shapes():
    with pytest.raises(ShapeError, match=r'`tensor` must have shape \(B, C, H, W\), got \(2, 2\)'):
        resize_map(torch.zeros(2, 2), (1, 1))
    with pytest.raises(ShapeError, match=r'`labels` must have shape \(B, H, W\), got \(1, 1, 2, 2\)'):
        resize_labels(torch.zeros(1, 1, 2, 2), (1, 1))
    with pytest.raises(ShapeError, match=r'`labels` must hold pixels, got \(1, 0, 2\)'):
        resize_labels(torch.zeros(1, 0, 2), (1, 1))
