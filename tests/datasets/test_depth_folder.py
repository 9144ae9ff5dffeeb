"""Depth maps in files: two folders of equal names, and the lists of the Eigen split."""

from __future__ import annotations

from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, METRICS, TRANSFORMS

from mmstructkd.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / 'configs' / '_base_' / 'datasets'


@pytest.fixture(autouse=True)
def _mmseg_scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    mmcv.imwrite(array, str(path))


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Two images a split; the depth of all of them, in millimetres, is returned."""
    rng = np.random.default_rng(0)
    depth = rng.integers(800, 4000, (240, 320)).astype(np.uint16)
    depth[:, :40] = 0
    for split in ('train', 'val'):
        for name in ('000000', '000002'):
            write(tmp_path / 'kitchen' / 'img' / split / f'{name}.jpg', rng.integers(0, 256, (240, 320, 3), np.uint8))
            write(tmp_path / 'kitchen' / 'depth' / split / f'{name}.png', depth)
    monkeypatch.setenv('MMSTRUCTKD_DATA', str(tmp_path))
    return depth


def test_kitchen_config_reads_the_folder(kitchen: np.ndarray) -> None:
    """Validation gives the whole map in metres, to the millimetre; training a crop of it."""
    cfg = Config.fromfile(CONFIGS / 'kitchen_160x224.py')
    train = DATASETS.build(cfg.train_dataloader.dataset)
    val = DATASETS.build(cfg.val_dataloader.dataset)
    assert len(train) == len(val) == 2
    sample = val[0]
    assert tuple(sample['inputs'].shape) == (3, 240, 320)
    metres = sample['data_samples'].gt_depth_map.data
    assert metres.dtype == torch.float32
    assert np.array_equal((metres[0].numpy() * 1000).round().astype(np.uint16), kitchen)
    sample = train[1]
    assert tuple(sample['inputs'].shape) == (3, 160, 224)
    crop = sample['data_samples'].gt_depth_map.data
    assert tuple(crop.shape) == (1, 160, 224)
    assert set(np.unique((crop.numpy() * 1000).round().astype(np.uint16))) <= set(np.unique(kitchen))


def test_crop_and_flip_keep_image_and_depth_together(tmp_path: Path) -> None:
    """The image shows its own depth; both say the same after every random step."""
    across = np.linspace(0, 200, 320, dtype=np.uint8)
    image = np.repeat(np.repeat(across[None, :, None], 240, 0), 3, 2)
    write(tmp_path / 'img' / 'a.png', image)
    write(tmp_path / 'depth' / 'a.png', image[:, :, 0].astype(np.uint16))
    steps = [
        step
        for step in Config.fromfile(CONFIGS / 'kitchen_160x224.py').train_pipeline
        if step.type != 'PhotoMetricDistortion'
    ]
    dataset = DATASETS.build(
        dict(type='mmstructkd.DepthFolderDataset', data_root=str(tmp_path), img_suffix='.png', pipeline=steps)
    )
    np.random.seed(0)
    for _ in range(8):
        sample = dataset[0]
        shown, metres = sample['inputs'][0], sample['data_samples'].gt_depth_map.data[0] * 1000
        assert torch.equal(shown.float(), metres.round())


def test_metric_leaves_out_what_has_no_reading(kitchen: np.ndarray) -> None:
    """The evaluator of the config scores a prediction that is right where there are readings as perfect."""
    cfg = Config.fromfile(CONFIGS / 'kitchen_160x224.py')
    truth = DATASETS.build(cfg.val_dataloader.dataset)[0]['data_samples'].gt_depth_map.data
    metric = METRICS.build(cfg.val_evaluator)
    guess = torch.where(truth > 0, truth, torch.full_like(truth, 7.0))
    metric.process({}, [dict(pred_depth_map=dict(data=guess), gt_depth_map=dict(data=truth))])
    scores = metric.compute_metrics(metric.results)
    assert scores['abs_rel'] == scores['rmse'] == 0
    assert scores['d1'] == 1


def test_data_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('MMSTRUCTKD_DATA', raising=False)
    for name in ('kitchen_160x224', 'bccd_320x240'):
        folder = name.split('_')[0]
        assert Config.fromfile(CONFIGS / f'{name}.py').train_dataloader.dataset.data_root == f'data/{folder}'
    monkeypatch.setenv('MMSTRUCTKD_DATA', '/elsewhere')
    for name in ('kitchen_160x224', 'bccd_320x240'):
        folder = name.split('_')[0]
        assert Config.fromfile(CONFIGS / f'{name}.py').val_dataloader.dataset.data_root == f'/elsewhere/{folder}'


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / 'img').mkdir()
    with pytest.raises(ConfigError, match=r'`data_prefix` must name a folder with images \(\*\.jpg\)'):
        DATASETS.build(dict(type='mmstructkd.DepthFolderDataset', data_root=str(tmp_path)))


def eigen(root: Path, lines: str) -> dict:
    (root / 'split.txt').write_text(lines, encoding='utf-8')
    load = dict(type='LoadDepthAnnotation', depth_rescale_factor=1 / 256)
    return dict(
        type='mmstructkd.KITTIEigenDataset',
        data_root=str(root),
        ann_file='split.txt',
        pipeline=[dict(type='LoadImageFromFile'), load, dict(type='PackSegInputs', meta_keys=('focal_length',))],
    )


def test_eigen_list(tmp_path: Path) -> None:
    """Pairs as the list names them, 256 steps a metre; lines without depth are left out, blank ones as well."""
    write(tmp_path / 'input' / 'day' / 'image_02' / '7.png', np.zeros((5, 8, 3), np.uint8))
    depth = np.arange(40, dtype=np.uint16).reshape(5, 8) * 128
    write(tmp_path / 'gt_depth' / 'drive' / '7.png', depth)
    lines = 'day/image_02/7.png drive/7.png 721.5377\nday/image_02/8.png None 721.5377\n\n'
    dataset = DATASETS.build(eigen(tmp_path, lines))
    assert len(dataset) == 1
    sample = dataset[0]['data_samples']
    assert np.allclose(sample.gt_depth_map.data[0].numpy(), np.arange(40).reshape(5, 8) / 2)
    assert sample.focal_length == pytest.approx(721.5377)


def test_eigen_list_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'"IMAGE DEPTH FOCAL", got .a\.png b\.png. in line 2 of split\.txt'):
        DATASETS.build(eigen(tmp_path, 'a.png b.png 7\na.png b.png\n'))
    with pytest.raises(ConfigError, match='at least one image with depth'):
        DATASETS.build(eigen(tmp_path, 'a.png None 7\n'))
    with pytest.raises(ConfigError, match='`ann_file` must name a list of the Eigen split'):
        DATASETS.build(dict(type='mmstructkd.KITTIEigenDataset', data_root=str(tmp_path)))


def kitti(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """One image of KITTI's size for each list; image (its own row and column numbers) and depth are returned."""
    rows, columns = np.mgrid[:375, :1242]
    image = np.stack([rows % 256, columns % 256, np.zeros_like(rows)], axis=2).astype(np.uint8)
    depth = (rows * 40 + columns + 256).astype(np.uint16)
    write(root / 'kitti' / 'input' / 'day' / '7.png', image)
    write(root / 'kitti' / 'gt_depth' / 'drive' / '7.png', depth)
    for split in ('train', 'test'):
        (root / 'kitti' / f'kitti_eigen_{split}.txt').write_text('day/7.png drive/7.png 721.5377\n', encoding='utf-8')
    return image, depth


def test_kitti_config_scores_the_window_of_the_whole_image(tmp_path: Path) -> None:
    """The readings that are left are those of the published window; image and prediction have the crop's size."""
    image, depth = kitti(tmp_path)
    cfg = Config.fromfile(CONFIGS / 'kitti_352x704.py')
    sample = DATASETS.build(dict(cfg.val_dataloader.dataset, data_root=str(tmp_path / 'kitti')))[0]
    metres, shown = sample['data_samples'].gt_depth_map.data[0].numpy(), sample['inputs'].numpy()
    assert metres.shape == sample['data_samples'].ori_shape == (352, 1216)
    assert np.array_equal(shown, image[23:, 13:1229].transpose(2, 0, 1))
    window = np.zeros((375, 1242), dtype=bool)
    # 0.40810811 and 0.99189189 of 375 rows, 0.03594771 and 0.96405229 of 1242 columns
    window[153:371, 44:1197] = True
    assert np.array_equal(metres, np.where(window, depth / 256, 0)[23:, 13:1229].astype(np.float32))


def test_kitti_config_trains_on_crops_of_the_lower_part(tmp_path: Path) -> None:
    """No reading is taken away, and image and depth stay together."""
    kitti(tmp_path)
    cfg = Config.fromfile(CONFIGS / 'kitti_352x704.py')
    steps = [step for step in cfg.train_pipeline if step.type != 'PhotoMetricDistortion']
    dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, data_root=str(tmp_path / 'kitti'), pipeline=steps))
    for _ in range(4):
        sample = dataset[0]
        shown, metres = sample['inputs'].numpy().astype(int), sample['data_samples'].gt_depth_map.data[0].numpy()
        assert metres.shape == shown.shape[1:] == (352, 704)
        # depth is 40 rows + columns + 256, of which the image has both modulo 256
        column = (metres * 256).astype(int) - 256 - 40 * (np.arange(352) + 23)[:, None]
        assert np.array_equal(shown[0], np.repeat((np.arange(352) + 23)[:, None] % 256, 704, axis=1))
        assert np.array_equal(shown[1], column % 256)
        assert column.min() >= 13
        assert column.max() < 1229


def test_windows_and_crops_of_other_sizes() -> None:
    depth = np.ones((10, 20), np.float32)
    out = TRANSFORMS.build(dict(type='mmstructkd.DepthWindow', window=(0.1, 0.55, 0.0, 1.0))).transform(
        dict(gt_depth_map=depth)
    )
    assert out['gt_depth_map'][1:5].all()
    assert out['gt_depth_map'].sum() == 4 * 20
    crop = TRANSFORMS.build(dict(type='mmstructkd.BottomCrop', crop_size=(3, 4)))
    numbers = np.arange(30).reshape(5, 6)
    out = crop.transform(dict(img=numbers, gt_depth_map=numbers, seg_fields=['gt_depth_map']))
    assert out['gt_depth_map'].tolist() == numbers[2:, 1:5].tolist() == out['img'].tolist()
    assert out['img_shape'] == out['ori_shape'] == (3, 4)
    with pytest.raises(ConfigError, match='`crop_size` must fit into each image, got 3x4 for one of 2x9'):
        crop.transform(dict(img=np.zeros((2, 9, 3)), seg_fields=[]))


@pytest.mark.parametrize('size', [352, (352,), (352, 0), (352.0, 1216)])
def test_bottom_crop_refuses(size: object) -> None:
    with pytest.raises(ConfigError, match='`crop_size` must be two integers above 0'):
        TRANSFORMS.build(dict(type='mmstructkd.BottomCrop', crop_size=size))


@pytest.mark.parametrize('window', [(0.1, 0.5), (0.5, 0.1, 0.0, 1.0), (0.0, 1.0, 0.0, 1.1)])
def test_depth_window_refuses(window: tuple) -> None:
    with pytest.raises(ConfigError, match='`window` must be four shares within'):
        TRANSFORMS.build(dict(type='mmstructkd.DepthWindow', window=window))
    with pytest.raises(ConfigError, match="`window` must be one of .*got 'gar'. Did you mean 'garg'"):
        TRANSFORMS.build(dict(type='mmstructkd.DepthWindow', window='gar'))
