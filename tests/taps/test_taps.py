"""Taps: what they name, what they record, and what they leave behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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


@pytest.mark.parametrize(
    ('text', 'meant'),
    [
        ('decode_head.conv_seg.', 'decode_head.conv_seg'),
        ('decode_head..conv_seg', 'decode_head.conv_seg'),
        ('.neck[2]', 'neck[2]'),
        ('neck.[2]', 'neck[2]'),
        (' neck[2]', 'neck[2]'),
        ('neck [2]', 'neck[2]'),
        ('neck[ 2 ]', 'neck[2]'),
        ('neck\n', 'neck'),
        ('in: neck', 'in:neck'),
        ('heads[1].conv', 'heads.1.conv'),
        ('in:heads[1].convs[0].norm', 'in:heads.1.convs.0.norm'),
    ],
)
def test_a_tap_of_the_wrong_form_names_the_right_one(text: str, meant: str) -> None:
    with pytest.raises(TapError, match='must read') as caught:
        Tap.parse(text)
    assert f'got {text!r}. Did you mean {meant!r}?' in str(caught.value)
    assert str(Tap.parse(meant)) == meant


@pytest.mark.parametrize('text', ['neck[-2:]', 'neck[1:2:3]', 'neck[]', 'neck[[0]]', 'neck[a b]', 'n-eck', '1.conv'])
def test_keys_that_are_none(text: str) -> None:
    with pytest.raises(TapError, match='must read'):
        Tap.parse(text)


@pytest.mark.parametrize('text', ['neck[-1]', "head['a b']", 'head["x-y"]', 'head[scores]'])
def test_keys_come_back_as_they_were(text: str) -> None:
    tap = Tap.parse(text)
    assert Tap.parse(str(tap)) == tap


class Outputs(nn.Module):
    """A tensor, a tuple of tensors, a dict with both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.named = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.two((x, x))
        self.named({'map': x, 'maps': [x, x]})
        return self.one(x)


@pytest.mark.parametrize(
    ('text', 'whole'),
    [
        ('one[0]', 'one'),
        ('one[-1]', 'one'),
        ('one[*]', 'one'),
        ('one[:1]', 'one'),
        ('two[0][1]', 'two[0]'),
        ('named[map][0]', 'named[map]'),
        ('named[maps][1][*]', 'named[maps][1]'),
        ('in:one[0]', 'in:one'),
    ],
)
def test_an_index_picks_no_image(text: str, whole: str) -> None:
    tap, net = Tap.parse(text), Outputs()
    with pytest.raises(TapError) as caught, Capture(net, [tap]):
        net(torch.rand(4, 3, 2, 2))
    assert 'got one tensor of shape (4, 3, 2, 2); an index would pick an image' in str(caught.value)
    assert str(caught.value).endswith(f"Write '{whole}'.")
    with Capture(net, [Tap.parse(whole)]) as capture:
        net(torch.rand(4, 3, 2, 2))
    assert capture.records[Tap.parse(whole)][0].shape == (4, 3, 2, 2)


class Losses(nn.Module):
    """A head with a loss, as mmseg's have it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_cls = nn.Conv2d(2, 2, 1)
        self.loss_clss = nn.ModuleList([nn.CrossEntropyLoss()])
        self.data_preprocessor = nn.Identity()


def test_hints_name_what_can_be_tapped() -> None:
    for text in ('conv_clss', 'loss_cls', 'data_preprocesor', 'losses'):
        with pytest.raises(TapError, match='conv_cls') as caught:
            Tap.parse(text).resolve(Losses(), 'x')
        assert "'loss_clss" not in str(caught.value)
        assert "'data_preprocessor'" not in str(caught.value)


# --- which tensors a gradient leaves -------------------------------------------------------------------------


class Chain(nn.Module):
    """Five convolutions, each with a fault of its own."""

    def __init__(self, reentrant: bool = True) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.plain = nn.Conv2d(3, 3, 1)
        self.block = Block(reentrant)
        self.aside = nn.Conv2d(3, 3, 1)
        self.detached = Detached()
        self.labels = Labels()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block(self.plain(self.frozen(x)))
        with torch.no_grad():
            self.aside(x)
        self.labels(x)
        return x + self.detached(x)


class Block(nn.Module):
    """Checkpoints what it does, as the blocks of mmseg's and mmdet's backbones do."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU()
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: self.act(self.conv(x)), x, use_reentrant=self.reentrant)


class Detached(nn.Conv2d):
    """A convolution whose result is cut off."""

    def __init__(self) -> None:
        super().__init__(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).detach()


class Labels(nn.Module):
    """The best channel."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(1)


CUTS = {
    'frozen': 'frozen',
    'in:frozen': 'frozen',
    'in:plain': 'frozen',
    'block.conv': 'checkpoint',
    'block.act': 'checkpoint',
    'in:block.act': 'checkpoint',
    'aside': 'no_grad',
    'detached': 'detached',
    'labels': 'dtype',
}


@pytest.mark.parametrize('reentrant', [True, False])
def test_it_says_why_no_gradient_leaves_a_tap(reentrant: bool) -> None:
    net, free = Chain(reentrant), ['plain', 'block', 'in:block', 'in:block.conv', 'in:aside']
    want = dict(CUTS)
    if not reentrant:  # runs with a graph, whose tensors are computed again when they are asked for
        free += [text for text, why in want.items() if why == 'checkpoint']
        want = {text: why for text, why in want.items() if why != 'checkpoint'}
    with Capture(net, [Tap.parse(text) for text in (*want, *free)]) as capture:
        net(torch.rand(1, 3, 2, 2))
    assert {str(tap): why for tap, why in capture.cut.items()} == want
    with torch.no_grad(), Capture(net, [Tap.parse(text) for text in want]) as capture:
        net(torch.rand(1, 3, 2, 2))
    assert not capture.cut  # nobody asks for gradients


def test_a_tap_inside_a_checkpoint_with_a_graph_gets_its_gradient() -> None:
    """What non-reentrant checkpointing gives is what no checkpointing gives."""
    net, x, tap = Chain(reentrant=False), torch.rand(1, 3, 2, 2), Tap.parse('block.conv')
    with Capture(net, [tap]) as capture:
        out = net(x)
    (out.sum() + capture.records[tap][0].square().sum()).backward()
    got = net.plain.weight.grad.clone()
    net.zero_grad()
    inner = net.block.conv(net.plain(net.frozen(x)))
    out = net.block.act(inner)
    ((out + net.detached(out)).sum() + inner.square().sum()).backward()
    torch.testing.assert_close(got, net.plain.weight.grad)
