"""The thin shells around distances of features: weights, presets, what is left out."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import (
    AttentionTransferLoss,
    FeatureMSELoss,
    HierarchicalContextLoss,
    MaskedGenerationLoss,
)
from mmstructkd.structures import Targets
from tests.reference import pyramid, statistics
from tests.reference.divergence import nearest

SHAPE = (3, 4, 2, 5)

#: Loss, and its weighted definition.
CASES = [
    (FeatureMSELoss, {}, lambda s, t, v: 10 * statistics.feature_mse(s, t, 'mean', v)),
    (FeatureMSELoss, {'loss_weight': 3.0}, lambda s, t, v: 3 * statistics.feature_mse(s, t, 'mean', v)),
    (AttentionTransferLoss, {}, lambda s, t, v: 1e4 * statistics.attention_transfer(s, t, 2, valid=v)),
    (
        AttentionTransferLoss,
        {'loss_weight': 2.0, 'power': 1, 'reduction': 'sum'},
        lambda s, t, v: 2 * statistics.attention_transfer(s, t, 1, 'sum', v),
    ),
    (MaskedGenerationLoss, {}, lambda s, t, v: 2e-5 * statistics.feature_mse(s, t, 'sum', v)),
    (MaskedGenerationLoss, {'preset': 'one-stage'}, lambda s, t, v: 2e-5 * statistics.feature_mse(s, t, 'sum', v)),
    (MaskedGenerationLoss, {'preset': 'two-stage'}, lambda s, t, v: 5e-7 * statistics.feature_mse(s, t, 'sum', v)),
    (
        MaskedGenerationLoss,
        {'preset': 'seg', 'loss_weight': 5.0},
        lambda s, t, v: 1e-4 * statistics.feature_mse(s, t, 'sum', v),
    ),
    (MaskedGenerationLoss, {'alpha': 0.5}, lambda s, t, v: 0.5 * statistics.feature_mse(s, t, 'sum', v)),
    (HierarchicalContextLoss, {}, lambda s, t, v: pyramid.hierarchical_context(s, t, (4, 2, 1), v)),
    (
        HierarchicalContextLoss,
        {'loss_weight': 1.2, 'sizes': [1]},
        lambda s, t, v: 1.2 * pyramid.hierarchical_context(s, t, (1,), v),
    ),
]

every = pytest.mark.parametrize(('loss', 'settings', 'want'), CASES)


def pair():
    return torch.randn(2, *SHAPE, dtype=torch.float64).unbind()


@every
def test_equals_reference(loss, settings, want):
    student, teacher = pair()
    torch.testing.assert_close(loss(**settings)(student, teacher), want(student, teacher, None))


@every
@pytest.mark.parametrize('where', ['inside', 'labelled'])
def test_labels_and_mask_leave_positions_out(loss, settings, want, where):
    student, teacher = pair()
    labels = torch.randint(0, 4, (3, 4, 10))
    labels[1, :, :5] = 9
    valid = torch.rand(3, 4, 10) > 0.2
    built = loss(**settings)
    built.restrict(where)
    got = built(student, teacher, Targets(labels=labels, valid=valid, ignore_index=9))
    counts = valid if where == 'inside' else valid & (labels != 9)
    torch.testing.assert_close(got, want(student, teacher, nearest(counts, (2, 5))))


@every
def test_labels_of_regions_say_nothing_about_positions(loss, settings, want):
    student, teacher = pair()
    got = loss(**settings)(student, teacher, Targets(labels=torch.tensor([1, 2, -1]), ignore_index=-1))
    torch.testing.assert_close(got, want(student, teacher, None))


def test_only_attention_takes_other_widths():
    assert not AttentionTransferLoss.needs_equal_channels
    for loss in (FeatureMSELoss, HierarchicalContextLoss, MaskedGenerationLoss):
        assert loss.needs_equal_channels


def test_vectors_are_refused_by_name():
    with pytest.raises(ShapeError, match=r'feature_mse_loss: `student` must have shape \(B, D, H, W\), got \(6, 4\)'):
        FeatureMSELoss()(torch.zeros(6, 4), torch.zeros(6, 4), Targets(labels=torch.zeros(6, dtype=torch.int64)))


def test_settings_are_shown():
    assert "power=3, reduction='sum'" in repr(AttentionTransferLoss(power=3, reduction='sum'))
    assert 'alpha=5e-07' in repr(MaskedGenerationLoss(preset='two-stage'))
    assert 'sizes=(4, 2, 1)' in repr(HierarchicalContextLoss())


def test_bad_arguments():
    with pytest.raises(
        ConfigError, match='AttentionTransferLoss: `power` must be a finite number of at least 1, got 0'
    ):
        AttentionTransferLoss(power=0)
    with pytest.raises(ConfigError, match=r"AttentionTransferLoss: `reduction` must be one of .*, got 'all'"):
        AttentionTransferLoss(reduction='all')
    with pytest.raises(
        ConfigError, match='MaskedGenerationLoss: `alpha` must be a finite number of at least 0, got -1'
    ):
        MaskedGenerationLoss(alpha=-1)
    with pytest.raises(ConfigError, match="MaskedGenerationLoss: `alpha` must be 2e-05 with preset='seg', got 1"):
        MaskedGenerationLoss(alpha=1, preset='seg')
    with pytest.raises(ConfigError, match='HierarchicalContextLoss: `sizes` must be a sequence of integers above 0'):
        HierarchicalContextLoss(sizes=(4, 0))
