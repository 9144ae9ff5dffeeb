"""``tools/train.py`` and ``tools/test.py`` as a user calls them, in this process."""

from __future__ import annotations

import json
import pickle
import runpy
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import mmcv
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.models import SegTTAModel

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.datasets.scenes import render_scene
from mmstructkd.optim import AutocastOptimWrapper
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_distiller, toy_segmentor, toy_terms

TOOLS = Path(__file__).parents[2] / 'tools'
SIZE = (48, 64)


def call(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> None:
    """Run a tool with these arguments."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    runpy.run_path(str(TOOLS / tool), run_name='__main__')


def fails(monkeypatch: pytest.MonkeyPatch, tool: str, *arguments: object) -> str:
    """Run a tool that must end with exit code 1 and one line; return the line."""
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, tool, *arguments)
    assert isinstance(end.value.code, str), end.value.code  # Python prints it to stderr and exits with 1
    assert '\n' not in end.value.code
    return end.value.code


def write(cfg: Config, path: Path) -> Path:
    """Write a config that can be tested, too."""
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, dict(type='TestLoop')
    cfg.dump(path)
    return path


def quick(folder: Path, **changes: Any) -> Config:
    """A run of a small distiller with a critic."""
    terms = {name: toy_terms()[name] for name in ('pixel', 'holistic')}
    teacher = dict(config=toy_segmentor(2), allow_random=True)
    cfg = toy_config(toy_distiller(student=toy_segmentor(2), teacher=teacher, terms=terms), folder, max_iters=2)
    cfg.merge_from_dict(changes)
    return cfg


def test_train_resume_and_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = MODELS.build(toy_segmentor(8))
    weights = tmp_path / 'teacher.pth'
    torch.save(dict(state_dict=teacher.state_dict()), weights)
    distilled = toy_distiller(teacher=dict(config=toy_segmentor(8), checkpoint=str(weights)))
    config = write(toy_config(distilled, tmp_path / 'unused', max_iters=2), tmp_path / 'toy.py')

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


def test_resuming_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = write(quick(tmp_path / 'run'), tmp_path / 'toy.py')
    (tmp_path / 'run').mkdir()
    record = tmp_path / 'run' / 'last_checkpoint'
    record.touch()
    assert 'must name a checkpoint, got an empty one' in fails(monkeypatch, 'train.py', config, '--resume')
    record.write_text(str(tmp_path / 'gone.pth'))
    assert 'gone.pth' in fails(monkeypatch, 'train.py', config, '--resume')
    record.unlink()
    assert 'must be a file' in fails(monkeypatch, 'train.py', config, '--resume', tmp_path / 'gone.pth')
    call(monkeypatch, 'train.py', config, '--resume')
    assert 'to resume from: the training begins' in capsys.readouterr().out
    assert record.read_text() == str(tmp_path / 'run' / 'iter_2.pth')


# --- train.py


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """The runners that train.py built."""
    runners: list[Runner] = []
    original = Runner.train

    def train(self: Runner) -> Any:
        runners.append(self)
        return original(self)

    monkeypatch.setattr(Runner, 'train', train)
    return runners


WRAPPERS = {
    'plain': {},
    'no type': dict(type=None),
    'amp': dict(type='AmpOptimWrapper', loss_scale=512.0, dtype='float16'),
    'amp, dynamic': dict(type='mmengine.AmpOptimWrapper', loss_scale='dynamic', use_fsdp=False),
    'autocast': dict(type='mmstructkd.AutocastOptimWrapper', dtype='bfloat16'),
    'with all': dict(
        accumulative_counts=2,
        clip_grad=dict(max_norm=0.5),
        paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}),
    ),
    'with a constructor': dict(
        type='AmpOptimWrapper',
        loss_scale='dynamic',
        constructor='mmengine.DefaultOptimWrapperConstructor',
        paramwise_cfg=dict(bias_lr_mult=2.0),
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason='what --amp does without a GPU')
@pytest.mark.parametrize('settings', WRAPPERS.values(), ids=WRAPPERS)
def test_amp_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Runner], settings: dict[str, Any]
) -> None:
    """The context of the forward changes, and nothing else."""
    cfg = quick(tmp_path / 'run')
    cfg.optim_wrapper.update(settings)
    if settings.get('type', '') is None:
        cfg.optim_wrapper.pop('type')
    call(monkeypatch, 'train.py', write(cfg, tmp_path / 'toy.py'), '--amp')
    built = trained[0].optim_wrapper
    assert isinstance(built, AutocastOptimWrapper)
    assert built._accumulative_counts == settings.get('accumulative_counts', 1)
    assert built.clip_grad_kwargs == settings.get('clip_grad')
    rates = {group['initial_lr'] for group in built.optimizer.param_groups}
    assert len(rates) == 2 + ('paramwise_cfg' in settings)  # the student's and the critic's
    assert (tmp_path / 'run' / 'iter_2.pth').is_file()


def test_amp_needs_a_wrapper_that_it_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = quick(tmp_path / 'run')
    cfg.optim_wrapper.type = 'ApexOptimWrapper'
    assert "got optim_wrapper.type='ApexOptimWrapper'" in fails(
        monkeypatch, 'train.py', write(cfg, tmp_path / 'toy.py'), '--amp'
    )


@pytest.mark.parametrize('options', [(), ('--amp',)])
def test_scaled_learning_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: list[Runner], options: tuple
) -> None:
    """Batches of 2 where the rates are for 8: a quarter, the critic's own rate too."""
    cfg = quick(tmp_path / 'run')
    cfg.param_scheduler = []
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=8)
    config = write(cfg, tmp_path / 'toy.py')
    call(monkeypatch, 'train.py', config, *options)
    call(monkeypatch, 'train.py', config, '--auto-scale-lr', '--work-dir', tmp_path / 'scaled', *options)
    plain, scaled = ([group['lr'] for group in r.optim_wrapper.optimizer.param_groups] for r in trained)
    assert scaled == [rate / 4 for rate in plain]
    assert len(set(plain)) == 2


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (None, 'auto_scale_lr.base_batch_size in the config, got None'),
        (dict(enable=True), "got {'enable': True}"),
        (dict(base_batch_size=0), '`auto_scale_lr.base_batch_size` must be a finite number above 0, got 0'),
        (dict(base_batch_size='16'), "got '16'"),
    ],
)
def test_scaled_learning_rates_need_a_batch_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict | None, message: str
) -> None:
    cfg = quick(tmp_path / 'run')
    if settings is not None:
        cfg.auto_scale_lr = settings
    assert message in fails(monkeypatch, 'train.py', write(cfg, tmp_path / 'toy.py'), '--auto-scale-lr')


def test_mistakes_end_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Of a tap, of a weight that makes the loss infinite, of the command line; a bug keeps its traceback."""
    config = write(quick(tmp_path / 'run'), tmp_path / 'toy.py')

    def with_options(*options: str) -> str:
        return fails(monkeypatch, 'train.py', config, '--cfg-options', *options)

    assert "TapError: term 'pixel'" in with_options('model.terms.pixel.tap=decode_head.conv_sg')
    assert 'FloatingPointError: iteration ' in with_options('model.terms.pixel.loss.loss_weight=1e38')
    assert "Did you mean 'optim_wrapper'?" in with_options('optim_wraper.optimizer.lr=1')
    assert '`--cfg-options` must fit the config' in with_options('work_dir.x=1')
    assert "Did you mean 'toy.py'?" in fails(monkeypatch, 'train.py', tmp_path / 'toi.py')
    (tmp_path / 'broken.py').write_text('model = dict(')
    assert 'must be a readable config' in fails(monkeypatch, 'train.py', tmp_path / 'broken.py')
    assert "got 'FlexibelRunner'. Did you mean 'FlexibleRunner' or" in with_options('runner_type=FlexibelRunner')
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, 'train.py', config, '--cfg-options', 'train_cfg.max_iters')
    assert end.value.code == 2
    assert "--cfg-options must be followed by key=value, got 'train_cfg.max_iters'" in capsys.readouterr().err

    def bug(self: Runner) -> None:
        raise ZeroDivisionError('a bug')

    monkeypatch.setattr(Runner, 'train', bug)
    with pytest.raises(ZeroDivisionError):
        call(monkeypatch, 'train.py', config)


# --- test.py


def test_test_wants_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        call(monkeypatch, 'test.py', 'config.py')
    assert 'a checkpoint is needed' in capsys.readouterr().err
    config = write(quick(tmp_path), tmp_path / 'toy.py')
    assert 'gone.pth' in fails(monkeypatch, 'test.py', config, tmp_path / 'gone.pth')


class Case:
    """A config and a checkpoint of a task, and the images that it is tested on, as files."""

    def __init__(self, task: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        networks = {'seg': toy_segmentor, 'depth': toy_depth_estimator, 'det': toy_detector}
        student, teacher = (networks[task](width=width) for width in (2, 4))
        tap = 'neck[0]' if task == 'det' else 'backbone[3]'
        terms = dict(feature=dict(tap=tap, loss=dict(type='mmstructkd.ChannelwiseKLLoss')))
        model = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
        self.cfg = toy_config(model, folder / 'unused', task=task)
        self.cfg.val_dataloader.dataset.num_scenes = 2
        self.cfg.default_hooks.visualization = dict(
            type='DetVisualizationHook' if task == 'det' else 'SegVisualizationHook'
        )
        kind = 'DetLocalVisualizer' if task == 'det' else 'SegLocalVisualizer'
        self.cfg.visualizer = dict(type=kind, vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
        self.folder, self.monkeypatch = folder, monkeypatch
        self.checkpoint = folder / 'student.pth'
        built = MODELS.build(student)
        torch.save({'state_dict': built.state_dict(), 'meta': {}}, self.checkpoint)
        for index in range(1_000_000, 1_000_002):
            mmcv.imwrite(render_scene(0, index, SIZE).image[..., ::-1], str(folder / f'scene_0_{index:07d}.png'))
        monkeypatch.chdir(folder)  # the names of the images are relative

    def arguments(self, *options: object) -> tuple:
        config = write(self.cfg, self.folder / 'toy.py')
        return (self.monkeypatch, 'test.py', config, self.checkpoint, '--work-dir', self.folder / 'work', *options)

    def test(self, *options: object) -> dict[str, float]:
        """Run test.py and return the scores."""
        before = set(self.folder.glob('work/*/*.json'))
        call(*self.arguments(*options))
        (scores,) = set(self.folder.glob('work/*/*.json')) - before
        result = json.loads(scores.read_text())
        scores.unlink()
        return result

    def refused(self, *options: object) -> str:
        return fails(*self.arguments(*options))


@pytest.fixture
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(request.param, tmp_path, monkeypatch)


@pytest.mark.parametrize('case', ['seg', 'depth', 'det'], indirect=True)
def test_predictions_in_a_file(case: Case) -> None:
    case.test('--out', 'predictions.pkl')
    predictions = pickle.loads((case.folder / 'predictions.pkl').read_bytes())
    assert len(predictions) == 2
    assert all(any(key.startswith('pred_') for key in one) for one in predictions)
    assert all('gt_instances' not in one for one in predictions)


@pytest.mark.parametrize('case', ['seg', 'depth'], indirect=True)
def test_predictions_in_a_folder(case: Case) -> None:
    case.cfg.val_evaluator = [case.cfg.val_evaluator]  # one of several
    case.test('--out', case.folder / 'maps')
    assert sorted(path.name for path in (case.folder / 'maps').glob('*.png')) == [
        'scene_0_1000000.png',
        'scene_0_1000001.png',
    ]


@pytest.mark.parametrize('case', ['det'], indirect=True)
def test_a_detector_has_no_folder(case: Case) -> None:
    assert '`--out` must end in .pkl or .pickle for a detector' in case.refused('--out', 'boxes')


@pytest.mark.parametrize('case', ['seg', 'det'], indirect=True)
def test_drawn_predictions(case: Case) -> None:
    case.test('--show-dir', 'drawn')
    drawn = [path for path in case.folder.rglob('*.png') if 'drawn' in path.parts]
    assert len(drawn) == 2, [str(path) for path in case.folder.rglob('*.png')]


@pytest.mark.parametrize('case', ['seg', 'det'], indirect=True)
def test_shown_predictions(case: Case) -> None:
    shown = []
    hold = 'mmengine.visualization.visualizer.Visualizer.show'
    case.monkeypatch.setattr(hold, lambda self, image, win_name, wait_time: shown.append((win_name, wait_time)))
    assert 'test.py: `--show` must have a display, got none that matplotlib can use' in case.refused('--show')
    assert not shown
    figure = plt.figure()
    case.monkeypatch.setattr(type(figure.canvas), 'required_interactive_framework', 'a toolkit')
    plt.close(figure)
    case.test('--show', '--wait-time', '0.5')
    assert [wait for _, wait in shown] == [0.5, 0.5]


@pytest.mark.parametrize('case', ['seg', 'det'], indirect=True)
def test_drawing_needs_a_hook(case: Case) -> None:
    case.cfg.default_hooks.pop('visualization')
    assert "Add default_hooks=dict(visualization=dict(type='" in case.refused('--show-dir', 'drawn')
    if case.cfg.default_scope == 'mmseg':
        case.cfg.default_hooks.visualization = dict(type='SegVisualizationHook')
        case.cfg.pop('visualizer')
        assert 'must find a visualizer that writes' in case.refused('--show-dir', 'drawn')


def flips(pack: dict) -> list[dict]:
    """Both mirror images."""
    return [
        dict(type='mmstructkd.LoadScene'),
        dict(
            type='TestTimeAug',
            transforms=[
                [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
                [dict(type='mmstructkd.LoadSceneAnnotations')],
                [pack],
            ],
        ),
    ]


@pytest.mark.parametrize('case', ['seg'], indirect=True)
def test_augmented_segmentation(case: Case) -> None:
    assert 'got no tta_model and no tta_pipeline' in case.refused('--tta')
    case.cfg.tta_model = dict(type='SegTTAModel')
    message = case.refused('--tta')
    assert 'got no tta_pipeline' in message
    assert 'no tta_model' not in message
    case.cfg.tta_pipeline = flips(dict(type='PackSegInputs'))
    merged = []
    original = SegTTAModel.merge_preds

    def merge(self: SegTTAModel, views: list) -> list:
        merged.append(len(views[0]))
        return original(self, views)

    case.monkeypatch.setattr(SegTTAModel, 'merge_preds', merge)
    assert 'mIoU' in case.test('--tta', '--out', 'predictions.pkl')
    assert merged == [2, 2]
    assert len(pickle.loads((case.folder / 'predictions.pkl').read_bytes())) == 2


@pytest.mark.parametrize('case', ['det'], indirect=True)
def test_augmented_detection(case: Case, capsys: pytest.CaptureFixture) -> None:
    """mmdet has a default for both, also behind a wrapper of the dataset."""
    inner = case.cfg.val_dataloader.dataset
    case.cfg.val_dataloader.dataset = dict(type='RepeatDataset', times=1, dataset=inner)
    case.test('--tta', '--out', 'predictions.pkl')
    assert "There is no tta_model in the config: mmdet's default is taken" in capsys.readouterr().out
    first, *_ = pickle.loads((case.folder / 'predictions.pkl').read_bytes())
    assert len(first['pred_instances']['scores']) <= 100


def test_a_config_without_a_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(tmp_path).dump(tmp_path / 'toy.py')
    message = fails(monkeypatch, 'test.py', tmp_path / 'toy.py', tmp_path / 'x.pth')
    assert 'must say how to test, got no test_dataloader, test_evaluator, test_cfg' in message


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
