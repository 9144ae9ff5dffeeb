"""The quickstart: its configs are fair to both students, its numbers are what was logged, its picture shows them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmstructkd import compat
from mmstructkd.evaluation.training import Training
from mmstructkd.teachers.loading import build_network, load_student

ROOT = Path(__file__).resolve().parents[2]
TASKS = ('segmentation', 'depth', 'detection')
tasks = pytest.mark.parametrize('task', TASKS)


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
    scenes = ROOT / 'configs' / 'scenes'
    return {
        task: {name: scenes / file for name, file in quickstart.TASKS[task].configs.items()}
        for task in quickstart.TASKS
    }


def trained(name, seed, metrics, checkpoint='x.pth'):
    return Training(name, seed, metrics, 0.125, 10.0, 20.0, checkpoint, 'key')


def cells(table):
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()]


def test_every_task_is_tested(quickstart):
    assert tuple(quickstart.TASKS) == TASKS


@tasks
def test_students_differ_in_the_distiller_alone(quickstart, configs, task):
    alone, distilled = (Config.fromfile(configs[task][name]) for name in (quickstart.ALONE, quickstart.DISTILLED))
    assert distilled.model.student == alone.model
    for key in (set(alone) | set(distilled)) - {'model'}:
        assert alone[key] == distilled[key], key
    teacher = Config.fromfile(configs[task][quickstart.TEACHER])
    assert Config.fromfile(distilled.model.teacher.config).model == teacher.model


@tasks
def test_default_teacher_is_the_one_the_quickstart_trains(quickstart, configs, task):
    out = quickstart.parse_args(['--task', task]).out
    iterations = Config.fromfile(configs[task][quickstart.TEACHER]).train_cfg.max_iters
    named = Config.fromfile(configs[task][quickstart.DISTILLED]).model.teacher.checkpoint
    assert ROOT / named == out / 'teacher' / f'iter_{iterations}.pth'


def test_segmentation_is_what_no_argument_means(quickstart):
    assert quickstart.parse_args([]).task == 'segmentation'
    assert quickstart.parse_args([]).out == ROOT / 'work_dirs' / 'quickstart'
    assert quickstart.parse_args(['--task', 'depth', '--out', 'here']).out == Path('here')


@tasks
@pytest.mark.parametrize('name', ['teacher', 'student alone', 'distilled student'])
def test_each_training_ends_with_its_schedule_and_a_validation(configs, task, name):
    cfg = Config.fromfile(configs[task][name])
    assert cfg.train_cfg.val_interval == cfg.train_cfg.max_iters == cfg.param_scheduler[-1].end
    assert str(cfg.train_cfg.max_iters) in configs[task][name].stem.split('_')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--task', 'pose'], "must be one of ['depth', 'detection', 'segmentation'], got 'pose'"),
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
    task = quickstart.TASKS['segmentation']
    trainings = [trained('teacher', 0, {'mIoU': 60.0})]
    trainings += [trained('student alone', seed, {'mIoU': value}) for seed, value in enumerate((40.0, 42.0, 44.0))]
    trainings += [trained('distilled student', seed, {'mIoU': value}) for seed, value in enumerate((43.0, 44.0, 45.0))]
    names = ('teacher', 'student alone', 'distilled student')
    table = quickstart.make_table(
        task,
        trainings,
        dict.fromkeys(names, (1_500_000, 2 * 10**9)),
        dict(zip(names, (0.01, 0.002, 0.003), strict=True)),
    )
    rows = cells(table)
    assert rows[0] == ['', 'mIoU', 'parameters', 'multiply-adds', 'latency', 'seconds a step']
    assert rows[2] == ['teacher', '60.00', '1.500 M', '2.000 G', '10.0 ms', '0.125']
    assert rows[3][:2] == ['student alone', '42.00 ± 2.00']
    assert rows[4][:2] == ['distilled student', '44.00 ± 1.00']
    assert len({len(line) for line in table.splitlines()}) == 1
    words = quickstart.verdict(task, trainings)
    assert 'has 2.00 ± 1.00 points of mIoU more than the student alone' in words
    assert '+3.00, +2.00, +1.00' in words


def test_lower_error_is_a_gain(quickstart):
    task = quickstart.TASKS['depth']
    values = {'student alone': (0.30, 0.32), 'distilled student': (0.25, 0.29)}
    trainings = [
        trained(name, seed, {'abs_rel': number, 'rmse': 2.0, 'd1': 60.0})
        for name, numbers in {'teacher': (0.2,), **values}.items()
        for seed, number in enumerate(numbers)
    ]
    sizes = dict.fromkeys(task.configs, (10**6, 10**9))
    rows = cells(quickstart.make_table(task, trainings, sizes, dict.fromkeys(task.configs, 0.1)))
    assert rows[0][:4] == ['', 'abs rel', 'RMSE', 'delta1']
    assert rows[3][:4] == ['student alone', '0.310 ± 0.014', '2.00 ± 0.00', '60.00 ± 0.00']
    words = quickstart.verdict(task, trainings)
    assert 'is lower than that of the student alone by 0.040 ± 0.014 (seed by seed: +0.050, +0.030)' in words
    worse = [trained(t.name, t.seed, {'abs_rel': 1 - t.metrics['abs_rel']}) for t in trainings]
    assert 'by -0.040 ± 0.014' in quickstart.verdict(task, worse)


def test_verdict_of_one_seed_says_so(quickstart):
    trainings = [
        trained('student alone', 3, {'coco/bbox_mAP': 40.0}),
        trained('distilled student', 3, {'coco/bbox_mAP': 39.5}),
    ]
    words = quickstart.verdict(quickstart.TASKS['detection'], trainings)
    assert '-0.50 points of mAP' in words
    assert 'one seed' in words


@tasks
def test_metrics_are_those_of_the_evaluator(quickstart, configs, task):
    """What the log calls them is what the config's metric computes."""
    cfg = Config.fromfile(configs[task]['student alone'])
    keys = [metric.key for metric in quickstart.TASKS[task].metrics]
    evaluator = cfg.val_evaluator.type
    if evaluator == 'DepthMetric':
        from mmseg.evaluation import DepthMetric

        assert set(keys) <= set(DepthMetric.METRICS)
    elif evaluator == 'CocoMetric':
        from mmdet.evaluation import CocoMetric

        assert cfg.val_evaluator.metric == 'bbox'
        assert all(key.startswith(f'{CocoMetric.default_prefix}/bbox_mAP') for key in keys)
    else:
        assert keys == list(cfg.val_evaluator.iou_metrics)


@tasks
def test_report_of_untrained_networks(quickstart, configs, task, tmp_path, monkeypatch, capsys):
    """Everything after the trainings: measured, drawn, written and printed."""
    chosen = quickstart.TASKS[task]
    monkeypatch.setattr(quickstart, 'ROWS', 2)
    monkeypatch.setattr(quickstart, 'latency', lambda networks, size: [0.001] * len(networks))
    trainings = []
    for name in chosen.configs:
        plain = 'student alone' if name == 'distilled student' else name
        cfg = Config.fromfile(configs[task][plain])
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        path = tmp_path / f'{name}.pth'
        network = build_network({'model': cfg.model, 'default_scope': cfg.default_scope}, 'test')
        torch.save({'state_dict': network.state_dict()}, path)
        metrics = {metric.key: 12.5 for metric in chosen.metrics}
        trainings.append(trained(name, 0, metrics, str(path)))
    source = load_student(cfg, trainings[-1].checkpoint, owner='test').state_dict()
    monkeypatch.setattr(
        quickstart, 'export', lambda config, training, target, log: torch.save({'state_dict': source}, target)
    )
    args = quickstart.parse_args(['--task', task, '--out', str(tmp_path)])
    quickstart.report(args, chosen, configs[task], trainings)

    shown = capsys.readouterr().out
    table = (tmp_path / 'table.md').read_text()
    assert table.strip() in shown
    assert chosen.units in table
    rows = cells('\n'.join(table.splitlines()[:5]))
    assert float(rows[2][-4].split()[0]) > 4 * float(rows[3][-4].split()[0]) > 0  # parameters
    assert float(rows[2][-3].split()[0]) > 4 * float(rows[3][-3].split()[0]) > 0  # multiply-adds
    assert rows[3][-4:-2] == rows[4][-4:-2]
    numbers = json.loads((tmp_path / 'results.json').read_text())
    assert [number['name'] for number in numbers] == list(chosen.configs)
    assert numbers[0]['metrics'] == metrics
    picture = cv2.imread(str(tmp_path / 'picture.png'))
    assert picture.shape[1] == 6 + 5 * (256 + 6)
    assert picture.shape[0] > 2 * 256


def test_failed_export_shows_its_log(quickstart, tmp_path, monkeypatch):
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools' / 'export_student.py').write_text('raise SystemExit("no such key")\n')
    monkeypatch.setattr(quickstart, 'ROOT', tmp_path)
    with pytest.raises(quickstart.TrainingError, match=r'no such key\s+quickstart: the export failed'):
        quickstart.export(Path('c.py'), trained('distilled student', 0, {}), tmp_path / 'out.pth', tmp_path / 'log')


def test_failed_training_ends_the_quickstart(quickstart, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise quickstart.TrainingError('no space left')

    monkeypatch.setattr(quickstart, 'train', fail)
    assert quickstart.main(['--task', 'depth', '--out', str(tmp_path / 'out')]) == 1
    assert 'no space left' in capsys.readouterr().err


def test_trainings_are_asked_for_with_their_teacher(quickstart, configs, tmp_path, monkeypatch):
    asked = []

    def train(tool, config, folder, **how):
        asked.append((config.name, folder.name, how['seed'], how.get('teacher')))
        assert how['metrics'] == quickstart.TASKS['detection'].metrics
        return trained(how['name'], how['seed'], {})

    monkeypatch.setattr(quickstart, 'train', train)
    args = quickstart.parse_args(['--task', 'detection', '--out', str(tmp_path), '--seeds', '0', '5'])
    teacher, *students = quickstart.train_all(args, quickstart.TASKS['detection'], configs['detection'])
    assert [(t.name, t.seed) for t in students] == [
        (name, seed) for seed in (0, 5) for name in ('student alone', 'distilled student')
    ]
    assert [entry[1:] for entry in asked] == [
        ('teacher', 0, None),
        ('student_alone_seed0', 0, None),
        ('distilled_student_seed0', 0, teacher),
        ('student_alone_seed5', 5, None),
        ('distilled_student_seed5', 5, teacher),
    ]


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
