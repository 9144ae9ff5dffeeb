"""Settings that leave nothing of a loss are refused when it is built: weights of all parts 0, absurd temperatures."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.temperatures import (
    ConstantTemperature,
    LearnableTemperature,
    ScheduledTemperature,
    StandardizedTemperature,
)
from mmstructkd.testing import toy_distiller
from tests.losses import test_contract as contract

#: Every loss that is a weighted sum of parts, and the weights.
SUMS = {
    'DecoupledKLLoss': ('alpha', 'beta'),
    'DistLoss': ('inter_weight', 'intra_weight'),
    'FocalGlobalLoss': ('foreground_weight', 'background_weight', 'attention_weight', 'global_weight'),
    'MaskedGenerationLoss': ('alpha',),
    'MemoryContrastLoss': ('pixel_weight', 'region_weight'),
    'PrototypeContrastLoss': ('within_weight', 'across_weight', 'soft_within_weight', 'soft_across_weight'),
    'RelationalLoss': ('distance_weight', 'angle_weight'),
}
SOFTENED = [name for name in contract.NAMES if hasattr(MODELS.get(f'mmstructkd.{name}'), 'soften')]


def build(name, **settings):
    return MODELS.build({'type': f'mmstructkd.{name}', **contract.SMALL.get(name, {}), **settings})


@pytest.mark.parametrize('name', sorted(SUMS))
def test_weights_that_are_all_zero(name):
    weights = SUMS[name]
    with pytest.raises(
        ConfigError, match=rf'{name}: one of `{weights[0]}`.* must be above 0, got 0 for all.*loss_weight=0'
    ):
        build(name, **dict.fromkeys(weights, 0))
    for kept in weights:  # one part is enough
        assert build(name, **{**dict.fromkeys(weights, 0), kept: 0.5}) is not None


def test_there_is_no_other_sum_of_parts():
    """A loss with two weights beside ``loss_weight`` belongs into the table above, or is named here with the reason."""
    others = {
        'HolisticLoss',  # weights of the critic's objective: the student's part has loss_weight alone
    }
    for name in contract.NAMES:
        arguments = MODELS.get(f'mmstructkd.{name}').__init__.__annotations__
        weights = [a for a in arguments if a.endswith('_weight') and a not in ('loss_weight', 'variance_weight')]
        assert len(weights) < 2 or name in SUMS or name in others


def test_loss_weight_switches_off():
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    assert build('DistLoss', loss_weight=0)(student, teacher) == 0


@pytest.mark.parametrize('name', SOFTENED)
@pytest.mark.parametrize('temperature', [1e6, 1e-6, 1e4, 1e-4, 1e30])
def test_a_temperature_that_leaves_no_gradient(name, temperature):
    with pytest.raises(ConfigError, match=rf'{name}: `temperature` must lie between 0\.001 and 1000, got'):
        build(name, temperature=temperature)


@pytest.mark.parametrize(
    ('kind', 'settings', 'named'),
    [
        (ConstantTemperature, dict(value=1e6), 'value'),
        (StandardizedTemperature, dict(value=1e-6), 'value'),
        (ScheduledTemperature, dict(start=1e6), 'start'),
        (ScheduledTemperature, dict(final=1e-6), 'final'),
        (LearnableTemperature, dict(low=1e-6), 'low'),
        (LearnableTemperature, dict(span=1e6), r'low \+ span'),
    ],
)
def test_temperatures_of_every_kind(kind, settings, named):
    with pytest.raises(ConfigError, match=rf'{kind.__name__}: `{named}` must lie between 0\.001 and 1000'):
        kind(**settings)


def test_the_second_temperature_of_the_memory():
    with pytest.raises(ConfigError, match='MemoryContrastLoss: `kd_temperature` must lie between'):
        build('MemoryContrastLoss', kd_temperature=1e6)


@pytest.mark.parametrize('temperature', [1e-3, 0.05, 4.0, 21.0, 1e3])
def test_within_the_range_a_gradient_is_left(temperature):
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    student.requires_grad_()
    for name in ('PixelwiseKLLoss', 'ChannelwiseKLLoss'):
        (gradient,) = torch.autograd.grad(build(name, temperature=temperature)(student, teacher), student)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 1e-6


def test_a_kernel_that_vanishes():
    with pytest.raises(ConfigError, match='CorrelationCongruenceLoss: `gamma` must be at most 5, got 100'):
        build('CorrelationCongruenceLoss', gamma=100.0)


def test_a_confidence_that_no_edge_reaches():
    with pytest.raises(ConfigError, match='LocalizationKLLoss: `threshold` must be at most 1, a probability, got 1.5'):
        build('LocalizationKLLoss', region='confident', threshold=1.5)


@pytest.mark.parametrize(
    ('loss', 'reason'),
    [
        (dict(type='mmstructkd.DistLoss', inter_weight=0, intra_weight=0), 'one of `inter_weight`, `intra_weight`'),
        (dict(type='mmstructkd.DecoupledKLLoss', alpha=0, beta=0), 'one of `alpha`, `beta`'),
        (dict(type='mmstructkd.PixelwiseKLLoss', temperature=1e6), '`temperature` must lie between'),
        (
            dict(
                type='mmstructkd.ChannelwiseKLLoss', temperature=dict(type='mmstructkd.ConstantTemperature', value=1e-6)
            ),
            '`temperature` cannot be built',
        ),
    ],
)
def test_the_term_is_named(loss, reason):
    with pytest.raises(ConfigError, match=f"term 'one': .*{reason}"):
        MODELS.build(toy_distiller(terms=dict(one=dict(tap='decode_head.conv_seg', loss=loss))))
