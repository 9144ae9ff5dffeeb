from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.losses import StandardizedMSELoss
from mmstructkd.structures import Targets
from tests.reference import statistics as reference
from tests.reference.divergence import nearest

SHAPE = (3, 4, 2, 5)


def pair():
    return torch.randn(2, *SHAPE, dtype=torch.float64).unbind()


@pytest.mark.parametrize(
    ('settings', 'over', 'factor'),
    [
        ({}, 'image', 1),
        ({'preset': 'nfd'}, 'image', 1),
        ({'preset': 'pkd'}, 'batch', 0.5),
        ({'over': 'batch'}, 'batch', 1),
        ({'half': True}, 'image', 0.5),
    ],
)
def test_equals_reference(settings, over, factor):
    student, teacher = pair()
    got = StandardizedMSELoss(6.0, **settings)(student, teacher)
    torch.testing.assert_close(got, 6 * factor * reference.standardized_mse(student, teacher, over))


def test_eps_is_passed_on():
    student, teacher = pair()
    got = StandardizedMSELoss(eps=0.5)(student, teacher)
    torch.testing.assert_close(got, reference.standardized_mse(student, teacher, 'image', eps=0.5))


@pytest.mark.parametrize('preset', ['nfd', 'pkd'])
@pytest.mark.parametrize('where', ['inside', 'labelled'])
def test_labels_and_mask_leave_positions_out(preset, where):
    student, teacher = pair()
    labels = torch.randint(0, 4, (3, 4, 10))
    labels[1, :, :5] = 9
    valid = torch.rand(3, 4, 10) > 0.2
    loss = StandardizedMSELoss(preset=preset)
    loss.restrict(where)
    got = loss(student, teacher, Targets(labels=labels, valid=valid, ignore_index=9))
    counts = nearest(valid if where == 'inside' else valid & (labels != 9), (2, 5))
    want = reference.standardized_mse(student, teacher, loss.over, counts)
    torch.testing.assert_close(got, want / 2 if preset == 'pkd' else want)


def test_can_still_be_cast_like_any_module():
    assert isinstance(StandardizedMSELoss(half=True).half(), StandardizedMSELoss)


def test_wants_equal_channels_and_says_where_it_works():
    assert StandardizedMSELoss.needs_equal_channels
    assert StandardizedMSELoss.tasks == ('seg', 'depth', 'det')


def test_shows_its_settings():
    assert "over='batch', half=True" in repr(StandardizedMSELoss(preset='pkd'))


def test_bad_arguments():
    with pytest.raises(ConfigError, match="StandardizedMSELoss: `over` must be 'batch' with preset='pkd', got 'image'"):
        StandardizedMSELoss(preset='pkd', over='image')
    with pytest.raises(ConfigError, match=r"`preset` must be one of \['nfd', 'pkd'\], got 'pdk'\. Did you mean 'pkd'"):
        StandardizedMSELoss(preset='pdk')
    with pytest.raises(
        ConfigError, match=r"StandardizedMSELoss: `over` must be one of \['image', 'batch'\], got 'all'"
    ):
        StandardizedMSELoss(over='all')
    with pytest.raises(ConfigError, match="StandardizedMSELoss: `half` must be True or False, got 'yes'"):
        StandardizedMSELoss(half='yes')
    with pytest.raises(ConfigError, match='StandardizedMSELoss: `eps` must be a finite number above 0, got 0'):
        StandardizedMSELoss(eps=0)
