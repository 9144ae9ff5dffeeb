from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmstructkd.connectors import MaskedGenerationConnector
from mmstructkd.connectors import masked_generation as module
from mmstructkd.errors import ConfigError


def test_masks_then_generates():
    connector = MaskedGenerationConnector(3, 5, seed=4)
    student = torch.randn(2, 3, 6, 7, requires_grad=True)
    shown = copy.deepcopy(connector).shown(2, (6, 7))
    got = connector(student)
    aligned = torch.einsum('bihw,oi->bohw', student, connector.align.weight[..., 0, 0])
    masked = (aligned + connector.align.bias[:, None, None]) * shown[:, None]
    first, _, last = connector.generation
    hidden = nn.functional.conv2d(masked, first.weight, first.bias, padding=1).clamp(min=0)
    torch.testing.assert_close(got, nn.functional.conv2d(hidden, last.weight, last.bias, padding=1))
    (grad,) = torch.autograd.grad(got.square().sum(), student)
    assert not grad[(~shown)[:, None].expand_as(grad)].any()
    assert grad[shown[:, None].expand_as(grad)].any()


def test_equal_widths_need_no_projection():
    connector = MaskedGenerationConnector(4, 4)
    assert isinstance(connector.align, nn.Identity)
    assert len(list(connector.parameters())) == 4


@pytest.mark.parametrize('ratio', [0.0, 0.45, 0.75, 1.0])
def test_ratio_is_the_share_that_is_hidden(ratio):
    connector = MaskedGenerationConnector(1, 1, ratio=ratio, seed=0)
    shown = connector.shown(4, (100, 100))
    assert (~shown).float().mean().item() == pytest.approx(ratio, abs=0.01)
    # Positions one by one, images one by one.
    if 0 < ratio < 1:
        assert not torch.equal(shown[0], shown[1])


def test_each_step_has_its_mask_and_the_seed_decides():
    first, second = (MaskedGenerationConnector(1, 1, seed=7) for _ in range(2))
    steps = [first.shown(1, (9, 9)) for _ in range(3)]
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[1], steps[2])
    for step in steps:
        assert torch.equal(second.shown(1, (9, 9)), step)
    other = MaskedGenerationConnector(1, 1, seed=8)
    assert not torch.equal(other.shown(1, (9, 9)), steps[0])


def test_global_stream_is_left_alone():
    connector = MaskedGenerationConnector(2, 2)
    before = torch.random.get_rng_state()
    connector(torch.zeros(1, 2, 3, 3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    one = MaskedGenerationConnector(2, 2).shown(1, (9, 9))
    torch.manual_seed(1)
    assert torch.equal(MaskedGenerationConnector(2, 2).shown(1, (9, 9)), one)


def test_resume_goes_on_exactly():
    straight = MaskedGenerationConnector(2, 3, seed=3)
    for _ in range(4):
        straight.shown(1, (9, 9))
    state = copy.deepcopy(straight.state_dict())
    want = [straight.shown(1, (9, 9)) for _ in range(2)]
    resumed = MaskedGenerationConnector(2, 3)
    resumed.shown(1, (9, 9))
    resumed.load_state_dict(state)
    assert state['stream'].tolist() == [3, 4]
    for step in want:
        assert torch.equal(resumed.shown(1, (9, 9)), step)


def test_eval_draws_the_coming_mask_and_stays():
    connector = MaskedGenerationConnector(2, 2, seed=3).eval()
    one, two = connector.shown(1, (9, 9)), connector.shown(1, (9, 9))
    assert torch.equal(one, two)
    assert torch.equal(connector.train().shown(1, (9, 9)), one)
    assert connector.stream.tolist() == [3, 1]


def test_processes_draw_what_one_would_for_their_joint_batch(monkeypatch):
    want = MaskedGenerationConnector(1, 1, seed=5).shown(4, (5, 6))
    for rank in range(2):
        monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, 2))
        assert torch.equal(MaskedGenerationConnector(1, 1, seed=5).shown(2, (5, 6)), want[rank::2])


def test_hidden_nan_goes_nowhere():
    connector = MaskedGenerationConnector(2, 2, seed=0)
    shown = copy.deepcopy(connector).shown(1, (6, 6))
    student = torch.where(shown[:, None], torch.randn(1, 2, 6, 6), float('nan'))
    assert connector(student).isfinite().all()


@pytest.mark.parametrize('name', ['in_channels', 'out_channels'])
def test_bad_widths(name):
    with pytest.raises(
        ConfigError, match=f'MaskedGenerationConnector: `{name}` must be an integer of at least 1, got 0'
    ):
        MaskedGenerationConnector(**{'in_channels': 2, 'out_channels': 2, name: 0})


def test_bad_arguments():
    with pytest.raises(ConfigError, match=r'`ratio` must be a probability in \[0, 1\], got 1.5'):
        MaskedGenerationConnector(2, 2, ratio=1.5)
    with pytest.raises(ConfigError, match='`ratio` must be a finite number of at least 0, got -0.1'):
        MaskedGenerationConnector(2, 2, ratio=-0.1)
    for seed in (-1, 1.5, True):
        with pytest.raises(ConfigError, match='`seed` must be an integer of at least 0 or None, got'):
            MaskedGenerationConnector(2, 2, seed=seed)
    assert 'ratio=0.65' in repr(MaskedGenerationConnector(2, 2))
