"""Detectors that train in milliseconds, one of each kind that distilling must serve."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import ConfigDict

from mmstructkd.datasets.scenes import OBJECT_CLASSES

__all__ = ['TOY_DETECTORS', 'toy_detector']

#: One-stage without and with anchors, with box distributions, and two-stage without and with masks.
TOY_DETECTORS = ('fcos', 'retinanet', 'gfl', 'faster_rcnn', 'mask_rcnn')

NORM = dict(type='BN', requires_grad=True)
STRIDES = [8, 16, 32, 64, 128]
FOCAL = dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
NMS = dict(type='nms', iou_threshold=0.6)
TEST = dict(nms_pre=100, min_bbox_size=0, score_thr=0.01, nms=NMS, max_per_img=20)
ATSS = dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False)
MAX_IOU = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0.1, ignore_iof_thr=-1)


def _one_stage(kind: str, width: int, num_classes: int) -> dict[str, Any]:
    """Head and settings of a one-stage detector."""
    head = dict(num_classes=num_classes, in_channels=4 * width, stacked_convs=1, feat_channels=4 * width)
    if kind == 'fcos':
        own = dict(type='FCOSHead', strides=STRIDES, norm_cfg=NORM, loss_cls=FOCAL, loss_bbox=dict(type='IoULoss'))
        return dict(type='FCOS', bbox_head=dict(head, **own), train_cfg=dict(), test_cfg=TEST)
    anchors = dict(type='AnchorGenerator', octave_base_scale=4, ratios=[0.5, 1.0, 2.0], strides=STRIDES)
    if kind == 'retinanet':
        own = dict(
            type='RetinaHead',
            anchor_generator=dict(anchors, scales_per_octave=3),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
            loss_cls=FOCAL,
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
        )
        train = dict(
            assigner=MAX_IOU, sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1, debug=False
        )
        return dict(type='RetinaNet', bbox_head=dict(head, **own), train_cfg=train, test_cfg=TEST)
    own = dict(
        type='GFLHead',
        anchor_generator=dict(anchors, octave_base_scale=8, scales_per_octave=1, ratios=[1.0]),
        norm_cfg=NORM,
        reg_max=8,
        loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True, beta=2.0, loss_weight=1.0),
        loss_dfl=dict(type='DistributionFocalLoss', loss_weight=0.25),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    )
    return dict(type='GFL', bbox_head=dict(head, **own), train_cfg=ATSS, test_cfg=TEST)


def _two_stage(width: int, num_classes: int) -> dict[str, Any]:
    """Heads and settings of a Faster R-CNN."""
    channels = 4 * width
    coder = dict(type='DeltaXYWHBBoxCoder', target_means=[0.0] * 4)
    assigner = dict(MAX_IOU, neg_iou_thr=0.5, match_low_quality=True)
    sampler = dict(type='RandomSampler', num=16, pos_fraction=0.5, neg_pos_ub=-1)
    proposals = dict(nms_pre=50, max_per_img=20, nms=dict(NMS, iou_threshold=0.7), min_bbox_size=0)
    common = dict(allowed_border=-1, pos_weight=-1, debug=False)
    return dict(
        type='FasterRCNN',
        rpn_head=dict(
            type='RPNHead',
            in_channels=channels,
            feat_channels=channels,
            anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0], strides=STRIDES),
            bbox_coder=dict(coder, target_stds=[1.0] * 4),
            loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True),
            loss_bbox=dict(type='L1Loss'),
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=4, sampling_ratio=0),
                out_channels=channels,
                featmap_strides=STRIDES[:4],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=channels,
                fc_out_channels=2 * channels,
                roi_feat_size=4,
                num_classes=num_classes,
                bbox_coder=dict(coder, target_stds=[0.1, 0.1, 0.2, 0.2]),
                reg_class_agnostic=False,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False),
                loss_bbox=dict(type='L1Loss'),
            ),
        ),
        train_cfg=dict(
            rpn=dict(assigner=assigner, sampler=dict(sampler, add_gt_as_proposals=False), **common),
            rpn_proposal=proposals,
            rcnn=dict(assigner=assigner, sampler=dict(sampler, add_gt_as_proposals=True), **common),
        ),
        test_cfg=dict(rpn=proposals, rcnn=dict(score_thr=0.01, nms=NMS, max_per_img=20)),
    )


def _with_masks(model: dict[str, Any], channels: int, num_classes: int) -> dict[str, Any]:
    """A Mask R-CNN of a Faster R-CNN."""
    extractor = model['roi_head']['bbox_roi_extractor']
    model['roi_head'].update(
        mask_roi_extractor=dict(extractor, roi_layer=dict(extractor['roi_layer'])),
        mask_head=dict(
            type='FCNMaskHead',
            num_convs=1,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=num_classes,
            loss_mask=dict(type='CrossEntropyLoss', use_mask=True),
        ),
    )
    model['train_cfg']['rcnn']['mask_size'] = 8
    model['test_cfg']['rcnn']['mask_thr_binary'] = 0.5
    return dict(model, type='MaskRCNN')


def toy_detector(
    kind: str = 'fcos', width: int = 4, num_classes: int = len(OBJECT_CLASSES), **changes: Any
) -> ConfigDict:
    """Config of a detector on a ResNet-18 of a few channels with an FPN of five levels.

    Args:
        kind: one of :data:`TOY_DETECTORS`.
        width: channels of the first stage; the pyramid has four times as many.
        num_classes: number of classes.
        **changes: override keys of the model.

    Returns:
        Config of an mmdet detector.
    """
    model = dict(
        _scope_='mmdet',
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=dict(
            type='ResNet',
            depth=18,
            stem_channels=width,
            base_channels=width,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            norm_cfg=NORM,
            norm_eval=False,
            style='pytorch',
        ),
        neck=dict(
            type='FPN',
            in_channels=[width, 2 * width, 4 * width, 8 * width],
            out_channels=4 * width,
            start_level=1,
            add_extra_convs='on_output',
            num_outs=5,
        ),
    )
    two_stage = kind in ('faster_rcnn', 'mask_rcnn')
    model.update(_two_stage(width, num_classes) if two_stage else _one_stage(kind, width, num_classes))
    if kind == 'mask_rcnn':
        model = _with_masks(model, 4 * width, num_classes)
    model.update(copy.deepcopy(changes))
    return ConfigDict(copy.deepcopy(model))
