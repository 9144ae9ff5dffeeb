"""A run that was stopped and resumed ends as the one that was not, to the last bit."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.logging import MessageHub
from mmengine.registry import METRICS, TRANSFORMS
from mmengine.runner import IterBasedTrainLoop, Runner

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor, toy_terms
from tests.comparison import assert_same


class Interrupt(Hook):
    """Stops a run as ctrl-C would: after an iteration and its checkpoint, or after a validation."""

    priority = 'LOWEST'

    def __init__(self, at: int, stage: str = 'train') -> None:
        self.at, self.stage = at, stage

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self.stage == 'train' and runner.iter + 1 == self.at:
            raise KeyboardInterrupt

    def before_val_epoch(self, runner: Runner) -> None:
        if self.stage == 'before_val' and runner.iter == self.at:
            raise KeyboardInterrupt

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        if self.stage == 'val' and runner.iter == self.at:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def noisy_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers a step of the pipeline that draws from all streams."""

    class DrawAll(BaseTransform):
        def transform(self, results: dict) -> dict:
            shift = random.random() + np.random.rand() + torch.rand(()).item()
            results['img'] = np.clip(results['img'] + 5 * shift, 0, 255).astype(results['img'].dtype)
            return results

    TRANSFORMS.register_module(module=DrawAll, name='DrawAll', force=True)


def config(folder: Path, max_iters: int = 6, **changes: Any) -> Config:
    """A run whose data draw from every stream."""
    terms = {name: toy_terms()[name] for name in ('pixel', 'feature')}
    model = toy_distiller(
        student=toy_segmentor(2), teacher=dict(config=toy_segmentor(2), allow_random=True), terms=terms
    )
    cfg = toy_config(model, folder, max_iters=max_iters)
    cfg.merge_from_dict(changes)
    object.__setattr__(cfg, '_format_python_code', False)  # most of the time of a run as small as this
    steps = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [*steps[:-1], dict(type='DrawAll'), steps[-1]]
    return cfg


def by_epoch(cfg: Config, epochs: int = 2, **checkpoint: Any) -> Config:
    """The same by epochs of four iterations."""
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=100)
    cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', **{'interval': 1, **checkpoint})
    return cfg


def run(cfg: Config, *hooks: Hook) -> Runner:
    """Train in this process, from a state of its own."""
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    for hook in hooks:
        runner.register_hook(hook, priority='LOWEST')
    if hooks:
        with pytest.raises(KeyboardInterrupt):
            runner.train()
    else:
        runner.train()
    # Workers live as long as something refers to their loader, and a runner is a cycle.
    runner.train_dataloader._iterator = None
    vars(runner.train_loop).pop('dataloader_iterator', None)
    gc.collect()
    return runner


def assert_same_end(straight: Path, stopped: Path, *, also: tuple[str, ...] = ()) -> None:
    """Compare everything that decides how a training goes on."""
    first, second = read_checkpoint(straight), read_checkpoint(stopped)
    for part in ('state_dict', 'optimizer', 'param_schedulers', *also):
        assert_same(first[part], second[part], part)
    for part in ('iter', 'epoch', 'seed'):
        assert first['meta'][part] == second['meta'][part]
    for part in ('terms', 'processes', 'data', 'random'):
        assert_same(first['mmstructkd'][part], second['mmstructkd'][part], part)


def assert_exact(
    tmp_path: Path,
    build: Callable[[Path], Config],
    *stops: Interrupt,
    last: str = 'iter_6.pth',
    also: tuple[str, ...] = (),
) -> Runner:
    """Run straight on, and stopped and resumed at each of ``stops``; return the last resumed runner."""
    run(build(tmp_path / 'straight'))
    for number, stop in enumerate(stops):
        folder = tmp_path / f'stopped{number}'
        cfg = build(folder)
        run(cfg, stop)
        for stream in (random.seed, np.random.seed, torch.manual_seed):
            stream(123)  # another process, another state
        cfg.resume = True
        resumed = run(cfg)
        assert_same_end(tmp_path / 'straight' / last, folder / last, also=also)
    return resumed


LOADING = {
    'no worker': {},
    'two workers': dict(num_workers=2),
    'three persistent workers': dict(num_workers=3, persistent_workers=True),
}


@pytest.mark.parametrize('loading', LOADING.values(), ids=LOADING)
@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_iterations(tmp_path: Path, loading: dict, sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)

    def build(folder: Path) -> Config:
        cfg = config(folder)
        cfg.train_dataloader.update(loading, sampler=dict(type=sampler, shuffle=True))
        return cfg

    assert_exact(tmp_path, build, Interrupt(2), Interrupt(4))  # within the first pass through the data, and at its end


@pytest.mark.parametrize('loading', LOADING.values(), ids=LOADING)
def test_within_an_epoch_and_between_epochs(tmp_path: Path, loading: dict) -> None:
    def build(folder: Path) -> Config:
        cfg = by_epoch(config(folder), by_epoch=False, interval=2)
        cfg.train_dataloader.update(loading)
        return cfg

    assert_exact(tmp_path, build, Interrupt(2), Interrupt(4), last='iter_8.pth')


@pytest.mark.parametrize('loading', LOADING.values(), ids=LOADING)
def test_epochs(tmp_path: Path, loading: dict) -> None:
    def build(folder: Path) -> Config:
        cfg = by_epoch(config(folder), epochs=3)
        cfg.train_dataloader.update(loading)
        return cfg

    assert_exact(tmp_path, build, Interrupt(10), last='epoch_3.pth')


def with_scores(cfg: Config) -> Config:
    """Validate at every second iteration, by a metric whose values rise and fall."""
    METRICS.register_module(module=Waves, name='Waves', force=True)
    cfg.val_evaluator = dict(type='Waves')
    cfg.train_cfg.val_interval = 2
    return cfg


class Waves(BaseMetric):
    """A score that depends on the weights, and one that falls; draws random numbers."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append(float(data_samples[0]['seg_logits']['data'].mean()) + torch.rand(()).item() * 0)

    def compute_metrics(self, results: list) -> dict[str, float]:
        torch.rand(3)
        random.random()
        np.random.rand()
        step = MessageHub.get_current_instance().get_info('iter')
        return {'score': float(np.sin(1e4 * np.mean(results))), 'falling': float(-step)}


STAGES = {
    'before its validation': Interrupt(4, 'before_val'),
    'after its validation': Interrupt(4, 'val'),
    'one later': Interrupt(5),
}


@pytest.mark.parametrize('stop', STAGES.values(), ids=STAGES)
@pytest.mark.parametrize('rule', ['greater', 'less'])
def test_best_checkpoints_are_saved_in_the_middle_of_a_validation(tmp_path: Path, stop: Interrupt, rule: str) -> None:
    """One of both rules saves the file of iteration 4 again, under the same name."""

    def build(folder: Path) -> Config:
        cfg = with_scores(config(folder))
        cfg.default_hooks.checkpoint.update(save_best='score', rule=rule)
        return cfg

    assert_exact(tmp_path, build, stop)


@pytest.mark.parametrize('stop', STAGES.values(), ids=STAGES)
def test_training_that_follows_its_scores(tmp_path: Path, stop: Interrupt) -> None:
    """mmengine forgets what EarlyStoppingHook counted, and the validation it was stopped before."""

    def build(folder: Path) -> Config:
        cfg = by_epoch(with_scores(config(folder)), epochs=4, by_epoch=True)
        cfg.train_dataloader.dataset.num_scenes = 4
        cfg.train_cfg.val_interval = 1
        # Each validation saves its checkpoint again, before EarlyStoppingHook has counted it.
        cfg.default_hooks.checkpoint.update(save_best='falling', rule='less')
        cfg.custom_hooks = [dict(type='EarlyStoppingHook', monitor='falling', rule='greater', patience=20)]
        cfg.param_scheduler = [
            dict(type='ReduceOnPlateauLR', monitor='score', rule='less', patience=1, factor=0.5),
            dict(type='LinearLR', start_factor=0.1, begin=0, end=4, by_epoch=False),
        ]
        return cfg

    def stopper(runner: Runner) -> tuple:
        return next((h.wait_count, h.best_score) for h in runner.hooks if isinstance(h, EarlyStoppingHook))

    assert stopper(assert_exact(tmp_path, build, stop, last='epoch_4.pth')) == (3, -1.0)


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    def build(folder: Path) -> Config:
        cfg = with_scores(config(folder))
        cfg.custom_hooks = [dict(type='EarlyStoppingHook', monitor='score', rule='greater', stopping_threshold=-2)]
        return cfg

    run(build(tmp_path))
    assert not (tmp_path / 'iter_4.pth').exists()
    cfg = build(tmp_path)
    cfg.resume = True
    assert run(cfg).iter == 2


def ema(cfg: Config) -> None:
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.3, begin_iter=2)]


def open_window(cfg: Config) -> None:
    cfg.optim_wrapper.accumulative_counts = 4
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)


def every_other_step(cfg: Config) -> None:
    cfg.model.teacher.every = 3
    cfg.model.terms.pixel.schedule = dict(type='linear', begin=0, end=6)


def kept_outputs(cfg: Config) -> None:
    torch.save(MODELS.build(cfg.model.teacher.config).state_dict(), Path(cfg.work_dir).parent / 'teacher.pth')
    cfg.model.teacher.update(
        allow_random=False,
        checkpoint=str(Path(cfg.work_dir).parent / 'teacher.pth'),
        cache=dict(folder=f'{cfg.work_dir}_cache'),
    )
    steps = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [
        *steps[:2],
        dict(type='mmstructkd.FiniteAugmentation', views=2, transforms=steps[2:]),
    ]


def learnt_temperature(cfg: Config) -> None:
    cfg.model.terms.pixel.loss.temperature = dict(type='mmstructkd.LearnableTemperature', low=1.0, span=20.0)


def memory(cfg: Config) -> None:
    loss = dict(
        type='mmstructkd.MemoryContrastLoss', num_classes=10, pixel_capacity=40, region_capacity=8, pixels_per_image=4
    )
    cfg.model.terms.memory = dict(tap='backbone[3]', loss=loss)


def critic(cfg: Config) -> None:
    cfg.model.terms.holistic = toy_terms()['holistic']


def schedules(cfg: Config) -> None:
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
        dict(type='CosineAnnealingLR', T_max=3, by_epoch=False, begin=3, end=6),
        dict(type='LinearMomentum', start_factor=0.5, by_epoch=False, begin=0, end=5),
    ]


def lower_precision(cfg: Config) -> None:
    cfg.optim_wrapper.update(type='mmstructkd.AutocastOptimWrapper', accumulative_counts=3)
    cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-3)


def scaler(cfg: Config) -> None:
    cfg.optim_wrapper.update(
        type='AmpOptimWrapper',
        dtype='bfloat16',
        loss_scale=dict(init_scale=8.0, growth_interval=1),
        accumulative_counts=3,
        clip_grad=dict(max_norm=1.0),
    )


KINDS = {
    function.__name__: function
    for function in (
        critic,
        ema,
        every_other_step,
        kept_outputs,
        learnt_temperature,
        lower_precision,
        memory,
        open_window,
        scaler,
        schedules,
    )
}


@pytest.fixture
def amp_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """mmengine's AmpOptimWrapper with torch's scaler for CPUs."""
    module = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    monkeypatch.setattr(f'{module}.is_cuda_available', lambda: True)
    monkeypatch.setattr(f'{module}.GradScaler', functools.partial(torch.amp.GradScaler, 'cpu'))


@pytest.mark.usefixtures('amp_on_a_cpu')
@pytest.mark.parametrize('kind', KINDS)
def test_what_training_keeps(tmp_path: Path, kind: str) -> None:
    def build(folder: Path) -> Config:
        folder.parent.mkdir(exist_ok=True)
        torch.manual_seed(1)  # of the teacher, where it is saved
        cfg = config(folder)
        KINDS[kind](cfg)
        return cfg

    assert_exact(tmp_path, build, Interrupt(2), also=('ema_state_dict',) if kind == 'ema' else ())


def test_a_run_without_a_seed(tmp_path: Path) -> None:
    """mmengine draws a seed for each process, and builds the data before it has read the checkpoint's."""
    cfg = config(tmp_path)
    cfg.pop('randomness')
    cfg.train_dataloader.num_workers = 2
    torch.save(MODELS.build(cfg.model.teacher.config).state_dict(), tmp_path / 'teacher.pth')
    cfg.model.teacher.update(allow_random=False, checkpoint=str(tmp_path / 'teacher.pth'))
    np.random.seed(1)
    run(cfg)
    (tmp_path / 'iter_6.pth').rename(tmp_path / 'straight.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_2.pth'))
    np.random.seed(2)
    cfg.resume = True
    run(cfg)
    assert_same_end(tmp_path / 'straight.pth', tmp_path / 'iter_6.pth')


def test_the_log_says_what_happens(tmp_path: Path, logged: list[str]) -> None:
    """Nothing of batches that were not advanced, of gradients that are lost, or of a checkpoint that is not there."""
    cfg = config(tmp_path)
    cfg.log_level = 'INFO'
    cfg.resume = True  # of a folder that is empty
    open_window(cfg)
    run(cfg, Interrupt(2))
    text = '\n'.join(logged)
    assert f'There is no checkpoint in {str(tmp_path)!r} to resume from: the training begins.' in text
    assert 'Auto resumed' not in text
    logged.clear()
    run(cfg)
    text = '\n'.join(logged)
    assert f'Auto resumed from the latest checkpoint {tmp_path / "iter_2.pth"}' in text
    assert 'Advance dataloader 2 steps to skip data that has already been trained' in text
    for false in ('Skip advancing', 'not be advanced', 'is lost', 'unavailable', 'again:', 'metainfo'):
        assert false not in text, false


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the run's logger prints."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    original = Runner.build_logger

    def build_logger(self: Runner, *args: Any, **kwargs: Any) -> logging.Logger:
        logger = original(self, *args, **kwargs)
        logger.addHandler(Keep())
        return logger

    monkeypatch.setattr(Runner, 'build_logger', build_logger)
    return lines


def test_other_settings_are_said(tmp_path: Path, logged: list[str]) -> None:
    cfg = config(tmp_path)
    run(cfg, Interrupt(2))
    cfg.resume = True
    cfg.train_dataloader.update(num_workers=1, batch_size=4)
    assert run(cfg).iter == 6
    assert 'with other settings (num_workers 0 -> 1, batch_size 2 -> 4)' in '\n'.join(logged)


def test_the_best_checkpoint_has_no_optimizer(tmp_path: Path, logged: list[str]) -> None:
    cfg = with_scores(config(tmp_path))
    cfg.default_hooks.checkpoint.update(save_best='score', rule='greater')
    run(cfg, Interrupt(3))
    cfg.resume, cfg.load_from = True, str(tmp_path / 'best_score_iter_2.pth')
    assert run(cfg).iter == 6
    assert 'momentum and schedules start anew' in '\n'.join(logged)


def test_a_pipeline_that_remembers_is_run_again(tmp_path: Path) -> None:
    class Blend(BaseTransform):
        """Adds an image of before, as mmdet's CachedMosaic does."""

        def __init__(self) -> None:
            self.results_cache: list[np.ndarray] = []

        def transform(self, results: dict) -> dict:
            self.results_cache.append(results['img'])
            results['img'] = (results['img'] // 2 + random.choice(self.results_cache) // 2).astype(np.uint8)
            return results

    TRANSFORMS.register_module(module=Blend, name='Blend', force=True)

    def build(folder: Path) -> Config:
        cfg = config(folder)
        steps = cfg.train_dataloader.dataset.pipeline
        cfg.train_dataloader.dataset.pipeline = [steps[0], dict(type='Blend'), *steps[1:]]
        cfg.train_dataloader.update(num_workers=2)
        return cfg

    assert_exact(tmp_path, build, Interrupt(2))


def test_a_pipeline_that_is_switched(tmp_path: Path) -> None:
    """mmdet's PipelineSwitchHook starts the workers anew."""

    def build(folder: Path) -> Config:
        cfg = by_epoch(config(folder), epochs=3)
        cfg.train_dataloader.update(num_workers=2, persistent_workers=True)
        steps = [step for step in cfg.train_dataloader.dataset.pipeline if step.type != 'RandomFlip']
        cfg.custom_hooks = [dict(type='mmdet.PipelineSwitchHook', switch_epoch=1, switch_pipeline=steps)]
        return cfg

    assert_exact(tmp_path, build, Interrupt(5), Interrupt(9), last='epoch_3.pth')


@pytest.mark.skipif(
    'fast_forward_on_resume' not in inspect.signature(IterBasedTrainLoop).parameters,
    reason='mmengine has it from 0.10.12 on',
)
def test_data_that_are_not_to_be_advanced(tmp_path: Path, logged: list[str]) -> None:
    """Then mmengine's warning is true: the first batch is the first of the stream."""
    cfg = config(tmp_path)
    cfg.train_cfg.fast_forward_on_resume = True
    cfg.train_dataloader.sampler.shuffle = False
    run(cfg, Interrupt(2))
    cfg.resume = True
    logged.clear()
    runner = Runner.from_cfg(cfg)
    seen = []

    class See(Hook):
        def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
            seen.append(data_batch['data_samples'][0].img_path)

    runner.register_hook(See())
    runner.train()
    assert 'Skip advancing dataloader' in '\n'.join(logged)
    assert seen[0].endswith('_0000000.png')
