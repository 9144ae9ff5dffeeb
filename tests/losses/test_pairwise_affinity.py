from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.losses import PairwiseAffinityLoss
from mmstructkd.structures import Targets
from tests.reference import affinity as reference

SHAPE_S, SHAPE_T = (2, 3, 5, 4), (2, 6, 5, 4)


def pair():
    return torch.randn(SHAPE_S).double().requires_grad_(), torch.randn(SHAPE_T).double()


def check(loss, weight, **given):
    student, teacher = pair()
    got, want = loss(student, teacher), weight * reference.pairwise_affinity(student, teacher, **given)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_defaults():
    check(PairwiseAffinityLoss(), 1)


def test_preset_of_the_paper():
    check(PairwiseAffinityLoss(preset='paper'), 10, kind='avg', kernel=(2, 2))


def test_preset_of_the_code():
    # int(0.5 * 5) = 2 and int(0.5 * 4) = 2: three rows of nodes, two columns.
    check(PairwiseAffinityLoss(preset='code'), 0.5, kind='max', kernel=(2, 2), detach_norm=True)


@pytest.mark.parametrize(
    ('size', 'kernel'), [((65, 65), (32, 32)), ((64, 128), (32, 64)), ((3, 2), (1, 1)), ((1, 1), (1, 1))]
)
def test_patch_of_the_code_follows_the_map(size, kernel):
    assert PairwiseAffinityLoss(preset='code')._kernel_at(*size) == kernel
    assert PairwiseAffinityLoss(kernel_size=[2, 3])._kernel_at(*size) == (2, 3)


def test_arguments_reach_the_function():
    loss = PairwiseAffinityLoss(2.0, pool='max', kernel_size=(1, 2), radius=1, detach_norm=True)
    check(loss, 2, kind='max', kernel=(1, 2), radius=1, detach_norm=True)


def test_a_preset_leaves_the_rest_free():
    check(PairwiseAffinityLoss(preset='paper', radius=1), 10, radius=1)


@pytest.mark.parametrize('where', ['inside', 'labelled'])
def test_labels_and_mask_leave_positions_out(where):
    student, teacher = pair()
    labels = torch.randint(0, 4, (2, 5, 4))
    labels[1, :3] = 9
    valid = torch.rand(2, 5, 4) > 0.2
    loss = PairwiseAffinityLoss()
    loss.restrict(where)
    got = loss(student, teacher, Targets(labels=labels, valid=valid, ignore_index=9))
    counts = valid if where == 'inside' else valid & (labels != 9)
    want = reference.pairwise_affinity(student, teacher, valid=counts)
    torch.testing.assert_close(got, want)


def test_widths_may_differ():
    assert not PairwiseAffinityLoss.needs_equal_channels


def test_bad_arguments():
    with pytest.raises(ConfigError, match=r"PairwiseAffinityLoss: `pool` must be one of .*, got 'mean'"):
        PairwiseAffinityLoss(pool='mean')
    with pytest.raises(ConfigError, match='PairwiseAffinityLoss: `kernel_size` must be an integer above 0'):
        PairwiseAffinityLoss(kernel_size=0)
    with pytest.raises(ConfigError, match='PairwiseAffinityLoss: `radius` must be None or an integer'):
        PairwiseAffinityLoss(radius=-1)
    for bad in (0, 1.5, True, float('nan'), 'half'):
        with pytest.raises(ConfigError, match='`kernel_scale` must be above 0 and at most 1, got'):
            PairwiseAffinityLoss(kernel_scale=bad)
    with pytest.raises(
        ConfigError, match=r"must be given by one of .*, got \{'kernel_size': 2, 'kernel_scale': 0\.5\}"
    ):
        PairwiseAffinityLoss(kernel_scale=0.5, kernel_size=2)
    with pytest.raises(ConfigError, match="'max_side': 4.*preset='paper' fixes another"):
        PairwiseAffinityLoss(max_side=4, preset='paper')
    for bad in (0, 2.0, True):
        with pytest.raises(ConfigError, match='`max_side` must be an integer of at least 1, got'):
            PairwiseAffinityLoss(max_side=bad)
    with pytest.raises(ConfigError, match=r"'kernel_scale': 0\.5.*preset='code' fixes another"):
        PairwiseAffinityLoss(preset='code', kernel_size=2)
    with pytest.raises(ConfigError, match=r"`loss_weight` must be 10\.0 with preset='paper', got 5"):
        PairwiseAffinityLoss(preset='paper', loss_weight=5)


def test_print_out_shows_the_settings():
    assert "pool='max', kernel_scale=0.5, radius=None, detach_norm=True" in repr(PairwiseAffinityLoss(preset='code'))
    assert 'kernel_size=(2, 2)' in repr(PairwiseAffinityLoss())


@pytest.mark.parametrize(('height', 'width', 'kernel'), [(9, 4, (3, 1)), (4, 4, (1, 1)), (8, 5, (2, 2))])
def test_max_side_bounds_the_nodes(height, width, kernel):
    student, teacher = torch.randn(2, 3, height, width), torch.randn(2, 5, height, width)
    got = PairwiseAffinityLoss(max_side=4)(student, teacher)
    torch.testing.assert_close(got, PairwiseAffinityLoss(kernel_size=kernel)(student, teacher))
    assert 'max_side=4' in repr(PairwiseAffinityLoss(max_side=4))
