"""Schedules against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from mmstructkd.distillers import WeightSchedule
from mmstructkd.errors import ConfigError


@pytest.mark.parametrize(
    ('config', 'expected'),
    [
        (dict(), {0: 1.0, 99: 1.0}),
        (dict(type='constant', begin=10, end=20, end_factor=3.0), {9: 0.0, 10: 3.0, 19: 3.0, 20: 0.0}),
        (dict(type='linear', begin=10, end=30), {0: 0.0, 10: 0.0, 20: 0.5, 30: 1.0, 90: 1.0}),
        (dict(type='linear', start_factor=1.0, end_factor=0.0), {0: 1.0, 25: 0.75, 100: 0.0}),
        (dict(type='cosine', begin=0, end=100, end_factor=2.0), {0: 0.0, 50: 1.0, 25: 1 - math.sqrt(0.5), 100: 2.0}),
        (dict(type='step', milestones=[10, 20], gamma=0.5), {9: 1.0, 10: 0.5, 19: 0.5, 20: 0.25}),
        (dict(type='ramp_up', begin=40, end=60), {39: 0.0, 40: math.exp(-5), 50: math.exp(-1.25), 60: 1.0, 80: 1.0}),
    ],
)
def test_factor(config: dict, expected: dict[int, float]) -> None:
    schedule = WeightSchedule.from_config(config, 'term')
    for step, value in expected.items():
        assert schedule.factor(step, 100) == pytest.approx(value), step


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(type='linaer'), "must be one of .* got 'linaer'. Did you mean 'linear'"),
        (dict(begn=3), "got 'begn'. Did you mean 'begin'"),
        (dict(begin=10, end=10), '`end` must lie after `begin`=10, got 10'),
        (dict(end_factor=-1.0), '`end_factor` must be a finite number of at least 0, got -1.0'),
        (dict(end_factor=float('nan')), 'got nan'),
        (dict(type='step', milestones=[20, 10]), 'must increase'),
        (dict(type='step'), 'must not be empty'),
    ],
)
def test_refuses(config: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightSchedule.from_config(config, 'term')
