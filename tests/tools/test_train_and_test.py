"""``tools/train.py`` and ``tools/test.py`` as a user calls them, in this process."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor

TOOLS = Path(__file__).parents[2] / 'tools'


def call(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> None:
    """Run a tool with these arguments."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    runpy.run_path(str(TOOLS / tool), run_name='__main__')


def test_train_resume_and_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = MODELS.build(toy_segmentor(8))
    weights = tmp_path / 'teacher.pth'
    torch.save(dict(state_dict=teacher.state_dict()), weights)
    distilled = toy_distiller(teacher=dict(config=toy_segmentor(8), checkpoint=str(weights)))
    cfg = toy_config(distilled, tmp_path / 'unused', max_iters=2)
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, dict(type='TestLoop')
    config = tmp_path / 'toy.py'
    cfg.dump(config)

    run = tmp_path / 'run'
    options = ('--cfg-options', 'model.terms.pixel.loss.loss_weight=0', 'randomness.seed=5')
    call(monkeypatch, 'train.py', config, '--work-dir', run, '--amp', *options)
    content = read_checkpoint(str(run / 'iter_2.pth'))
    assert content['meta']['seed'] == 5
    assert 'AutocastOptimWrapper' in content['mmstructkd']['config']
    logs = [json.loads(line) for path in run.glob('*/vis_data/scalars.json') for line in path.read_text().splitlines()]
    logs = [entry for entry in logs if 'loss' in entry]  # the others are of the validation
    assert [entry['loss_kd_pixel'] for entry in logs] == [0.0, 0.0]
    assert all(entry['loss_kd_pairwise'] > 0 for entry in logs)

    call(monkeypatch, 'train.py', config, '--work-dir', run, '--resume', *options, 'train_cfg.max_iters=3')
    assert read_checkpoint((run / 'last_checkpoint').read_text().strip())['meta']['iter'] == 3

    weights.unlink()  # the teacher is not needed to test
    call(monkeypatch, 'test.py', config, run / 'iter_2.pth', '--work-dir', tmp_path / 'test')
    (result,) = [json.loads(path.read_text()) for path in (tmp_path / 'test').glob('*/*.json')]
    assert 0 <= result['mIoU'] <= 100


def test_test_wants_a_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, 'test.py', 'config.py')
    assert 'a checkpoint is needed' in capsys.readouterr().err


def test_compare_prints_mean_and_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Finished runs are read, not run again."""
    values = {'alone': [40.0, 42.0], 'kd': [43.0, 43.0]}
    for name, numbers in values.items():
        for seed, number in enumerate(numbers):
            folder = tmp_path / f'{name}_seed{seed}'
            log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
            log.parent.mkdir(parents=True)
            steps = [dict(loss=1.0, time=t) for t in (0.1, 0.2, 0.9)]
            log.write_text('\n'.join(json.dumps(entry) for entry in [*steps, dict(mIoU=1.0), dict(mIoU=number)]))
            (folder / 'done').touch()
    arms = ('--arm', 'alone=a.py', '--arm', 'kd=b.py')
    call(monkeypatch, 'compare.py', *arms, '--seeds', 0, 1, '--work-dir', tmp_path, '--out', tmp_path / 'out' / 'table')
    table = (tmp_path / 'out' / 'table.md').read_text()
    assert '| alone | 40.00 | 42.00 | 41.00 | 1.41 | +0.00 | 0.20 |' in table
    assert '| kd | 43.00 | 43.00 | 43.00 | 0.00 | +2.00 | 0.20 |' in table
    assert table.strip() in capsys.readouterr().out
    (tmp_path / 'kd_seed1' / 'done').unlink()
    with pytest.raises(SystemExit, match='b.py with seed 1 failed, see'):
        call(monkeypatch, 'compare.py', *arms, '--seeds', 0, 1, '--work-dir', tmp_path)
