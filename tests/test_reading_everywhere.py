"""Every way into a checkpoint: through runners, models, mmseg, mmdet and the tools; none runs code unasked."""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import mmengine.runner.checkpoint
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hub import get_model
from mmengine.registry import init_default_scope
from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint, load_checkpoint, load_from_local

from mmstructkd import checkpoints, compat
from mmstructkd.checkpoints import trusted_checkpoints
from mmstructkd.distillers import FrozenTeacher
from mmstructkd.distillers.preflight import build_distiller
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.teachers.loading import build_network
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor, toy_terms
from tests.attacks import attack
from tests.tools.conftest import detector, load_tool, run_tool  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]
IN_CONFIG = 'trust_checkpoint=True at the top of the config, or --trust-checkpoint'
IN_CODE = 'trusted_checkpoints() of mmstructkd.checkpoints'
compat.install()


@pytest.fixture(scope='module')
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Content of a checkpoint of a plain toy run."""
    folder = tmp_path_factory.mktemp('good')
    Runner.from_cfg(toy_config(toy_segmentor(4), folder, max_iters=2)).train()
    return torch.load(folder / 'iter_2.pth', weights_only=False)


def run_of(folder: Path, model: dict | None = None, **changes: Any) -> Runner:
    return Runner.from_cfg(toy_config(model or toy_segmentor(4), folder / 'work', **changes))


def pretrained(folder: Path, file: Path, trust: dict, **init: Any) -> None:
    model = toy_segmentor(4)
    model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(file), **init)
    run_of(folder, model, max_iters=1, **trust).train()


def resume_latest(folder: Path, file: Path, trust: dict) -> None:
    (folder / 'work').mkdir()
    (folder / 'work' / 'last_checkpoint').write_text(str(file))
    run_of(folder, resume=True, max_iters=3, **trust).train()


def flexible(folder: Path, file: Path, trust: dict, resume: bool) -> None:
    cfg = toy_config(toy_segmentor(4), folder / 'work', max_iters=3, load_from=str(file), resume=resume, **trust)
    cfg.pop('randomness')
    FlexibleRunner.from_cfg(cfg).train()


#: What a runner reads, by name: folder, file and the config's consent.
RUNNERS: dict[str, Callable[[Path, Path, dict], Any]] = {
    'load_from': lambda d, f, t: run_of(d, load_from=str(f), max_iters=1, **t).train(),
    'resume': lambda d, f, t: run_of(d, load_from=str(f), resume=True, max_iters=3, **t).train(),
    'resume the latest': resume_latest,
    'test': lambda d, f, t: run_of(
        d, load_from=str(f), test_cfg=dict(type='TestLoop'), test_evaluator=dict(type='IoUMetric'),
        test_dataloader=toy_config({}, d).val_dataloader, **t).test(),
    'val': lambda d, f, t: run_of(d, load_from=str(f), **t).val(),
    'load_checkpoint': lambda d, f, t: run_of(d, **t).load_checkpoint(str(f)),
    'init_cfg': pretrained,
    'init_cfg with a prefix': functools.partial(pretrained, prefix='backbone.'),
    'pretrained': lambda d, f, t: run_of(d, toy_segmentor(4, pretrained=str(f)), max_iters=1, **t).train(),
    'distilled load_from': lambda d, f, t: run_of(
        d, toy_distiller(terms=dict(pixel=toy_terms()['pixel'])), load_from=str(f), max_iters=1, **t).train(),
    'distilled student init_cfg': lambda d, f, t: run_of(
        d, toy_distiller(student=toy_segmentor(4, pretrained=str(f)), terms=dict(pixel=toy_terms()['pixel'])),
        max_iters=1, **t).train(),
    'FlexibleRunner load_from': functools.partial(flexible, resume=False),
    'FlexibleRunner resume': functools.partial(flexible, resume=True),
    'check_config load_from': lambda d, f, t: build_distiller(
        toy_config(toy_distiller(terms=dict(pixel=toy_terms()['pixel'])), d, load_from=str(f), **t)),
    'check_config init_cfg': lambda d, f, t: build_distiller(toy_config(
        toy_distiller(student=toy_segmentor(4, pretrained=str(f)), terms=dict(pixel=toy_terms()['pixel'])), d, **t)),
}  # fmt: skip


def plain(folder: Path) -> Config:
    return toy_config(toy_segmentor(4), folder, test_dataloader=toy_config({}, folder).val_dataloader)


def through_mmseg(folder: Path, file: Path) -> None:
    from mmseg.apis import init_model

    init_model(plain(folder), str(file), device='cpu')


def through_an_inferencer(folder: Path, file: Path) -> None:
    from mmseg.apis import MMSegInferencer

    cfg = plain(folder)
    cfg.visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
    cfg.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    cfg.dump(folder / 'plain.py')
    MMSegInferencer(str(folder / 'plain.py'), str(file), device='cpu')


def from_the_hub(folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    cfg = plain(folder)
    cfg.model_path = str(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.hub.hub.get_config', lambda *args, **kwargs: cfg)
        get_model('mmseg::any.py', pretrained=True)


#: What reads outside of a runner.
FUNCTIONS: dict[str, Callable[[Path, Path], Any]] = {
    'CheckpointLoader': lambda d, f: CheckpointLoader.load_checkpoint(str(f)),
    '_load_checkpoint': lambda d, f: _load_checkpoint(str(f), map_location='cpu'),
    'load_checkpoint': lambda d, f: load_checkpoint(build_network(toy_segmentor(4), 'test'), str(f)),
    'load_from_local': lambda d, f: load_from_local(str(f), None),
    'init_model': through_mmseg,
    'inferencer': through_an_inferencer,
    'hub': from_the_hub,
}


def refused(info: pytest.ExceptionInfo, file: Path, way_out: str, canary: Path) -> None:
    text = str(info.value)
    assert str(file) in text
    assert "'posix.system'" in text
    assert way_out in text
    assert not canary.exists()


@pytest.fixture
def bad(tmp_path: Path, good: dict) -> tuple[Path, Path]:
    """A whole checkpoint that would make a canary, and the canary."""
    return attack(tmp_path / 'bad.pth', tmp_path / 'canary', content=good), tmp_path / 'canary'


@pytest.fixture
def more(tmp_path: Path, good: dict) -> Path:
    """A whole checkpoint that needs more than plain types, and harms nobody."""
    torch.save({**good, 'more': types.SimpleNamespace(a=1)}, tmp_path / 'more.pth')
    return tmp_path / 'more.pth'


@pytest.mark.parametrize('entry', RUNNERS)
def test_runners_run_no_code_without_consent(entry: str, bad: tuple[Path, Path], more: Path, tmp_path: Path) -> None:
    file, canary = bad
    with pytest.raises(CheckpointError) as info:
        RUNNERS[entry](tmp_path / 'no', file, {}) if (tmp_path / 'no').mkdir() is None else None
    refused(info, file, IN_CONFIG, canary)
    (tmp_path / 'yes').mkdir()
    RUNNERS[entry](tmp_path / 'yes', more, dict(trust_checkpoint=True))


@pytest.mark.parametrize('entry', FUNCTIONS)
def test_functions_run_no_code_without_consent(entry: str, bad: tuple[Path, Path], more: Path, tmp_path: Path) -> None:
    init_default_scope('mmseg')
    file, canary = bad
    with pytest.raises(CheckpointError) as info:
        FUNCTIONS[entry](tmp_path, file)
    refused(info, file, IN_CODE, canary)
    with trusted_checkpoints():
        FUNCTIONS[entry](tmp_path, more)


def test_mmdet_runs_no_code(bad: tuple[Path, Path], tmp_path: Path, detector: Callable) -> None:  # noqa: F811
    from mmdet.apis import init_detector

    with pytest.raises(CheckpointError) as info:
        init_detector(Config(dict(model=detector(4), default_scope='mmdet')), str(bad[0]), device='cpu')
    refused(info, bad[0], IN_CODE, bad[1])


def test_the_teacher_has_its_own_consent(bad: tuple[Path, Path], more: Path, tmp_path: Path) -> None:
    for file in (bad[0], more):
        with pytest.raises(CheckpointError, match='trust_checkpoint=True in `teacher`'):
            FrozenTeacher(toy_segmentor(4), str(file))
    model = toy_distiller(teacher=dict(config=toy_segmentor(4), checkpoint=str(bad[0])))
    with pytest.raises(CheckpointError) as info:  # that of the config is for other files
        run_of(tmp_path, model, trust_checkpoint=True)
    refused(info, bad[0], 'trust_checkpoint=True in `teacher`', bad[1])
    assert FrozenTeacher(toy_segmentor(4), str(more), trust_checkpoint=True).hash
    model.teacher.update(checkpoint=str(more), trust_checkpoint=True)
    with pytest.raises(CheckpointError, match='at the top of the config'):  # and the teacher's for the teacher
        run_of(tmp_path, model, load_from=str(more)).load_or_resume()


@pytest.mark.parametrize('value', ['no', 'True', 1, 0, None])
def test_consent_in_a_config_is_a_real_bool(value: Any, tmp_path: Path, bad: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match='config: `trust_checkpoint` must be True or False, got'):
        run_of(tmp_path, load_from=str(bad[0]), trust_checkpoint=value)
    assert not bad[1].exists()


def test_consent_is_of_one_runner(more: Path, tmp_path: Path) -> None:
    careful = run_of(tmp_path / 'a', load_from=str(more))
    trusting = run_of(tmp_path / 'b', load_from=str(more), trust_checkpoint=True)
    with pytest.raises(CheckpointError):
        careful.load_or_resume()
    trusting.load_or_resume()
    with pytest.raises(CheckpointError):
        careful.load_checkpoint(str(more))
    with pytest.raises(CheckpointError):
        load_from_local(str(more), None)


@pytest.mark.parametrize('runner', ['Runner', 'FlexibleRunner'])
def test_resuming_runs_no_config_text(runner: str, good: dict, tmp_path: Path) -> None:
    """mmengine evaluates ``meta['config']``, which mmcv 1.x wrote, as a Python file."""
    canary = tmp_path / 'canary'
    text = f'model = dict(a=__import__("pathlib").Path({str(canary)!r}).touch())\n'
    Config.fromstring(text, '.py')
    assert canary.exists(), 'the attack must be one'
    canary.unlink()
    torch.save({**good, 'meta': {**good['meta'], 'config': text}}, tmp_path / 'bad.pth')
    if runner == 'Runner':
        resumed = run_of(tmp_path, load_from=str(tmp_path / 'bad.pth'), resume=True, max_iters=3)
        resumed.train()
        assert resumed.iter == 3
    else:
        flexible(tmp_path, tmp_path / 'bad.pth', {}, resume=True)
    assert not canary.exists()
    # Where nothing is resumed, the content is as it is in the file.
    assert load_from_local(str(tmp_path / 'bad.pth'), None)['meta']['config'] == text


# --- from addresses and tables -------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the folder over HTTP; downloads go into another one."""
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{running.server_port}'
        running.shutdown()


def test_downloads_of_mmengine_run_no_code(address: str, bad: tuple[Path, Path], more: Path, good: dict) -> None:
    folder = bad[0].parent
    torch.save(good, folder / 'good.pth')
    (folder / 'mmengine').mkdir()
    torch.save(good, folder / 'mmengine' / 'mine.pth')
    attack(folder / 'mmengine' / 'bad.pth', bad[1], content=good)
    (folder / 'mmengine' / 'open_mmlab.json').write_text(
        f'{{"theirs": "{address}/bad.pth", "ours": "bad.pth", "good": "{address}/good.pth", "mine": "mine.pth"}}'
    )
    for name in (f'{address}/bad.pth', 'open-mmlab://theirs', 'openmmlab://ours'):
        with pytest.raises(CheckpointError, match=r'bad\.pth.*posix\.system'):
            CheckpointLoader.load_checkpoint(name)
        assert not bad[1].exists()
    for name in (f'{address}/good.pth', 'open-mmlab://good', 'open-mmlab://mine'):
        assert CheckpointLoader.load_checkpoint(name, 'cpu')['meta']['iter'] == 2
    # Files of mmengine's own cache are used under its names.
    assert (folder / 'hub' / 'checkpoints' / 'good.pth').is_file()
    (folder / 'good.pth').unlink()
    assert CheckpointLoader.load_checkpoint(f'{address}/good.pth')['meta']['iter'] == 2
    with pytest.raises(CheckpointError, match=r'none\.pth.*must be reachable.*404'):
        CheckpointLoader.load_checkpoint(f'{address}/none.pth')
    assert not list((folder / 'hub' / 'checkpoints').glob('*.part'))


def test_names_of_torchvision_and_mmcls_run_no_code(
    address: str, bad: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {'resnet': f'{address}/bad.pth'}
    monkeypatch.setattr(mmengine.runner.checkpoint, 'get_torchvision_models', lambda: table)
    monkeypatch.setattr(mmengine.runner.checkpoint, 'get_mmcls_models', lambda: table)
    for name in ('torchvision://resnet', 'modelzoo://resnet', 'mmcls://resnet'):
        with pytest.raises(CheckpointError, match=r'bad\.pth.*posix\.system'):
            CheckpointLoader.load_checkpoint(name)
        assert not bad[1].exists()


def test_a_hash_in_a_name_is_compared_where_it_is_asked_for(address: str, good: dict, tmp_path: Path) -> None:
    torch.save(good, tmp_path / 'wrong-00000000.pth')
    with pytest.raises(CheckpointError, match='invalid hash value'):
        checkpoints.load_url(f'{address}/wrong-00000000.pth', check_hash=True, progress=False)
    read = checkpoints.load_url(f'{address}/wrong-00000000.pth', str(tmp_path / 'own'), file_name='b.pth')
    assert read['meta']['iter'] == 2
    assert (tmp_path / 'own' / 'b.pth').is_file()


# --- the tools -----------------------------------------------------------------------------------------------


def dump(folder: Path, model: dict | None = None, **changes: Any) -> str:
    folder.mkdir(exist_ok=True)
    data = toy_config({}, folder)
    test = dict(
        test_dataloader=data.val_dataloader, test_cfg=dict(type='TestLoop'), test_evaluator=dict(type='IoUMetric')
    )
    toy_config(model or toy_segmentor(4), folder / 'work', max_iters=3, **test, **changes).dump(folder / 'config.py')
    return str(folder / 'config.py')


def distilled(**student: Any) -> dict:
    return toy_distiller(student=toy_segmentor(4, **student), terms=dict(pixel=toy_terms()['pixel']))


#: Script, and its arguments for a folder and a file; what it says about consent.
TOOLS: dict[str, tuple[str, Callable[[Path, Path], list[str]], str]] = {
    'train --resume': ('train', lambda d, f: [dump(d), '--resume', str(f)], IN_CONFIG),
    'train load_from': ('train', lambda d, f: [dump(d), '--cfg-options', f'load_from={f}'], IN_CONFIG),
    'train distilled': ('train', lambda d, f: [dump(d, distilled(), load_from=str(f))], IN_CONFIG),
    'test': ('test', lambda d, f: [dump(d, distilled()), str(f)], IN_CONFIG),
    'export_student': (
        'export_student',
        lambda d, f: [dump(d, distilled()), str(f), '--out', str(d / 'out.pth')],
        '--trust-checkpoint',
    ),
    'draw': ('draw', lambda d, f: [dump(d), str(f), '--out', str(d / 'out.png')], '--trust-checkpoint'),
    'check_config': (
        'check_config',
        lambda d, f: [dump(d, distilled(), load_from=str(f)), '--runs', '0', '--synthetic'],
        IN_CONFIG,
    ),
    'check_config init_cfg': (
        'check_config',
        lambda d, f: [dump(d, distilled(pretrained=str(f))), '--runs', '0', '--synthetic'],
        IN_CONFIG,
    ),
}


def call(tool: ModuleType, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    monkeypatch.setattr(sys, 'argv', ['tool', *arguments])
    return tool.main()


@pytest.mark.parametrize('entry', TOOLS)
def test_tools_run_no_code_without_consent(
    entry: str,
    bad: tuple[Path, Path],
    more: Path,
    tmp_path: Path,
    load_tool: Callable[[str], ModuleType],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    name, arguments, way_out = TOOLS[entry]
    tool = load_tool(name)
    try:
        status = call(tool, arguments(tmp_path / 'no', bad[0]), monkeypatch)
    except CheckpointError as err:
        text = str(err)
    else:
        text = capsys.readouterr().err
        assert status == 1
    assert str(bad[0]) in text
    assert "'posix.system'" in text
    assert way_out in text
    assert not bad[1].exists()
    flagged = [*arguments(tmp_path / 'yes', more), '--trust-checkpoint']
    assert call(tool, flagged, monkeypatch) in (None, 0), capsys.readouterr().err


@pytest.mark.parametrize('entry', ['train --resume', 'test', 'export_student', 'draw', 'check_config'])
def test_a_word_in_the_options_is_no_consent(
    entry: str,
    bad: tuple[Path, Path],
    tmp_path: Path,
    load_tool: Callable[[str], ModuleType],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    name, arguments, _ = TOOLS[entry]
    given = [*arguments(tmp_path, bad[0]), '--cfg-options', 'trust_checkpoint=no']
    try:
        assert call(load_tool(name), given, monkeypatch) == 1
    except ConfigError as err:
        text = str(err)
    else:
        text = capsys.readouterr().err
    assert "config: `trust_checkpoint` must be True or False, got 'no'" in text
    assert not bad[1].exists()


def test_compare_hands_the_flag_to_each_run(
    load_tool: Callable[[str], ModuleType],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tool, commands = load_tool('compare'), []

    def run(command: list[str], **kwargs: Any) -> types.SimpleNamespace:
        commands.append(command)
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(tool.subprocess, 'run', run)
    for flag in ([], ['--trust-checkpoint']):
        with pytest.raises(SystemExit):
            call(tool, ['--arm', 'a=a.py', '--seeds', '0', '--work-dir', str(tmp_path), *flag], monkeypatch)
    assert ['--trust-checkpoint' in command for command in commands] == [False, True]


# --- scripts that are not ours -------------------------------------------------------------------------------

SCRIPT = """
{first}
import sys
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner
cfg = Config.fromfile(sys.argv[1])
cfg.load_from = sys.argv[2]
cfg.resume = len(sys.argv) > 3
runner = Runner.from_cfg(cfg)
runner.train()
"""


@pytest.mark.parametrize('first', ['', 'import mmstructkd', 'from mmstructkd import functional'])
def test_a_plain_config_that_imports_the_package_is_safe_under_any_script(
    first: str, good: dict, tmp_path: Path
) -> None:
    """What mmseg's and mmdet's own scripts do; nothing in the config is of this package but ``custom_imports``."""
    cfg = toy_config(toy_segmentor(4), tmp_path / 'work')
    (tmp_path / 'img').mkdir()
    cv2.imwrite(str(tmp_path / 'img' / 'a.jpg'), np.zeros((8, 8, 3), np.uint8))
    dataset = dict(type='BaseSegDataset', data_prefix=dict(img_path=str(tmp_path / 'img')), pipeline=[])
    cfg.train_dataloader.dataset = dataset
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        cfg.pop(key)
    cfg.dump(tmp_path / 'config.py')
    (tmp_path / 'script.py').write_text(SCRIPT.format(first=first))
    bad = attack(tmp_path / 'bad.pth', tmp_path / 'canary', content=good)
    done = subprocess.run(
        [sys.executable, str(tmp_path / 'script.py'), str(tmp_path / 'config.py'), str(bad), 'resume'],
        capture_output=True, text=True, check=False, env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    assert 'CheckpointError: read_checkpoint' in done.stderr, done.stderr
    assert "needs 'posix.system'" in done.stderr
    assert not (tmp_path / 'canary').exists()


def test_models_of_other_packages_are_read_as_carefully(bad: tuple[Path, Path]) -> None:
    """mmseg's ViT and Swin, and mmdet's PVT, read by themselves in ``init_weights``."""
    vit = dict(
        type='mmseg.VisionTransformer', img_size=32, patch_size=16, embed_dims=8, num_layers=1, num_heads=1,
        init_cfg=dict(type='Pretrained', checkpoint=str(bad[0])),
    )  # fmt: skip
    swin = dict(
        type='mmseg.SwinTransformer', embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
        init_cfg=dict(type='Pretrained', checkpoint=str(bad[0])),
    )  # fmt: skip
    pvt = dict(
        type='mmdet.PyramidVisionTransformer', embed_dims=8, num_layers=[1] * 4, num_heads=[1] * 4,
        init_cfg=dict(type='Pretrained', checkpoint=str(bad[0])),
    )  # fmt: skip
    for config in (vit, swin, pvt):
        with pytest.raises(CheckpointError, match=r'posix\.system'):
            MODELS.build(ConfigDict(config)).init_weights()
        assert not bad[1].exists()
