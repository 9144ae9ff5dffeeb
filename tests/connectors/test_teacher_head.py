"""The student's feature through the teacher's head."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmstructkd.connectors import TeacherHeadConnector
from mmstructkd.errors import ConfigError, ShapeError, TapError


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def teacher(**changes):
    parts = {'conv_seg': nn.Conv2d(8, 5, 1), 'neck': nn.Conv2d(2, 8, 1), 'act': nn.ReLU(), 'pair': Pair(), **changes}
    return nn.ModuleDict({'decode_head': nn.ModuleDict(parts)}).requires_grad_(False).eval()


def connector(network=None, head='decode_head.conv_seg', **kwargs):
    made = TeacherHeadConnector(3, 5, head=head, **kwargs)
    made.attach(teacher() if network is None else network)
    return made


def test_is_the_head_behind_the_projection():
    network = teacher()
    made = connector(network).eval()
    x = torch.randn(2, 3, 4, 4)
    conv, norm = made.projection.conv, made.projection.norm
    with torch.no_grad():
        norm.running_mean.uniform_()
        norm.running_var.uniform_(0.5, 2)
    want = network['decode_head']['conv_seg'](norm(conv(x)).relu())
    torch.testing.assert_close(made(x), want)
    assert conv.weight.shape == (8, 3, 1, 1)


def test_gradient_passes_the_head_and_leaves_it_alone():
    network = teacher().requires_grad_(True)  # even where somebody trains the teacher
    made = connector(network)
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    made(x).square().sum().backward()
    assert x.grad.any()
    assert all(p.grad is not None for p in made.parameters())
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_head_is_nobodys_but_the_teachers():
    network = teacher()
    made = connector(network)
    head = network['decode_head']['conv_seg']
    assert head not in list(made.modules())
    assert not {id(p) for p in head.parameters()} & {id(p) for p in made.parameters()}
    assert sorted(made.state_dict()) == sorted(k for k in made.state_dict() if k.startswith('projection.'))
    twin = copy.deepcopy(made)
    assert twin._borrowed.module is head
    made.train()
    assert not head.training
    made.double()
    assert head.weight.dtype == torch.float32


def test_head_runs_in_eval_and_comes_back_as_it_was():
    head = nn.Sequential(nn.Dropout(0.9), nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5))
    network = teacher(conv_seg=head)
    made = connector(network).eval()
    x = torch.randn(2, 3, 4, 4)
    want = made(x)
    head.train()
    mean = head[2].running_mean.clone()
    torch.testing.assert_close(made(x), want)
    assert torch.equal(head[2].running_mean, mean)
    assert head.training
    assert head[0].training


def test_attaching_again_keeps_what_was_learned():
    made = connector()
    weight = made.projection.conv.weight
    made.attach(teacher())
    assert made.projection.conv.weight is weight


def test_width_that_the_head_expects():
    assert connector(head='decode_head.act', head_channels=6).projection.conv.out_channels == 6
    norm_first = teacher(conv_seg=nn.Sequential(nn.BatchNorm2d(7), nn.Conv2d(7, 5, 1)))
    assert connector(norm_first).projection.conv.out_channels == 7
    with pytest.raises(ConfigError, match="`head_channels` must be given for 'decode_head.act', got None"):
        connector(head='decode_head.act')


def test_names_and_order_of_calls():
    with pytest.raises(TapError, match="`head` must name a module of ModuleDict, got 'decode_head.conv_sg'. Did you"):
        connector(head='decode_head.conv_sg')
    with pytest.raises(TapError, match="`head` must name a module of ModuleDict, got ''"):
        connector(head='')
    with pytest.raises(ConfigError, match='`attach` must be called with the teacher before the first forward'):
        TeacherHeadConnector(3, 5, head='conv_seg')(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ShapeError, match="gives one tensor, got tuple from 'decode_head.pair'"):
        connector(head='decode_head.pair', head_channels=4)(torch.zeros(2, 3, 2, 2))
    with pytest.raises(ShapeError, match=r'`student` must have shape \(B, C, H, W\), got \(2, 4, 3\)'):
        connector()(torch.zeros(2, 4, 3))
    with pytest.raises(ConfigError, match='`kernel_size` must be odd, got 2'):
        connector(kernel_size=2)
