"""BCCD in a folder as its base config expects it."""

from __future__ import annotations

import json
from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.registry import DefaultScope

CONFIG = Path(__file__).parents[2] / 'configs' / '_base_' / 'datasets' / 'bccd_320x240.py'


@pytest.fixture
def bccd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images a split, the second of the training without a cell."""
    rng = np.random.default_rng(0)
    names = ('RBC', 'WBC', 'Platelets')
    boxes = [[100.0, 60.0, 40.0, 80.0], [300.0, 200.0, 120.0, 100.0]]
    for split in ('train', 'val'):
        images = [dict(id=i, file_name=f'{i}.jpg', height=480, width=640) for i in range(2)]
        marked = [
            dict(id=i, image_id=0, category_id=2 * i, bbox=box, area=box[2] * box[3], iscrowd=0)
            for i, box in enumerate(boxes)
        ]
        if split == 'val':
            marked.append(dict(marked[0], id=2, image_id=1))
        for info in images:
            image = rng.integers(0, 256, (480, 640, 3), np.uint8)
            mmcv.imwrite(image, f'{tmp_path}/bccd/img/{split}/{info["file_name"]}')
        content = dict(
            images=images, annotations=marked, categories=[dict(id=i, name=name) for i, name in enumerate(names)]
        )
        (tmp_path / 'bccd' / f'{split}.json').write_text(json.dumps(content), encoding='utf-8')
    monkeypatch.setenv('MMSTRUCTKD_DATA', str(tmp_path))


def test_config_reads_the_folder(bccd: None) -> None:
    """Half the size; classes in the order of the file; an image without a cell is left out of the training."""
    cfg = Config.fromfile(CONFIG)
    with DefaultScope.overwrite_default_scope('mmdet'):
        train = DATASETS.build(cfg.train_dataloader.dataset)
        val = DATASETS.build(cfg.val_dataloader.dataset)
        metric = METRICS.build(cfg.val_evaluator)
    assert (len(train), len(val)) == (1, 2)
    assert train.metainfo['classes'] == ('RBC', 'WBC', 'Platelets')
    sample = train[0]
    assert tuple(sample['inputs'].shape) == (3, 240, 320)
    instances = sample['data_samples'].gt_instances
    assert instances.labels.tolist() == [0, 2]
    widths = (instances.bboxes.tensor[:, 2] - instances.bboxes.tensor[:, 0]).tolist()
    assert widths == pytest.approx([20, 60])
    assert val[0]['data_samples'].scale_factor == (0.5, 0.5)
    metric.dataset_meta = val.metainfo
    assert metric.metrics == ['bbox']
