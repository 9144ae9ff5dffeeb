"""The 1x1 convolution and its options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmstructkd.connectors import ConvConnector
from mmstructkd.errors import ConfigError


def test_plain_is_one_convolution_with_a_bias():
    connector = ConvConnector(3, 5)
    layers = [m for m in connector.modules() if not list(m.children())]
    assert [type(m) for m in layers] == [nn.Conv2d]
    assert layers[0].bias is not None
    x = torch.randn(2, 3, 4, 6)
    want = torch.einsum('bchw,dc->bdhw', x, layers[0].weight[:, :, 0, 0]) + layers[0].bias[:, None, None]
    torch.testing.assert_close(connector(x), want)
    assert (connector(10 * x) < 0).any(), 'a feature may be negative'


def test_norm_and_activation_stand_behind_it():
    connector = ConvConnector(3, 5, norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU'))
    assert connector.conv.conv.bias is None, 'the norm has one'
    assert isinstance(connector.conv.norm, nn.BatchNorm2d)
    x = torch.randn(4, 3, 5, 5)
    out = connector(x)
    plain = connector.conv.conv(x)
    mean, var = plain.mean((0, 2, 3), keepdim=True), plain.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(out, ((plain - mean) / (var + 1e-5).sqrt()).relu())
    connector.eval()
    before = connector.conv.norm.running_mean.clone()
    connector(x)
    assert torch.equal(connector.conv.norm.running_mean, before)


@pytest.mark.parametrize(('norm', 'act'), [(dict(type='GN', num_groups=1), None), (None, dict(type='GELU'))])
def test_one_of_the_two(norm, act):
    connector = ConvConnector(3, 5, norm_cfg=norm, act_cfg=act)
    assert connector.conv.with_norm == (norm is not None)
    assert connector.conv.with_activation == (act is not None)
    assert connector(torch.randn(1, 3, 1, 1)).shape == (1, 5, 1, 1)


def test_larger_kernel_keeps_the_size():
    assert ConvConnector(3, 5, kernel_size=3)(torch.randn(1, 3, 4, 7)).shape == (1, 5, 4, 7)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(in_channels=0), '`in_channels` must be an integer of at least 1, got 0'),
        (dict(out_channels=2.5), '`out_channels` must be an integer of at least 1, got 2.5'),
        (dict(kernel_size=4), '`kernel_size` must be odd, got 4'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=f'ConvConnector: {message}'):
        ConvConnector(**{'in_channels': 3, 'out_channels': 5, **arguments})
