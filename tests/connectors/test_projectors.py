"""The projector ensemble and the deep projector."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmstructkd.connectors import DeepProjectorConnector, ProjectorEnsembleConnector
from mmstructkd.errors import ConfigError


def test_ensemble_is_the_mean_of_rectified_projections():
    connector = ProjectorEnsembleConnector(3, 5, num_projectors=4)
    x = torch.randn(2, 3, 4, 6)
    convs = [m for m in connector.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 4
    with torch.no_grad():
        for conv in convs:
            conv.bias.uniform_(-1, 1)
    want = sum((torch.einsum('bchw,dc->bdhw', x, c.weight[:, :, 0, 0]) + c.bias.view(-1, 1, 1)).relu() for c in convs)
    torch.testing.assert_close(connector(x), want / 4)


def test_projectors_start_apart():
    convs = [m for m in ProjectorEnsembleConnector(3, 5).modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 3
    assert not any(torch.equal(a.weight, b.weight) for a, b in zip(convs, convs[1:] + convs[:1], strict=True))


def test_deep_projector_has_the_published_layers():
    connector = DeepProjectorConnector(4, 7)
    layers = [m for m in connector.modules() if not list(m.children())]
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert [type(m) for m in layers] == kinds
    convs = [m for m in layers if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convs] == [
        (4, 8, (1, 1)),
        (8, 4, (1, 1)),
        (4, 8, (1, 1)),
        (8, 7, (1, 1)),
    ]
    out = connector(torch.randn(3, 4, 5, 5))
    assert (out < 0).any(), 'nothing rectifies the end'


def test_deep_projector_takes_another_norm():
    connector = DeepProjectorConnector(4, 7, expansion=3, norm_cfg=dict(type='GN', num_groups=2))
    assert sum(isinstance(m, nn.GroupNorm) for m in connector.modules()) == 2
    assert connector(torch.randn(1, 4, 1, 1)).shape == (1, 7, 1, 1)


@pytest.mark.parametrize(
    ('kind', 'name'), [(ProjectorEnsembleConnector, 'num_projectors'), (DeepProjectorConnector, 'expansion')]
)
@pytest.mark.parametrize('value', [0, 1.5, True])
def test_bad_number_is_refused(kind, name, value):
    with pytest.raises(ConfigError, match=f'{kind.__name__}: `{name}` must be an integer of at least 1, got {value}'):
        kind(3, 5, **{name: value})
