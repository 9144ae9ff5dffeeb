"""The self-teacher's neck against its definition written out, the released code's numbers, and its properties."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.models import GivenFeatures, RefinementNeck

GOLDEN = Path(__file__).parents[1] / 'golden'


def key(name: str) -> str:
    """The name of a released weight here: their levels are numbered from 2, the fine one."""
    found = re.fullmatch(r'conv(\d)(up|dw)\.(.*)', name)
    assert found is not None
    level, way, rest = int(found[1]), found[2], found[3]
    return f'up.{level - 2}.{rest}' if way == 'up' else f'down.{level - 3}.{rest}'


@pytest.mark.parametrize(('case', 'end'), [('frskd_bifpn_seg', 'coarse'), ('frskd_bifpn_seg_last', 'fine')])
def test_the_released_network(case: str, end: str) -> None:
    content = torch.load(GOLDEN / f'{case}.pt', weights_only=True)
    neck = RefinementNeck([2] * 6, layers=1, conv='scale', end=end)
    neck.load_state_dict({key(name): value for name, value in content['weights'].items()}, strict=True)
    inputs = [level.clone().requires_grad_() for level in content['student']]
    outputs = neck(inputs)
    loss = sum(level.square().mean() for level in outputs)
    loss.backward()
    close = {'rtol': 1e-4, 'atol': 1e-6}
    torch.testing.assert_close(loss, content['loss'], **close)
    torch.testing.assert_close(list(outputs), content['outputs'], **close)
    torch.testing.assert_close([level.grad for level in inputs], content['grad'], **close)
    weights, buffers = dict(neck.named_parameters()), dict(neck.named_buffers())
    for name, value in content['weight_grads'].items():
        torch.testing.assert_close(weights[key(name)].grad, value, **close)
    for name, value in content['buffers_after'].items():
        torch.testing.assert_close(buffers[key(name)], value, **close)


SIZES = [(9, 13), (5, 7), (5, 7)]  # odd, not half of each other, and one stride twice
WIDTHS = [3, 4, 6]


def levels() -> list[torch.Tensor]:
    sizes = zip(WIDTHS, SIZES, strict=True)
    return [torch.randn(2, width, *size, requires_grad=True) for width, size in sizes]


@pytest.mark.parametrize('end', ['coarse', 'fine'])
@pytest.mark.parametrize('layers', [1, 2])
@pytest.mark.parametrize('conv', ['scale', 'separable'])
def test_any_sizes_and_widths_and_what_a_head_reads_trains_all_of_it(end: str, layers: int, conv: str) -> None:
    neck = RefinementNeck(WIDTHS, layers=layers, conv=conv, end=end)
    inputs = levels()
    outputs = neck(inputs)
    assert [out.shape for out in outputs] == [level.shape for level in inputs]
    read = outputs[-1] if end == 'coarse' else outputs[0]
    (read * torch.randn_like(read)).sum().backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())
    assert all(level.grad.any() for level in inputs)


def test_two_levels_by_hand() -> None:
    neck = RefinementNeck([2, 2], conv='scale', end='coarse').eval()
    with torch.no_grad():
        for block in (*neck.up, *neck.down):
            block[0].weight.fill_(1.0)
            block[0].bias.zero_()
            block[1].eps = 0.0
    fine, coarse = torch.rand(1, 2, 2, 2), torch.rand(1, 2, 1, 1)
    first, second = neck([fine, coarse])
    torch.testing.assert_close(first, fine + coarse)  # one value spreads
    torch.testing.assert_close(second, coarse + coarse + (fine + coarse)[..., :1, :1])  # nearest takes the corner


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(in_channels=[]), '`in_channels` must be a list with the width of each level, got'),
        (dict(in_channels=[4, 0]), '`in_channels` must be an integer of at least 1, got 0'),
        (dict(layers=0), '`layers` must be'),
        (dict(conv='3x3'), '`conv` must be one of'),
        (dict(end='auto'), '`end` must be one of'),
    ],
)
def test_bad_arguments(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        RefinementNeck(**{'in_channels': [2, 2], **changes})


def test_another_number_of_levels() -> None:
    with pytest.raises(ShapeError, match='must be 2 maps, got 3'):
        RefinementNeck([2, 2])([torch.zeros(1, 2, 4, 4)] * 3)


def test_given_features_hand_on_what_they_got_and_forget() -> None:
    backbone, maps = GivenFeatures(), [torch.zeros(1, 2, 4, 4)]
    with pytest.raises(ConfigError, match='`give` must be called'):
        backbone(torch.zeros(1, 3, 8, 8))
    backbone.give(maps)
    assert backbone(torch.zeros(1, 3, 8, 8))[0] is maps[0]
    assert not backbone.state_dict()
    backbone.give(None)
    with pytest.raises(ConfigError, match='`give` must be called'):
        backbone(torch.zeros(1, 3, 8, 8))
