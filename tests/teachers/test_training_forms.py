"""Autocast, accumulation and clipping, for every kind of teacher: resume stays exact, the student's step its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_segmentor
from tests.comparison import assert_same
from tests.teachers.kinds import KINDS, model_of

FORMS: dict[str, dict] = {
    'autocast': dict(type='mmstructkd.AutocastOptimWrapper', dtype='bfloat16'),
    'accumulation': dict(accumulative_counts=2),
    'clipping': dict(clip_grad=dict(max_norm=0.1)),
    'all': dict(
        type='mmstructkd.AutocastOptimWrapper', dtype='bfloat16', accumulative_counts=2, clip_grad=dict(max_norm=0.1)
    ),
}
every = pytest.mark.parametrize('kind', sorted(KINDS))
#: Kinds that change the student's own step, terms or none: what they are for.
OWN_STEP = {'gated': 'no gradient of the task passes a gate', 'staged': 'the second stage freezes modules'}


class Interrupt(Hook):
    """Ends a run after an iteration, as ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


class Silence(Hook):
    """No term counts at any iteration."""

    priority = 'LOWEST'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        teachers = runner.model.teacher
        own = [term for one in getattr(teachers, 'members', {'': teachers}).values() for term in one.terms.values()]
        for term in [*runner.model.terms.values(), *own]:
            term.factor = 0.0


class Watch(Hook):
    """Keeps the student's parameters after each iteration."""

    def __init__(self, student: torch.nn.Module) -> None:
        self.student = student
        self.seen: list[dict[str, Tensor]] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        self.seen.append({name: p.detach().clone() for name, p in self.student.named_parameters()})


def config(model: dict, work_dir: Path, form: str, max_iters: int = 4, **changes: Any) -> Config:
    cfg = toy_config(model, work_dir, max_iters=max_iters, **changes)
    cfg.optim_wrapper.update(copy.deepcopy(FORMS[form]))
    return cfg


def detached(model: dict) -> dict:
    """The same with twins that leave the student's gradient alone."""
    for teacher in (model.get('teachers') or {'teacher': model['teacher']}).values():
        if teacher.get('type') == 'mmstructkd.SelfTeacher':
            teacher['detach'] = True
    return model


@every
def test_resume_is_bit_equal_under_autocast_accumulation_and_clipping(kind: str, tmp_path: Path) -> None:
    Runner.from_cfg(config(model_of(kind), tmp_path / 'straight', 'all')).train()
    cfg = config(model_of(kind), tmp_path / 'stopped', 'all')
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(2), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    torch.rand(5)
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    first, second = (read_checkpoint(str(tmp_path / name / 'iter_4.pth')) for name in ('straight', 'stopped'))
    MODELS.build(toy_segmentor(4)).load_state_dict(first['state_dict'], strict=True)
    for part in ('state_dict', 'optimizer', 'mmstructkd'):
        one, two = ({key: value for key, value in file[part].items() if key != 'config'} for file in (first, second))
        assert_same(one, two)


@pytest.mark.parametrize(
    ('kind', 'form'),
    [(kind, 'all') for kind in sorted(KINDS)]
    + [(kind, form) for kind in ('self_detached', 'peer_with_optimizer') for form in sorted(FORMS) if form != 'all'],
)
def test_silent_and_detached_is_plain_training(kind: str, form: str, tmp_path: Path) -> None:
    """The student's weights after each of three iterations are those of plain training, to the last bit."""
    model = detached(model_of(kind))
    if kind in OWN_STEP:
        model = {key: value for key, value in model.items() if key not in ('gates', 'stages')}
    torch.manual_seed(5)
    start = MODELS.build(toy_segmentor(4)).state_dict()
    torch.save(start, tmp_path / 'start.pth')
    watched = []
    for name, network in (('plain', toy_segmentor(4)), ('distilled', model)):
        cfg = config(network, tmp_path / name, form, max_iters=3, load_from=str(tmp_path / 'start.pth'))
        runner = Runner.from_cfg(cfg)
        watch = Watch(getattr(runner.model, 'student', runner.model))
        runner.register_hook(watch, priority='LOWEST')
        if name == 'distilled':
            runner.register_hook(Silence(), priority='LOWEST')
        runner.train()
        watched.append(watch.seen)
    plain, distilled = watched
    assert len(plain) == len(distilled) == 3
    for number, (one, two) in enumerate(zip(plain, distilled, strict=True)):
        assert all(torch.equal(one[key], two[key]) for key in one), f'iteration {number}'
    waits = 'accumulative_counts' in FORMS[form]
    assert all(torch.equal(start[key], plain[0][key]) for key in plain[0]) == waits  # the run does train
