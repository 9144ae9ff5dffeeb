"""The hook tells the terms' modules how far the training is; temperatures learn and resume in a run."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import Runner
from torch import nn

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.hooks import TermScheduleHook
from mmstructkd.temperatures import LearnableTemperature
from mmstructkd.terms.schedule import WeightSchedule
from mmstructkd.testing import toy_config, toy_distiller

LEARNED = dict(
    pixel=dict(
        tap='decode_head.conv_seg',
        loss=dict(
            type='mmstructkd.PixelwiseKLLoss', temperature=dict(type='mmstructkd.LearnableTemperature', init=0.0, end=1)
        ),
    ),
    channel=dict(
        tap='decode_head.conv_seg',
        loss=dict(
            type='mmstructkd.ChannelwiseKLLoss',
            temperature=dict(type='mmstructkd.ScheduledTemperature', start=4.0, final=1.0),
        ),
    ),
)


class Follower(nn.Module):
    """Notes what it is told."""

    def __init__(self, by_epoch: bool | None = None) -> None:
        super().__init__()
        self.told: list[tuple[int, int]] = []
        if by_epoch is not None:
            self.by_epoch = by_epoch

    def set_progress(self, step: int, last: int) -> None:
        self.told.append((step, last))


def test_modules_are_told_iterations_or_epochs() -> None:
    plain, iterations, epochs = Follower(), Follower(False), Follower(True)
    term = nn.ModuleList([nn.Linear(1, 1), nn.Sequential(plain, iterations), epochs])
    term.schedule, term.teacher_taps = WeightSchedule(type='linear'), []
    teacher = SimpleNamespace(interval_factor=lambda iteration, taps: 1.0, terms={})
    told: list[tuple[int, int]] = []
    model = SimpleNamespace(
        terms=nn.ModuleDict({'one': term}), teacher=teacher, set_progress=lambda *progress: told.append(progress)
    )
    runner = SimpleNamespace(model=model, iter=3, max_iters=12, epoch=1, max_epochs=4)
    hook = TermScheduleHook()
    hook.before_train(runner)
    hook.before_train_iter(runner, 0)
    runner.iter = 4
    hook.before_train_iter(runner, 0)
    assert plain.told == iterations.told == told == [(3, 12), (4, 12)]
    assert epochs.told == [(1, 4), (1, 4)]
    assert term.factor == pytest.approx(4 / 12)


def run(cfg: object) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


def test_temperatures_in_a_run(tmp_path: Path) -> None:
    model = toy_distiller()
    model.terms = LEARNED
    cfg = toy_config(model, tmp_path / 'run', max_iters=2)
    cfg.default_hooks.checkpoint.interval = 1
    cfg.optim_wrapper.optimizer.weight_decay = 0.5
    straight = run(cfg)
    terms = straight.model.terms
    learned = terms['pixel'].loss.temperature
    assert isinstance(learned, LearnableTemperature)
    assert learned.reversal == -1.0
    # A toy's scores are near 0, where the loss hardly depends on T: a step is small, and 0 shows it.
    assert learned.theta.item() != 0.0
    # The last iteration had one of two behind it.
    assert terms['channel'].loss.temperature.value == pytest.approx(2.5)
    group = [g for g in straight.optim_wrapper.param_groups if any(p is learned.theta for p in g['params'])]
    assert [g['weight_decay'] for g in group] == [0.0]
    assert [len(g['params']) for g in group] == [1]
    # Beside the student, not in it; and from there the run goes on exactly.
    middle = read_checkpoint(str(tmp_path / 'run' / 'iter_1.pth'))
    assert not any('theta' in key for key in middle['state_dict'])
    assert any(key.endswith('temperature.theta') for key in middle['mmstructkd']['terms'])
    cfg.work_dir = str(tmp_path / 'again')
    cfg.load_from = str(tmp_path / 'run' / 'iter_1.pth')
    cfg.resume = True
    resumed = run(cfg)
    assert torch.equal(resumed.model.terms['pixel'].loss.temperature.theta, learned.theta)
    for key, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value), key
