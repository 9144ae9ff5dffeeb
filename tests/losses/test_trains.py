"""Every registered loss, two iterations through the Runner on the scenes, on each task that it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from mmstructkd.losses import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_distiller, toy_segmentor

LOSSES = {
    name: kind
    for name, kind in MODELS.module_dict.items()
    if isinstance(kind, type) and issubclass(kind, DistillLoss) and kind.__module__.startswith('mmstructkd.')
}
#: Arguments without which a loss cannot be built or does not fit a toy.
SETTINGS: dict[str, dict[str, Any]] = {
    'HolisticLoss': dict(critic=dict(base_channels=2)),
    'MemoryContrastLoss': dict(num_classes=10, pixel_keys=64, region_keys=32, pixel_capacity=32, region_capacity=8),
    'RegionContrastLoss': dict(num_classes=10),
}
#: What a detector's batches, which have boxes and no label map, need besides.
ON_BOXES: dict[str, dict[str, Any]] = {
    'DecoupledKLLoss': dict(target='teacher'),
    'RegionContrastLoss': dict(num_classes=8, regions='boxes'),
    'WeightedSoftLabelLoss': dict(target='teacher'),
}
#: Scores, where others take features.
SCORES = {
    'seg': 'decode_head.conv_seg',
    'depth': 'decode_head.conv_depth',
    'det': 'bbox_head.gfl_cls',
}
FEATURES = {'seg': 'backbone[2]', 'depth': 'backbone[2]', 'det': 'neck[:3]'}
ON_SCORES = {
    'BinaryKLLoss',
    'CategorySimilarityLoss',
    'DecoupledKLLoss',
    'DistLoss',
    'HolisticLoss',
    'InterclassSimilarityLoss',
    'PixelwiseKLLoss',
    'WeightedSoftLabelLoss',
    'ZipfLabelLoss',
}


def tap(name: str, task: str) -> str:
    """Where a loss is tapped on a task."""
    if name == 'LocalizationKLLoss' and task == 'det':
        return 'bbox_head.gfl_reg'
    if task == 'depth' and LOSSES[name].tasks == ('depth',):
        return 'decode_head.to_depth'
    return (SCORES if name in ON_SCORES else FEATURES)[task]


def terms(task: str) -> dict[str, dict]:
    """One term for each loss that names the task."""
    found = {}
    for name, kind in LOSSES.items():
        settings = (ON_BOXES if task == 'det' and name in ON_BOXES else SETTINGS).get(name, {})
        if task == 'depth' and name == 'LocalizationKLLoss':
            settings = dict(edges=1, region='all')
        if task in kind.tasks:
            at = SCORES[task] if name == 'LocalizationKLLoss' and task == 'depth' else tap(name, task)
            found[name] = dict(tap=at, loss=dict(type=f'mmstructkd.{name}', **settings))
    return found


@pytest.mark.parametrize('task', ['seg', 'depth', 'det'])
def test_every_loss_trains_on_its_tasks(task: str, tmp_path: Path) -> None:
    wanted = terms(task)
    assert len(wanted) > 10
    toy = {
        'seg': toy_segmentor,
        'depth': lambda width: toy_depth_estimator(width, 'DepthClassificationHead'),
        'det': lambda width: toy_detector('gfl', width),
    }[task]
    model = toy_distiller(student=toy(2), teacher=dict(config=toy(4), allow_random=True), terms=wanted)
    runner = Runner.from_cfg(toy_config(model, tmp_path, max_iters=2, task=task))
    before = {name: value.clone() for name, value in runner.model.student.named_parameters()}
    runner.train()
    for name in wanted:
        values = torch.tensor(runner.message_hub.get_scalar(f'train/loss_kd_{name}').data[0])
        assert values.isfinite().all(), name
        assert len(values) == 2, name
    moved = [name for name, value in runner.model.student.named_parameters() if not torch.equal(value, before[name])]
    assert any(name.startswith('backbone') for name in moved)


def test_every_loss_names_a_task() -> None:
    assert all(set(kind.tasks) <= {'seg', 'depth', 'det'} and kind.tasks for kind in LOSSES.values())
