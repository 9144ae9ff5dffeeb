"""Runs through mmengine's Runner: checkpoints, EMA, resume, schedules, precision, errors."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import init_model

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor, toy_terms
from tests.comparison import assert_same


def train(cfg: Config) -> Runner:
    """Run a config from a clean state, as a fresh process would."""
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


def weights(checkpoint: Path | str) -> dict:
    """Read a checkpoint as the safe loader does."""
    return read_checkpoint(str(checkpoint))


@pytest.fixture
def plain_file(tmp_path: Path) -> str:
    """The student's own config, written to a file."""
    path = tmp_path / 'student.py'
    Config(dict(default_scope='mmseg', model=toy_segmentor(4))).dump(path)
    return str(path)


@pytest.fixture
def load_report(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What mmengine's loader complains about."""
    from mmengine.runner import checkpoint as module

    messages: list[str] = []
    monkeypatch.setattr(module, 'print_log', lambda message, *a, **k: messages.append(str(message)))
    return messages


def assert_plain(checkpoint: Path, config: str, messages: list[str]) -> dict:
    """Load by mmseg's own API; every key must match."""
    messages.clear()
    model = init_model(config, str(checkpoint), device='cpu')
    assert not [m for m in messages if 'not match' in m or 'missing' in m or 'unexpected' in m]
    content = weights(checkpoint)
    model.load_state_dict(content['state_dict'], strict=True)
    assert all(torch.equal(v, content['state_dict'][k]) for k, v in model.state_dict().items())
    assert model.dataset_meta['classes']
    assert set(content['state_dict']) == set(MODELS.build(toy_segmentor(4)).state_dict())
    return content


def test_the_checkpoint_is_the_student(tmp_path: Path, plain_file: str, load_report: list[str]) -> None:
    runner = train(toy_config(toy_distiller(), tmp_path / 'run', max_iters=2))
    content = assert_plain(tmp_path / 'run' / 'iter_2.pth', plain_file, load_report)
    assert set(content) == {'meta', 'state_dict', 'message_hub', 'optimizer', 'param_schedulers', 'mmstructkd'}
    own = Config.fromstring(content['meta']['cfg'], '.py')
    assert own.model.type == 'EncoderDecoder'
    assert 'StructuredDistiller' in content['mmstructkd']['config']
    assert content['mmstructkd']['teacher'] == dict(type='FrozenTeacher', config='inline', checkpoint=None, sha256=None)
    kept = content['mmstructkd']['terms']
    assert any('critic' in key for key in kept)
    assert any('connectors' in key for key in kept)
    assert_same(dict(kept), dict(runner.model.terms.state_dict()))
    # the config inside the checkpoint builds a plain model that takes the weights
    model = MODELS.build(own.model)
    model.load_state_dict(content['state_dict'], strict=True)


def test_the_checkpoint_is_the_student_with_ema(tmp_path: Path, plain_file: str, load_report: list[str]) -> None:
    cfg = toy_config(toy_distiller(), tmp_path / 'run', max_iters=4)
    cfg.custom_hooks = [dict(type='EMAHook', momentum=0.5)]
    cfg.train_cfg.val_interval = 2
    runner = train(cfg)
    content = assert_plain(tmp_path / 'run' / 'iter_4.pth', plain_file, load_report)
    names = {k.removeprefix('module.') for k in content['ema_state_dict']} - {'steps'}
    assert names == set(content['state_dict'])
    averaged = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model.module
    assert averaged.teacher.network is runner.model.teacher.network  # not copied, not averaged
    assert not {id(p) for p in averaged.parameters()} & {id(p) for p in averaged.teacher.network.parameters()}
    # state_dict holds the average, ema_state_dict the raw weights, as mmengine has it for plain models
    key = 'decode_head.conv_seg.weight'
    assert torch.equal(content['ema_state_dict']['module.' + key], runner.model.student.state_dict()[key])
    assert not torch.equal(content['state_dict'][key], runner.model.student.state_dict()[key])
    # and it resumes: both are back where they were
    cfg.resume = True
    cfg.train_cfg.max_iters = 4
    again = Runner.from_cfg(cfg)
    again.train()
    assert torch.equal(again.model.student.state_dict()[key], runner.model.student.state_dict()[key])


def test_load_from_starts_from_a_plain_student(tmp_path: Path) -> None:
    plain = MODELS.build(toy_segmentor(4))
    torch.save(dict(state_dict=plain.state_dict(), meta={}), tmp_path / 'student.pth')
    cfg = toy_config(toy_distiller(), tmp_path / 'run', max_iters=1, load_from=str(tmp_path / 'student.pth'))
    cfg.optim_wrapper.optimizer.lr = 0.0
    cfg.optim_wrapper.optimizer.weight_decay = 0.0
    cfg.param_scheduler = []
    runner = train(cfg)
    for (name, p), q in zip(plain.named_parameters(), runner.model.student.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize('workers', [0, 2])
def test_resume_is_bit_equal(tmp_path: Path, workers: int) -> None:
    terms = toy_terms()
    terms['pixel']['schedule'] = dict(type='linear', begin=0, end=6)

    def config(name: str) -> Config:
        cfg = toy_config(toy_distiller(terms=terms), tmp_path / name, max_iters=6)
        cfg.train_dataloader.num_workers = workers
        cfg.train_dataloader.persistent_workers = workers > 0
        cfg.train_cfg.val_interval = 2  # a validation draws random numbers, too
        return cfg

    train(config('straight'))
    stopped = config('stopped')
    runner = Runner.from_cfg(copy.deepcopy(stopped))
    runner.register_hook(Interrupt(at=4), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    torch.rand(7)  # another process, another state
    stopped.resume = True
    train(stopped)
    first, second = (weights(tmp_path / name / 'iter_6.pth') for name in ('straight', 'stopped'))
    assert first['meta']['iter'] == second['meta']['iter'] == 6
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_same(first[part], second[part], part)
    assert_same(first['mmstructkd']['terms'], second['mmstructkd']['terms'], 'terms')
    assert_same(first['mmstructkd']['random']['torch'], second['mmstructkd']['random']['torch'], 'torch')


class Interrupt:
    """Stops a run as ctrl-C would, after an iteration and its checkpoint."""

    def __new__(cls, at: int):
        from mmengine.hooks import Hook

        class _Interrupt(Hook):
            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
                if runner.iter + 1 == at:
                    raise KeyboardInterrupt

        return _Interrupt()


def test_resume_refuses_other_terms_and_other_teachers(tmp_path: Path) -> None:
    cfg = toy_config(toy_distiller(), tmp_path / 'run', max_iters=2)
    train(cfg)
    cfg.resume = True
    other = copy.deepcopy(cfg)
    other.model.terms.pop('feature')
    with pytest.raises(CheckpointError, match='must hold the terms of the config'):
        train(other)
    teacher = MODELS.build(toy_segmentor(8))
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    other = copy.deepcopy(cfg)
    other.model.teacher.checkpoint = str(tmp_path / 'teacher.pth')
    with pytest.raises(CheckpointError, match='the teacher must be the one the checkpoint was trained with'):
        train(other)


def test_epochs_too(tmp_path: Path) -> None:
    """Epoch-based training: schedules by epoch, and resume."""
    terms = toy_terms()
    terms['pixel']['schedule'] = dict(type='constant', begin=1, by_epoch=True)

    def config(name: str) -> Config:
        cfg = toy_config(toy_distiller(terms=terms), tmp_path / name)
        cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=10)
        cfg.train_dataloader.sampler = dict(type='DefaultSampler', shuffle=True)
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
        cfg.default_hooks.logger.log_metric_by_epoch = True
        return cfg

    straight = train(config('straight'))
    history = straight.message_hub.get_scalar('train/loss_kd_pixel').data[0]
    assert all(history[:4] == 0)
    assert all(history[4:] > 0)
    stopped = config('stopped')
    runner = Runner.from_cfg(copy.deepcopy(stopped))
    runner.register_hook(Interrupt(at=6), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    stopped.resume = True
    train(stopped)
    first, second = (weights(tmp_path / name / 'epoch_2.pth') for name in ('straight', 'stopped'))
    for part in ('state_dict', 'optimizer'):
        assert_same(first[part], second[part], part)


def test_the_teacher_is_bit_equal_after_training_and_runs_only_where_needed(tmp_path: Path) -> None:
    terms = {'pixel': toy_terms()['pixel']}
    terms['pixel']['schedule'] = dict(type='constant', begin=2, end=3)
    runner = Runner.from_cfg(toy_config(toy_distiller(terms=terms), tmp_path, max_iters=4))
    network, calls = runner.model.teacher.network, []
    before = copy.deepcopy(network.state_dict())
    network.backbone.register_forward_hook(lambda *a: calls.append(runner.iter))
    runner.train()
    assert_same(dict(before), dict(network.state_dict()))
    assert calls == [2]
    assert not any(m.training for m in network.modules())


def test_gradient_accumulation_equals_the_large_batch() -> None:
    """Two halves accumulated give the gradient of the whole (batch statistics aside)."""
    from mmengine.optim import build_optim_wrapper

    from mmstructkd.testing import toy_batch

    torch.manual_seed(0)
    terms = {name: term for name, term in toy_terms().items() if name != 'holistic'}
    model = MODELS.build(toy_distiller(terms=terms)).eval()
    settings = dict(
        type='OptimWrapper', constructor='mmstructkd.DistillOptimWrapperConstructor', optimizer=dict(type='SGD', lr=1.0)
    )
    batch = toy_batch(batch=4)
    results = []
    for parts in (1, 2):
        twin = copy.deepcopy(model)
        wrapper = build_optim_wrapper(twin, dict(settings, accumulative_counts=parts))
        wrapper.initialize_count_status(twin, 0, parts)
        size = 4 // parts
        for part in range(parts):
            piece = {k: v[part * size : (part + 1) * size] for k, v in batch.items()}
            with wrapper.optim_context(twin):
                total, _ = twin.parse_losses(twin(**piece, mode='loss'))
            wrapper.update_params(total)
        results.append(dict(twin.named_parameters()))
    start = dict(model.named_parameters())
    for name, p in results[0].items():
        moved = (p - start[name]).abs().max()
        assert torch.allclose(p, results[1][name], atol=1e-6 + 1e-4 * moved.item()), name


def test_mixed_precision_and_clipping(tmp_path: Path) -> None:
    cfg = toy_config(toy_distiller(), tmp_path, max_iters=2)
    cfg.optim_wrapper.type = 'mmstructkd.AutocastOptimWrapper'
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)
    runner = train(cfg)
    for name in ('loss_kd_pixel', 'loss_kd_pairwise', 'loss_kd_feature', 'loss_kd_holistic'):
        assert torch.isfinite(torch.tensor(runner.message_hub.get_scalar(f'train/{name}').data[0])).all()


def test_compile_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='`compile` must be off.*forward hooks'):
        Runner.from_cfg(toy_config(toy_distiller(), tmp_path, compile=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    cfg = toy_config(toy_distiller(), tmp_path, max_iters=6)
    runner = Runner.from_cfg(cfg)
    network = runner.model.teacher.network

    def poison(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output * float('nan') if runner.iter == 3 else output

    network.decode_head.conv_seg.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match=r'iteration 4: loss_kd_pixel is nan.*decode.loss_ce \d'):
        runner.train()
    assert sorted(p.name for p in tmp_path.glob('*.pth')) == ['iter_2.pth']
    content = weights(tmp_path / 'iter_2.pth')
    assert all(torch.isfinite(v).all() for v in content['state_dict'].values())


def test_a_users_own_constructor_and_hooks_are_kept(tmp_path: Path) -> None:
    cfg = toy_config(toy_distiller(), tmp_path, max_iters=1)
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        constructor='LearningRateDecayOptimizerConstructor',
        paramwise_cfg=dict(decay_rate=0.9, decay_type='layer_wise', num_layers=4),
        optimizer=dict(type='AdamW', lr=1e-3),
    )
    cfg.custom_hooks = [dict(type='mmstructkd.FiniteLossHook')]
    runner = Runner.from_cfg(cfg)
    assert [type(h).__name__ for h in runner.hooks].count('FiniteLossHook') == 1
    assert runner.optim_wrapper['base_constructor'] == 'LearningRateDecayOptimizerConstructor'
