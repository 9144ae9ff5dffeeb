"""The quickstart: its configs are fair to both students, its numbers are what was logged, its picture shows them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmstructkd import compat

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def quickstart():
    spec = importlib.util.spec_from_file_location('tool_quickstart', ROOT / 'tools' / 'quickstart.py')
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # a dataclass looks its module up there
        spec.loader.exec_module(module)
        compat.install()
        yield module


@pytest.fixture(scope='module')
def configs(quickstart):
    return {name: ROOT / 'configs' / 'scenes' / file for name, file in quickstart.CONFIGS['segmentation'].items()}


def trained(quickstart, name, seed, metric, checkpoint='x.pth'):
    return quickstart.Training(name, seed, metric, 0.125, 10.0, 20.0, checkpoint, 'key')


def test_students_differ_in_the_distiller_alone(quickstart, configs):
    alone, distilled = (Config.fromfile(configs[name]) for name in (quickstart.ALONE, quickstart.DISTILLED))
    assert distilled.model.student == alone.model
    for key in (set(alone) | set(distilled)) - {'model'}:
        assert alone[key] == distilled[key], key
    assert Config.fromfile(distilled.model.teacher.config).model == Config.fromfile(configs[quickstart.TEACHER]).model


def test_default_teacher_is_the_one_the_quickstart_trains(quickstart, configs):
    out = quickstart.parse_args([]).out
    iterations = Config.fromfile(configs[quickstart.TEACHER]).train_cfg.max_iters
    named = Config.fromfile(configs[quickstart.DISTILLED]).model.teacher.checkpoint
    assert ROOT / named == out / 'teacher' / f'iter_{iterations}.pth'


@pytest.mark.parametrize('file', ['teacher', 'student alone', 'distilled student'])
def test_each_training_ends_with_its_schedule_and_a_validation(configs, file):
    cfg = Config.fromfile(configs[file])
    assert cfg.train_cfg.val_interval == cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--task', 'depth'], "must be one of ['segmentation'], got 'depth'"),
        (['--seeds', '1', '1'], 'different numbers from 0 to 2**32 - 1, got [1, 1]'),
        (['--seeds', '-1'], 'got [-1]'),
        (['--out', __file__], 'which is a file'),
    ],
)
def test_bad_arguments_are_refused(quickstart, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        quickstart.parse_args(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_table_has_mean_and_spread(quickstart):
    trainings = [trained(quickstart, 'teacher', 0, 60.0)]
    trainings += [trained(quickstart, 'student alone', seed, value) for seed, value in enumerate((40.0, 42.0, 44.0))]
    trainings += [trained(quickstart, 'distilled student', seed, value) for seed, value in enumerate((43, 44, 45))]
    names = ('teacher', 'student alone', 'distilled student')
    table = quickstart.make_table(
        trainings, dict.fromkeys(names, (1_500_000, 2 * 10**9)), dict(zip(names, (0.01, 0.002, 0.003), strict=True))
    )
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]
    assert rows[2] == ['teacher', '60.00', '1.500 M', '2.000 G', '10.0 ms', '0.125']
    assert rows[3][:2] == ['student alone', '42.00 ± 2.00']
    assert rows[4][:2] == ['distilled student', '44.00 ± 1.00']
    assert len({len(line) for line in table.splitlines()}) == 1
    words = quickstart.verdict(trainings)
    assert '2.00 ± 1.00 points' in words
    assert '+3.00, +2.00, +1.00' in words


def test_verdict_of_one_seed_says_so(quickstart):
    trainings = [trained(quickstart, 'student alone', 3, 40.0), trained(quickstart, 'distilled student', 3, 39.5)]
    assert '-0.50 points' in quickstart.verdict(trainings)
    assert 'one seed' in quickstart.verdict(trainings)


def test_half_written_log_is_read_up_to_its_end(quickstart, tmp_path):
    log = tmp_path / '20260101_000000' / 'vis_data' / 'scalars.json'
    log.parent.mkdir(parents=True)
    log.write_text('{"loss": 1.5, "iter": 20, "time": 0.25}\n{"loss": 1.2, "it')
    entries = quickstart.read_scalars(tmp_path)
    assert entries == [{'loss': 1.5, 'iter': 20, 'time': 0.25}]
    assert '20/40  loss 1.500  0.250 s a step' in quickstart.how_far(entries, 40, 3.0)
    assert 'starting' in quickstart.how_far([], 40, 3.0)


def test_finished_training_is_found_by_its_key(quickstart, tmp_path):
    checkpoint = tmp_path / 'iter_1.pth'
    training = trained(quickstart, 'teacher', 0, 50.0, str(checkpoint))
    (tmp_path / 'done.json').write_text(json.dumps(asdict(training)))
    assert quickstart.finished(tmp_path, 'key') is None  # its checkpoint is gone
    checkpoint.touch()
    assert quickstart.finished(tmp_path, 'key') == training
    assert quickstart.finished(tmp_path, 'another key') is None
    (tmp_path / 'done.json').write_text('{"name"')
    assert quickstart.finished(tmp_path, 'key') is None


def test_key_follows_config_seed_and_teacher(quickstart, configs, tmp_path):
    key = quickstart.training_key(configs['student alone'], 0, None)
    assert quickstart.training_key(configs['student alone'], 0, None) == key
    others = [quickstart.training_key(configs['student alone'], 1, None)]
    others.append(quickstart.training_key(configs['teacher'], 0, None))
    checkpoint = tmp_path / 'teacher.pth'
    for content in ('a', 'b'):
        checkpoint.write_text(content)
        teacher = trained(quickstart, 'teacher', 0, 50.0, str(checkpoint))
        others.append(quickstart.training_key(configs['distilled student'], 0, teacher))
    assert len({key, *others}) == 5


def test_failed_training_shows_its_log(quickstart, tmp_path, monkeypatch, capsys):
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools' / 'train.py').write_text('raise OSError(28, "No space left on device")\n')
    monkeypatch.setattr(quickstart, 'ROOT', tmp_path)
    config = tmp_path / 'config.py'
    config.write_text('train_cfg = dict(max_iters=1)\n')
    with pytest.raises(SystemExit, match=r'No space left on device\n.*the training of the teacher failed'):
        quickstart.train('teacher', config, tmp_path / 'run', seed=0, stage='[1/1]', fresh=False)
    assert '[1/1]  FAILED' in capsys.readouterr().out
    assert not (tmp_path / 'run' / 'done.json').exists()


def test_picture_and_sizes_of_untrained_students(quickstart, configs, tmp_path):
    cfg = Config.fromfile(configs['student alone'])
    init_default_scope('mmseg')
    network = quickstart.build_network({'model': cfg.model, 'default_scope': 'mmseg'}, 'test')
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'student.pth')
    student = quickstart.load(configs['distilled student'], tmp_path / 'student.pth')
    assert not student.training

    parameters, operations = quickstart.complexity(student, (64, 64))
    assert parameters == sum(p.numel() for p in network.parameters())
    assert quickstart.complexity(student, (128, 128))[1] > 3 * operations  # pooled maps do not grow
    assert all(seconds > 0 for seconds in quickstart.latency([student, student], (32, 32), repeats=2))

    path = tmp_path / 'picture.png'
    quickstart.draw(path, cfg, {'student alone': student}, {'student alone': 12.3})
    picture = cv2.imread(str(path))
    assert picture.shape[1] == 6 + 3 * (256 + 6)
    assert picture.shape[0] > quickstart.ROWS * 256


def test_script_passes_arguments_on(tmp_path):
    """The shell script hands over to the Python of the environment, from any folder."""
    text = (ROOT / 'tools' / 'quickstart.sh').read_text()
    assert subprocess.run(['bash', '-n', str(ROOT / 'tools' / 'quickstart.sh')], check=False).returncode == 0
    copy = tmp_path / 'tools'
    copy.mkdir()
    (copy / 'quickstart.sh').write_text(text)
    (copy / 'setup_env.sh').write_text(f'echo progress >&2\necho {sys.executable}\n')
    (copy / 'quickstart.py').write_text('import sys\nprint(sys.argv[1:])\n')
    ran = subprocess.run(
        ['bash', str(copy / 'quickstart.sh'), '--seeds', '0', '1'], capture_output=True, text=True, check=False, cwd='/'
    )
    assert ran.stdout.strip() == "['--seeds', '0', '1']"
