"""A training is run once, its numbers are what was logged, and a failure shows its log."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from mmstructkd.evaluation.metrics import Metric
from mmstructkd.evaluation.training import Training, TrainingError, progress_text, train, training_key

METRICS = (Metric('abs_rel', 'abs rel', digits=3, higher_is_better=False), Metric('d1', 'delta1', factor=100.0))
#: Logs two validations, as a training does that resumes, and writes a checkpoint; each run adds a line to a file.
TOOL = """
import json, pathlib, sys
config, folder = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index('--work-dir') + 1])
with (pathlib.Path(__file__).parent / 'runs').open('a') as runs:
    print(*sys.argv[sys.argv.index('--cfg-options') + 1:], file=runs)
log = folder / '20260101_000000' / 'vis_data' / 'scalars.json'
log.parent.mkdir(parents=True)
steps = [dict(loss=1.0, iter=i, time=0.5) for i in (1, 2)]
log.write_text('\\n'.join(json.dumps(e) for e in [*steps, dict(abs_rel=9.0, d1=0.1), dict(abs_rel=0.25, d1=0.5)]))
(folder / 'iter_2.pth').write_text('weights')
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('train_cfg = dict(max_iters=2)\nwidth = 8\n')
    return path


@pytest.fixture
def tool(tmp_path):
    path = tmp_path / 'train.py'
    path.write_text(TOOL)
    return path


def test_finished_training_is_not_repeated(tool, config, tmp_path, capsys):
    how = dict(name='teacher', metrics=METRICS, seed=3, stage='[1/3] teacher')
    training = train(tool, config, tmp_path / 'run', **how)
    assert training.metrics == {'abs_rel': 0.25, 'd1': 50.0}
    assert training.step_seconds == 0.5
    assert training.checkpoint == str(tmp_path / 'run' / 'iter_2.pth')
    assert 'abs rel 0.250, ' in capsys.readouterr().out
    assert train(tool, config, tmp_path / 'run', **how) == training
    assert '[1/3] teacher  is there already: abs rel 0.250' in capsys.readouterr().out
    assert (tmp_path / 'runs').read_text().splitlines() == ['randomness.seed=3 default_hooks.logger.interval=20']

    train(tool, config, tmp_path / 'run', **how, fresh=True)
    train(tool, config, tmp_path / 'run', **{**how, 'seed': 4})
    (tmp_path / 'run' / 'iter_2.pth').unlink()
    train(tool, config, tmp_path / 'run', **{**how, 'seed': 4})
    (tmp_path / 'run' / 'done.json').write_text('{"name"')
    train(tool, config, tmp_path / 'run', **{**how, 'seed': 4})
    assert len((tmp_path / 'runs').read_text().splitlines()) == 5


def test_teacher_is_handed_over(tool, config, tmp_path):
    checkpoint = tmp_path / 'teacher.pth'
    checkpoint.touch()
    teacher = Training('teacher', 0, {}, 0.1, 1.0, 1.0, str(checkpoint), 'key')
    how = dict(name='student', metrics=METRICS, seed=0, stage='')
    train(tool, config, tmp_path / 'run', **how, teacher=teacher)
    assert f'model.teacher.checkpoint={checkpoint}' in (tmp_path / 'runs').read_text()


def test_metric_that_a_log_lacks(tool, config, tmp_path):
    how = dict(name='student', seed=0, stage='')
    with pytest.raises(TrainingError, match=r"must log 'coco/bbox_mAP', got none\. Its log: "):
        train(tool, config, tmp_path / 'run', metrics=[Metric('coco/bbox_mAP', 'mAP')], **how)
    empty = Metric('coco/bbox_mAP', 'mAP', factor=100.0, if_missing=0.0)
    assert train(tool, config, tmp_path / 'run', metrics=[empty], **how).metrics == {'coco/bbox_mAP': 0.0}


def test_failed_training_shows_its_log(config, tmp_path, capsys):
    tool = tmp_path / 'train.py'
    tool.write_text('raise OSError(28, "No space left on device")\n')
    with pytest.raises(TrainingError, match=r'No space left on device\n.*the training of the teacher failed'):
        train(tool, config, tmp_path / 'run', name='teacher', metrics=METRICS, seed=0, stage='[1/1]')
    assert '[1/1]  FAILED' in capsys.readouterr().out
    assert not (tmp_path / 'run' / 'done.json').exists()


def test_key_follows_config_seed_and_teacher(config, tmp_path):
    key = training_key(config, 0, None)
    assert training_key(config, 0, None) == key
    others = [training_key(config, 1, None)]
    checkpoint = tmp_path / 'teacher.pth'
    for content in ('a', 'b'):
        checkpoint.write_text(content)
        others.append(training_key(config, 0, Training('teacher', 0, {}, 0.1, 1.0, 1.0, str(checkpoint), 'key')))
    config.write_text('train_cfg = dict(max_iters=3)\n')
    others.append(training_key(config, 0, None))
    assert len({key, *others}) == 5


def test_state_in_words():
    entries = [{'loss': 1.5, 'iter': 20, 'time': 0.25}]
    assert progress_text(entries, 40, 3.0) == '  20/40  loss 1.500  0.250 s a step  3 s'
    assert 'validating (3 s)' in progress_text(entries, 20, 3.0)
    assert progress_text([], 40, 3.0) == 'starting (3 s)'


def test_training_survives_json():
    training = Training('teacher', 0, {'d1': 0.5}, 0.1, 1.0, 1.0, 'x.pth', 'key')
    assert Training(**json.loads(json.dumps(asdict(training)))) == training
