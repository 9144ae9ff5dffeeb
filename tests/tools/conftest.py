"""Loads the scripts of ``tools/`` as modules, and runs them as a user does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from mmengine.config import ConfigDict

from mmstructkd.datasets.scenes import CLASSES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='session')
def load_tool() -> Callable[[str], ModuleType]:
    """Import a script by its name."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f'tool_{name}', ROOT / 'tools' / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope='session')
def run_tool() -> Callable[..., subprocess.CompletedProcess]:
    """Start a script in a process of its own."""

    def run(name: str, *arguments: object) -> subprocess.CompletedProcess:
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        command = [sys.executable, str(ROOT / 'tools' / f'{name}.py'), *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)

    return run


@pytest.fixture(scope='session')
def detector() -> Callable[[int], ConfigDict]:
    """Config of a RetinaNet of a given width on a ResNet-18 of a few channels."""

    def config(width: int) -> ConfigDict:
        return ConfigDict(
            type='RetinaNet',
            _scope_='mmdet',
            data_preprocessor=dict(
                type='DetDataPreprocessor', mean=[0.0] * 3, std=[255.0] * 3, bgr_to_rgb=True, pad_size_divisor=32
            ),
            backbone=dict(type='ResNet', depth=18, stem_channels=width, base_channels=width, norm_eval=False),
            neck=dict(
                type='FPN',
                in_channels=[width, 2 * width, 4 * width, 8 * width],
                out_channels=width,
                start_level=1,
                add_extra_convs='on_input',
                num_outs=3,
            ),
            bbox_head=dict(
                type='RetinaHead',
                num_classes=len(CLASSES),
                in_channels=width,
                stacked_convs=1,
                feat_channels=width,
                anchor_generator=dict(
                    type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1, ratios=[1.0], strides=[8, 16, 32]
                ),
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
                loss_cls=dict(type='FocalLoss', use_sigmoid=True),
                loss_bbox=dict(type='L1Loss'),
            ),
            train_cfg=dict(
                assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, ignore_iof_thr=-1),
                sampler=dict(type='PseudoSampler'),
                allowed_border=-1,
                pos_weight=-1,
            ),
            test_cfg=dict(nms_pre=10, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5), max_per_img=5),
        )

    return config
