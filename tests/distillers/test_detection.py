"""Detectors: pyramids matched by stride, RoI heads on the same regions, a teacher that ends at its neck."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData
from torch import nn

from mmstructkd.errors import ConfigError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import RegionRecorder
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.tasks.targets import collect_targets, region_targets
from mmstructkd.testing import TOY_DETECTORS, toy_detector, toy_distiller

PAIRWISE = dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=10.0, max_side=32)
CHANNEL = dict(type='mmstructkd.ChannelwiseKLLoss', temperature=1.0)
NECK = dict(pairwise=dict(tap='neck[*]', loss=PAIRWISE))
REGIONS = dict(region=dict(tap='roi_head.bbox_head.fc_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss')))


def build(student: dict, teacher: dict, terms: dict) -> nn.Module:
    torch.manual_seed(0)
    config = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    return MODELS.build(config).train()


def step(model: nn.Module, size: tuple[int, int] = (64, 96)) -> dict[str, Any]:
    losses = model(**synthetic_batch(model, size, 2), mode='loss')
    model.parse_losses(losses)[0].backward()
    return losses


@pytest.mark.parametrize('kind', TOY_DETECTORS)
def test_one_step_of_each_kind(kind: str) -> None:
    terms = dict(NECK, channel=dict(tap='neck[:4]', loss=CHANNEL))
    model = build(toy_detector(kind, 2), toy_detector(kind, 4), terms)
    plain = copy.deepcopy(model.student)
    losses = step(model)
    assert losses['loss_kd_pairwise'] > 0
    assert losses['loss_kd_channel'] > 0
    assert [level.student_tap for level in model.terms['pairwise'].levels] == [f'neck[{i}]' for i in range(5)]
    assert all(c.conv.conv.weight.grad.abs().sum() > 0 for c in model.terms['channel'].connectors)
    # the detector's own losses are those of the plain detector
    torch.manual_seed(0)
    wanted = plain(**synthetic_batch(plain, (64, 96), 2), mode='loss')
    assert set(losses) - set(wanted) == {'loss_kd_pairwise', 'loss_kd_channel'}
    for name in model.student.neck.state_dict():
        assert dict(model.student.neck.named_parameters())[name].grad is not None


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn'])
def test_the_teacher_ends_at_its_neck(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its head, its assigner, its proposals and its losses never run."""
    model = build(toy_detector(kind, 2), toy_detector(kind, 4), NECK)
    network, calls = model.teacher.network, []
    for name, module in network.named_modules():
        if name.split('.')[0] in ('bbox_head', 'rpn_head', 'roi_head') or name == 'neck':
            module.register_forward_pre_hook(lambda *a, name=name: calls.append(name))
    for part in ('bbox_head', 'rpn_head', 'roi_head'):
        head = getattr(network, part, None)
        for method in ('loss', 'predict', 'loss_and_predict', 'loss_by_feat'):
            if hasattr(head, method):
                monkeypatch.setattr(head, method, lambda *a, name=f'{part}.{method}', **k: calls.append(name))
        for name in ('assigner', 'bbox_assigner'):
            if hasattr(head, name):
                monkeypatch.setattr(getattr(head, name), 'assign', lambda *a, **k: calls.append('assign'))
    step(model)
    assert calls == ['neck']


def test_other_detectors_are_matched_by_stride() -> None:
    """RetinaNet at strides 8 to 128 learns from a Faster R-CNN at 4 to 64."""
    teacher = toy_detector('faster_rcnn', 4)
    teacher.neck.start_level = 0
    teacher.neck.pop('add_extra_convs')
    terms = dict(pairwise=dict(tap=dict(student='neck[:4]', teacher='neck[*]'), loss=PAIRWISE))
    model = build(toy_detector('retinanet', 2), teacher, terms)
    levels = model.terms['pairwise'].levels
    assert [(level.student_tap, level.teacher_tap) for level in levels] == [
        (f'neck[{i}]', f'neck[{i + 1}]') for i in range(4)
    ]
    assert all(level.student[2:] == level.teacher[2:] for level in levels)
    assert step(model)['loss_kd_pairwise'] > 0

    with pytest.raises(TapError, match=r"none for 'neck\[4\]' \(8x1x2\); the teacher has 'neck\[0\]' \(16x24x48\)"):
        build(toy_detector('retinanet', 2), teacher, NECK)
    with pytest.raises(ConfigError, match="`match` must be one of .*got 'strides'. Did you mean 'stride'"):
        build(toy_detector('retinanet', 2), teacher, dict(pairwise=dict(NECK['pairwise'], match='strides')))
    in_order = build(toy_detector('retinanet', 2), teacher, dict(pairwise=dict(NECK['pairwise'], match='order')))
    assert [level.teacher_tap for level in in_order.terms['pairwise'].levels] == [f'neck[{i}]' for i in range(5)]
    with pytest.raises(TapError, match='as many tensors of the student as of the teacher, got 4 and 5'):
        build(toy_detector('retinanet', 2), teacher, dict(pairwise=dict(terms['pairwise'], match='order')))


def test_levels_of_a_shared_head() -> None:
    """A head called once a level gives as many pairs; other classes are named as such."""
    terms = dict(score=dict(tap='bbox_head.retina_cls', loss=dict(CHANNEL)))
    model = build(toy_detector('retinanet', 2), toy_detector('retinanet', 4), terms)
    assert [level.student_tap for level in model.terms['score'].levels] == [
        f'bbox_head.retina_cls #{i}' for i in range(5)
    ]
    assert step(model)['loss_kd_score'] > 0
    pixel = dict(score=dict(tap='bbox_head.retina_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss')))
    with pytest.raises(ConfigError, match="term 'score': the teacher must have the classes of the student, got num_cl"):
        build(toy_detector('retinanet', 2), toy_detector('retinanet', 4, num_classes=3), pixel)


def test_both_pool_the_regions_of_the_student() -> None:
    model = build(toy_detector('faster_rcnn', 2), toy_detector('faster_rcnn', 4), dict(NECK, **REGIONS))
    seen: dict[str, list] = {'student': [], 'teacher': []}
    for owner, network in (('student', model.student), ('teacher', model.teacher.network)):
        extractor = network.roi_head.bbox_roi_extractor
        extractor.register_forward_pre_hook(lambda module, args, owner=owner: seen[owner].append(args[1].detach()))
    assert step(model)['loss_kd_region'] > 0
    ((student,), (teacher,)) = seen.values()
    assert torch.equal(student, teacher)
    assert len(student) > 4
    # the term is the KL over classes on these regions
    batch = synthetic_batch(model, (64, 96), 2)
    _, found = model.observe(batch['inputs'], batch['data_samples'], [model.terms['region']])
    network = model.teacher.network
    with torch.no_grad():
        rois = found.regions.boxes[0]
        wanted = network.roi_head._bbox_forward(network.extract_feat(batch['inputs']), rois)['cls_score']
    (tap,) = model.terms['region'].teacher_taps
    assert torch.allclose(found.teacher[tap][0], wanted)
    log_s, log_t = (scores.log_softmax(1) for scores in (found.student[tap][0], wanted))
    by_hand = (log_t.exp() * (log_t - log_s)).sum(1).mean()
    got = model.terms['region'](found.student, found.teacher, found.targets, found.regions)['loss_kd_region']
    torch.testing.assert_close(got, by_hand)


def test_masks_are_scored_on_the_regions_of_the_student() -> None:
    masks = dict(mask=dict(tap='roi_head.mask_head.conv_logits', loss=dict(type='mmstructkd.BinaryKLLoss')))
    model = build(toy_detector('mask_rcnn', 2), toy_detector('mask_rcnn', 4), dict(masks, **REGIONS))
    losses = step(model)
    assert losses['loss_kd_mask'] > 0
    assert losses['loss_kd_region'] > 0
    batch = synthetic_batch(model, (64, 96), 2)
    _, found = model.observe(batch['inputs'], batch['data_samples'], list(model.terms.values()))
    (student,), (teacher,) = model.terms['mask'].tensors(found.student, found.teacher)
    assert student.shape == teacher.shape
    assert len(student) == len(found.regions.masks[0]) < len(found.regions.boxes[0])
    # the mask branch alone pools the regions of masks alone
    only = build(toy_detector('mask_rcnn', 2), toy_detector('mask_rcnn', 4), masks)
    pooled = []
    only.teacher.network.roi_head.bbox_roi_extractor.register_forward_pre_hook(lambda *args: pooled.append(1))
    assert step(only)['loss_kd_mask'] > 0
    assert not pooled


def test_rtmdet_of_mmdet() -> None:
    """As mmdet ships it: other backbone, a neck of three levels, a head with its own layers for each level."""
    student, teacher = (
        Config.fromfile(Config._get_cfg_path(f'mmdet::rtmdet/rtmdet_{size}_8xb32-300e_coco.py', '')[0]).model
        for size in ('tiny', 's')
    )
    for model in (student, teacher):
        model._scope_ = 'mmdet'
        model.backbone.pop('init_cfg', None)
    student.data_preprocessor.pop('batch_augments')
    for model in (student, teacher):
        model.backbone.norm_cfg = model.neck.norm_cfg = model.bbox_head.norm_cfg = dict(type='BN')
    terms = dict(
        NECK,
        scores=dict(tap=[f'bbox_head.rtm_cls.{i}' for i in range(3)], loss=dict(type='mmstructkd.BinaryKLLoss')),
    )
    model = build(student, teacher, terms)
    losses = step(model)
    assert losses['loss_kd_pairwise'] > 0
    assert losses['loss_kd_scores'] > 0
    assert len(model.terms['scores'].levels) == 3


def test_a_region_term_needs_two_stages_on_both_sides() -> None:
    with pytest.raises(TapError, match="term 'region': `teacher` must name a module of FCOS, got 'roi_head"):
        build(toy_detector('faster_rcnn', 2), toy_detector('fcos', 4), REGIONS)
    with pytest.raises(TapError, match="term 'region': `student` must name a module of FCOS, got 'roi_head"):
        build(toy_detector('fcos', 2), toy_detector('faster_rcnn', 4), REGIONS)


def test_recorder_leaves_nothing_behind() -> None:
    network = MODELS.build(toy_detector('faster_rcnn', 2))
    with RegionRecorder(network):
        assert network.roi_head.bbox_roi_extractor._forward_pre_hooks
    assert not network.roi_head.bbox_roi_extractor._forward_pre_hooks
    with RegionRecorder(nn.Linear(1, 1)) as recorder:
        pass
    assert recorder.regions.boxes == []


def test_targets_of_a_batch_of_unequal_sizes() -> None:
    """Padding never counts, and boxes come as they are."""
    model = build(toy_detector('fcos', 2), toy_detector('fcos', 4), NECK)
    batch = synthetic_batch(model, (64, 96), 2)
    first, second = batch['data_samples']
    first.set_metainfo(dict(img_shape=(40, 96)))
    second.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    targets = collect_targets(model.student, batch['inputs'], batch['data_samples'])
    assert targets.labels is None
    assert targets.depth is None
    assert targets.num_classes == model.student.bbox_head.num_classes
    assert targets.valid[0].sum() == 40 * 96
    assert targets.valid[1].all()
    assert [len(boxes) for boxes in targets.boxes] == [3, 0]
    assert [len(labels) for labels in targets.box_labels] == [3, 0]
    want = model(**batch, mode='loss')['loss_kd_pairwise']
    batch['inputs'][0, :, 40:] = 7.0  # what stands in the padding reaches the terms through the borders only
    assert want.isfinite()
    assert model(**batch, mode='loss')['loss_kd_pairwise'].isfinite()


@pytest.mark.parametrize('kind', ['retinanet', 'faster_rcnn'])
def test_images_without_boxes(kind: str) -> None:
    terms = dict(NECK, **(REGIONS if kind == 'faster_rcnn' else {}))
    model = build(toy_detector(kind, 2), toy_detector(kind, 4), terms)
    batch = synthetic_batch(model, (64, 64), 2)
    for sample in batch['data_samples']:
        sample.gt_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    total, _ = model.parse_losses(model(**batch, mode='loss'))
    total.backward()
    assert total.isfinite()


def test_labels_of_regions() -> None:
    boxes = (torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 0.0, 30.0, 10.0]]), torch.zeros(0, 4))
    targets = Targets(boxes=boxes, box_labels=(torch.tensor([2, 4]), torch.zeros(0, dtype=torch.int64)), num_classes=5)
    regions = torch.tensor(
        [
            [0, 0.0, 0.0, 10.0, 9.0],  # nearly the first box
            [0, 19.0, 0.0, 30.0, 10.0],  # nearly the second
            [0, 0.0, 0.0, 10.0, 4.0],  # too little of it
            [1, 0.0, 0.0, 10.0, 10.0],  # the same place in the other image
        ]
    )
    assert region_targets(targets, regions).labels.tolist() == [2, 4, 5, 5]
    assert region_targets(Targets(), regions).labels is None
    assert region_targets(targets, regions).valid is None


def test_config_of_a_detector_is_left_alone() -> None:
    config = toy_detector('gfl', 2)
    before = copy.deepcopy(config)
    build(config, toy_detector('gfl', 4), NECK)
    assert config == before
    assert isinstance(config, ConfigDict)
