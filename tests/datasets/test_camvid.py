"""CamVid in a folder as its readers expect it."""

from __future__ import annotations

from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS

CONFIGS = Path(__file__).parents[2] / 'configs' / '_base_' / 'datasets'


@pytest.fixture
def camvid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Two images a split; the labels of the first are returned."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, (360, 480)).astype(np.uint8)
    labels[labels == 11] = 255
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            image = rng.integers(0, 256, (360, 480, 3)).astype(np.uint8)
            mmcv.imwrite(image, f'{tmp_path}/camvid/img/{split}/{name}.jpg')
            mmcv.imwrite(labels, f'{tmp_path}/camvid/ann/{split}/{name}.png')
    monkeypatch.setenv('MMSTRUCTKD_DATA', str(tmp_path))
    return labels


@pytest.mark.parametrize(('name', 'crop'), [('camvid_180x240.py', (180, 240)), ('camvid_360x480.py', (360, 480))])
def test_config_reads_the_folder(camvid: np.ndarray, name: str, crop: tuple[int, int]) -> None:
    cfg = Config.fromfile(CONFIGS / name)
    with DefaultScope.overwrite_default_scope('mmseg'):
        train = DATASETS.build(cfg.train_dataloader.dataset)
        val = DATASETS.build(cfg.val_dataloader.dataset)
    assert len(train) == len(val) == 2
    assert len(val.metainfo['classes']) == len(val.metainfo['palette']) == 11
    assert (val.metainfo['classes'][0], val.metainfo['classes'][10]) == ('Sky', 'Bicyclist')
    sample = train[0]
    assert all(side <= limit for side, limit in zip(sample['data_samples'].gt_sem_seg.shape, crop, strict=True))
    sample = val[0]
    assert tuple(sample['inputs'].shape) == (3, 360, 480)
    assert np.array_equal(sample['data_samples'].gt_sem_seg.data[0].numpy(), camvid)


def test_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('MMSTRUCTKD_DATA', raising=False)
    assert Config.fromfile(CONFIGS / 'camvid_360x480.py').train_dataloader.dataset.data_root == 'data/camvid'
    monkeypatch.setenv('MMSTRUCTKD_DATA', '/elsewhere')
    assert Config.fromfile(CONFIGS / 'camvid_360x480.py').val_dataloader.dataset.data_root == '/elsewhere/camvid'
