"""Stages: which terms count, what the task weighs, what is frozen; under accumulation, clipping, bf16 and resume."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper as amp
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers.stages import StagedSchedule, compile_terms
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.optim import for_distiller
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_config, toy_distiller, toy_segmentor, toy_terms
from tests.comparison import assert_same
from tests.teachers.test_kinds import Interrupt

TERMS = {name: toy_terms()[name] for name in ('pixel', 'feature', 'holistic')}
PLAIN = {name: TERMS[name] for name in ('pixel', 'feature')}
STAGES = [
    dict(end=2, terms=['feature'], task_weight=0.0, freeze=['decode_head']),
    dict(end=3, terms=['pixel', 'holistic'], freeze=['backbone', 'auxiliary_head']),
    dict(terms=['pixel'], task_weight=0.5),
]
ADAM = dict(type='AdamW', lr=0.01, weight_decay=0.1)
SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.1)


def staged(stages: Any = STAGES, **changes: Any) -> dict:
    return toy_distiller(**{'terms': TERMS, 'stages': copy.deepcopy(stages), **changes})


def config(work_dir: Path, model: dict | None = None, max_iters: int = 4, **wrapper: Any) -> Config:
    cfg = toy_config(staged() if model is None else model, work_dir, max_iters=max_iters)
    cfg.optim_wrapper = dict(dict(type='OptimWrapper', optimizer=SGD), **wrapper)
    return cfg


class Watch(Hook):
    """Notes after each iteration the student's state, its losses and modes."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, Any]] = []
        self.evals: list[set[str]] = []

    def before_train(self, runner: Runner) -> None:
        self.states.append(copy.deepcopy(dict(runner.model.state_dict())))

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        student = runner.model.student
        self.states.append(copy.deepcopy(dict(runner.model.state_dict())))
        self.logs.append({name: float(value.detach()) for name, value in (outputs or {}).items()})
        self.evals.append({name for name, m in student.named_modules() if isinstance(m, _BatchNorm) and not m.training})

    def moved(self, step: int) -> set[str]:
        """Parts of the student of which something changed in an iteration, statistics included."""
        before, after = self.states[step], self.states[step + 1]
        return {key.split('.')[0] for key, value in after.items() if not torch.equal(value, before[key])}


def watched(cfg: Config) -> tuple[Runner, Watch]:
    runner, watch = Runner.from_cfg(cfg), Watch()
    runner.register_hook(watch)
    runner.train()
    return runner, watch


@pytest.mark.parametrize(
    'wrapper',
    [
        dict(),
        dict(optimizer=ADAM, clip_grad=dict(max_norm=0.1)),
        dict(type='mmstructkd.AutocastOptimWrapper', clip_grad=dict(max_norm=0.1)),
    ],
    ids=['plain', 'adamw and clipping', 'bf16'],
)
def test_what_moves_and_what_counts_in_each_stage(wrapper: dict, tmp_path: Path) -> None:
    """Frozen parts do not move in a bit, with momentum and decay; the hook is there without being named."""
    runner, watch = watched(config(tmp_path, **wrapper))
    assert 'StageHook' in {type(hook).__name__ for hook in runner.hooks}
    heads = {'decode_head', 'auxiliary_head'}
    assert watch.moved(0) == watch.moved(1) == {'backbone', 'auxiliary_head'}
    assert watch.moved(2) == {'decode_head'}
    assert watch.moved(3) == {'backbone', *heads}
    assert all(name.startswith('decode_head') for name in watch.evals[0])
    assert watch.evals[0]
    assert {name.split('.')[0] for name in watch.evals[2]} == {'backbone', 'auxiliary_head'}
    assert watch.evals[3] == set()
    for step, (terms, weight) in enumerate([('feature', 0)] * 2 + [('pixel holistic', 1)] + [('pixel', 0.5)]):
        counts = {name for name in TERMS if watch.logs[step].get(f'loss_kd_{name}')}
        assert counts == set(terms.split())
        assert (watch.logs[step]['decode.loss_ce'] > 0) is (weight > 0)
    assert all(p.requires_grad for p in runner.model.student.parameters())


def test_resume_is_bit_equal_within_a_stage_and_across(tmp_path: Path) -> None:
    """Stopped after the second iteration, where the first stage ends; and in the middle of a later one."""
    for number, stages in enumerate((STAGES, [dict(end=1, terms=['feature'], freeze=['backbone.layer1']), dict()])):
        model = staged(stages)
        folders = [tmp_path / f'{number}_{name}' for name in ('straight', 'stopped')]
        Runner.from_cfg(config(folders[0], model, optimizer=ADAM)).train()
        cfg = config(folders[1], model, optimizer=ADAM)
        runner = Runner.from_cfg(copy.deepcopy(cfg))
        runner.register_hook(Interrupt(), priority='LOWEST')
        with pytest.raises(KeyboardInterrupt):
            runner.train()
        cfg.resume = True
        Runner.from_cfg(cfg).train()
        first, second = (read_checkpoint(str(folder / 'iter_4.pth')) for folder in folders)
        MODELS.build(toy_segmentor(4)).load_state_dict(first['state_dict'], strict=True)
        for part in ('state_dict', 'optimizer', 'mmstructkd'):
            one, two = ({k: v for k, v in file[part].items() if k != 'config'} for file in (first, second))
            assert_same(one, two)


def test_one_stage_of_everything_is_no_stage(tmp_path: Path) -> None:
    files = []
    for name, stages in (('none', None), ('one', [dict()])):
        Runner.from_cfg(config(tmp_path / name, staged(stages), max_iters=2)).train()
        files.append(read_checkpoint(str(tmp_path / name / 'iter_2.pth')))
    assert_same(files[0]['state_dict'], files[1]['state_dict'])
    assert_same(files[0]['optimizer'], files[1]['optimizer'])


def test_gradients_accumulate_without_those_of_frozen_steps(tmp_path: Path) -> None:
    """A window of two iterations, of which the first one freezes the head: it gets the second one's gradient alone."""
    stages = [dict(end=1, freeze=['decode_head']), dict()]
    _, watch = watched(config(tmp_path, staged(stages), max_iters=2, accumulative_counts=2))
    assert watch.moved(0) <= {'backbone', 'auxiliary_head'}  # statistics
    assert watch.moved(1) == {'backbone', 'decode_head', 'auxiliary_head'}
    model = MODELS.build(staged(stages, terms=PLAIN)).train()
    wrapper = for_distiller(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2), model)
    wrapper.initialize_count_status(model, 0, 2)
    alone = None
    for step in range(2):
        model.set_progress(step, 2)
        total, _ = model.parse_losses(model(**toy_batch(seed=step), mode='loss'))
        weight = model.student.decode_head.conv_seg.weight
        (alone,) = torch.autograd.grad(total, [weight], retain_graph=True)
        before = weight.detach().clone()
        wrapper.update_params(total)
    torch.testing.assert_close(before - 0.1 * alone / 2, weight.detach())


def test_the_norm_that_is_clipped_is_that_of_what_moves() -> None:
    model = MODELS.build(staged([dict(end=1, terms=['pixel'], freeze=['backbone']), dict()], terms=PLAIN)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    wrapper = for_distiller(OptimWrapper(optimizer, clip_grad=dict(max_norm=1e-3)), model)
    model.set_progress(0, 2)
    before = {name: p.detach().clone() for name, p in model.student.named_parameters()}
    total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
    wrapper.update_params(total)
    change = [(p.detach() - before[name]).norm() for name, p in model.student.named_parameters()]
    torch.testing.assert_close(torch.stack(change).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0.0)
    assert all(torch.equal(p, before[f'backbone.{name}']) for name, p in model.student.backbone.named_parameters())


@pytest.mark.parametrize('step', range(4))
def test_every_trained_parameter_has_a_gradient_in_each_stage(step: int) -> None:
    """In the backward pass: two processes need not look for unused parameters, whatever is frozen."""
    model = MODELS.build(staged()).train()
    model.set_progress(step, 4)
    for term in model.terms.values():
        term.factor = term.schedule.factor(step, 4)
    total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
    total.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_gradient_scaler_leaves_frozen_parts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled, unscaled and clipped is what moves; a part of which nothing moves needs no scaler."""
    monkeypatch.setattr(amp, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp, 'GradScaler', functools.partial(torch.amp.GradScaler, 'cpu'))
    changes = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = MODELS.build(staged([dict(end=1, terms=['pixel'], freeze=['backbone']), dict()], terms=PLAIN)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
        clip = dict(clip_grad=dict(max_norm=1e-3))
        made = amp.AmpOptimWrapper(optimizer=optimizer, loss_scale=1024.0, **clip) if scaled else None
        wrapper = for_distiller(made or OptimWrapper(optimizer, **clip), model)
        model.set_progress(0, 2)
        before = {name: p.detach().clone() for name, p in model.student.named_parameters()}
        torch.manual_seed(1)
        total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
        wrapper.update_params(total)
        changes.append({name: p.detach() - before[name] for name, p in model.student.named_parameters()})
    assert all(bool(change.eq(0).all()) is name.startswith('backbone') for name, change in changes[1].items())
    for name, change in changes[0].items():
        torch.testing.assert_close(change, changes[1][name], rtol=1e-3, atol=1e-6)


def test_a_student_that_freezes_statistics_itself_keeps_them(tmp_path: Path) -> None:
    student = toy_segmentor(4)
    student.backbone.norm_eval = True
    model = staged([dict(end=1, freeze=['backbone.layer1']), dict()], student=student)
    _, watch = watched(config(tmp_path, model, max_iters=2))
    assert {name.split('.')[0] for name in watch.evals[0] & watch.evals[1]} == {'backbone'}
    assert not any(name.startswith('decode_head') for name in watch.evals[0] | watch.evals[1])


def test_a_terms_own_schedule_runs_inside_its_stages(tmp_path: Path) -> None:
    terms = dict(TERMS, pixel=dict(TERMS['pixel'], schedule=dict(type='linear', begin=0, end=4)))
    model = MODELS.build(staged([dict(end=2, terms=['feature', 'holistic']), dict()], terms=terms))
    schedule = model.terms['pixel'].schedule
    assert [schedule.factor(step, 4) for step in range(4)] == [0.0, 0.0, 0.5, 0.75]
    assert isinstance(schedule, StagedSchedule)
    again = MODELS.build(staged([dict(end=1), dict(end=2, terms=['feature', 'holistic']), dict(terms=['pixel'])]))
    assert [again.terms['pixel'].schedule.factor(step, 4) for step in range(4)] == [1.0, 0.0, 1.0, 1.0]


def test_the_weight_of_the_task_multiplies(tmp_path: Path) -> None:
    ramp = dict(type='linear', start_factor=0.0, end_factor=1.0)
    model = MODELS.build(staged([dict(end=2, task_weight=0.5), dict()], task_schedule=ramp))
    found = []
    for step in range(4):
        model.set_progress(step, 4)
        found.append(model.task_factor)
    assert found == [0.0, 0.125, 0.5, 0.75]


def test_a_term_that_never_meets_its_stage_is_refused(tmp_path: Path) -> None:
    terms = dict(TERMS, pixel=dict(TERMS['pixel'], schedule=dict(end=1)))
    model = staged([dict(end=2, terms=['feature', 'holistic']), dict()], terms=terms)
    with pytest.raises(ConfigError, match=r"term 'pixel': `schedule` must be above 0 at some iteration of the 4"):
        Runner.from_cfg(config(tmp_path, model)).train()


def test_a_stage_behind_the_end_is_refused(tmp_path: Path) -> None:
    runner = Runner.from_cfg(config(tmp_path, staged([dict(end=9), dict()])))
    with pytest.raises(ConfigError, match=r'`stages\[1\]` must begin before the training ends, got iteration 9 of 4'):
        runner.train()


def test_each_stage_is_announced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner.from_cfg(config(tmp_path))
    lines: list[str] = []
    runner.logger.setLevel(logging.INFO)
    runner.logger.info = lambda text, *_, **__: lines.append(str(text))  # type: ignore[method-assign]
    runner.train()
    assert [line for line in lines if line.startswith('Stage')] == [
        'Stage 1 of 3, from iteration 0: terms feature, task weight 0, frozen decode_head',
        'Stage 2 of 3, from iteration 2: terms pixel, holistic, task weight 1, frozen backbone, auxiliary_head',
        'Stage 3 of 3, from iteration 3: terms pixel, task weight 0.5',
    ]


@pytest.mark.parametrize(
    ('stages', 'match'),
    [
        ([], '`stages` must be a list of dicts'),
        (dict(end=1), '`stages` must be a list of dicts'),
        ([dict(terms=['pixels']), dict()], r'`stages\[0\].end` must be an iteration after 0'),
        ([dict(end=1, terms=['pixels']), dict()], r"`stages\[0\].terms` must name terms.*got 'pixels'.*'pixel'"),
        (
            [dict(end=1, freeze=['decode_hed']), dict()],
            r"`stages\[0\].freeze` must name modules.*'decode_hed'. Did",
        ),
        ([dict(end=1), dict(freeze=['backbone.layer9'])], r'`stages\[1\].freeze` must name modules.*backbone.layer9'),
        ([dict(end=1, freeze=['decode_head.dropout']), dict()], 'must name modules with parameters'),
        ([dict(end=1, freeze=['backbone', 'backbone']), dict()], 'each once'),
        ([dict(end=1, freeze='backbone'), dict()], r'`stages\[0\].freeze` must be a list'),
        ([dict(end=2), dict(end=2), dict()], r'`stages\[1\].end` must be an iteration after 2.*got 2'),
        ([dict(end=2), dict(end=4)], r'`stages\[1\].end` must be left out of the last stage'),
        ([dict(end=True), dict()], r'`stages\[0\].end` must be an iteration'),
        ([dict(ends=2), dict()], r"`stages\[0\]` must have only the keys.*'ends'. Did you mean 'end'"),
        ([dict(end=2, task_weight=-1), dict()], r'`stages\[0\].task_weight` must be a finite number of at least 0'),
        ([dict(end=2, task_weight=0, terms=[]), dict()], r'`stages\[0\].task_weight` must be above 0 in a stage with'),
        ([dict(end=2, terms=['pixel']), dict(terms=['pixel', 'feature'])], "got none with 'holistic'"),
    ],
)
def test_mistakes_are_errors_at_build(stages: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=f'StructuredDistiller: .*{match}'):
        MODELS.build(staged(stages))


def test_epochs_and_stages_do_not_mix() -> None:
    terms = dict(TERMS, pixel=dict(TERMS['pixel'], schedule=dict(by_epoch=True)))
    with pytest.raises(ConfigError, match="term 'pixel': `schedule.by_epoch` must be False beside `stages`"):
        MODELS.build(staged([dict(end=1), dict()], terms=terms))
    model = MODELS.build(staged(None, terms=terms))
    compile_terms((), model.terms)
    assert type(model.terms['pixel'].schedule).__name__ == 'WeightSchedule'


# --- chained runs --------------------------------------------------------------------------------------------------


def test_connectors_and_critics_go_on_in_the_next_run(tmp_path: Path) -> None:
    Runner.from_cfg(config(tmp_path / 'a', staged(None), max_iters=2)).train()
    file = str(tmp_path / 'a' / 'iter_2.pth')
    terms = {'feature': TERMS['feature'], 'other': TERMS['pixel']}
    cfg = config(tmp_path / 'b', staged(None, terms=terms, training_state_from=file), max_iters=2)
    cfg.load_from = file
    runner = Runner.from_cfg(cfg)
    watch = Watch()
    runner.register_hook(watch)
    seen: dict[str, Any] = {}

    class Look(Hook):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
            seen.setdefault('terms', copy.deepcopy(runner.model.terms['feature'].state_dict()))
            seen.setdefault('student', copy.deepcopy(runner.model.state_dict()))

    runner.register_hook(Look())
    runner.train()
    content = read_checkpoint(file)
    kept = {
        k.removeprefix('feature.'): v for k, v in content['mmstructkd']['terms'].items() if k.startswith('feature.')
    }
    assert kept
    assert_same(dict(seen['terms']), kept)
    assert_same(dict(seen['student']), dict(content['state_dict']))


@pytest.mark.parametrize('kind', ['plain', 'shape', 'missing'])
def test_a_training_state_that_cannot_be_taken(kind: str, tmp_path: Path) -> None:
    match = dict(plain='which holds no terms', shape="term 'feature': `training_state_from`", missing='must be a file')
    file = str(tmp_path / 'x.pth')
    if kind == 'plain':
        torch.save({'state_dict': MODELS.build(toy_segmentor(4)).state_dict()}, file)
    if kind == 'shape':
        other = MODELS.build(toy_distiller(student=toy_segmentor(2), terms=TERMS))
        torch.save({'mmstructkd': {'terms': other.terms.state_dict()}}, file)
    runner = Runner.from_cfg(config(tmp_path / 'run', staged(None, training_state_from=file)))
    with pytest.raises(CheckpointError, match=match[kind]):
        runner.train()
