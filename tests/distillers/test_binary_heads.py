"""Segmentation heads with one channel for two classes learn, also from a head with two, or are refused by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner
from mmengine.structures import PixelData
from torch import nn

from mmstructkd.datasets.scenes import CLASSES
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.registry import MODELS
from mmstructkd.tasks.targets import collect_targets, num_classes_of
from mmstructkd.testing import (
    toy_batch,
    toy_config,
    toy_depth_estimator,
    toy_detector,
    toy_distiller,
    toy_segmentor,
)

SCORES = 'decode_head.conv_seg'
OVER_CLASSES = {
    'pixel': dict(type='mmstructkd.PixelwiseKLLoss', temperature=2.0),
    'mapped': dict(type='mmstructkd.PixelwiseKLLoss', class_map=[0, 1]),
    'dist': dict(type='mmstructkd.DistLoss'),
    'dist_mapped': dict(type='mmstructkd.DistLoss', class_map=[1, 0]),
    'decoupled': dict(type='mmstructkd.DecoupledKLLoss'),
    'decoupled_by_teacher': dict(type='mmstructkd.DecoupledKLLoss', target='teacher'),
    'soft': dict(type='mmstructkd.WeightedSoftLabelLoss'),
    'interclass': dict(type='mmstructkd.InterclassSimilarityLoss', normalize=False, present='all'),
    'category': dict(type='mmstructkd.CategorySimilarityLoss'),
    'channel': dict(type='mmstructkd.ChannelwiseKLLoss'),
    'holistic': dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=2), softmax=True),
    'holistic_raw': dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=2)),
}


def binary(width: int, channels: int, num_classes: int = 2) -> dict:
    """FCN for two classes with a sigmoid's one channel, or with two."""
    model = toy_segmentor(width, num_classes=num_classes)
    for name in ('decode_head', 'auxiliary_head'):
        model[name].out_channels = channels
        model[name].loss_decode.use_sigmoid = channels == 1
        model[name].threshold = 0.5
    return model


def distiller(student: int, teacher: int, losses: dict) -> nn.Module:
    torch.manual_seed(0)
    terms = {name: dict(tap=SCORES, loss=copy.deepcopy(loss)) for name, loss in losses.items()}
    config = toy_distiller(
        student=binary(4, student), teacher=dict(config=binary(8, teacher), allow_random=True), terms=terms
    )
    return MODELS.build(config).train()


@pytest.mark.parametrize(('student', 'teacher'), [(1, 1), (1, 2), (2, 1)])
def test_each_loss_has_a_value_and_a_gradient(student: int, teacher: int) -> None:
    model = distiller(student, teacher, OVER_CLASSES)
    nn.init.normal_(model.teacher.network.decode_head.conv_seg.weight)
    batch = toy_batch(num_classes=2)
    for name, term in model.terms.items():
        assert [level.connector for level in term.levels] == ['none'], name
        model.zero_grad()
        losses = model(**batch, mode='loss')
        losses[f'loss_kd_{name}'].backward()
        gradient = model.student.decode_head.conv_seg.weight.grad
        assert losses[f'loss_kd_{name}'].isfinite(), name
        assert losses[f'loss_kd_{name}'] != 0, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize('teacher', [1, 2])
def test_a_run_on_the_scenes(teacher: int, tmp_path: Path) -> None:
    """Two of the classes against each other, all other pixels without a label."""
    losses = {name: OVER_CLASSES[name] for name in ('pixel', 'dist', 'decoupled', 'channel')}
    terms = {name: dict(tap=SCORES, loss=loss) for name, loss in losses.items()}
    terms['affinity'] = dict(tap='decode_head.convs', loss=dict(type='mmstructkd.PairwiseAffinityLoss'))
    model = toy_distiller(student=binary(4, 1), teacher=dict(config=binary(8, teacher), allow_random=True), terms=terms)
    cfg = toy_config(model, tmp_path, max_iters=3)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.metainfo = dict(classes=CLASSES[:2])
    cfg.train_cfg.val_interval = 3
    runner = Runner.from_cfg(cfg)
    before = copy.deepcopy(runner.model.student.state_dict())
    runner.train()
    for name in terms:
        values = torch.tensor(runner.message_hub.get_scalar(f'train/loss_kd_{name}').data[0])
        assert len(values) == 3
        assert values.isfinite().all()
        assert values.abs().max() > 0
    moved = runner.model.student.state_dict()
    assert not torch.equal(moved['decode_head.conv_seg.weight'], before['decode_head.conv_seg.weight'])
    assert runner.message_hub.get_scalar('val/mIoU').current() >= 0


def test_one_class_and_one_channel_are_two_classes() -> None:
    """mmseg takes num_classes=1 for the same head."""
    torch.manual_seed(0)
    term = dict(one=dict(tap=SCORES, loss=OVER_CLASSES['decoupled']))
    config = toy_distiller(
        student=binary(4, 1, num_classes=1), teacher=dict(config=binary(8, 2), allow_random=True), terms=term
    )
    model = MODELS.build(config).train()
    assert num_classes_of(model.student.decode_head) == 2
    batch = toy_batch(num_classes=2)
    assert collect_targets(model.student, batch['inputs'], batch['data_samples']).num_classes == 2
    assert model(**batch, mode='loss')['loss_kd_one'] > 0


def test_only_labelled_pixels_of_a_binary_head() -> None:
    model = distiller(1, 2, {'decoupled': OVER_CLASSES['decoupled'], 'pixel': OVER_CLASSES['pixel']})
    batch = toy_batch(num_classes=2)
    second = batch['data_samples'][1]
    second.gt_sem_seg = PixelData(data=torch.full((1, 48, 64), 255))
    whole = model(**batch, mode='loss')
    batch['inputs'][1] = 5.0  # of the image without a label
    changed = copy.deepcopy(model).eval()(**batch, mode='loss')
    batch['inputs'][1] = 0.0
    again = copy.deepcopy(model).eval()(**batch, mode='loss')
    assert whole['loss_kd_decoupled'] > 0
    torch.testing.assert_close(changed['loss_kd_decoupled'], again['loss_kd_decoupled'])
    assert not torch.isclose(changed['loss_kd_pixel'], again['loss_kd_pixel'])


@pytest.mark.parametrize(('student', 'teacher'), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ('loss', 'error', 'reason'),
    [
        (dict(type='ZipfLabelLoss'), ShapeError, 'at least 3 classes'),
        (dict(type='DistLoss', intra_weight=0), ConfigError, '`intra_weight` must be above 0 for two classes'),
        (dict(type='DecoupledKLLoss', alpha=0), ConfigError, '`alpha` must be above 0 for two classes'),
        (dict(type='InterclassSimilarityLoss'), ConfigError, '`normalize` must be False for two classes'),
        (
            dict(type='PixelwiseKLLoss', temperature=dict(type='mmstructkd.StandardizedTemperature')),
            ShapeError,
            '`temperature` must be one that leaves the scores of two classes as they are',
        ),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else '',
)
def test_what_two_classes_cannot_teach_is_refused(student, teacher, loss, error, reason) -> None:
    """Each of these is constant, or has no gradient, whatever the networks say."""
    with pytest.raises(error, match=f"term 'one': {loss['type']}: .*{reason}"):
        distiller(student, teacher, {'one': dict(loss, type=f'mmstructkd.{loss["type"]}')})


@pytest.mark.parametrize(
    'loss', ['PixelwiseKLLoss', 'DistLoss', 'DecoupledKLLoss', 'CategorySimilarityLoss', 'WeightedSoftLabelLoss']
)
def test_a_depth_map_is_no_class(loss: str) -> None:
    terms = dict(one=dict(tap='decode_head.to_depth', loss=dict(type=f'mmstructkd.{loss}')))
    teacher = dict(config=toy_depth_estimator(8), allow_random=True)
    with pytest.raises(ConfigError, match=f"term 'one': `tap` must name scores of classes or bins for {loss}, got one"):
        MODELS.build(toy_distiller(student=toy_depth_estimator(4), teacher=teacher, terms=terms))


def test_a_depth_map_in_probabilities_is_refused() -> None:
    terms = dict(one=dict(tap='decode_head.to_depth', loss=dict(type='mmstructkd.HolisticLoss', softmax=True)))
    teacher = dict(config=toy_depth_estimator(8), allow_random=True)
    with pytest.raises(ConfigError, match="term 'one': `tap` must name scores of classes or bins for HolisticLoss"):
        MODELS.build(toy_distiller(student=toy_depth_estimator(4), teacher=teacher, terms=terms))


def test_one_class_of_a_detector_is_not_one_of_two() -> None:
    """A detector of one class beside one of two: other classes, not a binary head."""

    def build(student: int, teacher: int) -> nn.Module:
        terms = dict(one=dict(tap='bbox_head.gfl_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss')))
        networks = (toy_detector('gfl', width, num_classes=n) for width, n in ((2, student), (4, teacher)))
        config_s, config_t = networks
        return MODELS.build(
            toy_distiller(student=config_s, teacher=dict(config=config_t, allow_random=True), terms=terms)
        )

    with pytest.raises(ConfigError, match="term 'one': the teacher must have the classes of the student, got num_cl"):
        build(1, 2)
    assert build(1, 1).terms['one'].levels


def test_a_loss_on_raw_values_still_gets_its_convolution() -> None:
    """Only losses that know what one channel beside two means take them as they are."""
    model = distiller(1, 2, {'raw': dict(type='mmstructkd.FeatureMSELoss'), 'channel': OVER_CLASSES['channel']})
    assert model.terms['raw'].levels[0].connector == 'ConvConnector'
    assert model.terms['channel'].levels[0].connector == 'none'


def test_a_binary_student_of_many_classes_needs_a_map() -> None:
    def build(**loss) -> nn.Module:
        terms = dict(one=dict(tap=SCORES, loss=dict(dict(type='mmstructkd.PixelwiseKLLoss'), **loss)))
        teacher = dict(config=toy_segmentor(8, num_classes=4), allow_random=True)
        return MODELS.build(toy_distiller(student=binary(4, 1), teacher=teacher, terms=terms)).train()

    with pytest.raises(ConfigError, match="term 'one': the teacher must have the classes of the student"):
        build()
    with pytest.raises(ConfigError, match="term 'one': the teacher must have the classes of the student"):
        build(type='mmstructkd.ChannelwiseKLLoss')  # no convolution from one class to four
    assert build(class_map=[0, 0, 1, 1])(**toy_batch(num_classes=2), mode='loss')['loss_kd_one'] > 0
