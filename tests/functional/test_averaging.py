from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.averaging import average_momentum, average_update


def test_the_ramp_makes_a_plain_mean_at_first():
    weights = [torch.randn(3) for _ in range(10)]
    average = torch.full((3,), 99.0)
    for step, current in enumerate(weights):
        average = average_update(average, current, momentum=average_momentum(step, momentum=0.99))
    torch.testing.assert_close(average, torch.stack(weights).mean(0))
    assert average_momentum(10**6, momentum=0.99) == 0.99
    assert average_momentum(0, momentum=0.99, ramp=False) == 0.99


def test_one_step():
    average, current = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    before = average.clone()
    torch.testing.assert_close(average_update(average, current, momentum=0.9), 0.9 * average + 0.1 * current)
    assert torch.equal(average, before)
    assert torch.equal(average_update(average, current, momentum=0), current)
    assert torch.equal(average_update(average, current, momentum=1), average)


def test_counters_are_taken_over():
    count = torch.tensor(7)
    got = average_update(torch.tensor(4), count, momentum=0.5)
    assert got == 7
    count.add_(1)
    assert got == 7


def test_small_steps_survive_in_float32():
    average, current = torch.ones(1), torch.full((1,), 2.0, dtype=torch.float16)
    for _ in range(100):
        average = average_update(average, current, momentum=0.9999)
    assert average.dtype == torch.float32
    torch.testing.assert_close(average.item(), 2 - 0.9999**100, rtol=1e-5, atol=0)


def test_no_graph():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not average_update(torch.zeros(2), weight, momentum=0.5).requires_grad


def test_bad_arguments():
    x = torch.zeros(2)
    with pytest.raises(ConfigError, match=r'average_momentum: `momentum` must lie in \[0, 1\), got 1'):
        average_momentum(3, momentum=1)
    with pytest.raises(ConfigError, match='`step` must be a finite number of at least 0'):
        average_momentum(-1)
    with pytest.raises(ConfigError, match=r'average_update: `momentum` must lie in \[0, 1\], got 1.5'):
        average_update(x, x, momentum=1.5)
    with pytest.raises(ShapeError, match=r'must share one shape, got \(2,\) and \(1,\)'):
        average_update(x, x[:1], momentum=0.5)
