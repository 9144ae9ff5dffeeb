"""Which positions count: inside the image, or labelled; for every registered loss, and through terms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmstructkd.errors import ConfigError
from mmstructkd.losses import DecoupledKLLoss, RegionContrastLoss, RelationalLoss, SimilarityPreservingLoss
from mmstructkd.losses.depth_base import DepthLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.tasks.targets import collect_targets
from mmstructkd.testing import (
    toy_batch,
    toy_depth_estimator,
    toy_detector,
    toy_distiller,
    toy_segmentor,
)
from tests.losses import test_contract as contract
from tests.losses.test_trains import LOSSES, tap

#: As built without arguments: what their published code needs labels for.
LABELLED = {
    'DecoupledKLLoss',
    'IntraClassVariationLoss',
    'MemoryContrastLoss',
    'PrototypeContrastLoss',
    'RegionContrastLoss',
    'WeightedSoftLabelLoss',
    'ZipfLabelLoss',
}
SETTINGS = {
    # A random teacher predicts one class everywhere, which stands in no relation.
    'InterclassSimilarityLoss': dict(present='all'),
    'HolisticLoss': dict(critic=dict(base_channels=2), seed=0),
    'MemoryContrastLoss': dict(num_classes=10, pixel_keys=64, region_keys=32, pixel_capacity=32, region_capacity=8),
    'RegionContrastLoss': dict(num_classes=10),
}
ON_MAPS = sorted(name for name, kind in LOSSES.items() if 'seg' in kind.tasks)


def distiller(name: str, **keys) -> torch.nn.Module:
    torch.manual_seed(0)
    term = dict(tap=tap(name, 'seg'), loss=dict(type=f'mmstructkd.{name}', **SETTINGS.get(name, {})), **keys)
    return MODELS.build(toy_distiller(terms=dict(one=term))).train()


def batch(label: int | None = None) -> dict:
    """Two images, the second padded at the bottom; one label everywhere, or noise."""
    made = toy_batch()
    for sample in made['data_samples']:
        if label is not None:
            sample.gt_sem_seg = PixelData(data=torch.full((1, 48, 64), label))
    made['data_samples'][1].set_metainfo(dict(img_shape=(40, 64)))
    return made


def score(model: torch.nn.Module, data: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The term's loss, and its gradient at the backbone."""
    for parameter in model.parameters():
        parameter.grad = None
    losses = model(**data, mode='loss')
    value = losses['loss_kd_one']
    value.backward()
    return value.detach(), model.student.backbone.layer1[0].conv1.weight.grad


@pytest.mark.parametrize('name', ON_MAPS)
def test_a_batch_without_labels_teaches_what_needs_none(name: str) -> None:
    model = distiller(name)
    assert model.terms['one'].loss.where == ('labelled' if name in LABELLED else 'inside')
    value, gradient = score(model, batch(255))
    if name in LABELLED:
        assert value == 0
        assert gradient is not None
        assert not gradient.any()
    else:
        assert value.isfinite()
        assert gradient.any()


@pytest.mark.parametrize('name', sorted(set(ON_MAPS) - LABELLED))
def test_a_term_can_ask_for_labelled_pixels_alone(name: str) -> None:
    value, gradient = score(distiller(name, where='labelled'), batch(255))
    assert value == 0
    assert not gradient.any()
    value, gradient = score(distiller(name, where='labelled'), batch())
    assert value.isfinite()
    assert gradient.any()


@pytest.mark.parametrize('name', sorted(contract.NAMES))
@pytest.mark.parametrize('where', ['inside', 'labelled'])
def test_used_directly_labels_mask_only_where_they_shall(name: str, where: str) -> None:
    loss = contract.build(name)
    if where == 'inside' and loss.needs_labels:
        with pytest.raises(ConfigError, match=f"{name}: `where` must be 'labelled', got 'inside'"):
            loss.restrict('inside')
        return
    loss.restrict(where)
    student, teacher = contract.pair(name)
    nothing = Targets(labels=torch.full((2, 8, 6), 255), num_classes=3, depth=torch.zeros(2, 8, 6))
    value, total = contract.parts(loss, student, teacher, nothing)
    total.backward()
    assert (value == 0) == (where == 'labelled')
    assert student.grad.any() == (where == 'inside')


@pytest.mark.parametrize('name', sorted(set(ON_MAPS) - LABELLED))
def test_padding_counts_nowhere(name: str) -> None:
    """What the networks show in the padding changes nothing, labelled or not."""
    model = distiller(name)
    data = batch(255)
    targets = collect_targets(model.student, data['inputs'], data['data_samples'])
    assert not targets.valid.any()
    assert targets.inside[0].all()
    assert targets.inside[1].sum() == 40 * 64
    counted = dataclasses.replace(targets, valid=targets.inside)
    term = model.terms['one']
    widths = term.levels[0]
    student, teacher = (torch.randn(2, side[1], 6, 8) for side in (widths.student, widths.teacher))
    student = term.connectors[0](student).detach().requires_grad_()
    value = term.loss.eval()(student, teacher, counted)
    value = value[''] if isinstance(value, dict) else value
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient[1, :, :5].any()
    assert not gradient[1, :, 5:].any()


def test_a_batch_that_comes_without_label_maps() -> None:
    """Of unlabelled images some samples have no ``gt_sem_seg`` at all: then nothing of the batch is labelled."""
    data = batch()
    for where, taught in (('inside', True), ('labelled', False)):
        model = distiller('PixelwiseKLLoss', where=where)
        term = model.terms['one']
        _, seen = model.observe(data['inputs'], data['data_samples'], [term])
        unlabelled = dataclasses.replace(seen.targets, labels=None, valid=seen.targets.inside)
        assert (term(seen.student, seen.teacher, unlabelled)['loss_kd_one'] > 0) == taught


def test_collected_targets() -> None:
    """Inside is what is not padding; valid is what is labelled as well."""
    model = MODELS.build(toy_segmentor())
    data = batch()
    targets = collect_targets(model, data['inputs'], data['data_samples'])
    labels = torch.cat([sample.gt_sem_seg.data for sample in data['data_samples']])
    assert torch.equal(targets.valid, targets.inside & (labels != 255))
    data['data_samples'][1].set_metainfo(dict(img_shape=(48, 64)))
    targets = collect_targets(model, data['inputs'], data['data_samples'])
    assert targets.inside is None
    assert torch.equal(targets.valid, labels != 255)


def test_collected_targets_of_depth() -> None:
    model = MODELS.build(toy_depth_estimator())
    samples = []
    for image in range(2):
        sample = SegDataSample(metainfo=dict(img_shape=(48, 64)))
        depth = torch.full((1, 48, 64), 2.0)
        depth[:, :8] = (0.0, torch.nan)[image]
        sample.gt_depth_map = PixelData(data=depth)
        samples.append(sample)
    targets = collect_targets(model, torch.zeros(2, 3, 48, 64), samples)
    assert targets.inside is None
    assert not targets.valid[:, :8].any()
    assert targets.valid[:, 8:].all()


def test_a_smaller_label_map_of_a_detector() -> None:
    """HTC and panoptic detectors have semantic maps at an eighth of the input."""
    model = MODELS.build(toy_detector('fcos', 2))
    data = synthetic_batch(model, (64, 96), 2)
    for sample in data['data_samples']:
        sample.gt_sem_seg = PixelData(data=torch.tensor([[[0, 255, 1], [1, 1, 1]]]))
    data['data_samples'][0].set_metainfo(dict(img_shape=(32, 96)))
    targets = collect_targets(model, data['inputs'], data['data_samples'])
    assert targets.valid.shape == targets.inside.shape == (2, 64, 96)
    assert not targets.valid[:, :32, 32:64].any()
    assert targets.valid[1, 32:].all()
    assert not targets.valid[0, 32:].any()


def test_which_term_says_where_in_depth() -> None:
    def build(loss: dict, **keys) -> DepthLoss:
        config = toy_distiller(
            student=toy_depth_estimator(2),
            teacher=dict(config=toy_depth_estimator(4), allow_random=True),
            terms=dict(
                one=dict(tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss', **loss), **keys)
            ),
        )
        return MODELS.build(config).terms['one'].loss

    assert build({}).where == 'inside'
    assert build(dict(where='all')).where == 'inside'
    assert build(dict(where='unlabelled')).where == 'unlabelled'
    assert build({}, where='labelled').where == 'labelled'
    assert build(dict(where='all'), where='inside').where == 'inside'
    with pytest.raises(ConfigError, match="term 'one': `where` must be said once, got 'labelled' of the term and 'unl"):
        build(dict(where='unlabelled'), where='labelled')


def test_features_of_depth_where_the_ground_truth_reads() -> None:
    """The same key for any loss: labelled is where the depth sensor saw something."""
    terms = {
        where: dict(tap='backbone[2]', loss=dict(type='mmstructkd.FeatureMSELoss'), where=where)
        for where in ('inside', 'labelled')
    }
    teacher = dict(config=toy_depth_estimator(4), allow_random=True)
    model = MODELS.build(toy_distiller(student=toy_depth_estimator(2), teacher=teacher, terms=terms)).train()
    samples = [SegDataSample(metainfo=dict(img_shape=(48, 64))) for _ in range(2)]
    for sample in samples:
        sample.gt_depth_map = PixelData(data=torch.zeros(1, 48, 64))
    losses = model(torch.randn(2, 3, 48, 64), samples, mode='loss')
    assert losses['loss_kd_inside'] > 0
    assert losses['loss_kd_labelled'] == 0


@pytest.mark.parametrize('value', ['label', 'all', 'everywhere', True, 3])
def test_a_wrong_place_is_named(value) -> None:
    with pytest.raises(ConfigError, match="term 'one': `where` must be one of .*'labelled', 'inside'"):
        distiller('PixelwiseKLLoss', where=value)


def test_a_loss_that_needs_labels_keeps_them() -> None:
    for name in ('DecoupledKLLoss', 'MemoryContrastLoss'):
        with pytest.raises(ConfigError, match=f"term 'one': {name}: `where` must be 'labelled', got 'inside'"):
            distiller(name, where='inside')
    assert DecoupledKLLoss(target='teacher').where == 'inside'
    assert RelationalLoss().where == SimilarityPreservingLoss().where == 'inside'
    assert RelationalLoss(nodes='classes').where == 'labelled'
    assert RegionContrastLoss(num_classes=3).where == 'labelled'
    assert RegionContrastLoss(num_classes=3, regions='boxes').where == 'inside'


def test_a_detector_labels_no_position() -> None:
    def build(loss: str, at: str, kind: str = 'gfl', **keys) -> torch.nn.Module:
        terms = dict(one=dict(tap=at, loss=dict(type=f'mmstructkd.{loss}'), where='labelled', **keys))
        teacher = dict(config=toy_detector(kind, 4), allow_random=True)
        return MODELS.build(toy_distiller(student=toy_detector(kind, 2), teacher=teacher, terms=terms))

    for loss, at in (
        ('BinaryKLLoss', 'bbox_head.gfl_cls'),
        ('PairwiseAffinityLoss', 'neck[*]'),
        ('FeatureMSELoss', 'neck[0]'),
    ):
        with pytest.raises(ConfigError, match="term 'one': `where` must be 'inside' for a task whose samples label no"):
            build(loss, at)
    # A region has a label of its own.
    model = build('PixelwiseKLLoss', 'roi_head.bbox_head.fc_cls', 'faster_rcnn').train()
    losses = model(**synthetic_batch(model, (64, 96), 2), mode='loss')
    assert losses['loss_kd_one'] > 0
