from __future__ import annotations

import itertools

import pytest

from mmstructkd.errors import ConfigError
from mmstructkd.functional.route import equal_hardness_route, equal_interval_route, next_stop, route_stage


def test_stage_is_the_last_stop_that_has_begun():
    begins = [0, 3, 4, 10]
    for step in range(20):
        assert route_stage(step, begins) == sum(step >= begin for begin in begins) - 1
    assert route_stage(5, [0]) == 0


@pytest.mark.parametrize('checkpoints', [1, 2, 7, 10, 33])
def test_equal_intervals(checkpoints):
    for stops in range(1, checkpoints + 1):
        route = equal_interval_route(checkpoints, stops)
        assert len(route) == stops
        assert route == sorted(set(route))
        assert route[-1] == checkpoints - 1
        gaps = [b - a for a, b in itertools.pairwise([-1, *route])]
        assert max(gaps) - min(gaps) <= 1


def test_equal_hardness():
    steep = [0.0, 0.0, 0.1, 1.0, 1.1, 1.2, 1.3, 2.0]
    assert equal_hardness_route(steep, 2) == [3, 7]
    assert equal_hardness_route(steep, 8)[-1] == 7
    # One checkpoint spans several steps: it is one stop.
    assert equal_hardness_route([0.0, 10.0], 2) == [1]
    # What falls again was reached before.
    assert equal_hardness_route([1.0, 3.0, 0.5, 4.0], 2) == [1, 3]
    assert equal_hardness_route([0.0, 0.0, 0.0], 3) == [0, 2]
    for stops in range(1, 5):
        route = equal_hardness_route([0.1, 0.4, 0.2, 0.9], stops)
        assert route == sorted(set(route))
        assert route[-1] == 3


def test_next_stop():
    hardness = [0.2, 0.25, 0.3, 0.29, 0.7]
    assert next_stop(hardness, 0, ratio=1.0) == 1  # never nowhere
    assert next_stop(hardness, 0, ratio=1.3) == 1
    assert next_stop(hardness, 0, ratio=1.45) == 3
    assert next_stop(hardness, 0, ratio=10.0) == 4
    assert next_stop(hardness, 3, ratio=1.0) == 4
    stops = [0]
    while stops[-1] < 4:
        stops.append(next_stop(hardness, stops[-1], ratio=1.3))
    assert stops == [0, 1, 3, 4]


def test_bad_arguments():
    for bad in ([], [1, 2], [0, 5, 5], [0, 7, 3]):
        with pytest.raises(ConfigError, match='route_stage: `begins` must start with 0 and increase, got'):
            route_stage(0, bad)
    with pytest.raises(ConfigError, match='`step` must be a finite number of at least 0'):
        route_stage(-1, [0])
    for checkpoints, stops in ((0, 1), (4, 0), (4, 5), (4, 2.0)):
        with pytest.raises(ConfigError, match='equal_interval_route: `(checkpoints|stops)` must be an integer above 0'):
            equal_interval_route(checkpoints, stops)
    with pytest.raises(ConfigError, match='`hardness` must hold finite numbers of at least 0, got'):
        equal_hardness_route([1.0, float('nan')], 1)
    with pytest.raises(ConfigError, match='`stops` must be an integer above 0, at most 2, got 3'):
        equal_hardness_route([1.0, 2.0], 3)
    with pytest.raises(ConfigError, match='`current` must be the number of a stop .* from 0 to 1, got 2'):
        next_stop([1.0, 2.0, 3.0], 2, ratio=2)
    with pytest.raises(ConfigError, match='`ratio` must be a finite number of at least 1'):
        next_stop([1.0, 2.0, 3.0], 0, ratio=0.5)
