"""The promises for depth estimators and detectors, through mmengine's Runner and the frameworks' own APIs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.apis import init_detector
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.apis import init_model

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_distiller

ROOT = Path(__file__).parents[2]
FEATURE = dict(type='mmstructkd.ChannelwiseKLLoss', temperature=1.0)  # with a connector, since the widths differ
PAIRWISE = dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=10.0)
NECK = dict(feature=dict(tap='neck[*]', loss=FEATURE), pairwise=dict(tap='neck[:3]', loss=PAIRWISE))
CRITIC = dict(type='mmstructkd.HolisticLoss', softmax=False, critic=dict(base_channels=4))
TERMS = {
    'depth': dict(
        feature=dict(tap='backbone[3]', loss=FEATURE),
        pairwise=dict(tap='backbone[2]', loss=PAIRWISE),
        holistic=dict(tap='decode_head.to_depth', loss=CRITIC),
    ),
    'fcos': NECK,
    'retinanet': NECK,
    'faster_rcnn': dict(
        NECK, region=dict(tap='roi_head.bbox_head.fc_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss'))
    ),
}
every = pytest.mark.parametrize('kind', sorted(TERMS))


def network(kind: str, width: int) -> ConfigDict:
    return toy_depth_estimator(width) if kind == 'depth' else toy_detector(kind, width)


def config(kind: str, folder: Path, **changes: Any) -> Config:
    model = toy_distiller(
        student=network(kind, 2), teacher=dict(config=network(kind, 4), allow_random=True), terms=TERMS[kind]
    )
    return toy_config(model, folder, task='depth' if kind == 'depth' else 'det', **changes)


def train(cfg: Config) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


def tensors(value: Any, path: str = '') -> dict[str, torch.Tensor]:
    """All tensors of a nested structure, by their place."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {name: found for key, inner in items for name, found in tensors(inner, f'{path}.{key}').items()}


class Interrupt(Hook):
    """Ends a run after its second iteration, as ctrl-C would."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == 2:
            raise KeyboardInterrupt


@every
def test_the_checkpoint_is_the_student(kind: str, tmp_path: Path) -> None:
    """It loads with every key by the framework's own API, and the teacher is as it was."""
    cfg = config(kind, tmp_path / 'run', max_iters=2)
    cfg.train_cfg.val_interval = 2
    runner = Runner.from_cfg(cfg)
    teacher = runner.model.teacher.network
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    start = {name: value.clone() for name, value in runner.model.student.state_dict().items()}
    runner.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    for term in TERMS[kind]:
        assert torch.tensor(runner.message_hub.get_scalar(f'train/loss_kd_{term}').data[0]).isfinite().all()

    file = tmp_path / 'run' / 'iter_2.pth'
    scope = 'mmseg' if kind == 'depth' else 'mmdet'
    plain = dict(default_scope=scope, model=network(kind, 2), custom_imports=cfg.custom_imports)
    Config(dict(plain, test_dataloader=cfg.val_dataloader)).dump(tmp_path / 's.py')  # init_detector reads it
    plain = (init_model if kind == 'depth' else init_detector)(str(tmp_path / 's.py'), str(file), device='cpu')
    content = read_checkpoint(str(file))
    plain.load_state_dict(content['state_dict'], strict=True)
    assert all(torch.equal(value, content['state_dict'][name]) for name, value in plain.state_dict().items())
    moved = [name for name, value in content['state_dict'].items() if not torch.equal(value, start[name])]
    assert any(name.startswith('backbone') for name in moved)
    kept = content['mmstructkd']['terms']
    assert any('connectors' in name for name in kept)
    assert not any('teacher' in name for name in (*content['state_dict'], *kept))
    # the config that the checkpoint carries is the plain student's
    assert Config.fromstring(content['meta']['cfg'], '.py').model.type == network(kind, 2).type


@every
def test_resume_is_bit_equal(kind: str, tmp_path: Path) -> None:
    train(config(kind, tmp_path / 'straight', max_iters=4))
    cfg = config(kind, tmp_path / 'stopped', max_iters=4)
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    torch.rand(5)
    cfg.resume = True
    train(cfg)
    first, second = (read_checkpoint(str(tmp_path / name / 'iter_4.pth')) for name in ('straight', 'stopped'))
    for part in ('state_dict', 'optimizer', 'mmstructkd'):
        one, two = tensors(first[part]), tensors(second[part])
        assert list(one) == list(two)
        assert all(torch.equal(value, two[name]) for name, value in one.items()), part


@every
def test_mixed_precision(kind: str, tmp_path: Path) -> None:
    cfg = config(kind, tmp_path, max_iters=2)
    cfg.optim_wrapper.type = 'mmstructkd.AutocastOptimWrapper'
    runner = train(cfg)
    for name, values in runner.message_hub.log_scalars.items():
        if 'loss' in name:
            assert torch.tensor(values.data[0]).isfinite().all(), name


@pytest.mark.parametrize('kind', ['depth', 'retinanet', 'faster_rcnn'])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    """DDP finds every parameter used, without being told to look."""
    cfg = config(kind, tmp_path / 'run', max_iters=2)
    cfg.train_dataloader.batch_size = 1
    cfg.dump(tmp_path / 'toy.py')
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [str(ROOT / 'tools' / 'train.py'), str(tmp_path / 'toy.py'), '--launcher', 'pytorch']
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    content = read_checkpoint(str(tmp_path / 'run' / 'iter_2.pth'))
    assert 'find_unused_parameters=True' not in content['mmstructkd']['config']
    MODELS.build(network(kind, 2)).load_state_dict(content['state_dict'], strict=True)
