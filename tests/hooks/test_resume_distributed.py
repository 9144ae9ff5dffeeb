"""Two processes on a CPU, stopped and resumed: each goes on with its own random streams."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor, toy_terms
from tests.comparison import assert_same

ROOT = Path(__file__).parents[2]


def config(folder: Path) -> Config:
    """A run whose processes draw different numbers, in their data and in their networks."""
    terms = {name: toy_terms()[name] for name in ('pixel', 'feature')}
    model = toy_distiller(
        student=toy_segmentor(2), teacher=dict(config=toy_segmentor(2), allow_random=True), terms=terms
    )
    cfg = toy_config(model, folder, max_iters=4)
    cfg.randomness = dict(seed=0, diff_rank_seed=True)
    cfg.train_dataloader.update(num_workers=1, persistent_workers=True)
    return cfg


def run(cfg: Config, path: Path, *options: str) -> str:
    """Train in two fresh processes; return what they printed."""
    cfg.dump(path)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command += [str(ROOT / 'tools' / 'train.py'), str(path), '--launcher', 'pytorch', *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def test_each_process_goes_on_with_its_own_streams(tmp_path: Path) -> None:
    straight, resumed = tmp_path / 'straight', tmp_path / 'resumed'
    run(config(straight), tmp_path / 'straight.py')
    middle = str(straight / 'iter_2.pth')
    one, two = read_checkpoint(middle)['mmstructkd']['processes']
    assert not torch.equal(one['random']['torch'], two['random']['torch'])
    assert not torch.equal(one['workers'][0]['numpy'][1], two['workers'][0]['numpy'][1])

    printed = run(config(resumed), tmp_path / 'resumed.py', '--resume', middle)
    assert 'with other settings' not in printed
    first, second = (read_checkpoint(folder / 'iter_4.pth') for folder in (straight, resumed))
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert_same(first[part], second[part], part)
    for part in ('terms', 'processes', 'data'):
        assert_same(first['mmstructkd'][part], second['mmstructkd'][part], part)

    # One process has no counterpart for its streams: it says so, and goes on behind as many batches.
    alone = config(tmp_path / 'alone')
    alone.resume, alone.load_from = True, middle
    warnings: list[str] = []
    runner = Runner.from_cfg(copy.deepcopy(alone))
    runner.logger.warning = warnings.append  # type: ignore[method-assign]
    runner.train()
    assert runner.iter == 4
    assert [text for text in warnings if 'processes 2 -> 1' in text and 'goes on behind as many batches' in text]
    assert len(read_checkpoint(tmp_path / 'alone' / 'iter_4.pth')['mmstructkd']['processes']) == 1
