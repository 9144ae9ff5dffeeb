"""Building a connector for widths, and what is said where it fails."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.connectors import ConvConnector, PoolConnector, build_connector, width_of
from mmstructkd.errors import ConfigError


def test_width_is_the_channels_whatever_the_layout():
    assert width_of(torch.zeros(2, 3, 4, 5)) == 3
    assert width_of(torch.zeros(2, 20, 3)) == 3
    assert width_of(torch.zeros(2, 3)) == 3


def test_builds_for_the_widths_and_keeps_those_of_the_config():
    connector = build_connector('term', {'type': 'mmstructkd.ConvConnector'}, [3, 4], [5, 6])
    assert isinstance(connector, ConvConnector)
    assert connector.conv.conv.weight.shape == (5, 3, 1, 1)
    connector = build_connector('term', {'type': 'mmstructkd.ConvConnector', 'out_channels': 7}, [3], [5])
    assert connector.conv.conv.weight.shape == (7, 3, 1, 1)
    assert isinstance(build_connector('term', {'type': PoolConnector, 'max_nodes': 4}, [3], [5]), PoolConnector)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        ('conv', r"`connector` must be a dict with a `type`, got 'conv'"),
        ({'kernel_size': 1}, r'`connector` must be a dict with a `type`, got'),
        (
            {'type': 'mmstructkd.ConvConector'},
            r"must name a registered connector, got 'mmstructkd.ConvConector'. Did you mean 'ConvConnector'",
        ),
        ({'type': 'mmstructkd.ConvConnector', 'kernel': 3}, r"`connector` cannot be built. .*'kernel'"),
        ({'type': 'mmstructkd.ConvConnector', 'kernel_size': 2}, r'`kernel_size` must be odd, got 2'),
    ],
)
def test_what_cannot_be_built_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        build_connector("term 'a'", config, [3], [5])
