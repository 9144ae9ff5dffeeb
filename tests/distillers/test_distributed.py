"""Two processes on a CPU through ``tools/train.py``: no unused parameter, and the gradient of the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.testing import toy_config, toy_distiller, toy_terms
from tests.distillers.two_ranks import without_batch_statistics

ROOT = Path(__file__).parents[2]
PLUGIN = '''
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS


@TRANSFORMS.register_module()
class FillIgnored(BaseTransform):
    """Every pixel counts: both processes then have the same denominators."""

    def transform(self, results):
        results['gt_seg_map'][results['gt_seg_map'] == 255] = 0
        return results
'''


def config(folder: Path, batch_size: int) -> Path:
    """Write the config of a run."""
    terms = toy_terms()
    terms['late'] = dict(toy_terms()['feature'], schedule=dict(type='constant', begin=2))  # silent at first
    student, teacher = without_batch_statistics(4), without_batch_statistics(8)
    model = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    cfg = toy_config(model, folder, max_iters=3)
    cfg.custom_imports = dict(imports=['mmstructkd', 'toy_plugin'], allow_failed_imports=False)
    cfg.train_dataloader.batch_size = batch_size
    steps = cfg.train_dataloader.dataset.pipeline
    cfg.train_dataloader.dataset.pipeline = [*steps[:2], dict(type='FillIgnored'), steps[-1]]
    cfg.default_hooks.checkpoint.interval = 3
    folder.mkdir()
    path = folder / 'toy.py'
    cfg.dump(path)
    return path


def run(path: Path, processes: int, plugin: Path) -> dict:
    """Train in fresh processes and return the checkpoint."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.pathsep.join([str(ROOT), str(plugin)])}
    command = [sys.executable]
    if processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    command += [str(ROOT / 'tools' / 'train.py'), str(path)]
    command += ['--launcher', 'pytorch'] if processes > 1 else []
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_checkpoint(str(path.parent / 'iter_3.pth'))


def test_two_processes_equal_one_with_the_joint_batch(tmp_path: Path) -> None:
    (tmp_path / 'toy_plugin.py').write_text(PLUGIN)
    one = run(config(tmp_path / 'one', batch_size=4), 1, tmp_path)
    two = run(config(tmp_path / 'two', batch_size=2), 2, tmp_path)
    assert 'find_unused_parameters=True' not in two['mmstructkd']['config']
    for part, tolerance in ((lambda c: c['state_dict'], 1e-5), (lambda c: c['mmstructkd']['terms'], 1e-4)):
        first, second = part(one), part(two)
        assert list(first) == list(second)
        for name in first:
            if isinstance(first[name], torch.Tensor) and first[name].is_floating_point():
                assert torch.allclose(first[name], second[name], atol=tolerance), name
