"""Taps: what they name, what they record, and what they leave behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from mmstructkd.errors import TapError
from mmstructkd.taps import Capture, Tap
from mmstructkd.taps.tap import Span


class Shared(nn.Module):
    """Two convolutions on two levels; the head is called once a level."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = Pyramid()
        self.head = nn.Conv2d(2, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outs = [self.head(level) for level in self.neck(x)]
        self.calls += 1
        return [self.relu(out) for out in outs]


class Pyramid(nn.Module):
    """Gives a tuple of two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.conv(x)
        return x, x[..., ::2, ::2]


@pytest.mark.parametrize(
    ('text', 'module', 'side', 'keys'),
    [
        ('decode_head.conv_seg', 'decode_head.conv_seg', 'output', ()),
        ('neck[2]', 'neck', 'output', (2,)),
        ('in:decode_head.conv_seg', 'decode_head.conv_seg', 'input', ()),
        ("head['scores'][0]", 'head', 'output', ('scores', 0)),
        ('neck.fpn_convs.0', 'neck.fpn_convs.0', 'output', ()),
        ('neck[*]', 'neck', 'output', (Span(),)),
        ('neck[:]', 'neck', 'output', (Span(),)),
        ('neck[1:]', 'neck', 'output', (Span(1),)),
        ('in:bbox_head[:4]', 'bbox_head', 'input', (Span(None, 4),)),
    ],
)
def test_parse(text: str, module: str, side: str, keys: tuple) -> None:
    tap = Tap.parse(text)
    assert (tap.module, tap.side, tap.keys) == (module, side, keys)
    assert Tap.parse(str(tap)) == tap
    assert tap.several == any(isinstance(key, Span) for key in keys)


@pytest.mark.parametrize('text', ['', 'neck[', 'out:neck', '[0]', 3, None, 'a b'])
def test_parse_refuses(text: object) -> None:
    with pytest.raises(TapError, match='must read'):
        Tap.parse(text)


def test_resolve_names_the_nearest() -> None:
    with pytest.raises(TapError, match="got 'neck.convv'. Did you mean 'neck.conv'"):
        Tap.parse('neck.convv').resolve(Shared(), "term 'a': `student`")
    with pytest.raises(TapError, match="'neck' has: 'neck.conv'"):
        Tap.parse('neck.zzzzzzzz').resolve(Shared(), 'x')


def test_records_outputs_inputs_and_calls() -> None:
    net, x = Shared(), torch.rand(1, 1, 4, 6)
    taps = [Tap.parse(t) for t in ('neck[1]', 'in:head', 'head')]
    with Capture(net, taps) as capture:
        net(x)
    level = net.neck(x)
    assert torch.equal(capture.records[taps[0]][0], level[1])
    assert [tuple(t.shape) for t in capture.records[taps[1]]] == [(1, 2, 4, 6), (1, 2, 2, 3)]
    assert len(capture.records[taps[2]]) == 2


def test_a_range_gives_its_tensors_in_order() -> None:
    net, x = Shared(), torch.rand(1, 1, 4, 6)
    taps = [Tap.parse(t) for t in ('neck[*]', 'neck[1:]', 'neck[:1]')]
    with Capture(net, taps, calls=dict.fromkeys(taps, 1)) as capture:
        net(x)
    assert capture.stopped
    assert net.calls == 0
    levels = net.neck(x)
    for tap, want in zip(taps, (levels, levels[1:], levels[:1]), strict=True):
        assert capture.passes[tap] == 1
        assert len(capture.records[tap]) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(capture.records[tap], want, strict=True))


def test_a_range_must_hold_tensors() -> None:
    net = Shared()
    for text, message in (
        ('neck[5:]', r'`\[5:\]` must exist in the output, got tuple of 2'),
        ('head[*]', r'`\[\*\]` must pick one of several outputs, got one tensor of shape \(1, 3, 2, 2\)'),
    ):
        with pytest.raises(TapError, match=message), Capture(net, [Tap.parse(text)]):
            net(torch.rand(1, 1, 2, 2))
    with pytest.raises(TapError, match='only as its last index'):
        Tap.parse('neck[*][0]')


def test_a_tuple_must_be_indexed() -> None:
    net = Shared()
    with (
        pytest.raises(TapError, match=r"got tuple. Pick one: 'neck\[0\]', 'neck\[1\]', 'neck\[\*\]'"),
        Capture(net, [Tap.parse('neck')]),
    ):
        net(torch.rand(1, 1, 2, 2))
    with (
        pytest.raises(TapError, match=r'`\[5\]` must exist in the output, got tuple of 2'),
        Capture(net, [Tap.parse('neck[5]')]),
    ):
        net(torch.rand(1, 1, 2, 2))
    assert not net.neck._forward_hooks


def test_stops_at_the_deepest_tap() -> None:
    net, tap = Shared(), Tap.parse('neck[0]')
    with Capture(net, [tap], calls={tap: 1}) as capture:
        net(torch.rand(1, 1, 2, 2))
    assert capture.stopped
    assert net.calls == 0  # nothing behind the neck ran
    with Capture(net, [tap], calls={tap: 2}) as capture:
        net(torch.rand(1, 1, 2, 2))
    assert not capture.stopped
    assert net.calls == 1


def test_sees_what_is_changed_in_place() -> None:
    net, tap, x = Shared(), Tap.parse('head'), torch.rand(1, 1, 2, 2)
    with Capture(net, [tap]) as capture, torch.no_grad():
        net(x)
    assert capture.changed_in_place() == {tap}
    with Capture(net, [tap], clone={tap}) as capture, torch.no_grad():
        net(x)
    assert not capture.changed_in_place()
    assert torch.equal(capture.records[tap][0], net.head(net.neck(x)[0]))


def test_nothing_is_left_behind() -> None:
    net, tap = Shared(), Tap.parse('head')
    with Capture(net, [tap]) as capture:
        net(torch.rand(1, 1, 2, 2))
    alive = weakref.ref(capture.records[tap][0])
    del capture
    gc.collect()
    assert alive() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
