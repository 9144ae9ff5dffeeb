"""Injection: the rest runs on what is put in, and its gradient reaches that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mmstructkd.errors import ShapeError, TapError
from mmstructkd.taps import Inject, Tap


class Head(nn.Module):
    """Several outputs in a list in a dict."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {'all': [x, 2 * x], 'other': 3 * x}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.front, self.head, self.last = nn.Linear(2, 2), Head(), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.head(self.front(x))
        return self.last(made['all'][0] + made['all'][1] + made['other'])


@pytest.mark.parametrize(('tap', 'scale'), [('front', 6.0), ('head[all][1]', 1.0), ('head[other]', 1.0)])
def test_the_rest_runs_on_it(tap: str, scale: float) -> None:
    network = Network()
    x, put = torch.randn(3, 2), torch.randn(3, 2, requires_grad=True)
    own = network.front(x)
    rest = {'front': 0.0, 'head[all][1]': 4.0, 'head[other]': 3.0}[tap] * own
    with Inject(network, Tap.parse(tap), put):
        found = network(x)
    torch.testing.assert_close(found, network.last(rest + scale * put))
    (grad,) = torch.autograd.grad(found.sum(), put)
    torch.testing.assert_close(grad, scale * network.last.weight.expand(3, 2))
    torch.testing.assert_close(network(x), network.last(6.0 * own))  # gone with the block


def test_what_lies_before_gets_no_gradient() -> None:
    network = Network()
    with Inject(network, Tap.parse('front'), torch.ones(1, 2)):
        network(torch.ones(1, 2)).sum().backward()
    assert network.front.weight.grad is None
    assert network.last.weight.grad is not None


@pytest.mark.parametrize(
    ('tap', 'error', 'match'),
    [
        ('fronts', TapError, "must name a module of Network, got 'fronts'. Did you mean 'front'"),
        ('in:front', TapError, 'must name one output of a module'),
        ('head[*]', TapError, 'must name one output of a module'),
        ('front', ShapeError, r"must have the shape of 'front', \(3, 2\), got \(3, 5\)"),
        ('head[nothing]', TapError, 'must exist in the output'),
    ],
)
def test_mistakes(tap: str, error: type[Exception], match: str) -> None:
    network = Network()
    with pytest.raises(error, match=match), Inject(network, Tap.parse(tap), torch.zeros(3, 5)):
        network(torch.zeros(3, 2))
