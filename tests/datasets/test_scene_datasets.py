"""The scene datasets under mmseg's and mmdet's own pipelines, loaders and metrics."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS as DET_DATASETS
from mmdet.registry import METRICS as DET_METRICS
from mmdet.registry import MODELS as DET_MODELS
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.registry import DATASETS as SEG_DATASETS
from mmseg.registry import METRICS as SEG_METRICS
from mmseg.registry import MODELS as SEG_MODELS

from mmstructkd.datasets import LoadScene, LoadSceneAnnotations, render_scene
from mmstructkd.datasets.scene_source import SPLIT_SIZE
from mmstructkd.datasets.scenes import CLASSES, OBJECT_CLASSES
from mmstructkd.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / 'configs' / '_base_' / 'datasets'


def load(name: str, num_scenes: int = 4, size: tuple[int, int] = (64, 64), **loader: object) -> Config:
    cfg = Config.fromfile(CONFIGS / name)
    for part in (cfg.train_dataloader, cfg.val_dataloader):
        part.dataset.update(num_scenes=num_scenes, size=size)
        part.update(num_workers=0, persistent_workers=False, **loader)
    return cfg


def build(scope: str, cfg: Config):
    with DefaultScope.overwrite_default_scope(scope):
        return (SEG_DATASETS if scope == 'mmseg' else DET_DATASETS).build(copy.deepcopy(cfg))


def loader(scope: str, cfg: Config):
    with DefaultScope.overwrite_default_scope(scope):
        return Runner.build_dataloader(copy.deepcopy(cfg), seed=0)


def test_seg_sample_is_the_scene() -> None:
    dataset = build('mmseg', load('scenes_seg.py').val_dataloader.dataset)
    assert len(dataset) == 4
    assert dataset.metainfo['classes'] == CLASSES
    sample = dataset[1]
    scene = render_scene(0, SPLIT_SIZE + 1, (64, 64))
    assert np.array_equal(sample['inputs'].numpy().transpose(1, 2, 0), scene.image)
    assert np.array_equal(sample['data_samples'].gt_sem_seg.data[0].numpy(), scene.labels)
    assert sample['data_samples'].ori_shape == (64, 64)


def test_perfect_segmentation_scores_100() -> None:
    cfg = load('scenes_seg.py', num_scenes=12, batch_size=2)
    batches = loader('mmseg', cfg.val_dataloader)
    metric = SEG_METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = batches.dataset.metainfo
    for batch in batches:
        outputs = []
        for sample in batch['data_samples']:
            label = sample.gt_sem_seg.data
            outputs.append(dict(pred_sem_seg=dict(data=label.clamp(max=9)), gt_sem_seg=dict(data=label)))
        metric.process(batch, outputs)
    scores = metric.evaluate(12)
    assert scores['mIoU'] == 100.0
    assert scores['aAcc'] == 100.0


def test_perfect_depth_scores_0() -> None:
    cfg = load('scenes_depth.py', batch_size=2)
    batches = loader('mmseg', cfg.val_dataloader)
    metric = SEG_METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = batches.dataset.metainfo
    for batch in batches:
        outputs = []
        for sample in batch['data_samples']:
            depth = sample.gt_depth_map.data
            assert depth.dtype == torch.float32
            assert (depth == 0).any()
            # what has no reading must not count: predict nonsense there
            outputs.append(
                dict(pred_depth_map=dict(data=torch.where(depth > 0, depth, 99.0)), gt_depth_map=dict(data=depth))
            )
        metric.process(batch, outputs)
    scores = metric.evaluate(4)
    assert scores['abs_rel'] == 0.0
    assert scores['rmse'] == 0.0
    assert scores['d1'] == 1.0


@pytest.mark.parametrize('shift', [0.0, 40.0])
def test_detection_is_scored_without_an_annotation_file(shift: float) -> None:
    cfg = load('scenes_det.py', num_scenes=8, size=(96, 96), batch_size=2)
    batches = loader('mmdet', cfg.val_dataloader)
    metric = DET_METRICS.build(cfg.val_evaluator)
    metric.dataset_meta = batches.dataset.metainfo
    for _ in range(2):  # the second round finds the truth of the first
        for batch in batches:
            for sample in batch['data_samples']:
                truth = sample.gt_instances
                sample.pred_instances = truth.new(
                    bboxes=truth.bboxes.tensor + shift, labels=truth.labels, scores=torch.ones(len(truth))
                )
            metric.process(batch, [sample.to_dict() for sample in batch['data_samples']])
        scores = metric.evaluate(8)
        assert (scores['coco/bbox_mAP'] == 1.0) if shift == 0.0 else (scores['coco/bbox_mAP'] < 0.2)


def test_det_sample_is_the_scene() -> None:
    dataset = build('mmdet', load('scenes_det.py').val_dataloader.dataset)
    assert dataset.metainfo['classes'] == OBJECT_CLASSES
    scene = render_scene(0, SPLIT_SIZE + 2, (64, 64))
    sample = dataset[2]['data_samples']
    good = ~scene.box_ignored
    assert np.array_equal(sample.gt_instances.bboxes.tensor.numpy(), scene.boxes[good])
    assert np.array_equal(sample.gt_instances.labels.numpy(), scene.box_labels[good])
    assert len(sample.ignored_instances) == scene.box_ignored.sum()
    assert dataset.get_cat_ids(2) == scene.box_labels.tolist()


def test_flips_move_everything_along() -> None:
    cfg = load('scenes_seg.py')
    steps = cfg.train_dataloader.dataset
    steps.pipeline[1].with_depth = True
    steps.pipeline[2].prob = 1.0
    sample = build('mmseg', steps)[0]
    scene = render_scene(0, 0, (64, 64))
    assert np.array_equal(sample['inputs'].numpy().transpose(1, 2, 0), scene.image[:, ::-1])
    assert np.array_equal(sample['data_samples'].gt_sem_seg.data[0].numpy(), scene.labels[:, ::-1])
    assert np.array_equal(sample['data_samples'].gt_depth_map.data[0].numpy(), scene.depth[:, ::-1])


@pytest.mark.parametrize(
    ('scope', 'name'), [('mmseg', 'scenes_seg.py'), ('mmseg', 'scenes_depth.py'), ('mmdet', 'scenes_det.py')]
)
def test_training_loader_with_workers(scope: str, name: str) -> None:
    cfg = load(name, num_scenes=6)
    cfg.train_dataloader.update(num_workers=2, persistent_workers=True, batch_size=3)
    batches = iter(loader(scope, cfg.train_dataloader))
    seen = [next(batches) for _ in range(4)]
    assert all(tuple(image.shape) == (3, 64, 64) for batch in seen for image in batch['inputs'])
    # twelve samples of six scenes, flipped or not: more than one scene, and each was seen
    names = {sample.img_path for batch in seen for sample in batch['data_samples']}
    assert names == {f'scene_0_{index:07d}.png' for index in range(6)}


@pytest.mark.parametrize(
    ('scope', 'name', 'preprocessor'),
    [
        ('mmseg', 'scenes_seg.py', 'SegDataPreProcessor'),
        ('mmseg', 'scenes_depth.py', 'SegDataPreProcessor'),
        ('mmdet', 'scenes_det.py', 'DetDataPreprocessor'),
    ],
)
def test_batches_suit_the_preprocessors(scope: str, name: str, preprocessor: str) -> None:
    batch = next(iter(loader(scope, load(name, batch_size=2).train_dataloader)))
    build_cfg = dict(type=preprocessor, mean=[0.0] * 3, std=[1.0] * 3)
    if scope == 'mmseg':
        build_cfg.update(size=(64, 64))
    models = SEG_MODELS if scope == 'mmseg' else DET_MODELS
    data = models.build(build_cfg)(batch, training=True)
    assert tuple(data['inputs'].shape) == (2, 3, 64, 64)
    assert data['inputs'].dtype == torch.float32
    for sample in data['data_samples']:
        if name == 'scenes_depth.py':
            assert tuple(sample.gt_depth_map.data.shape) == (1, 64, 64)
        elif name == 'scenes_det.py':
            assert len(sample.gt_instances.bboxes) == len(sample.gt_instances.labels) > 0
        else:
            assert tuple(sample.gt_sem_seg.data.shape) == (1, 64, 64)


def test_splits_share_no_scene() -> None:
    cfg = load('scenes_seg.py')
    indices = []
    for split in ('train', 'val', 'test'):
        dataset = build('mmseg', dict(cfg.val_dataloader.dataset, split=split))
        indices.append({dataset.get_data_info(i)['scene_index'] for i in range(len(dataset))})
    assert sum(len(part) for part in indices) == len(set.union(*indices)) == 12


def test_cache_changes_nothing() -> None:
    cfg = load('scenes_seg.py').train_dataloader.dataset
    # a step that writes into the image, and into the labels, in place
    cfg.pipeline = [*cfg.pipeline[:2], dict(type='PackSegInputs')]
    cached, fresh = build('mmseg', dict(cfg, cache=True)), build('mmseg', dict(cfg, cache=False))
    first = cached[0]
    truth = first['inputs'].clone()
    first['inputs'].zero_()
    first['data_samples'].gt_sem_seg.data.zero_()
    for sample in (cached[0], fresh[0]):
        assert torch.equal(sample['inputs'], truth)
        assert sample['data_samples'].gt_sem_seg.data.any()
    assert cached.get_data_info(0)['scene'] is cached.get_data_info(0)['scene']
    assert fresh.get_data_info(0)['scene'] is not fresh.get_data_info(0)['scene']
    assert len(pickle.dumps(cached)) < 20_000  # workers get no copy of the cache


def test_class_subset() -> None:
    cfg = load('scenes_seg.py').val_dataloader.dataset
    dataset = build('mmseg', dict(cfg, metainfo=dict(classes=('sky', 'ground'))))
    scene = render_scene(0, SPLIT_SIZE, (64, 64))
    wanted = np.full(256, 255)
    wanted[CLASSES.index('sky')], wanted[CLASSES.index('ground')] = 0, 1
    assert np.array_equal(dataset[0]['data_samples'].gt_sem_seg.data[0].numpy(), wanted[scene.labels])
    assert [tuple(colour) for colour in dataset.metainfo['palette']] == [(120, 178, 226), (106, 142, 85)]

    cfg = load('scenes_det.py').val_dataloader.dataset
    dataset = build('mmdet', dict(cfg, metainfo=dict(classes=('cone', 'ball'))))
    scene = render_scene(0, SPLIT_SIZE, (64, 64))
    kinds = [OBJECT_CLASSES[label] for label in scene.box_labels]
    assert dataset.get_cat_ids(0) == [('cone', 'ball').index(kind) for kind in kinds if kind in ('cone', 'ball')]


def test_reduce_zero_label() -> None:
    cfg = load('scenes_seg.py').val_dataloader.dataset
    dataset = build('mmseg', dict(cfg, reduce_zero_label=True))
    scene = render_scene(0, SPLIT_SIZE, (64, 64))
    labels = scene.labels.astype(int)
    wanted = np.where((labels == 0) | (labels == 255), 255, labels - 1)
    assert np.array_equal(dataset[0]['data_samples'].gt_sem_seg.data[0].numpy(), wanted)


def test_pipeline_reads_files_too(tmp_path: Path) -> None:
    # as inference_model does: only an image, no scene
    import mmcv

    image = render_scene(0, 0, (32, 32)).image
    path = str(tmp_path / 'image.png')
    mmcv.imwrite(image, path)
    results = Compose([LoadScene(), LoadSceneAnnotations()])(dict(img_path=path))
    assert np.array_equal(results['img'], image)
    assert 'gt_seg_map' not in results


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='training'), r"SceneSegDataset: `split` must be one of .*, got 'training'. Did you mean 'train'"),
        (dict(num_scenes=0), r'SceneSegDataset: `num_scenes` must be an integer of at least 1, got 0'),
        (dict(size=(8, 8)), r'`size\[0\]` must be an integer of at least 16, got 8'),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    cfg = dict(type='mmstructkd.SceneSegDataset', pipeline=[], **arguments)
    with pytest.raises(ConfigError, match=message):
        build('mmseg', cfg)


def test_a_step_that_loads_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match='`with_seg` must be True if `with_depth` is not, got False'):
        LoadSceneAnnotations(with_seg=False)
