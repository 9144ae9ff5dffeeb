from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.losses import ChannelwiseKLLoss
from mmstructkd.structures import Targets
from tests.reference import divergence as reference

SHAPE = (3, 4, 2, 5)


def pair():
    return torch.randn(2, *SHAPE, dtype=torch.float64).unbind()


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_equals_reference(temperature):
    student, teacher = pair()
    got = ChannelwiseKLLoss(3.0, temperature=temperature)(student, teacher)
    torch.testing.assert_close(got, 3 * reference.channelwise_kl(student, teacher, temperature))


def test_default_temperature():
    student, teacher = pair()
    torch.testing.assert_close(ChannelwiseKLLoss()(student, teacher), reference.channelwise_kl(student, teacher, 4.0))


@pytest.mark.parametrize('where', ['inside', 'labelled'])
def test_labels_and_mask_leave_positions_out(where):
    student, teacher = pair()
    labels = torch.randint(0, 4, (3, 4, 10))
    labels[1, :, :5] = 9
    valid = torch.rand(3, 4, 10) > 0.2
    loss = ChannelwiseKLLoss()
    loss.restrict(where)
    got = loss(student, teacher, Targets(labels=labels, valid=valid, ignore_index=9))
    counts = reference.nearest(valid if where == 'inside' else valid & (labels != 9), (2, 5))
    torch.testing.assert_close(got, reference.channelwise_kl(student, teacher, 4.0, counts))


def test_wants_equal_channels():
    assert ChannelwiseKLLoss.needs_equal_channels


def test_bad_temperature():
    with pytest.raises(ConfigError, match='ChannelwiseKLLoss: `temperature` must be a finite number above 0, got -4'):
        ChannelwiseKLLoss(temperature=-4)
