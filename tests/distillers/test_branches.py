"""Networks that train on copies of the batch, and those whose ``train()`` returns nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.models.backbones.trident_resnet import TridentConv
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from torch import nn

from mmstructkd.distillers import FrozenTeacher
from mmstructkd.errors import TapError
from mmstructkd.registry import MODELS
from mmstructkd.taps import Tap
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.tasks.targets import region_targets
from mmstructkd.teachers.loading import load_student
from mmstructkd.testing import toy_config, toy_detector, toy_distiller, toy_segmentor

CLASSES = 4


def trident(base: int, branch: int = 1) -> ConfigDict:
    """A small TridentNet: one map of stride 16, three branches in training."""
    model, channels = toy_detector('faster_rcnn', 1, CLASSES), 16 * base
    model.update(type='TridentFasterRCNN', neck=None)
    model.backbone = dict(
        type='TridentResNet',
        depth=50,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        stem_channels=base,
        base_channels=base,
        trident_dilations=(1, 2, 3),
        num_branch=3,
        test_branch_idx=branch,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
    )
    model.rpn_head.update(in_channels=channels, feat_channels=8)
    model.rpn_head.anchor_generator.strides = [16]
    model.roi_head.update(type='TridentRoIHead', num_branch=3, test_branch_idx=branch)
    model.roi_head.bbox_roi_extractor.update(out_channels=channels, featmap_strides=[16])
    model.roi_head.bbox_head.update(in_channels=channels, fc_out_channels=8)
    return model


def plain(base: int) -> ConfigDict:
    """The same detector without branches."""
    model = trident(base)
    for key in ('trident_dilations', 'num_branch', 'test_branch_idx'):
        model.backbone.pop(key)
    model.update(type='FasterRCNN')
    model.backbone.type = 'ResNet'
    model.roi_head.type = 'StandardRoIHead'
    model.roi_head.pop('num_branch')
    model.roi_head.pop('test_branch_idx')
    return model


def build(student: ConfigDict, teacher: ConfigDict, terms: dict) -> nn.Module:
    torch.manual_seed(0)
    config = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    model = MODELS.build(config).train()
    for module in (*model.student.modules(), *model.teacher.network.modules()):
        if isinstance(module, TridentConv):  # which mmdet leaves as whatever was in memory
            nn.init.kaiming_normal_(module.weight)
    return model


def step(model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    batch = synthetic_batch(model, (64, 96), 2)
    losses = model(**batch, mode='loss')
    model.parse_losses(losses)[0].backward()
    return batch, losses


FEATURE = dict(feature=dict(tap='backbone[0]', loss=dict(type='mmstructkd.FeatureMSELoss')))
MASKED = dict(masked=dict(tap='backbone[0]', loss=dict(type='mmstructkd.FocalGlobalLoss')))
REGIONS = dict(region=dict(tap='roi_head.bbox_head.fc_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss')))
PAIRWISE = dict(pairwise=dict(tap='backbone.layer2', loss=dict(type='mmstructkd.PairwiseAffinityLoss', max_side=32)))


@pytest.mark.parametrize('teacher', [lambda: trident(4), lambda: plain(4), lambda: trident(4, branch=-1)])
def test_each_branch_learns_from_the_teacher(teacher: Any) -> None:
    model = build(trident(2), teacher(), {**FEATURE, **MASKED, **REGIONS, **PAIRWISE})
    batch, losses = step(model)
    assert all(losses[f'loss_kd_{name}'] > 0 for name in model.terms)
    assert all(losses[f'loss_kd_{name}'].isfinite() for name in model.terms)
    _, seen = model.observe(batch['inputs'], batch['data_samples'], list(model.terms.values()))
    term = model.terms['feature']
    raw = seen.teacher[term.teacher_taps[0]][0]
    ((student, repeated),) = term.pairs(seen.student, seen.teacher)
    assert len(student) == len(repeated) == 6
    # copies of the batch come one after the other; a teacher that runs all branches has one for each
    assert torch.equal(repeated, raw if len(raw) == 6 else torch.cat([raw] * 3))
    assert not torch.equal(student[:2], student[2:4])
    ((before, unchanged),) = model.terms['pairwise'].pairs(seen.student, seen.teacher)
    assert len(before) == len(unchanged) == 2  # in front of the branches


def test_by_hand() -> None:
    """The mean over rows that are the branches of each image."""
    model = build(trident(2), plain(2), FEATURE)
    batch = synthetic_batch(model, (64, 96), 2)
    _, seen = model.observe(batch['inputs'], batch['data_samples'], list(model.terms.values()))
    term = model.terms['feature']
    student, teacher = seen.student[term.student_taps[0]][0], seen.teacher[term.teacher_taps[0]][0]
    want = torch.stack([(student[row] - teacher[row % 2]).square().mean() for row in range(6)]).mean()
    got = term(seen.student, seen.teacher, seen.targets, seen.regions)['loss_kd_feature']
    torch.testing.assert_close(got, want * term.loss.loss_weight)


def test_regions_of_a_branch_are_those_of_its_image() -> None:
    model = build(trident(2), plain(4), REGIONS)
    batch = synthetic_batch(model, (64, 96), 2)
    _, seen = model.observe(batch['inputs'], batch['data_samples'], list(model.terms.values()))
    (rois,) = seen.regions.boxes
    assert set(rois[:, 0].tolist()) == set(range(6))
    network = model.teacher.network
    with torch.no_grad():
        folded = torch.cat([rois[:, :1] % 2, rois[:, 1:]], dim=1)
        wanted = network.roi_head._bbox_forward(network.extract_feat(batch['inputs']), folded)['cls_score']
    (tap,) = model.terms['region'].teacher_taps
    torch.testing.assert_close(seen.teacher[tap][0], wanted)
    labels = region_targets(seen.targets, rois).labels
    assert torch.equal(labels, region_targets(seen.targets, folded).labels)
    assert (labels[rois[:, 0] >= 2] < CLASSES).any()


def test_a_module_inside_the_branches_is_named_with_the_way_out() -> None:
    terms = dict(inner=dict(tap='backbone.layer3.0.conv1', loss=dict(type='mmstructkd.FeatureMSELoss')))
    message = "term 'inner': `tap` must give as many .* got 3 and 1 .* trains with 3 branches.*tap the stage"
    with pytest.raises(TapError, match=message):
        step(build(trident(2), plain(2), terms))


def test_a_plain_student_of_a_network_of_branches() -> None:
    model = build(plain(2), trident(4), {**FEATURE, **REGIONS})
    _, losses = step(model)
    assert losses['loss_kd_feature'] > 0
    assert losses['loss_kd_region'] > 0


# --- train() that returns nothing ----------------------------------------------------------------------------


def localization_distilling(width: int) -> ConfigDict:
    """mmdet's own distiller (LD): its ``train()`` returns nothing, and it holds a teacher as a plain attribute."""
    inner = toy_detector('gfl', 3, CLASSES)
    model = toy_detector('gfl', width, CLASSES)
    model.update(type='KnowledgeDistillationSingleStageDetector', teacher_config=dict(model=inner), teacher_ckpt=None)
    loss = dict(type='KnowledgeDistillationKLDivLoss', loss_weight=0.25, T=10)
    model.bbox_head.update(type='LDHead', loss_ld=loss)
    return model


@MODELS.register_module()
class SilentSegmentor(MODELS.get('mmseg.EncoderDecoder')):
    """Returns nothing from what returns the module elsewhere."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)


def silent(width: int) -> ConfigDict:
    return toy_segmentor(width, type='mmstructkd.SilentSegmentor')


NECK = dict(neck=dict(tap='neck[*]', loss=dict(type='mmstructkd.ChannelwiseKLLoss')))
PIXEL = dict(pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss')))
CASES = {
    'LD teaches': (lambda: toy_detector('gfl', 2, CLASSES), lambda: localization_distilling(4), NECK),
    'LD learns': (lambda: localization_distilling(2), lambda: toy_detector('gfl', 4, CLASSES), NECK),
    'both': (lambda: localization_distilling(2), lambda: localization_distilling(4), NECK),
    'segmentors': (lambda: silent(4), lambda: silent(8), PIXEL),
}


@pytest.mark.parametrize('options', [{}, dict(fuse_conv_bn=True), dict(dtype='bf16')], ids=str)
@pytest.mark.parametrize('case', list(CASES))
def test_nothing_depends_on_what_train_returns(case: str, options: dict) -> None:
    student, teacher, terms = CASES[case]
    torch.manual_seed(0)
    config = dict(config=teacher(), allow_random=True, **options)
    model = MODELS.build(toy_distiller(student=student(), teacher=config, terms=terms))
    model.train()
    assert isinstance(model.teacher.network, nn.Module)
    assert not any(module.training for module in model.teacher.network.modules())
    _, losses = step(model)
    assert all(losses[f'loss_kd_{name}'] > 0 for name in terms)
    copy.deepcopy(model).eval()


def test_a_run_with_it_and_its_export(tmp_path: Path) -> None:
    model = toy_distiller(
        student=silent(4), teacher=dict(config=silent(8), allow_random=True), terms=copy.deepcopy(PIXEL)
    )
    cfg = toy_config(model, tmp_path, max_iters=2)
    cfg.train_cfg.val_interval = 2
    Runner.from_cfg(cfg).train()
    network = load_student(cfg, str(tmp_path / 'iter_2.pth'), owner='test')
    assert isinstance(network, nn.Module)
    assert not network.training


def test_a_network_held_as_a_plain_attribute_moves_along() -> None:
    model = MODELS.build(
        toy_distiller(
            student=localization_distilling(2),
            teacher=dict(config=toy_detector('gfl', 4, CLASSES), allow_random=True),
            terms=copy.deepcopy(NECK),
        )
    )
    model.to(torch.float64)
    assert {p.dtype for p in model.student.teacher_model.parameters()} == {torch.float64}
    model.float()
    assert {p.dtype for p in model.student.teacher_model.parameters()} == {torch.float32}
    assert not any(name.startswith('teacher_model') for name in model.state_dict())


def test_a_teacher_in_training_is_put_in_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = FrozenTeacher(silent(8), allow_random=True)
    tap = Tap.parse('decode_head.conv_seg')
    inputs = torch.randn(2, 3, 48, 64)
    teacher.probe(inputs[:1], None, [tap])
    first, second = (teacher.observe(inputs, None, [tap])[tap][0] for _ in range(2))
    assert torch.equal(first, second)
