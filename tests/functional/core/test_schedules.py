from __future__ import annotations

import itertools
import math

import pytest

from mmstructkd.errors import ConfigError
from mmstructkd.functional.core.schedules import adaptation_factor, exponential_factor, objective_weights


def test_exponential_has_a_constant_ratio():
    values = [exponential_factor(k / 8, start=0.1, end=0.9) for k in range(9)]
    assert values[0] == pytest.approx(0.1)
    assert values[-1] == pytest.approx(0.9)
    assert [b / a for a, b in itertools.pairwise(values)] == pytest.approx([9 ** (1 / 8)] * 8)
    assert exponential_factor(0.5, start=4.0, end=1.0) == pytest.approx(2.0)


def test_adaptation_starts_at_nothing():
    for r in (0.0, 0.03, 0.5, 1.0):
        assert adaptation_factor(r) == pytest.approx(2 / (1 + math.exp(-10 * r)) - 1)
    assert adaptation_factor(0.0) == 0


def test_objective_weights_at_the_ends():
    assert objective_weights(0.0) == (1.0, 1.0, 1.0)
    assert objective_weights(1.0) == (1.0, 0.0, 0.0)
    assert objective_weights(0.0, mode='released_code') == (0.0, 0.0, 1.0)
    assert objective_weights(1.0, mode='released_code') == (1.0, 1.0, 0.0)
    assert objective_weights(0.25).pixel == 0.75


@pytest.mark.parametrize('function', [exponential_factor, adaptation_factor, objective_weights])
@pytest.mark.parametrize('bad', [-0.1, 1.1, float('nan'), 'half'])
def test_progress_out_of_range(function, bad):
    with pytest.raises(ConfigError, match=f'{function.__name__}: `progress` must'):
        function(bad)


def test_bad_arguments():
    for name in ('start', 'end'):
        with pytest.raises(ConfigError, match=f'`{name}` must be a finite number above 0, got 0'):
            exponential_factor(0.5, **{name: 0})
    with pytest.raises(ConfigError, match='`steepness` must be a finite number above 0'):
        adaptation_factor(0.5, steepness=0)
    with pytest.raises(ConfigError, match="`mode` must be one of .*, got 'code'"):
        objective_weights(0.5, mode='code')
