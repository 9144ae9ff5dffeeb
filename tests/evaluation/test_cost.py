"""Networks of all three tasks are counted and timed."""

from __future__ import annotations

import pytest
import torch
from mmengine.analysis import get_model_complexity_info

from mmstructkd.evaluation.cost import all_tensors, latency, multiply_adds, parameter_count
from mmstructkd.teachers.loading import build_network
from mmstructkd.testing import TOY_DETECTORS, toy_depth_estimator, toy_detector, toy_segmentor

NETWORKS = {'seg': toy_segmentor, 'depth': toy_depth_estimator}
NETWORKS |= {kind: lambda kind=kind: toy_detector(kind) for kind in TOY_DETECTORS}


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return build_network(NETWORKS[request.param](), 'test').eval()


def test_four_times_the_pixels_are_four_times_the_work(network):
    small, large = multiply_adds(network, (64, 64)), multiply_adds(network, (128, 128))
    regions = hasattr(network, 'roi_head')  # their number follows the proposals, not the pixels
    assert small > 0
    assert (2 if regions else 3.5) < large / small < 4.5


def test_segmentor_counts_what_mmengine_counts():
    network = build_network(toy_segmentor(), 'test').eval()
    found = get_model_complexity_info(network, input_shape=(3, 48, 64), show_table=False, show_arch=False)
    assert multiply_adds(network, (48, 64)) == found['flops']
    assert parameter_count(network) == found['params']


def test_latency_is_measured_for_each(network):
    seconds = latency([network, network], (64, 64), repeats=2)
    assert len(seconds) == 2
    assert all(0 < value < 60 for value in seconds)


def test_tensors_are_found_at_any_depth():
    one, two, three = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert [id(t) for t in all_tensors(([one], {'a': (two, 'word')}, three))] == [id(one), id(two), id(three)]
