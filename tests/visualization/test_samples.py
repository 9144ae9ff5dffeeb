"""Samples of all three tasks are painted, in the size of a tile, by networks that are left as they are."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import InstanceData, PixelData

from mmstructkd import compat
from mmstructkd.errors import ConfigError
from mmstructkd.teachers.loading import build_network
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_segmentor
from mmstructkd.visualization import (
    Looks,
    choose_looks,
    colour_depth,
    colour_mask,
    draw_samples,
    paint_image,
    paint_prediction,
    paint_truth,
)

NETWORKS = {'seg': toy_segmentor, 'depth': toy_depth_estimator, 'det': lambda: toy_detector('gfl')}
tasks = pytest.mark.parametrize('task', NETWORKS)


def scenes(task):
    """Two scenes of the task, and what is known of their dataset."""
    compat.install()
    cfg = toy_config(NETWORKS[task](), 'unused', task=task)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    return dataset.metainfo, [dataset[0], dataset[1]]


def untrained(task):
    torch.manual_seed(0)
    return build_network(NETWORKS[task](), 'test').eval()


class Oracle(torch.nn.Module):
    """Says what it is told, in mmseg's or mmdet's way: written into the sample."""

    def __init__(self, **fields):
        super().__init__()
        self.fields = fields

    def test_step(self, batch):
        (sample,) = batch['data_samples']
        sample.set_data(self.fields)
        return [sample]


@tasks
def test_picture_of_an_untrained_network(task):
    meta, samples = scenes(task)
    network = untrained(task)
    looks = choose_looks(meta, samples, [network], width=100, score_threshold=0.0)
    before = copy.deepcopy(samples)
    picture = draw_samples(samples, {'student\nuntrained': network}, looks)
    assert picture.shape[1] == 6 + 3 * (100 + 6)
    assert picture.shape[0] > 2 * 24 + 2 * (75 + 6)
    assert picture.dtype == np.uint8
    for sample, old in zip(samples, before, strict=True):
        assert torch.equal(sample['inputs'], old['inputs'])
        assert set(sample['data_samples'].keys()) == set(old['data_samples'].keys())


@tasks
def test_prediction_that_is_the_truth_looks_like_it(task):
    meta, (sample, _) = scenes(task)
    truth = sample['data_samples']
    looks = choose_looks(meta, [sample], [untrained(task)])
    if task == 'seg':
        oracle = Oracle(pred_sem_seg=truth.gt_sem_seg)
    elif task == 'depth':
        oracle = Oracle(pred_depth_map=truth.gt_depth_map)
    else:
        given = truth.gt_instances
        oracle = Oracle(pred_instances=InstanceData(bboxes=given.bboxes.tensor, labels=given.labels))
    assert len(truth.gt_instances) if task == 'det' else True
    assert (paint_prediction(oracle, sample, looks) == paint_truth(sample, looks)).all()
    assert (paint_truth(sample, looks) != paint_image(sample, looks)).any()


def test_truth_and_predictions_have_the_size_of_the_file():
    """A validation pipeline may resize the image; the mask, the depth map and the boxes stay as they were."""
    meta, (sample, _) = scenes('seg')
    looks = choose_looks(meta, [sample], [untrained('seg')], width=64)
    large = np.kron(sample['data_samples'].gt_sem_seg.data[0].numpy(), np.ones((2, 2), np.uint8))
    own = colour_mask(sample['data_samples'].gt_sem_seg.data[0].numpy(), looks.palette)
    sample['data_samples'].gt_sem_seg = PixelData(data=torch.from_numpy(large)[None])
    assert (paint_truth(sample, looks) == own).all()

    meta, (sample, _) = scenes('det')
    looks = choose_looks(meta, [sample], [untrained('det')], width=128)
    sample['data_samples'].set_metainfo(dict(ori_shape=(96, 128)))
    sample['data_samples'].gt_instances = InstanceData(
        bboxes=torch.tensor([[40.0, 40.0, 80.0, 72.0]]), labels=torch.tensor([0])
    )
    changed = (paint_truth(sample, looks) != paint_image(sample, looks)).any(axis=2)
    assert changed[72, 40:81].any()
    assert not changed[73:].any()
    assert not changed[:, 81:].any()


def test_depth_range_is_that_of_the_readings():
    meta, samples = scenes('depth')
    readings = torch.cat([s['data_samples'].gt_depth_map.data.flatten() for s in samples])
    readings = readings[readings > 0]
    looks = choose_looks(meta, samples, [untrained('depth')])
    near, far = looks.depth_range
    assert near <= readings.min() < near + 0.5
    assert far - 0.5 < readings.max() <= far
    own = samples[0]['data_samples'].gt_depth_map.data[0].numpy()
    shown = paint_truth(samples[0], Looks('depth', depth_range=looks.depth_range, width=own.shape[1]))
    assert (shown == colour_depth(own, looks.depth_range)).all()
    given = choose_looks(meta, samples, [untrained('depth')], depth_range=(1.0, 9.0))
    assert given.depth_range == (1.0, 9.0)


def test_map_without_any_reading_needs_a_range():
    meta, (sample, _) = scenes('depth')
    sample['data_samples'].gt_depth_map.data.zero_()
    with pytest.raises(ConfigError, match='must have a depth reading, got none in 1'):
        choose_looks(meta, [sample], [untrained('depth')])


def test_networks_of_two_tasks_are_refused():
    meta, samples = scenes('seg')
    with pytest.raises(ConfigError, match=r"must share one task, got \['depth', 'seg'\]"):
        choose_looks(meta, samples, [untrained('seg'), untrained('depth')])


def test_boxes_of_low_score_are_left_out():
    meta, (sample, _) = scenes('det')
    instances = InstanceData(
        bboxes=torch.tensor([[5.0, 5.0, 30.0, 30.0]]), labels=torch.tensor([0]), scores=torch.tensor([0.25])
    )
    oracle = Oracle(pred_instances=instances)
    looks = choose_looks(meta, [sample], [untrained('det')])
    assert (paint_prediction(oracle, sample, looks) == paint_image(sample, looks)).all()
    lower = choose_looks(meta, [sample], [untrained('det')], score_threshold=0.2)
    assert (paint_prediction(oracle, sample, lower) != paint_image(sample, lower)).any()


def test_images_of_several_heights_stand_in_rows_of_one():
    meta, samples = scenes('seg')
    tall = copy.deepcopy(samples[0])
    tall['inputs'] = tall['inputs'].repeat(1, 2, 1)
    looks = choose_looks(meta, samples, [untrained('seg')], width=64)
    picture = draw_samples([samples[0], tall], {}, looks)
    top = 24 + 6
    assert (picture[top + 48 : top + 96, 6:70] == 255).all()
    assert (picture[top + 102 + 48 : top + 102 + 96, 6:70] != 255).any()
