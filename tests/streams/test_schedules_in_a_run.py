"""Schedules that go together: a term that comes in by a constant ratio while something else fades, in a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmstructkd.testing import toy_config, toy_distiller
from tests.teachers.kinds import SCORES, SELF, peer

RISES = dict(type='exponential', start_factor=0.1, end_factor=0.9)
FADES = dict(RISES, complement=True)
STEPS = 4
#: 0.1 * 9^(step / 4), as the authors of joint adaptation and distillation have it over epochs.
WANTED = [0.1, 0.1 * 9**0.25, 0.3, 0.1 * 9**0.75]
#: What a teacher that trains logs of its task, and who has the schedule of it.
TEACHERS: dict[str, dict] = {'peer': peer(task_schedule=FADES), 'self': dict(SELF, task_schedule=FADES)}


class Factors(Hook):
    """Notes the factors of a run, and losses beside those that they scale."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        model = runner.model
        self.seen.append(
            dict(term=model.terms['kd'].factor, task=model.task_factor, teacher=model.teacher._factor, **outputs)
        )


def run(teacher: str, folder: Path, *, plain: bool = False) -> list[dict[str, float]]:
    """Train; ``plain``: without any schedule."""
    settings = copy.deepcopy(TEACHERS[teacher])
    terms, more = dict(kd=dict(SCORES['kd'], schedule=RISES)), dict(task_schedule=FADES)
    if plain:
        settings.pop('task_schedule')
        terms, more = dict(kd=dict(SCORES['kd'])), {}
    runner = Runner.from_cfg(toy_config(toy_distiller(teacher=settings, terms=terms, **more), folder, max_iters=STEPS))
    hook = Factors()
    runner.register_hook(hook)
    runner.train()
    return hook.seen


@pytest.mark.parametrize('teacher', sorted(TEACHERS))
def test_what_rises_and_what_fades_add_up_to_one(teacher: str, tmp_path: Path) -> None:
    seen = run(teacher, tmp_path)
    assert [step['term'] for step in seen] == pytest.approx(WANTED)
    for name in ('task', 'teacher'):
        assert [step[name] for step in seen] == pytest.approx([1 - value for value in WANTED]), name


@pytest.mark.parametrize('teacher', sorted(TEACHERS))
def test_the_losses_of_the_first_step_are_scaled_by_them(teacher: str, tmp_path: Path) -> None:
    """Same seed, same weights: the first step of both runs differs by the factors alone."""
    scaled, plain = run(teacher, tmp_path / 'scaled')[0], run(teacher, tmp_path / 'plain', plain=True)[0]
    for key, factor in (('loss_kd_kd', 0.1), ('decode.loss_ce', 0.9), ('teacher_decode.loss_ce', 0.9)):
        assert float(scaled[key]) == pytest.approx(factor * float(plain[key]), rel=1e-4), key
