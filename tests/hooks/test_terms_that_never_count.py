"""A term that teaches nothing in a training is an error before its first batch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.runner import Runner
from torch import nn

from mmstructkd.errors import ConfigError
from mmstructkd.hooks import TermScheduleHook
from mmstructkd.terms.schedule import WeightSchedule
from mmstructkd.testing import toy_config, toy_distiller, toy_terms

ITERATIONS, EPOCHS = 12, 3


def check(every: int = 1, iter_based: bool = False, **schedule: Any) -> None:
    """Start a training of 12 iterations in 3 epochs (or in one, as an iteration-based loop counts)."""
    term = nn.Identity()
    term.teacher_taps = []
    term.schedule = WeightSchedule(**schedule)
    teacher = SimpleNamespace(interval_factor=lambda step, taps: float(every) if step % every == 0 else 0.0)
    model = SimpleNamespace(terms=nn.ModuleDict({'late': term}), teacher=teacher)
    epochs = 1 if iter_based else EPOCHS
    TermScheduleHook().before_train(SimpleNamespace(model=model, max_iters=ITERATIONS, max_epochs=epochs))


@pytest.mark.parametrize(
    ('schedule', 'message'),
    [
        (
            dict(begin=12),
            'must begin before the training ends, got begin=12 in a training of 12 iterations. Begin earlier',
        ),
        (dict(begin=80000), 'got begin=80000 in a training of 12 iterations'),
        (dict(type='ramp_up', begin=12), 'got begin=12 in a training of 12 iterations'),
        (dict(type='step', begin=13, milestones=[14]), 'got begin=13 in a training of 12 iterations'),
        (dict(type='linear', begin=12, end=20), 'got begin=12 in a training of 12 iterations'),
        (dict(begin=3, by_epoch=True), 'got begin=3 in a training of 3 epochs'),
        (dict(begin=1, by_epoch=True, iter_based=True), 'of 1 epoch. This loop counts one epoch: set by_epoch=False'),
        (dict(end_factor=0.0), 'must be above 0 at some iteration of the 12 .* loss_weight=0 switches a term off'),
        (dict(type='linear', end_factor=0.0), 'must be above 0 at some iteration of the 12'),
        (dict(type='cosine', end_factor=0.0, by_epoch=True), 'must be above 0 at some epoch of the 3'),
        (dict(type='linear', begin=11), 'must be above 0 at some iteration of the 12'),  # its first step is 0
        (dict(begin=1, end=4, every=4), 'must be above 0 at some iteration .* at which the teacher is asked'),
    ],
)
def test_it_is_refused(schedule: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"term 'late': `schedule` .*{message}"):
        check(**schedule)


@pytest.mark.parametrize(
    'schedule',
    [
        dict(),
        dict(begin=11),
        dict(begin=2, by_epoch=True),
        dict(type='linear', begin=10),
        dict(type='linear', begin=20, start_factor=1.0),  # held before it begins
        dict(type='step', milestones=[1], gamma=0.0),
        dict(begin=1, end=5, every=4),
        dict(end=1),
    ],
)
def test_a_term_that_counts_at_all_is_not(schedule: dict) -> None:
    check(**schedule)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_no_batch_is_seen(by_epoch: bool, tmp_path: Path) -> None:
    terms = {'pixel': toy_terms()['pixel']}
    terms['pixel']['schedule'] = dict(type='constant', begin=4 if not by_epoch else 1, by_epoch=by_epoch)
    cfg = toy_config(toy_distiller(terms=terms), tmp_path, max_iters=4)
    if by_epoch:
        cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=10)
        cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    seen: list[int] = []

    def start() -> Runner:
        runner = Runner.from_cfg(cfg)
        runner.model.student.backbone.register_forward_hook(lambda *args: seen.append(1))
        return runner

    runner = start()
    with pytest.raises(ConfigError, match="term 'pixel': `schedule` must begin before the training ends"):
        runner.train()
    assert seen == []
    start().val()  # which no schedule concerns
    assert seen
