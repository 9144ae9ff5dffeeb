"""Unlabelled images beside labelled ones, through mmengine's own loader."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmstructkd.datasets import ImageFolderDataset, PairedDataset
from mmstructkd.errors import ConfigError

SCENES = dict(type='mmstructkd.SceneSegDataset', num_scenes=6, size=(32, 48))
LABELLED = dict(
    SCENES,
    pipeline=[
        dict(type='mmstructkd.LoadScene'),
        dict(type='mmstructkd.LoadSceneAnnotations'),
        dict(type='PackSegInputs'),
    ],
)
PACK = {'mmseg': dict(type='PackSegInputs'), 'mmdet': dict(type='PackDetInputs')}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(3):
        path = tmp_path / 'images' / f'{number}' / 'a.png'
        path.parent.mkdir(parents=True)
        cv2.imwrite(str(path), np.full((32, 48, 3), number, np.uint8))
    (tmp_path / 'images' / 'notes.txt').write_text('no image')
    return tmp_path / 'images'


def unlabelled(folder: Path, scope: str = 'mmseg', **changes: object) -> dict:
    pipeline = [dict(type='LoadImageFromFile'), PACK[scope]]
    return dict(type='mmstructkd.ImageFolderDataset', data_root=str(folder), pipeline=pipeline, **changes)


def test_a_batch_has_both(folder: Path) -> None:
    init_default_scope('mmseg')
    dataset = dict(type='mmstructkd.PairedDataset', dataset=LABELLED, unlabelled=unlabelled(folder))
    loader = Runner.build_dataloader(
        dict(batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dataset)
    )
    batches = list(loader)
    assert len(batches) == 3
    for batch in batches:
        assert len(batch['inputs']) == len(batch['unlabelled']['inputs']) == 2
        assert all(hasattr(sample, 'gt_sem_seg') for sample in batch['data_samples'])
        assert not any(hasattr(sample, 'gt_sem_seg') for sample in batch['unlabelled']['data_samples'])
    assert loader.dataset.metainfo['classes'] == loader.dataset.dataset.metainfo['classes']
    drawn = {int(image[0, 0, 0]) for batch in batches for image in batch['unlabelled']['inputs']}
    assert drawn <= {0, 1, 2}


def test_what_is_drawn_follows_the_seed(folder: Path) -> None:
    init_default_scope('mmseg')
    dataset = PairedDataset(LABELLED, unlabelled=unlabelled(folder))
    draws = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        draws.append([int(dataset[i]['unlabelled']['inputs'][0, 0, 0]) for i in range(6)])
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_images_of_a_folder_or_a_list(folder: Path, tmp_path: Path, scope: str) -> None:
    init_default_scope(scope)
    everything = ImageFolderDataset(**{k: v for k, v in unlabelled(folder, scope).items() if k != 'type'})
    assert [Path(everything.get_data_info(i)['img_path']).parent.name for i in range(3)] == ['0', '1', '2']
    assert everything[0]['data_samples'].metainfo['img_shape'] == (32, 48)
    (tmp_path / 'kept.txt').write_text('2/a.png\n\n')
    some = ImageFolderDataset(
        **{k: v for k, v in unlabelled(folder, scope, ann_file=str(tmp_path / 'kept.txt')).items() if k != 'type'}
    )
    assert len(some) == 1
    assert int(some[0]['inputs'][0, 0, 0]) == 2


def test_mistakes_are_named(folder: Path, tmp_path: Path) -> None:
    init_default_scope('mmseg')
    with pytest.raises(ConfigError, match='another dataset must be named'):
        PairedDataset(LABELLED)
    with pytest.raises(ConfigError, match="must not have a name of .* got 'inputs'"):
        PairedDataset(LABELLED, inputs=unlabelled(folder))
    with pytest.raises(ConfigError, match='must be a folder that exists'):
        PairedDataset(LABELLED, unlabelled=unlabelled(folder / 'nowhere'))
    (tmp_path / 'kept.txt').write_text('9/a.png\n')
    with pytest.raises(ConfigError, match='got 1 that do not exist'):
        PairedDataset(LABELLED, unlabelled=unlabelled(folder, ann_file=str(tmp_path / 'kept.txt')))
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ConfigError, match='must hold images'):
        PairedDataset(LABELLED, unlabelled=unlabelled(tmp_path / 'empty'))
