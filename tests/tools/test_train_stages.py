"""Chained runs: each stage begins with what the one before has left, and a config's own checkpoint is never ignored."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor, toy_terms

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import train_stages  # noqa: E402

TERMS = {name: toy_terms()[name] for name in ('pixel', 'feature')}


def write(folder: Path, name: str, model: dict, **changes: Any) -> str:
    cfg = toy_config(model, folder / 'unused', max_iters=2, **changes)
    cfg.pop('work_dir')
    cfg.dump(folder / f'{name}.py')
    return str(folder / f'{name}.py')


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command of each stage that was started, with the options given to it."""
    commands: list[list[str]] = []
    run = train_stages.subprocess.run

    def note(command: list[str], **settings: Any) -> Any:
        commands.append(command)
        return run(command, env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}, **settings)

    monkeypatch.setattr(train_stages.subprocess, 'run', note)
    return commands


def test_two_stages_and_again(tmp_path: Path, ran: list[list[str]]) -> None:
    """The second begins with the first one's student and connector; a second call starts nothing."""
    first = write(tmp_path, 'hint', toy_distiller(terms={'feature': TERMS['feature']}))
    still = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-30))
    second = write(tmp_path, 'both', toy_distiller(terms=TERMS), optim_wrapper=still, param_scheduler=[])
    arguments = [first, second, '--work-dir', str(tmp_path / 'all'), '--cfg-options', 'log_level=ERROR']
    files = train_stages.train(train_stages.parse_args(arguments))
    assert [Path(file).relative_to(tmp_path).as_posix() for file in files] == [
        'all/1_hint/iter_2.pth',
        'all/2_both/iter_2.pth',
    ]
    assert ran[1][-2:] == [f'load_from={files[0]}', f'model.training_state_from={files[0]}']
    one, two = (read_checkpoint(file) for file in files)
    weights = [key for key, value in one['state_dict'].items() if 'running' not in key and value.is_floating_point()]
    assert all(one['state_dict'][key].equal(two['state_dict'][key]) for key in weights)
    kept = one['mmstructkd']['terms']
    assert kept
    assert all(value.equal(two['mmstructkd']['terms'][key]) for key, value in kept.items())
    assert train_stages.train(train_stages.parse_args(arguments)) == files
    assert len(ran) == 2


def test_a_stage_that_was_stopped_is_resumed(tmp_path: Path, ran: list[list[str]]) -> None:
    """It goes on from its own checkpoint, not from the student of the stage before."""
    first = write(tmp_path, 'first', toy_segmentor(4))
    train_stages.train(train_stages.parse_args([first, '--work-dir', str(tmp_path / 'w')]))
    cfg = Config.fromfile(first)
    cfg.train_cfg.max_iters = 4
    cfg.dump(first)
    (last,) = train_stages.train(train_stages.parse_args([first, '--work-dir', str(tmp_path / 'w')]))
    assert ran[1][-2:] == ['--resume', str(tmp_path / 'w' / '1_first' / 'iter_2.pth')]
    assert read_checkpoint(last)['meta']['iter'] == 4


@pytest.mark.parametrize(
    ('meta', 'loop', 'finished'),
    [
        (dict(iter=4, epoch=1), dict(max_iters=4), True),
        (dict(iter=2, epoch=1), dict(max_iters=4), False),
        (dict(iter=40, epoch=2), dict(by_epoch=True, max_epochs=2), True),
        (dict(iter=40, epoch=1), dict(by_epoch=True, max_epochs=2), False),
    ],
)
def test_when_a_stage_is_over(meta: dict, loop: dict, finished: bool) -> None:
    assert train_stages.is_finished({'meta': meta}, Config(dict(train_cfg=loop))) is finished


def cfg_of(model: dict, **changes: Any) -> Config:
    return toy_config(model, 'x', **changes)


def test_what_a_config_says_itself_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    state = {'mmstructkd': {}}
    own = cfg_of(toy_distiller(training_state_from='mine.pth'), load_from='own.pth')
    assert train_stages.additions(own, 'before.pth', state) == []
    told = capsys.readouterr().out
    assert "load_from='own.pth' itself, which is kept" in told
    assert "training_state_from='mine.pth' itself, which is kept" in told


def test_what_is_filled_in() -> None:
    distilled, plain = cfg_of(toy_distiller()), cfg_of(toy_segmentor(4))
    both = ['load_from=a.pth', 'model.training_state_from=a.pth']
    assert train_stages.additions(distilled, 'a.pth', {'mmstructkd': {}}) == both
    assert train_stages.additions(distilled, 'a.pth', {}) == both[:1]  # behind a plain run
    assert train_stages.additions(plain, 'a.pth', {'mmstructkd': {}}) == both[:1]
    assert train_stages.additions(distilled, None, {}) == []


def test_mistakes_are_found_before_the_first_stage_is_trained(tmp_path: Path, ran: list[list[str]]) -> None:
    good = write(tmp_path, 'good', toy_segmentor(4))
    Path(tmp_path, 'endless.py').write_text("model = dict(type='x')\n", encoding='utf-8')
    for other in (str(tmp_path / 'goood.py'), str(tmp_path / 'endless.py')):
        with pytest.raises(ConfigError, match=r'train_stages: `(config|train_cfg)` must'):
            train_stages.train(train_stages.parse_args([good, other, '--work-dir', str(tmp_path / 'w')]))
    assert ran == []


def test_a_stage_without_a_last_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write(tmp_path, 'good', toy_segmentor(4))
    monkeypatch.setattr(train_stages.subprocess, 'run', lambda command, check: None)
    with pytest.raises(CheckpointError, match='stage 1 must leave a checkpoint of its end'):
        train_stages.train(train_stages.parse_args([good, '--work-dir', str(tmp_path / 'w')]))
