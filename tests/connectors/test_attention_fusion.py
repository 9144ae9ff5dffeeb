from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from mmstructkd.connectors import AttentionFusionConnector
from mmstructkd.errors import ConfigError, ShapeError

SIZES = [(9, 7), (5, 4), (5, 4), (2, 2)]
WIDTHS_S, WIDTHS_T = [3, 4, 4, 6], [5, 5, 7, 7]


def levels(widths, batch=2):
    return [torch.randn(batch, w, *size) for w, size in zip(widths, SIZES, strict=True)]


def batch_norm(features, norm):
    mean, var = features.mean((0, 2, 3), keepdim=True), features.var((0, 2, 3), unbiased=False, keepdim=True)
    scaled = (features - mean) / (var + norm.eps).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


def nearest(features, size):
    height, width = features.shape[2:]
    rows = [y * height // size[0] for y in range(size[0])]
    columns = [x * width // size[1] for x in range(size[1])]
    return features[:, :, rows][:, :, :, columns]


def test_equals_the_equations_from_the_coarsest_down():
    connector = AttentionFusionConnector(WIDTHS_S, WIDTHS_T, mid_channels=4)
    with torch.no_grad():
        for parameter in connector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    students, teachers = levels(WIDTHS_S), levels(WIDTHS_T)
    got, passed = connector(students, teachers)
    below = None
    for level in (3, 2, 1, 0):
        fusion = connector.fusions[level]
        mixed = batch_norm(functional.conv2d(students[level], fusion.reduce.conv.weight), fusion.reduce.norm)
        if below is not None:
            coarse = nearest(below, SIZES[level])
            both = torch.cat([mixed, coarse], 1)
            gates = functional.conv2d(both, fusion.gates.weight, fusion.gates.bias).sigmoid()
            mixed = mixed * gates[:, 0:1] + coarse * gates[:, 1:2]
        below = mixed  # what goes down has not passed the 3x3 convolution
        want = batch_norm(functional.conv2d(mixed, fusion.expand.conv.weight, padding=1), fusion.expand.norm)
        torch.testing.assert_close(got[level], want, rtol=1e-4, atol=1e-5)
    assert all(one is two for one, two in zip(passed, teachers, strict=True))


def test_fine_levels_teach_coarse_ones():
    connector = AttentionFusionConnector(WIDTHS_S, WIDTHS_T, mid_channels=4)
    students = [s.requires_grad_() for s in levels(WIDTHS_S)]
    out, _ = connector(students, levels(WIDTHS_T))
    grads = torch.autograd.grad(out[0].square().sum() + out[0].sum(), students)
    assert all(g.abs().sum() > 0 for g in grads)
    out, _ = connector(students, levels(WIDTHS_T))
    grads = torch.autograd.grad(out[3].square().sum(), students, allow_unused=True)
    assert [g is None for g in grads] == [True, True, True, False]


def test_every_parameter_is_used():
    connector = AttentionFusionConnector(WIDTHS_S, WIDTHS_T, mid_channels=4)
    out, _ = connector(levels(WIDTHS_S), levels(WIDTHS_T))
    sum(o.square().sum() for o in out).backward()
    assert all(p.grad is not None for p in connector.parameters())
    assert connector.fusions[3].gates is None
    assert connector.fusions[0].gates is not None


def test_one_level_and_other_normalisation():
    connector = AttentionFusionConnector([3], [5], mid_channels=4, norm_cfg=dict(type='GN', num_groups=1))
    out, _ = connector([torch.randn(1, 3, 1, 1)], [torch.randn(1, 5, 1, 1)])
    assert out[0].shape == (1, 5, 1, 1)
    bare = AttentionFusionConnector([3], [5], mid_channels=4, norm_cfg=None)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in bare.modules())


def test_one_value_a_channel_takes_the_running_statistics():
    connector = AttentionFusionConnector([3], [5], mid_channels=4)
    feature = torch.randn(1, 3, 1, 1)
    before = {name: b.clone() for name, b in connector.named_buffers()}
    got, _ = connector([feature], [feature])
    assert all(torch.equal(b, before[name]) for name, b in connector.named_buffers())
    assert all(m.training for m in connector.modules())
    torch.testing.assert_close(got, connector.eval()([feature], [feature])[0])


def test_defaults():
    assert AttentionFusionConnector.joint
    connector = AttentionFusionConnector([3], [5])
    assert connector.fusions[0].reduce.conv.out_channels == 256
    assert connector.fusions[0].reduce.conv.bias is None
    assert isinstance(connector.fusions[0].expand.norm, nn.BatchNorm2d)


def test_bad_widths():
    for wrong in (([3], [5, 5]), (3, 5), ([], [])):
        with pytest.raises(
            ConfigError, match='AttentionFusionConnector: `in_channels` and `out_channels` must be lists'
        ):
            AttentionFusionConnector(*wrong)
    with pytest.raises(ConfigError, match='AttentionFusionConnector: `mid_channels` must be an integer of at least 1'):
        AttentionFusionConnector([3], [5], mid_channels=0)
    with pytest.raises(ConfigError, match='AttentionFusionConnector: `out_channels` must be an integer of at least 1'):
        AttentionFusionConnector([3], [0])


def test_bad_levels():
    connector = AttentionFusionConnector([3, 3], [3, 3], mid_channels=2)
    fine, coarse = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ShapeError, match=r'must be 2 levels, .* got 1 and 2'):
        connector([fine], [fine, coarse])
    with pytest.raises(ShapeError, match=r'must go from fine to coarse, got maps of \[\(4, 4\), \(8, 8\)\]\. Name'):
        connector([coarse, fine], [coarse, fine])
