"""The export: plain in keys and types, equal in every bit, or not there at all."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmstructkd import compat
from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers import student_config
from mmstructkd.registry import MODELS
from mmstructkd.teachers.loading import build_network
from mmstructkd.testing import toy_config, toy_distiller, toy_segmentor, toy_terms


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('export_student')


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Config and last checkpoint of a distilled run of two iterations with an EMA."""
    folder = tmp_path_factory.mktemp('run')
    cfg = toy_config(
        toy_distiller(terms=dict(pixel=toy_terms()['pixel'], feature=toy_terms()['feature'])),
        folder / 'work',
        max_iters=2,
        custom_hooks=[dict(type='EMAHook', momentum=0.5)],
    )
    cfg.dump(folder / 'distilled.py')
    compat.install()
    Runner.from_cfg(cfg).train()
    return str(folder / 'distilled.py'), str(folder / 'work' / 'iter_2.pth')


def save_run(folder: Path, model: dict, **changes: Any) -> tuple[str, str]:
    """Config and checkpoint of a run of ``model`` that was never trained."""
    toy_config(model, folder / 'work').dump(folder / 'run.py')
    content = {'state_dict': MODELS.build(model).state_dict(), 'meta': {}, **changes}
    torch.save(content, folder / 'run.pth')
    return str(folder / 'run.py'), str(folder / 'run.pth')


@pytest.fixture(scope='module')
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Config and checkpoint of a plain run."""
    return save_run(tmp_path_factory.mktemp('plain'), toy_segmentor(4))


@pytest.fixture(scope='module')
def pyramid_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same of a PSPNet."""
    return save_run(tmp_path_factory.mktemp('pyramid'), pyramid())


def pickled_names(path: Path) -> set[str]:
    """Modules of everything that a checkpoint's pickle names."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith('data.pkl')]
        pickle = archive.read(name)
    return {argument.split(' ')[0] for code, argument, _ in pickletools.genops(pickle) if code.name == 'GLOBAL'}


# --- the checkpoint ------------------------------------------------------------------------------------------


def test_loads_into_mmseg_with_every_key(
    tool: ModuleType, run: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from mmseg.apis import init_model

    out = tmp_path / 'deep' / 'student.pth'
    assert tool.main([*run, '--out', str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ['student.pth']
    content = torch.load(out, weights_only=True)
    assert set(content) == {'state_dict', 'meta'}
    assert set(content['meta']) == {'cfg', 'dataset_meta'}
    assert pickled_names(out) <= {'torch', 'torch._utils', 'collections'}

    source = read_checkpoint(run[1])
    assert 'ema_state_dict' in source
    assert {'optimizer', 'message_hub', 'mmstructkd'} <= set(source)
    assert list(content['state_dict']) == list(source['state_dict'])
    assert all(torch.equal(value, source['state_dict'][key]) for key, value in content['state_dict'].items())
    raw = source['ema_state_dict']['module.decode_head.conv_seg.weight']
    assert not torch.equal(content['state_dict']['decode_head.conv_seg.weight'], raw)

    model = init_model(Config.fromstring(content['meta']['cfg'], '.py'), str(out), device='cpu')
    assert type(model).__name__ == 'EncoderDecoder'
    result = model.load_state_dict(content['state_dict'], strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert model.dataset_meta['classes'] == source['meta']['dataset_meta']['classes']

    shown = capsys.readouterr().out
    assert 'averaged (EMA) weights of the student, every key matched' in shown
    for line, width in (('student', 4), ('teacher', 8)):
        parameters = sum(p.numel() for p in build_network(toy_segmentor(width), 'test').parameters())
        assert f'{line}   {parameters / 1e6:.3f} M parameters, ' in shown
    assert shown.count('G multiply-adds at 48x64') == 2


def test_a_plain_run_is_exported_alike(
    tool: ModuleType, plain_run: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / 'student.pth'
    assert tool.main([*plain_run, '--out', str(out), '--size', '32', '40']) == 0
    assert set(torch.load(out, weights_only=True)['meta']) == {'cfg'}
    shown = capsys.readouterr().out
    assert 'multiply-adds at 32x40' in shown
    assert 'teacher' not in shown
    assert 'EMA' not in shown


def test_a_peer_is_exported_too(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It learned beside the student, and its file is that of its own plain config."""
    teacher = dict(type='mmstructkd.PeerTeacher', config=toy_segmentor(6))
    terms = {'pixel': toy_terms()['pixel']}
    cfg = toy_config(toy_distiller(teacher=teacher, terms=terms), tmp_path / 'work', max_iters=1)
    cfg.dump(tmp_path / 'distilled.py')
    compat.install()
    Runner.from_cfg(cfg).train()
    config, checkpoint = str(tmp_path / 'distilled.py'), str(tmp_path / 'work' / 'iter_1.pth')
    out = tmp_path / 'peer.pth'
    assert tool.main([config, checkpoint, '--which', 'teacher', '--out', str(out), '--size', '32', '32']) == 0
    assert 'weights of the teacher, every key matched' in capsys.readouterr().out
    state = read_checkpoint(str(out))['state_dict']
    MODELS.build(toy_segmentor(6)).load_state_dict(state, strict=True)
    kept = read_checkpoint(checkpoint)['mmstructkd']['companion']
    assert state
    assert all(torch.equal(value, kept[f'network.{name}']) for name, value in state.items())


def test_a_frozen_teacher_is_not_exported(
    tool: ModuleType, run: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, checkpoint = run
    assert tool.main([config, checkpoint, '--which', 'teacher', '--out', str(tmp_path / 'a.pth')]) == 1
    assert 'whose one teacher is a PeerTeacher' in capsys.readouterr().err


def test_numpy_values_become_plain(tool: ModuleType, tmp_path: Path) -> None:
    meta = dict(classes=('a', 'b'), palette=np.array([[1, 2, 3]]), scale=np.float32(0.5), more={'n': [np.int64(2)]})
    files = save_run(tmp_path, toy_distiller(), meta={'dataset_meta': meta, 'epoch': 3})
    out = tmp_path / 'student.pth'
    assert tool.main([*files, '--out', str(out)]) == 0
    saved = torch.load(out, weights_only=True)['meta']['dataset_meta']
    assert saved == dict(classes=('a', 'b'), palette=[[1, 2, 3]], scale=0.5, more={'n': [2]})
    assert pickled_names(out) <= {'torch', 'torch._utils', 'collections'}


def test_detectors_load_into_mmdet(tool: ModuleType, tmp_path: Path, detector: Callable) -> None:
    from mmdet.apis import init_detector

    terms = dict(scores=dict(tap='bbox_head.retina_cls', loss=dict(type='mmstructkd.ChannelwiseKLLoss')))
    model = dict(
        type='mmstructkd.StructuredDistiller',
        student=detector(4),
        teacher=dict(config=detector(8), allow_random=True),
        terms=terms,
    )
    dataset = dict(type='CocoDataset', ann_file='absent.json', data_prefix=dict(img=''), pipeline=[], test_mode=True)
    changes = dict(default_scope='mmdet', test_dataloader=dict(dataset=dataset))
    toy_config(model, tmp_path / 'work', **changes).dump(tmp_path / 'run.py')
    meta = {'dataset_meta': {'classes': tuple('abcdefghij')}}
    torch.save({'state_dict': MODELS.build(model).state_dict(), 'meta': meta}, tmp_path / 'run.pth')
    files = [str(tmp_path / 'run.py'), str(tmp_path / 'run.pth'), '--size', '64', '64']
    out = tmp_path / 'student.pth'

    assert tool.main([*files, '--out', str(out)]) == 0
    network = init_detector(student_config(Config.fromfile(files[0])), str(out), device='cpu')
    network.load_state_dict(torch.load(out, weights_only=True)['state_dict'], strict=True)
    assert network.dataset_meta['classes'] == tuple('abcdefghij')

    out.unlink()
    assert tool.main([*files, '--out', str(out), '--onnx', str(tmp_path / 'student.onnx')]) == 1
    assert not out.exists()


def test_its_config_needs_mmstructkd_for_nothing_it_does_not_name() -> None:
    """A plain mmseg reads ``meta['cfg']``: it must not be asked to import what it may not have."""
    data = dict(train_dataloader=dict(dataset=dict(type='CityscapesDataset')), terms_of_a_base=toy_terms())
    base = dict(model=toy_distiller(), default_scope='mmseg')
    plain = student_config(Config(dict(base, custom_imports=dict(imports=['mmstructkd']), **data)))
    assert 'custom_imports' not in plain
    plain = student_config(Config(dict(base, custom_imports=dict(imports=['mine', 'mmstructkd.losses']), **data)))
    assert plain.custom_imports.imports == ['mine']
    data['train_dataloader']['dataset']['type'] = 'mmstructkd.CamVidDataset'
    cfg = Config(dict(base, custom_imports=dict(imports='mmstructkd'), **data))
    assert student_config(cfg).custom_imports.imports == 'mmstructkd'
    assert cfg.model.type == 'mmstructkd.StructuredDistiller'


# --- refusals ------------------------------------------------------------------------------------------------


def change_weight(content: dict) -> None:
    content['state_dict']['decode_head.conv_seg.bias'][0] += 1e-6


def lose_key(content: dict) -> None:
    del content['state_dict']['decode_head.conv_seg.bias']


def add_key(content: dict) -> None:
    content['state_dict']['terms.pixel.weight'] = torch.zeros(1)


def add_entry(content: dict) -> None:
    content['optimizer'] = {}


@pytest.mark.parametrize(
    ('tamper', 'message'),
    [
        (change_weight, "verify: 'decode_head.conv_seg.bias' must be as in the source"),
        (lose_key, "missing ['decode_head.conv_seg.bias'] and unexpected []"),
        (add_key, "missing [] and unexpected ['terms.pixel.weight']"),
        (add_entry, "must hold ['meta', 'state_dict'], got ['meta', 'optimizer', 'state_dict']"),
    ],
)
def test_a_tampered_file_is_not_kept(
    tool: ModuleType,
    plain_run: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tamper: Callable[[dict], None],
    message: str,
) -> None:
    save = torch.save

    def tampering(content: dict, path: Path) -> None:
        tamper(content)
        save(content, path)

    monkeypatch.setattr(torch, 'save', tampering)
    out = tmp_path / 'out' / 'student.pth'
    assert tool.main([*plain_run, '--out', str(out)]) == 1
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith('CheckpointError: ')
    assert message in error
    assert list(out.parent.iterdir()) == []


def test_other_outputs_are_refused_and_an_older_file_stays(
    tool: ModuleType,
    plain_run: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    load = tool.load_as_users_do

    def shifted(*args: Any) -> torch.nn.Module:
        model = load(*args)
        model.decode_head.conv_seg.register_forward_hook(lambda module, inputs, output: output + 1e-6)
        return model

    monkeypatch.setattr(tool, 'load_as_users_do', shifted)
    out = tmp_path / 'student.pth'
    out.write_bytes(b'older')
    assert tool.main([*plain_run, '--out', str(out)]) == 1
    assert 'the outputs must equal those of the source bit for bit' in capsys.readouterr().err
    assert out.read_bytes() == b'older'
    assert not list(tmp_path.glob('.*'))


def test_mistakes_end_with_one_line(
    tool: ModuleType, plain_run: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config, checkpoint = plain_run
    wide = str(tmp_path / 'wide.pth')
    torch.save(MODELS.build(toy_segmentor(8)).state_dict(), wide)
    out = str(tmp_path / 'student.pth')
    for arguments, message in (
        ([config, wide, '--out', out], 'CheckpointError: export_student: `checkpoint` must give every parameter'),
        ([config, 'absent.pth', '--out', out], 'CheckpointError: local_checkpoint: `path` must be a file'),
        (['absent.py', checkpoint, '--out', out], 'ConfigError: export_student: `config` must be a readable config'),
        ([config, checkpoint, '--out', checkpoint], '`--out` must be a file of its own'),
        ([config, checkpoint, '--out', out, '--onnx', out], '`--onnx` must be a file of its own'),
    ):
        assert tool.main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert 'Traceback' not in error
        assert not Path(out).exists()
    with pytest.raises(SystemExit):
        tool.main([config, checkpoint, '--out', out, '--tolerance', '0'])


# --- ONNX ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('height', 'width', 'cells'), [(6, 8, 3), (7, 5, 2), (6, 6, 6), (5, 9, 4), (4, 4, 1)])
def test_pooling_as_products(tool: ModuleType, height: int, width: int, cells: int) -> None:
    tensor = torch.rand(2, 3, height, width, dtype=torch.float64)
    rows, columns = (tool.pooling_matrix(length, cells).double() for length in (height, width))
    wanted = torch.nn.functional.adaptive_avg_pool2d(tensor, cells)
    assert torch.allclose(rows @ tensor @ columns.T, wanted, atol=1e-7)


def pyramid() -> dict:
    """A toy PSPNet: on a 6x8 map the cells of its 3x3 and 6x6 pooling overlap."""
    student = toy_segmentor(4)
    student.decode_head.type = 'PSPHead'
    student.decode_head.pool_scales = (1, 2, 3, 6)
    for key in ('num_convs', 'concat_input'):
        student.decode_head.pop(key)
    return student


def test_onnx_gives_the_logits_of_mmseg(
    tool: ModuleType, pyramid_run: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = [str(tmp_path / 'student.pth'), '--onnx', str(tmp_path / 'student.onnx')]
    assert tool.main([*pyramid_run, '--out', *files]) == 0
    shown = capsys.readouterr().out
    assert 'largest difference to torch' in shown
    assert 'image 1x3x48x64 -> logits, opset 17' in shown
    assert torch.nn.functional.adaptive_avg_pool2d.__module__ == 'torch.nn.functional'

    model = MODELS.build(pyramid()).eval()
    model.load_state_dict(torch.load(files[0], weights_only=True)['state_dict'])
    image = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        wanted = model.encode_decode(image, [dict(img_shape=(48, 64), pad_shape=(48, 64), ori_shape=(48, 64))])
    session = onnxruntime.InferenceSession(files[2])
    (given,) = session.run(['logits'], {'image': image.numpy()})
    assert given.shape == (1, 10, 48, 64)
    assert float((torch.from_numpy(given) - wanted).abs().max()) < 1e-5


def test_an_onnx_file_that_differs_is_not_kept(
    tool: ModuleType,
    pyramid_run: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    right = tool.pooling_matrix
    monkeypatch.setattr(tool, 'pooling_matrix', lambda length, cells: right(length, cells) * 3)
    out = tmp_path / 'out'
    assert tool.main([*pyramid_run, '--out', str(out / 's.pth'), '--onnx', str(out / 's.onnx')]) == 1
    assert 'ONNX Runtime must agree with torch to 0.0001, got a difference of' in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_as_a_command(run_tool: Callable, run: tuple[str, str], tmp_path: Path) -> None:
    out, onnx = tmp_path / 'student.pth', tmp_path / 'student.onnx'
    done = run_tool('export_student', *run, '--out', out, '--onnx', onnx)
    assert done.returncode == 0, done.stderr
    assert out.is_file()
    assert onnx.is_file()
