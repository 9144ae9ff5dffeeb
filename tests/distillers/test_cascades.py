"""Heads of several stages: each tensor belongs to the regions of its own stage, in both networks and in the labels."""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any

import pytest
import torch
from mmdet.models.roi_heads import CascadeRoIHead
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmstructkd.errors import TapError
from mmstructkd.losses import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import RegionRecorder, Tap, pair_stages, probe_regions, shows_regions, tapped_forward
from mmstructkd.tasks import targets as targets_module
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.tasks.targets import collect_targets, region_targets, repeat_targets
from mmstructkd.testing import toy_detector, toy_distiller

CLASSES = 4


def cascade(kind: str, width: int, stages: int = 3, **changes: Any) -> ConfigDict:
    """A detector of several stages: ``'cascade'``, ``'htc'`` or ``'scnet'``, each with masks."""
    model = toy_detector('mask_rcnn', width, CLASSES)
    model.neck.start_level = 0  # five levels at strides 4 to 64
    model.neck.pop('add_extra_convs')
    strides = [4, 8, 16, 32, 64]
    model.rpn_head.anchor_generator.strides = strides
    head, channels = model.roi_head, 4 * width
    for extractor in (head.bbox_roi_extractor, head.mask_roi_extractor):
        extractor.featmap_strides = strides[:4]
    head.update(
        type=dict(cascade='CascadeRoIHead', htc='HybridTaskCascadeRoIHead', scnet='SCNetRoIHead')[kind],
        num_stages=stages,
        stage_loss_weights=[1.0] * stages,
        bbox_head=[dict(head.bbox_head, reg_class_agnostic=True) for _ in range(stages)],
    )
    if kind == 'htc':
        head.mask_head = [dict(head.mask_head, type='HTCMaskHead', with_conv_res=stage > 0) for stage in range(stages)]
    if kind == 'scnet':
        for one in head.bbox_head:
            one.update(type='SCNetBBoxHead', num_shared_fcs=2)
        head.mask_head.update(type='SCNetMaskHead', conv_to_res=False)
        head.glbctx_head = dict(
            type='GlobalContextHead', num_convs=1, in_channels=channels, conv_out_channels=channels, num_classes=CLASSES
        )
        head.feat_relay_head = dict(
            type='FeatureRelayHead',
            in_channels=2 * channels,
            out_conv_channels=channels,
            roi_feat_size=4,
            scale_factor=1,
        )
    model.type = dict(cascade='CascadeRCNN', htc='HybridTaskCascade', scnet='SCNet')[kind]
    rcnn = model.train_cfg.rcnn
    model.train_cfg.rcnn = [copy.deepcopy(rcnn) for _ in range(stages)]
    for stage, one in enumerate(model.train_cfg.rcnn):
        threshold = 0.3 + 0.1 * stage  # so that stages choose others
        one.assigner.update(pos_iou_thr=threshold, neg_iou_thr=threshold, min_pos_iou=threshold)
    model.update(changes)
    return model


def with_semantic(model: ConfigDict, width: int) -> ConfigDict:
    """The branch that looks at the whole image."""
    channels = 4 * width
    model.roi_head.update(
        semantic_roi_extractor=dict(model.roi_head.mask_roi_extractor, featmap_strides=[8]),
        semantic_head=dict(
            type='FusedSemanticHead',
            num_ins=5,
            fusion_level=1,
            num_convs=1,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=6,
            loss_seg=dict(type='CrossEntropyLoss', ignore_index=255, loss_weight=0.2),
        ),
    )
    return model


@MODELS.register_module()
class WitnessLoss(DistillLoss):
    """Notes what it is given."""

    needs_equal_channels = needs_equal_size = False
    seen: list[tuple[Tensor, Tensor, Targets]] = []

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        self.seen.append((student.detach(), teacher, targets))
        return (student * 0).sum() + 1


def build(student: ConfigDict, teacher: ConfigDict, terms: dict) -> nn.Module:
    torch.manual_seed(0)
    config = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    model = MODELS.build(config).train()
    for name, module in model.student.named_modules():
        if name.endswith('fc_reg'):
            nn.init.normal_(module.weight, std=1.0)  # each stage moves its boxes
    WitnessLoss.seen.clear()
    return model


def witness(tap: Any) -> dict:
    return dict(tap=tap, loss=dict(type='mmstructkd.WitnessLoss'))


def boxes(stages: Any = range(3), part: str = 'fc_cls') -> list[str]:
    return [f'roi_head.bbox_head.{stage}.{part}' for stage in stages]


def run(model: nn.Module, batch: dict[str, Any] | None = None) -> dict[str, list[Tensor]]:
    """One step; the regions that the student's extractors pooled, by their names and in the order of the calls."""
    torch.manual_seed(3)
    pooled: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: pooled.setdefault(name, []).append(args[1].detach())
        )
        for name, module in model.student.named_modules()
        if re.fullmatch(r'roi_head\.(bbox|mask)_roi_extractor(\.\d)?', name) and not isinstance(module, nn.ModuleList)
    ]
    batch = batch or synthetic_batch(model, (64, 96), 2)
    losses = model(**batch, mode='loss')
    model.parse_losses(losses)[0].backward()
    for handle in handles:
        handle.remove()
    model.batch = batch
    return pooled


def labels_of(model: nn.Module, rois: Tensor) -> Tensor:
    targets = collect_targets(model.student, model.batch['inputs'], model.batch['data_samples'])
    return region_targets(targets, rois).labels


@pytest.mark.parametrize('kind', ['cascade', 'htc', 'scnet'])
def test_each_stage_is_labelled_by_its_own_boxes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages in one term, and the last one in a term of its own."""
    monkeypatch.setattr(targets_module, 'FOREGROUND_IOU', 0.05)  # so that most regions have a class
    terms = dict(all=witness(boxes()), last=witness(boxes([2])))
    model = build(cascade(kind, 2), cascade(kind, 4), terms)
    pooled = run(model)
    rois = [pooled[f'roi_head.bbox_roi_extractor.{stage}'][0] for stage in range(3)]
    assert not torch.equal(rois[0][: len(rois[1])], rois[1][: len(rois[0])])
    assert len(WitnessLoss.seen) == 4
    for stage, (student, teacher, targets) in zip((0, 1, 2, 2), WitnessLoss.seen, strict=True):
        assert len(student) == len(teacher) == len(rois[stage])
        assert torch.equal(targets.labels, labels_of(model, rois[stage]))
        assert targets.valid is None
    stages = [labels_of(model, one) for one in rois]
    assert any(one.shape != two.shape or not torch.equal(one, two) for one, two in itertools.pairwise(stages))


@pytest.mark.parametrize('kind', ['cascade', 'htc', 'scnet'])
def test_the_teacher_pools_the_same_regions_in_the_same_stage(kind: str) -> None:
    model = build(cascade(kind, 2), cascade(kind, 4), dict(all=witness(boxes())))
    network = model.teacher.network
    pooled: dict[int, Tensor] = {}
    for stage, extractor in enumerate(network.roi_head.bbox_roi_extractor):
        extractor.register_forward_pre_hook(lambda m, args, stage=stage: pooled.update({stage: args[1]}))
    of_student = run(model)
    for stage in range(3):
        rois = of_student[f'roi_head.bbox_roi_extractor.{stage}'][0]
        assert torch.equal(pooled[stage], rois)
        # and the tensors are those of this stage
        features = network.extract_feat(model.batch['inputs'])
        more = {'glbctx_feat': network.roi_head.glbctx_head(features)[1]} if kind == 'scnet' else {}
        wanted = network.roi_head._bbox_forward(stage, features, rois, **more)['cls_score']
        torch.testing.assert_close(WitnessLoss.seen[stage][1], wanted)


def test_masks_of_a_cascade() -> None:
    taps = [f'roi_head.mask_head.{stage}.conv_logits' for stage in range(3)]
    model = build(cascade('cascade', 2), cascade('cascade', 4), dict(masks=witness(taps), boxes=witness(boxes([1]))))
    pooled = run(model)
    for stage in range(3):
        student, teacher, targets = WitnessLoss.seen[stage]
        rois = pooled[f'roi_head.mask_roi_extractor.{stage}'][0]
        assert len(student) == len(teacher) == len(rois)
        assert targets.labels is None  # one label does not spread over a map of the region
    rows = model.observe(model.batch['inputs'], model.batch['data_samples'], list(model.terms.values()))[1].regions.rows
    assert {str(tap): len(found) for tap, found in rows.items()} == {**dict.fromkeys(taps, 1), boxes([1])[0]: 1}


@pytest.mark.parametrize('interleaved', [True, False])
def test_masks_that_pass_through_earlier_stages(interleaved: bool) -> None:
    """HTC runs the first mask head on the regions of each stage: its calls belong to three sets of regions."""
    model = build(
        cascade('htc', 2), cascade('htc', 4), dict(flow=witness('roi_head.mask_head.0.convs.0'), boxes=witness(boxes()))
    )
    model.student.roi_head.interleaved = interleaved
    pooled = run(model)
    rois = [pooled[f'roi_head.mask_roi_extractor.{stage}'][0] for stage in range(3)]
    assert len(model.terms['flow'].levels) == 3  # the probe runs it as often
    flows = WitnessLoss.seen[:3]
    assert [len(student) for student, _, _ in flows] == [len(one) for one in rois]
    assert [len(teacher) for _, teacher, _ in flows] == [len(one) for one in rois]
    model.terms.train()
    _, seen = model.observe(model.batch['inputs'], model.batch['data_samples'], list(model.terms.values()))
    (tap,) = model.terms['flow'].student_taps
    assert [len(one) for one in seen.regions.rows[tap]] == [len(one) for one in seen.regions.masks]


def test_heads_for_the_whole_image_have_labels_of_the_image() -> None:
    student, teacher = (with_semantic(cascade('htc', width), width) for width in (2, 4))
    for model in (student, teacher):
        model.data_preprocessor.update(pad_seg=True)
    assert not shows_regions(Tap.parse('roi_head.semantic_head.conv_logits'))
    terms = dict(whole=witness('roi_head.semantic_head.conv_logits'), boxes=witness(boxes()))
    model = build(student, teacher, terms)
    features = model.teacher.network.extract_feat(torch.zeros(1, 3, 64, 96))
    regions = probe_regions(1, (64, 96))
    taps = [Tap.parse(text) for text in (boxes()[1], 'roi_head.semantic_head.conv_logits')]
    with torch.no_grad():
        records = tapped_forward(model.teacher.network, torch.zeros(1, 3, 64, 96), None, taps, regions=regions).records
        head = model.teacher.network.roi_head
        feature = head.semantic_head(features)[1]
        wanted = head._bbox_forward(1, features, regions.boxes[1], semantic_feat=feature)['cls_score']
    torch.testing.assert_close(records[taps[0]][0], wanted)
    assert records[taps[1]][0].shape[0] == 1
    term, batch = model.terms['whole'], torch.zeros(1, 3, 64, 96)
    known = Targets(images=batch, labels=torch.ones(1, 64, 96, dtype=torch.int64), input_size=(64, 96))
    maps = {term.student_taps[0]: [torch.randn(1, 6, 8, 12)]}
    term(maps, maps, known, regions)
    assert WitnessLoss.seen[-1][2].labels is known.labels


@pytest.mark.parametrize('also_boxes', [True, False])
def test_scnet_relays_what_belongs_to_a_mask(also_boxes: bool) -> None:
    """The last box stage's features of a region reach the mask of the same region."""
    terms = dict(mask=witness('roi_head.mask_head.conv_logits'), **(dict(box=witness(boxes())) if also_boxes else {}))
    model = build(cascade('scnet', 2), cascade('scnet', 4), terms)
    run(model)
    network = model.teacher.network
    _, seen = model.observe(model.batch['inputs'], model.batch['data_samples'], list(model.terms.values()))
    (tap,) = model.terms['mask'].teacher_taps
    (shown,) = seen.teacher[tap]
    with torch.no_grad():
        features, head = network.extract_feat(model.batch['inputs']), network.roi_head
        context = head.glbctx_head(features)[1]
        rois = seen.regions.masks[0]
        relayed = head._bbox_forward(2, features, rois, glbctx_feat=context)['relayed_feat']
        wanted = head._mask_forward(features, rois, glbctx_feat=context, relayed_feat=head.feat_relay_head(relayed))[
            'mask_preds'
        ]
    assert len(rois)
    torch.testing.assert_close(shown, wanted)


# --- networks of other numbers of stages ---------------------------------------------------------------------


def test_the_last_stage_teaches_a_detector_of_one() -> None:
    tap = dict(student='roi_head.bbox_head.fc_cls', teacher=boxes([2])[0])
    model = build(toy_detector('faster_rcnn', 2, CLASSES), cascade('cascade', 4), dict(last=witness(tap)))
    pooled = run(model)
    (rois,) = pooled['roi_head.bbox_roi_extractor']
    student, teacher, targets = WitnessLoss.seen[-1]
    assert len(student) == len(teacher) == len(rois)
    assert torch.equal(targets.labels, labels_of(model, rois))
    network = model.teacher.network
    wanted = network.roi_head._bbox_forward(2, network.extract_feat(model.batch['inputs']), rois)['cls_score']
    torch.testing.assert_close(teacher, wanted)


def test_a_detector_of_one_stage_teaches_the_last() -> None:
    tap = dict(student=boxes([2])[0], teacher='roi_head.bbox_head.fc_cls')
    model = build(cascade('cascade', 2), toy_detector('faster_rcnn', 4, CLASSES), dict(last=witness(tap)))
    rois = run(model)['roi_head.bbox_roi_extractor.2'][0]
    student, teacher, targets = WitnessLoss.seen[-1]
    assert len(student) == len(teacher) == len(rois)
    assert torch.equal(targets.labels, labels_of(model, rois))
    network = model.teacher.network
    wanted = network.roi_head._bbox_forward(network.extract_feat(model.batch['inputs']), rois)['cls_score']
    torch.testing.assert_close(teacher, wanted)


def test_stages_cross_over_where_a_term_says_so() -> None:
    tap = dict(student=boxes([0, 1]), teacher=boxes([1, 2]))
    model = build(cascade('cascade', 2), cascade('cascade', 4), dict(shifted=witness(tap)))
    pooled = run(model)
    network = model.teacher.network
    features = network.extract_feat(model.batch['inputs'])
    for level, (student, teacher, targets) in enumerate(WitnessLoss.seen):
        rois = pooled[f'roi_head.bbox_roi_extractor.{level}'][0]
        assert torch.equal(targets.labels, labels_of(model, rois))
        assert len(student) == len(rois)
        torch.testing.assert_close(teacher, network.roi_head._bbox_forward(level + 1, features, rois)['cls_score'])


@pytest.mark.parametrize(
    ('terms', 'message'),
    [
        (
            dict(one=(boxes([0]), boxes([2])), two=(boxes([1]), boxes([2]))),
            "term 'two': stage 2 of the bbox branch of the teacher must be put beside one stage .* got 1 here and 0 in",
        ),
        (dict(one=(boxes([0, 1, 2]), boxes([1]))), r"term 'one': `tap` must name as many stages .* got \[1\] and \[0"),
        (
            dict(one=(boxes([0, 1, 2]), boxes([1, 2]))),
            r"term 'one': `tap` must name as many stages .* got \[1, 2\] and",
        ),
    ],
)
def test_regions_of_two_stages_at_once_are_an_error_at_build(terms: dict, message: str) -> None:
    taps = {name: dict(student=student, teacher=teacher) for name, (student, teacher) in terms.items()}
    with pytest.raises(TapError, match=message):
        build(cascade('cascade', 2), cascade('cascade', 4), {name: witness(tap) for name, tap in taps.items()})


def test_pairs_of_stages() -> None:
    def parsed(texts: list[str]) -> list[Tap]:
        return [Tap.parse(text) for text in texts]

    masks = parsed(['roi_head.mask_head.1.conv_logits'])
    terms = [('a', parsed(boxes()), parsed(boxes())), ('b', masks, masks), ('c', parsed(['neck[0]']), masks)]
    assert pair_stages(terms) == {('bbox', 0): 0, ('bbox', 1): 1, ('bbox', 2): 2, ('mask', 1): 1}
    single = parsed(['roi_head.bbox_head.shared_fcs.1'])
    assert pair_stages([('a', single, parsed(boxes([2])))]) == {('bbox', 2): 0}


class QueryHead(CascadeRoIHead):
    """A stage that hands on features of each proposal, as Sparse R-CNN's."""

    def _bbox_forward(self, stage: int, x: Any, rois: Tensor, object_feats: Tensor, batch_img_metas: list) -> dict:
        raise AssertionError('never called')


def test_a_head_that_takes_queries_is_refused_by_name() -> None:
    network = MODELS.build(cascade('cascade', 2))
    network.roi_head.__class__ = QueryHead
    taps = [Tap.parse(boxes()[0])]
    with pytest.raises(TapError, match=r"which also takes \['object_feats', 'batch_img_metas'\]. Tap the neck"):
        tapped_forward(network, torch.zeros(1, 3, 64, 96), None, taps, regions=probe_regions(1, (64, 96)))


def test_a_mask_branch_that_shares_the_pooling_is_refused_at_build() -> None:
    networks = [toy_detector('mask_rcnn', width, CLASSES) for width in (2, 4)]
    for model in networks:
        model.roi_head.mask_roi_extractor = None
    with pytest.raises(TapError, match="got none for 'mask_roi_extractor'. Tap the neck instead"):
        build(*networks, dict(mask=witness('roi_head.mask_head.conv_logits')))


def test_the_recorder_removes_what_it_has_set() -> None:
    network = MODELS.build(cascade('cascade', 2))
    taps = [Tap.parse(text) for text in (*boxes(), 'roi_head.mask_head.0.conv_logits', 'neck[0]')]
    with RegionRecorder(network, taps):
        assert network.roi_head.bbox_head[0].fc_cls._forward_pre_hooks
    assert not any(module._forward_pre_hooks for module in network.modules())


def test_what_a_copied_batch_knows() -> None:
    labels = torch.arange(8).view(2, 2, 2)
    known = Targets(labels=labels, boxes=(torch.zeros(1, 4), torch.ones(2, 4)), images=torch.randn(2, 3, 2, 2))
    copied = repeat_targets(known, 3)
    assert torch.equal(copied.labels, torch.cat([labels] * 3))
    assert [len(one) for one in copied.boxes] == [1, 2] * 3
    assert copied.valid is None
    assert len(copied.images) == 6
