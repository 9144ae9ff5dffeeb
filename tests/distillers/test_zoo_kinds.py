"""Networks of both zoos that once could not be distilled, with few channels: one of each kind, one step.

What made them different stands beside each: a head that needs samples, an output that only training has, a size that
they are made for, labels of another kind. ``tools/sweep_zoo.py`` runs them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmstructkd.compat import without_pretrained
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.errors import ShapeError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.tasks.batches import needs_of, synthetic_batch, training_info
from mmstructkd.teachers.loading import drop_pretrained

PIXEL = dict(type='mmstructkd.PixelwiseKLLoss')
CHANNEL = dict(type='mmstructkd.ChannelwiseKLLoss')
SMALL = {(256, 512, 1024, 2048): (16, 32, 64, 128), (512, 1024, 2048): (32, 64, 128), (2048,): (128,)}


def narrow(config: Any) -> None:
    """Make a ResNet-50 and what takes its stages sixteen times narrower."""
    if isinstance(config, dict):
        if config.get('type') in ('ResNet', 'ResNetV1c'):
            config.update(base_channels=4, stem_channels=4, depth=50)
        for key, value in config.items():
            if key == 'in_channels' and isinstance(value, (list, tuple)) and tuple(value) in SMALL:
                config[key] = list(SMALL[tuple(value)])
            elif key == 'norm_cfg' and isinstance(value, dict) and value.get('type') == 'SyncBN':
                value['type'] = 'BN'
            narrow(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            narrow(value)


def zoo(path: str, changes: Mapping[str, Any] | None = None) -> Config:
    """A config of a zoo without weights, narrow, with some keys changed."""
    cfg = Config.fromfile(Config._get_cfg_path(path, '')[0])
    drop_pretrained(cfg.model)
    narrow(cfg.model)
    cfg.merge_from_dict({f'model.{key}': value for key, value in (changes or {}).items()})
    init_default_scope(cfg.default_scope)
    return cfg


def distil(cfg: Config, terms: dict) -> StructuredDistiller:
    torch.manual_seed(0)
    model = dict(
        type='mmstructkd.StructuredDistiller',
        student=cfg.model,
        teacher=dict(config=dict(model=cfg.model, default_scope=cfg.default_scope), allow_random=True),
        terms=terms,
    )
    with without_pretrained():
        distiller = MODELS.build(model)
        distiller.init_weights()
    return distiller.train()


def step(distiller: StructuredDistiller, cfg: Config, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """One training step on two images; every term teaches."""
    batch = synthetic_batch(distiller, size, 2, needs=needs_of(distiller.student, cfg))
    with training_info(cfg):
        losses = distiller(**batch, mode='loss')
    total, _ = distiller.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    for name in distiller.terms:
        assert losses[f'loss_kd_{name}'] > 0
    for parameter in distiller.student.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
    return losses


PIDNET = {
    'backbone.channels': 4,
    'backbone.ppm_channels': 8,
    'backbone.num_stem_blocks': 1,
    'backbone.num_branch_blocks': 1,
    'decode_head.in_channels': 16,
    'decode_head.channels': 8,
    'data_preprocessor.size': (64, 128),
}
DDRNET = {
    'backbone.channels': 4,
    'backbone.ppm_channels': 8,
    'decode_head.in_channels': 16,
    'decode_head.channels': 8,
    'data_preprocessor.size': (64, 128),
}
QUERIES = {'decode_head.num_queries': 10, 'data_preprocessor.size': (64, 96)}
BEIT = {
    'backbone.img_size': (64, 64),
    'backbone.embed_dims': 24,
    'backbone.num_heads': 2,
    'backbone.num_layers': 4,
    'backbone.out_indices': [0, 1, 2, 3],
    'neck.embed_dim': 24,
    'decode_head.in_channels': [24] * 4,
    'decode_head.num_classes': 5,
    'decode_head.channels': 16,
    'auxiliary_head.in_channels': 24,
    'auxiliary_head.num_classes': 5,
    'data_preprocessor.size': (64, 64),
}

SEGMENTORS = [
    # a branch that only training has, in the head and in the backbone; maps of edges among the samples
    ('pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', PIDNET, 'decode_head.p_cls_seg', PIXEL, (64, 128)),
    ('pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py', PIDNET, 'backbone[1]', CHANNEL, (64, 128)),
    (
        'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
        PIDNET,
        dict(student='backbone[1]', teacher='backbone'),
        CHANNEL,
        (64, 128),
    ),
    (
        'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
        DDRNET,
        'decode_head.aux_cls_seg',
        PIXEL,
        (64, 128),
    ),
    # a cascade, whose first head training runs twice; points of the head's own choice
    (
        'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py',
        {'data_preprocessor.size': (64, 128)},
        'decode_head.0.conv_seg',
        PIXEL,
        (64, 128),
    ),
    (
        'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py',
        {'data_preprocessor.size': (64, 128)},
        'decode_head.1.fc_seg',
        PIXEL,
        (64, 128),
    ),
    # a head that needs samples and gives lists
    ('mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py', QUERIES, 'backbone[*]', CHANNEL, (64, 96)),
    (
        'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py',
        QUERIES,
        'decode_head.pixel_decoder[0]',
        CHANNEL,
        (64, 96),
    ),
    ('maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py', QUERIES, 'backbone[3]', CHANNEL, (64, 96)),
    # position embeddings of one size
    ('beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py', BEIT, 'decode_head.conv_seg', PIXEL, (64, 64)),
    # a pooling window that needs a large map
    (
        'mobilenet_v3/mobilenet-v3-d8-scratch-s_lraspp_4xb4-320k_cityscapes-512x1024.py',
        {'data_preprocessor.size': (512, 512)},
        'decode_head.conv_seg',
        PIXEL,
        (512, 512),
    ),
]


@pytest.mark.parametrize(('path', 'changes', 'tap', 'loss', 'size'), SEGMENTORS)
def test_segmentors(path: str, changes: dict, tap: Any, loss: dict, size: tuple[int, int]) -> None:
    cfg = zoo(f'mmseg::{path}', changes)
    step(distil(cfg, dict(term=dict(tap=tap, loss=loss))), cfg, size)


DETECTORS = [
    # samples with masks of their own kind, and a head that needs them
    ('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py', {}, 'neck[*]', (96, 128)),
    ('boxinst/boxinst_r50_fpn_ms-90k_coco.py', {}, 'neck[*]', (96, 128)),
    ('yolact/yolact_r50_1xb8-55e_coco.py', {}, 'neck[*]', (192, 192)),
    ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', {}, 'neck[*]', (96, 128)),
    # class maps, stored as mmdet stores them
    ('htc/htc_r50_fpn_1x_coco.py', {}, 'neck[*]', (96, 128)),
    ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', {}, 'neck[*]', (96, 128)),
    ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', {}, 'semantic_head.conv_logits', (96, 128)),
    ('maskformer/maskformer_r50_ms-16xb1-75e_coco.py', {'panoptic_head.num_queries': 10}, 'backbone[*]', (96, 128)),
    # an operator of inference that has no form for CPUs
    ('guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py', {}, 'neck[*]', (128, 128)),
    ('guided_anchoring/ga-retinanet_r50_fpn_1x_coco.py', {}, 'bbox_head.retina_cls', (128, 128)),
    # regions instead of region proposals, and samples that are used up
    ('fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py', {}, 'neck[*]', (96, 128)),
    # sizes
    ('ssd/ssd300_coco.py', {}, 'neck[*]', (300, 300)),
    ('ddod/ddod_r50_fpn_1x_coco.py', {}, 'bbox_head.atss_cls', (320, 320)),
    # the message hub
    ('yolox/yolox_nano_8xb8-300e_coco.py', {}, 'neck[*]', (96, 128)),
    ('tood/tood_r50_fpn_1x_coco.py', {}, 'neck[*]', (96, 128)),
    # transformers, whose queries must be fewer than there are positions
    (
        'dino/dino-4scale_r50_8xb2-12e_coco.py',
        {'encoder.num_layers': 1, 'decoder.num_layers': 1},
        'neck[*]',
        (192, 256),
    ),
]


@pytest.mark.parametrize(('path', 'changes', 'tap', 'size'), DETECTORS)
def test_detectors(path: str, changes: dict, tap: Any, size: tuple[int, int]) -> None:
    if 'boxinst' in path:
        pytest.importorskip('skimage', reason='BoxInst makes its masks with scikit-image')
    cfg = zoo(f'mmdet::{path}', changes)
    step(distil(cfg, dict(term=dict(tap=tap, loss=CHANNEL))), cfg, size)


DETR = 'mmdet::detr/detr_r50_8xb2-150e_coco.py'


@pytest.mark.parametrize(
    ('path', 'tap', 'error', 'message'),
    [
        # six layers of the decoder in one tensor: no image comes first
        (
            DETR,
            'bbox_head.fc_cls',
            TapError,
            r"the images on its first axis, got \(6, 1, 100, 81\) for 1 image at 'bbox",
        ),
        (DETR, 'bbox_head.fc_cls[5]', TapError, 'got one tensor of shape'),
        # tokens that cover the image become a map, and queries do not
        (DETR, 'encoder.layers.5', ShapeError, "gave tokens .*connector=dict\\(type='mmstructkd.TokensToMapConnector'"),
        (DETR, 'decoder.layers.5', ShapeError, r'lie nowhere in the image \(queries\)'),
    ],
)
def test_hints_fit_the_network(path: str, tap: str, error: type, message: str) -> None:
    cfg = zoo(path)
    with pytest.raises(error, match=message) as caught:
        distil(cfg, dict(term=dict(tap=tap, loss=CHANNEL)))
    assert ('TokensToMap' in str(caught.value)) == ('encoder' in tap)


def test_the_connector_of_the_hint_works() -> None:
    cfg = zoo(DETR)
    connector = dict(type='mmstructkd.TokensToMapConnector')
    step(distil(cfg, dict(term=dict(tap='encoder.layers.5', loss=CHANNEL, connector=connector))), cfg, (96, 128))


def test_a_head_with_queries_of_its_own() -> None:
    """Sparse R-CNN's RoI head takes more than features and regions: named, not a TypeError."""
    cfg = zoo('mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py')
    with pytest.raises(TapError, match='SparseRCNN'):
        distil(cfg, dict(term=dict(tap='roi_head.bbox_head.5.fc_cls', loss=PIXEL)))
    step(distil(cfg, dict(term=dict(tap='neck[*]', loss=CHANNEL))), cfg, (96, 128))
