"""Which checkpoint is resumed, what a config may hold, and the runner that mmengine calls flexible."""

from __future__ import annotations

import copy
import enum
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmstructkd import compat
from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.hooks.student_checkpoint import plain_values
from mmstructkd.registry import MODELS
from mmstructkd.resuming import checkpoint_to_resume
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor, toy_terms

compat.install()


def small(folder: Path, **model: object) -> Config:
    """A short run of a small distiller."""
    terms = {name: toy_terms()[name] for name in ('pixel', 'holistic')}
    teacher = dict(config=toy_segmentor(2), allow_random=True)
    cfg = toy_config(
        toy_distiller(**{'student': toy_segmentor(2), 'teacher': teacher, 'terms': terms, **model}), folder, max_iters=2
    )
    object.__setattr__(cfg, '_format_python_code', False)
    return cfg


# --- which checkpoint


def test_latest_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_to_resume(tmp_path / 'absent') is None
    assert checkpoint_to_resume(tmp_path) is None
    (tmp_path / 'iter_4.pth').touch()
    (tmp_path / 'last_checkpoint').write_text(f'{tmp_path / "iter_4.pth"}\n')
    assert checkpoint_to_resume(tmp_path) == str(tmp_path / 'iter_4.pth')
    assert checkpoint_to_resume(tmp_path, 'https://host/x.pth') == 'https://host/x.pth'
    assert checkpoint_to_resume(tmp_path, tmp_path / 'iter_4.pth') == str(tmp_path / 'iter_4.pth')


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (b'', 'got an empty one'),
        (b' \n', 'got an empty one'),
        (b'/nowhere/iter_4.pth', "got '/nowhere/iter_4.pth', which is not there"),
        (b'/tmp', "got the folder '/tmp'"),
        (b'\xff\xfe\x00garbage', 'one that cannot be read (UnicodeDecodeError)'),
        (b'a\x00b', 'which is not there'),
        (b'x' * 100_000, 'which is not there'),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path: Path, content: bytes, problem: str) -> None:
    record = tmp_path / 'last_checkpoint'
    record.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        checkpoint_to_resume(tmp_path)
    assert f'{str(record)!r} must name a checkpoint' in str(error.value)
    assert problem in str(error.value)
    assert 'There is none to resume from' in str(error.value)
    assert len(str(error.value)) < 700
    (tmp_path / 'iter_2.pth').touch()
    (tmp_path / 'best_mIoU_iter_2.pth').touch()
    with pytest.raises(CheckpointError, match=f'resume with --resume {tmp_path / "iter_2.pth"}'):
        checkpoint_to_resume(tmp_path)


def test_checkpoints_without_a_record_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / 'teacher.pth').touch()
    assert checkpoint_to_resume(tmp_path) is None
    (tmp_path / 'epoch_3.pth').touch()
    with pytest.raises(CheckpointError, match=r'must have a file `last_checkpoint`.*--resume .*epoch_3.pth'):
        checkpoint_to_resume(tmp_path)


def test_a_runner_looks_before_anything_is_built(tmp_path: Path) -> None:
    cfg = small(tmp_path)
    cfg.resume = True
    (tmp_path / 'last_checkpoint').touch()
    with pytest.raises(CheckpointError, match='got an empty one'):
        Runner.from_cfg(cfg)
    (tmp_path / 'last_checkpoint').unlink()
    cfg.load_from = str(tmp_path / 'iter_9.pth')
    with pytest.raises(CheckpointError, match='iter_9.pth'):
        Runner.from_cfg(cfg)


# --- what is saved


class Level(enum.IntEnum):
    HIGH = 3


def test_plain_values_are_read_back(tmp_path: Path) -> None:
    values = {
        'path': PurePosixPath('/a/b'),
        'device': torch.device('cpu'),
        'dtype': torch.bfloat16,
        'scalars': (np.float64(0.5), np.int32(2), np.bool_(True), np.str_('x')),
        'level': Level.HIGH,
        'objects': np.array([Path('/c'), None], dtype=object),
        'numbers': np.arange(3),
        'set': {Path('/d')},
        'config': Config(dict(a=dict(b=[1])))._cfg_dict,
        np.int64(4): torch.ones(2),
    }
    torch.save({'it': plain_values(values)}, tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')['it']
    assert read['path'] == '/a/b'
    assert (read['device'], read['dtype']) == ('cpu', 'torch.bfloat16')
    assert read['scalars'] == (0.5, 2, True, 'x')
    assert [type(value) for value in read['scalars']] == [float, int, bool, str]
    assert (read['level'], type(read['level'])) == (3, int)
    assert read['objects'] == ['/c', None]
    assert read['numbers'].tolist() == [0, 1, 2]
    assert read['set'] == {'/d'}
    assert read['config'] == {'a': {'b': [1]}}
    assert read[4].tolist() == [1, 1]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Weights of a teacher."""
    torch.save(MODELS.build(toy_segmentor(2)).state_dict(), tmp_path / 'teacher.pth')
    return tmp_path / 'teacher.pth'


def test_paths_and_numpy_numbers_anywhere_in_a_config(tmp_path: Path, teacher: Path) -> None:
    """The file is read back by the loader that runs no code, and resumes."""
    cfg = small(tmp_path / 'run', teacher=dict(config=toy_segmentor(2), checkpoint=teacher))
    cfg.work_dir = tmp_path / 'run'
    cfg.optim_wrapper.optimizer.lr = np.float64(0.01)
    cfg.model.terms.pixel.loss.loss_weight = np.float32(2)
    cfg.train_dataloader.dataset.metainfo = dict(root=[tmp_path], version=np.int64(2))
    cfg.default_hooks.checkpoint.out_dir = tmp_path / 'elsewhere'
    Runner.from_cfg(copy.deepcopy(cfg)).train()
    content = read_checkpoint(tmp_path / 'elsewhere' / 'run' / 'iter_2.pth')
    assert content['mmstructkd']['teacher']['checkpoint'] == str(teacher)
    assert content['meta']['dataset_meta']['root'] == [str(tmp_path)]
    assert type(content['optimizer']['parts'][0]['param_groups'][0]['lr']) is float
    cfg.resume = True
    cfg.train_cfg.max_iters = 3
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 3


def test_a_model_that_was_built_with_a_path(tmp_path: Path, teacher: Path) -> None:
    cfg = small(tmp_path / 'run')
    model = MODELS.build(
        dict(
            type='mmstructkd.StructuredDistiller',
            student=toy_segmentor(2),
            teacher=dict(config=toy_segmentor(2), checkpoint=teacher),
            terms=dict(pixel=toy_terms()['pixel']),
        )
    )
    keys = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'default_hooks', 'default_scope', 'randomness')
    Runner(model, str(tmp_path / 'run'), **{key: cfg[key] for key in keys}, cfg=Config(dict(model=cfg.model))).train()
    content = read_checkpoint(tmp_path / 'run' / 'iter_2.pth')
    assert content['mmstructkd']['teacher']['checkpoint'] == str(teacher)


# --- FlexibleRunner


def flexible(folder: Path, **changes: object) -> Config:
    cfg = small(folder)
    cfg.merge_from_dict(dict(runner_type='FlexibleRunner', **changes))
    cfg.train_cfg.max_iters = cfg.param_scheduler[0].end = 4
    cfg.default_hooks.checkpoint.update(save_best='mIoU')
    cfg.train_cfg.val_interval = 2
    return cfg


def test_the_flexible_runner_keeps_the_promises(tmp_path: Path) -> None:
    """The checkpoint is the student; the critic is trained with its own settings; resume is exact."""
    runner = RUNNERS.build(flexible(tmp_path / 'straight'))
    runner.train()
    names = [type(hook).__name__ for hook in runner.hooks]
    assert {'StudentCheckpointHook', 'TermScheduleHook', 'FiniteLossHook'} <= set(names)
    straight = read_checkpoint(tmp_path / 'straight' / 'iter_4.pth')
    assert set(straight['state_dict']) == set(MODELS.build(toy_segmentor(2)).state_dict())
    assert len(straight['optimizer']['parts']) == 2

    cfg = flexible(tmp_path / 'resumed')
    cfg.resume, cfg.load_from = True, str(tmp_path / 'straight' / 'iter_2.pth')
    torch.rand(5)
    RUNNERS.build(cfg).train()
    resumed = read_checkpoint(tmp_path / 'resumed' / 'iter_4.pth')
    assert resumed['meta']['iter'] == straight['meta']['iter'] == 4
    for part in ('state_dict',):
        assert all(torch.equal(value, resumed[part][key]) for key, value in straight[part].items())
    terms = straight['mmstructkd']['terms']
    assert all(torch.equal(value, resumed['mmstructkd']['terms'][key]) for key, value in terms.items())


def test_the_flexible_runner_with_a_strategy_of_its_own_is_refused(tmp_path: Path) -> None:
    cfg = flexible(tmp_path)
    runner = RUNNERS.build(cfg)
    runner.strategy.__class__ = type('FSDPStrategy', (type(runner.strategy),), {})
    with pytest.raises(ConfigError, match=r"`strategy` must be 'SingleDeviceStrategy' or.*'FSDPStrategy'.*runner_type"):
        runner.train()


def test_the_flexible_runner_that_was_started_too_early_is_refused(tmp_path: Path) -> None:
    """Where mmstructkd is imported by the model's type alone, `train` is running already."""
    runner = RUNNERS.build(flexible(tmp_path))
    with pytest.raises(ConfigError, match='started before mmstructkd was imported'):
        getattr(type(runner).train, compat._MARK)(runner)


def test_a_plain_model_is_left_to_the_flexible_runner(tmp_path: Path) -> None:
    cfg = flexible(tmp_path)
    cfg.model = toy_segmentor(2)
    runner = RUNNERS.build(cfg)
    runner.train()
    assert 'StudentCheckpointHook' not in [type(hook).__name__ for hook in runner.hooks]
    assert 'mmstructkd' not in read_checkpoint(tmp_path / 'iter_4.pth')
