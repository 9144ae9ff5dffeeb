"""Each work-around of compat.py: what it is for, and that it can be undone by nothing but the mm packages."""

from __future__ import annotations

import copy
import os
import socket
import stat
import subprocess
import sys
import uuid
from pathlib import Path

import mmengine.runner
import mmengine.runner.checkpoint
import mmengine.runner.runner
import pytest
import torch
from mmcv.ops import RoIAlign, nms
from mmcv.ops.nms import NMSop
from mmdet.models import DetDataPreprocessor
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import LocalBackend, register_backend
from mmengine.fileio.backends import BaseStorageBackend
from mmengine.fileio.backends.registry_utils import backends
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import FlexibleRunner, Runner
from mmseg.models import SegDataPreProcessor
from torch import nn
from torch.utils.data import Dataset

from mmstructkd import compat, running
from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import ConfigError
from mmstructkd.running import prepare_cpu_distributed
from mmstructkd.teachers.normalization import pad_value, swaps_channels

ROOT = Path(__file__).resolve().parents[1]
compat.install()


class Toy(BaseModel):
    """One linear layer; its loss is its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x, mode='loss'):
        return {'loss': self.layer(torch.stack(list(x))).mean()}


class Ones(Dataset):
    """Four times the same sample."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {'x': torch.ones(2)}


def toy_runner(work_dir, model=None, iters=2, **kwargs) -> Runner:
    kwargs.setdefault('default_hooks', {'checkpoint': {'type': 'CheckpointHook', 'interval': 1, 'by_epoch': False}})
    return Runner(
        model or Toy(),
        work_dir=str(work_dir),
        train_dataloader={
            'dataset': Ones(),
            'sampler': {'type': 'InfiniteSampler'},
            'batch_size': 2,
            'num_workers': 0,
        },
        optim_wrapper={'optimizer': {'type': 'AdamW', 'lr': 0.1}},
        param_scheduler={'type': 'LinearLR', 'by_epoch': False, 'end': 4},
        train_cfg={'by_epoch': False, 'max_iters': iters},
        log_level='ERROR',
        experiment_name=uuid.uuid4().hex,  # the default is the second, and two may fall into one
        **kwargs,
    )


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
    """A folder with the checkpoints that mmengine itself writes, EMA included."""
    folder = tmp_path_factory.mktemp('trained')
    toy_runner(folder, custom_hooks=[{'type': 'EMAHook'}]).train()
    return folder


def test_install_twice_changes_nothing_more():
    def state():
        return (
            mmengine.runner.runner.save_checkpoint,
            mmengine.runner.save_checkpoint,
            Runner.register_hooks,
            Runner.__init__,
            Runner.resume,
            FlexibleRunner.load_checkpoint,
            mmengine.runner.checkpoint.torch,
            mmengine.runner.checkpoint.load_url,
            mmengine.runner.runner._load_checkpoint_to_model,
            CheckpointHook._save_checkpoint_with_step,
            CheckpointHook._save_best_checkpoint,
            RoIAlign.forward,
            NMSop.forward,
            dict(MODULE2PACKAGE),
        )

    before = state()
    compat.install()
    assert state() == before


def test_mmengine_saves_by_torch_itself():
    """Only reading is another; whoever replaces a function of torch meets it there."""
    assert mmengine.runner.checkpoint.torch.save is torch.save
    assert mmengine.runner.checkpoint.torch.load is not torch.load


# --- mmseg:: -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('installed', 'expected'),
    [
        ({'onedl-mmsegmentation'}, 'mmseg'),
        ({'mmsegmentation'}, 'mmsegmentation'),
        ({'mmsegmentation', 'onedl-mmsegmentation'}, 'mmsegmentation'),
        (set(), 'mmsegmentation'),
    ],
)
def test_mmseg_is_mapped_only_where_the_onedl_line_gives_it(monkeypatch, installed, expected):
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    monkeypatch.setattr(compat, '_has_distribution', lambda name: name in installed)
    compat.map_mmseg_configs()
    assert MODULE2PACKAGE['mmseg'] == expected


def test_mmseg_bases_resolve_on_this_line(tmp_path):
    file = tmp_path / 'config.py'
    file.write_text("_base_ = ['mmseg::_base_/models/fcn_unet_s5-d16.py']\n")
    assert Config.fromfile(file).model.type == 'EncoderDecoder'


# --- data preprocessors --------------------------------------------------------------------------------------


@pytest.mark.parametrize('bgr_to_rgb', [True, False])
@pytest.mark.parametrize('package', ['mmengine', 'mmseg', 'mmdet'])
def test_preprocessor_is_read_on_both_lines(package, bgr_to_rgb):
    kind, pad = {
        'mmengine': (ImgDataPreprocessor, 'pad_value'),
        'mmseg': (SegDataPreProcessor, 'pad_val'),
        'mmdet': (DetDataPreprocessor, 'pad_value'),
    }[package]
    preprocessor = kind(mean=[0.0] * 3, std=[1.0] * 3, bgr_to_rgb=bgr_to_rgb, **{pad: 7})
    assert swaps_channels(preprocessor) is bgr_to_rgb
    assert pad_value(preprocessor) == 7


# --- writing -------------------------------------------------------------------------------------------------


class Stop(RuntimeError):
    """What the tests break a save with."""


@pytest.fixture
def breaks_while_writing(monkeypatch):
    """Let the local backend write half and then die, once the fixture is called."""

    def arm():
        def put(self, obj, filepath):
            Path(filepath).write_bytes(obj[: len(obj) // 2])
            raise Stop

        monkeypatch.setattr(LocalBackend, 'put', put)

    return arm


def test_crash_while_writing_leaves_the_old_checkpoint_whole(tmp_path, breaks_while_writing):
    runner = toy_runner(tmp_path)
    runner.train()
    before = (tmp_path / 'iter_2.pth').read_bytes()
    files = sorted(tmp_path.iterdir())
    breaks_while_writing()
    with pytest.raises(Stop):
        runner.save_checkpoint(str(tmp_path), 'iter_2.pth', by_epoch=False)
    assert (tmp_path / 'iter_2.pth').read_bytes() == before
    assert sorted(tmp_path.iterdir()) == files


def test_process_killed_while_writing_leaves_the_old_checkpoint_whole(tmp_path):
    code = f"""
import os, torch
from pathlib import Path
from mmengine.fileio import LocalBackend
from mmengine.runner import save_checkpoint
import mmengine.runner.runner
from mmstructkd import compat
compat.install()
path = {str(tmp_path / 'a.pth')!r}
mmengine.runner.runner.save_checkpoint({{'w': torch.ones(3)}}, path)
def put(self, obj, filepath):
    Path(filepath).write_bytes(obj[:100])
    os._exit(9)
LocalBackend.put = put
mmengine.runner.runner.save_checkpoint({{'w': torch.zeros(3)}}, path)
"""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    assert read_checkpoint(tmp_path / 'a.pth')['w'].tolist() == [1, 1, 1]


def test_saved_file_has_the_rights_of_any_file_and_follows_links(tmp_path):
    save = mmengine.runner.runner.save_checkpoint
    save({'w': torch.ones(1)}, str(tmp_path / 'sub' / 'a.pth'))
    usual = tmp_path / 'usual'
    usual.touch()
    assert stat.S_IMODE((tmp_path / 'sub' / 'a.pth').stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    (tmp_path / 'link.pth').symlink_to(tmp_path / 'sub' / 'a.pth')
    save({'w': torch.zeros(1)}, str(tmp_path / 'link.pth'))
    assert (tmp_path / 'link.pth').is_symlink()
    assert read_checkpoint(tmp_path / 'sub' / 'a.pth')['w'] == 0


def test_other_back_ends_are_left_alone():
    put = []

    class Cloud(BaseStorageBackend):
        def get(self, filepath): ...

        def get_text(self, filepath): ...

        def put(self, obj, filepath):
            put.append(filepath)

    register_backend('cloud_of_the_test', Cloud)
    try:
        mmengine.runner.runner.save_checkpoint(
            {'w': torch.ones(1)}, 'folder/a.pth', backend_args={'backend': 'cloud_of_the_test'}
        )
    finally:
        backends.pop('cloud_of_the_test')
    assert put == ['folder/a.pth']


def test_old_checkpoints_go_only_after_the_new_one_is_there(tmp_path, breaks_while_writing):
    hook = {'type': 'CheckpointHook', 'interval': 1, 'by_epoch': False, 'max_keep_ckpts': 1}
    runner = toy_runner(tmp_path, default_hooks={'checkpoint': hook})
    runner.train()
    assert [p.name for p in tmp_path.glob('*.pth')] == ['iter_2.pth']
    hook = next(h for h in runner.hooks if isinstance(h, CheckpointHook))
    breaks_while_writing()
    with pytest.raises(Stop):
        hook._save_checkpoint_with_step(runner, 3, meta={})
    assert [p.name for p in tmp_path.glob('*.pth')] == ['iter_2.pth']
    assert isinstance(hook.file_backend, LocalBackend)


def test_best_checkpoint_stays_until_a_better_one_is_there(tmp_path, breaks_while_writing):
    hook = {'type': 'CheckpointHook', 'interval': -1, 'by_epoch': False, 'save_best': 'score', 'rule': 'greater'}
    runner = toy_runner(tmp_path, default_hooks={'checkpoint': hook})
    runner.train()
    hook = next(h for h in runner.hooks if isinstance(h, CheckpointHook))
    runner.train_loop._iter = 1
    hook._save_best_checkpoint(runner, {'score': 0.1})
    runner.train_loop._iter = 2
    hook._save_best_checkpoint(runner, {'score': 0.2})
    assert [p.name for p in tmp_path.glob('best_*')] == ['best_score_iter_2.pth']
    # The same name once more is replaced, not removed.
    hook._save_best_checkpoint(runner, {'score': 0.3})
    assert [p.name for p in tmp_path.glob('best_*')] == ['best_score_iter_2.pth']
    runner.train_loop._iter = 3
    breaks_while_writing()
    with pytest.raises(Stop):
        hook._save_best_checkpoint(runner, {'score': 0.4})
    assert [p.name for p in tmp_path.glob('best_*')] == ['best_score_iter_2.pth']


# --- running -------------------------------------------------------------------------------------------------


class Asking(Toy):
    """A model that wants to know its runner."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Runner, int]] = []

    def prepare_runner(self, runner: Runner) -> None:
        self.calls.append((runner, len(runner.hooks)))


def test_model_prepares_its_runner_once_after_the_hooks_are_there(tmp_path):
    model = Asking()
    runner = toy_runner(tmp_path, model)
    assert [call[0] for call in model.calls] == [runner]
    assert model.calls[0][1] == len(runner.hooks) > 3
    runner.register_hooks({}, [])
    assert len(model.calls) == 1
    second = toy_runner(tmp_path, model)
    assert [call[0] for call in model.calls] == [runner, second]


def test_model_inside_a_wrapper_prepares_its_runner(tmp_path):
    @MODEL_WRAPPERS.register_module()
    class WrapperOfTheTest(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    try:
        wrapper = WrapperOfTheTest(Asking())
        runner = toy_runner(tmp_path, wrapper)
        assert wrapper.module.calls[0][0] is runner
    finally:
        MODEL_WRAPPERS.module_dict.pop('WrapperOfTheTest')


def test_one_process_needs_no_preparation():
    cfg = Config({})
    prepare_cpu_distributed(cfg, 'none')
    assert dict(cfg) == {}
    assert not torch.distributed.is_initialized()


def test_processes_with_a_gpu_are_left_to_mmengine(monkeypatch):
    monkeypatch.setattr(running, 'get_device', lambda: 'cuda')
    cfg = Config({})
    prepare_cpu_distributed(cfg, 'pytorch')
    assert dict(cfg) == {}


@pytest.fixture
def one_of_one(monkeypatch):
    """The environment of a group of one process on the CPU."""
    monkeypatch.setattr(running, 'get_device', lambda: 'cpu')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    group = {'RANK': 0, 'LOCAL_RANK': 0, 'WORLD_SIZE': 1, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    for name, value in group.items():
        monkeypatch.setenv(name, str(value))


def test_cpu_processes_keep_the_settings_of_mmengine(one_of_one):
    cfg = Config({'find_unused_parameters': True})
    prepare_cpu_distributed(cfg, 'pytorch')
    assert torch.distributed.get_backend() == 'gloo'
    assert cfg.model_wrapper_cfg == {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': True,
        'device_ids': None,
    }
    prepare_cpu_distributed(cfg, 'pytorch')  # again is harmless
    own = Config({'model_wrapper_cfg': {'type': 'MMDistributedDataParallel', 'static_graph': True}})
    prepare_cpu_distributed(own, 'pytorch')
    assert own.model_wrapper_cfg == {
        'type': 'MMDistributedDataParallel',
        'static_graph': True,
        'device_ids': None,
    }


def test_cpu_processes_need_torchrun(monkeypatch, one_of_one):
    with pytest.raises(ConfigError, match=r"`launcher` must be 'pytorch'.*got 'slurm'"):
        prepare_cpu_distributed(Config({}), 'slurm')
    monkeypatch.delenv('RANK')
    with pytest.raises(ConfigError, match=r'RANK in the environment.*torchrun'):
        prepare_cpu_distributed(Config({}), 'pytorch')


def test_two_processes_train_through_runner(tmp_path):
    script = tmp_path / 'two.py'
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch
from mmengine.config import Config
from mmstructkd.running import prepare_cpu_distributed
from tests.test_compat import Toy, toy_runner
cfg = Config({{}})
prepare_cpu_distributed(cfg, 'pytorch')
runner = toy_runner({str(tmp_path / 'work')!r}, launcher='pytorch', cfg=cfg)
runner.train()
weights = [torch.zeros(1, 2) for _ in range(2)]
torch.distributed.all_gather(weights, runner.model.module.layer.weight.data)
assert torch.equal(*weights)
assert type(runner.model).__name__ == 'MMDistributedDataParallel'
torch.distributed.destroy_process_group()
print('both agree')
"""
    )
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', str(script)]
    # torchrun ends its workers when it is asked to; killed, it would leave them.
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            process.terminate()
            raise
    assert process.returncode == 0, err[-3000:]
    assert out.count('both agree') == 2


# --- mmcv's ops on a CPU -------------------------------------------------------------------------------------


def test_roi_align_takes_bf16_on_a_cpu():
    compat.install()
    pool, rois = RoIAlign(2, 0.5), torch.tensor([[0.0, 0.0, 0.0, 6.0, 6.0]])
    feature = torch.randn(1, 3, 4, 4)
    half = feature.bfloat16().requires_grad_()
    got = pool(half, rois.bfloat16())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), pool(half.detach().float(), rois), rtol=1e-2, atol=1e-2)
    got.sum().backward()
    assert half.grad.abs().sum() > 0
    assert pool(feature, rois).dtype == torch.float32
    original = getattr(RoIAlign.forward, compat._MARK)
    with pytest.raises(RuntimeError, match='BFloat16'):  # still needed
        original(pool, half, rois.bfloat16())


def test_nms_takes_bf16_on_a_cpu():
    compat.install()
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 0.0, 8.0, 7.0], [20.0, 0.0, 28.0, 8.0]])
    scores = torch.tensor([0.5, 0.75, 0.25])
    _, kept = nms(boxes, scores, 0.5)
    assert kept.tolist() == [1, 2]
    assert nms(boxes.bfloat16(), scores.bfloat16(), 0.5)[1].tolist() == [1, 2]
    original = getattr(NMSop.forward, compat._MARK)
    with pytest.raises(RuntimeError, match='BFloat16'):  # still needed
        original(None, boxes.bfloat16(), scores.bfloat16(), 0.5, 0, 0.0, -1)


@pytest.mark.parametrize(('size', 'stride', 'kernel'), [((1, 1), 2, 3), ((2, 1), 2, 5), ((2, 2), 3, 3)])
@pytest.mark.parametrize('autocast', [True, False])
def test_narrow_convolutions_have_the_right_gradient_in_bf16(size, stride, kernel, autocast):
    compat.install()
    for trial in range(20):
        torch.manual_seed(trial)
        layer = torch.nn.Conv2d(8, 64, kernel, stride=stride, padding=kernel // 2)
        layer.weight.data.copy_(layer.weight.bfloat16())
        maps = torch.randn(2, 8, *size).bfloat16()
        exact = copy.deepcopy(layer).double()
        exact(maps.double()).sum().backward()
        if not autocast:
            layer.bfloat16()
        # what a faulty kernel leaves as it is
        poison = [torch.full((numbers,), float('nan')) for numbers in (64 * 8 * kernel**2, 32 * 8 * kernel**2)]
        del poison
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
            out = layer(maps.float() if autocast else maps)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        torch.testing.assert_close(layer.weight.grad.double(), exact.weight.grad, rtol=1e-2, atol=1e-2)
        assert not layer.weight.grad[exact.weight.grad == 0].any()


def test_other_convolutions_are_left_alone():
    compat.install()
    layer, maps = torch.nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(1, 2, 1, 1)
    original = getattr(torch.nn.Conv2d._conv_forward, compat._MARK)
    assert torch.equal(layer(maps), original(layer, maps, layer.weight, layer.bias))
    with torch.autocast('cpu', dtype=torch.float16):
        assert layer(maps).dtype == torch.float16
