from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.reduce import masked_mean, mean_of_sum
from mmstructkd.functional.core.valid import valid_pixels
from tests.reference import divergence as reference


def test_masked_mean_equals_reference():
    values = torch.randn(2, 3, 5, dtype=torch.float64)
    valid = torch.rand(2, 3, 5) > 0.4
    torch.testing.assert_close(masked_mean(values, valid), reference.masked_mean(values, valid))
    torch.testing.assert_close(masked_mean(values), values.mean())


def test_masked_mean_counts_what_is_broadcast():
    values = torch.randn(2, 3, dtype=torch.float64)
    valid = torch.tensor([[True], [False]])
    torch.testing.assert_close(masked_mean(values, valid), values[0].mean())


def test_what_does_not_count_may_be_anything():
    values = torch.tensor([1.0, float('nan'), 3.0, float('inf')], requires_grad=True)
    loss = masked_mean(values, torch.tensor([True, False, True, False]))
    loss.backward()
    assert loss.item() == 2
    assert values.grad.tolist() == [0.5, 0, 0.5, 0]


@pytest.mark.parametrize('valid', [torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.bool)])
def test_nothing_counts_is_zero_with_a_graph(valid):
    values = torch.randn(2, 3, requires_grad=True)
    loss = masked_mean(values, valid)
    loss.backward()
    assert loss.item() == 0
    assert not values.grad.any()


def test_empty_is_zero_with_a_graph():
    values = torch.randn(0, 3, requires_grad=True)
    loss = masked_mean(values)
    loss.backward()
    assert loss.item() == 0


def test_mean_of_sum_takes_tensors_and_numbers():
    total = torch.tensor(6.0, dtype=torch.float64)
    assert mean_of_sum(total, 4).item() == 1.5
    assert mean_of_sum(total, torch.tensor(4)).item() == 1.5
    assert mean_of_sum(total, torch.tensor(4)).dtype == torch.float64
    assert mean_of_sum(torch.tensor(0.0), torch.tensor(0)).item() == 0


def test_valid_pixels_joins_labels_and_mask():
    reference_map = torch.zeros(1, 2, 1, 3)
    labels = torch.tensor([[[0, 7, 1]]])
    valid = torch.tensor([[[True, True, False]]])
    assert valid_pixels('doc', reference_map) is None
    got = valid_pixels('doc', reference_map, labels=labels, ignore_index=7, valid=valid)
    assert got.tolist() == [[[True, False, False]]]
    assert valid_pixels('doc', reference_map, labels=labels).all()


def test_valid_pixels_brings_targets_to_the_grid():
    labels = torch.full((1, 4, 8), 255)
    labels[:, 0, 4] = 3
    got = valid_pixels('doc', torch.zeros(1, 2, 1, 2), labels=labels)
    assert got.tolist() == [[[False, True]]]


@pytest.mark.parametrize('shape', [(2, 1, 4, 4), (3, 4, 4), (4, 4)])
def test_valid_pixels_refuses_what_is_no_map_of_the_batch(shape):
    with pytest.raises(ShapeError, match=r'owner: `labels` must have shape \(B, H, W\) with B = 2, got'):
        valid_pixels('owner', torch.zeros(2, 3, 4, 4), labels=torch.zeros(shape, dtype=torch.int64))


def test_valid_pixels_refuses_a_mask_of_numbers():
    with pytest.raises(ConfigError, match=r'`mask` must be boolean, got torch\.float32'):
        valid_pixels('owner', torch.zeros(2, 3, 4, 4), valid=torch.ones(2, 4, 4))
