"""Queries of real heads as a teacher of pixels."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn
from torch.nn.functional import interpolate

from mmstructkd.connectors import QueryMarginals
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.errors import ConfigError, ShapeError, TapError
from mmstructkd.functional import pixelwise_kl_loss
from mmstructkd.losses import DecoupledKLLoss, DistLoss, PixelwiseKLLoss
from mmstructkd.structures import Targets
from mmstructkd.taps import Tap
from mmstructkd.testing import toy_batch, toy_segmentor

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def _mask2former():
    cfg = Config.fromfile(ROOT / 'configs/scenes/mask2former_r18-w32_800_scenes-128x128.py').model
    cfg.data_preprocessor.size = (48, 64)
    cfg.backbone.update(base_channels=4, stem_channels=4)
    cfg.decode_head.in_channels = [4, 8, 16, 32]
    cfg._scope_ = 'mmseg'
    return cfg


def mask2former(classes=10):
    cfg = copy.deepcopy(_mask2former())
    cfg.decode_head.num_classes = classes
    cfg.decode_head.loss_cls.class_weight = [1.0] * classes + [0.1]
    return cfg


def maskformer(classes=10):
    cfg = mask2former(classes)
    attention = dict(embed_dims=16, num_heads=2, dropout=0.0, batch_first=True)
    ffn = dict(embed_dims=16, feedforward_channels=16, num_fcs=2, ffn_drop=0.0)
    head = cfg.decode_head
    cfg.decode_head = dict(
        type='MaskFormerHead',
        in_channels=[4, 8, 16, 32],
        feat_channels=16,
        out_channels=16,
        num_classes=classes,
        num_queries=7,
        pixel_decoder=dict(type='mmdet.PixelDecoder', norm_cfg=dict(type='GN', num_groups=4)),
        positional_encoding=dict(num_feats=8, normalize=True),
        transformer_decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=ffn),
        ),
        loss_cls=head.loss_cls,
        loss_mask=dict(type='mmdet.FocalLoss', use_sigmoid=True, loss_weight=20.0),
        loss_dice=head.loss_dice,
        train_cfg=head.train_cfg,
    )
    return cfg


def knet(classes=10):
    """K-Net of mmseg: a query for each class, and scores of each pixel in the end."""
    cfg = toy_segmentor(4, classes)
    update = dict(
        type='KernelUpdateHead',
        num_classes=classes,
        num_ffn_fcs=2,
        num_heads=2,
        num_mask_fcs=1,
        feedforward_channels=16,
        in_channels=8,
        out_channels=8,
        dropout=0.0,
        conv_kernel_size=1,
        ffn_act_cfg=dict(type='ReLU', inplace=True),
        with_ffn=True,
        feat_transform_cfg=dict(conv_cfg=dict(type='Conv2d'), act_cfg=None),
        kernel_updator_cfg=dict(
            type='KernelUpdator',
            in_channels=8,
            feat_channels=8,
            out_channels=8,
            act_cfg=dict(type='ReLU', inplace=True),
            norm_cfg=dict(type='LN'),
        ),
    )
    generate = dict(cfg.decode_head, channels=8)
    cfg.decode_head = dict(
        type='IterativeDecodeHead', num_stages=2, kernel_update_head=[update] * 2, kernel_generate_head=generate
    )
    return cfg


def distiller(teacher, term=None, classes=10, **more):
    term = {
        'tap': dict(student='decode_head.conv_seg', teacher='decode_head'),
        'connector': dict(type='mmstructkd.QueryMarginals'),
        'loss': dict(type='mmstructkd.PixelwiseKLLoss'),
        **(term or {}),
    }
    return StructuredDistiller(
        student=toy_segmentor(2, classes), teacher=dict(config=teacher, allow_random=True), terms=dict(kd=term), **more
    )


def marginals(network, images, samples):
    """What the head predicts, which is not normalised, at the size of the image."""
    with torch.no_grad():
        return network.encode_decode(images, [copy.deepcopy(sample.metainfo) for sample in samples])


@pytest.mark.parametrize('teacher', [mask2former, maskformer], ids=['Mask2Former', 'MaskFormer'])
def test_a_real_head_teaches_what_it_predicts(teacher):
    torch.manual_seed(0)
    model = distiller(teacher()).train()
    batch = toy_batch()
    loss = model(**batch, mode='loss')['loss_kd_kd']
    loss.backward()
    assert model.student.decode_head.conv_seg.weight.grad.any()
    assert all(p.grad is None for p in model.teacher.network.parameters())
    _, seen = model.observe(batch['inputs'], batch['data_samples'], [model.terms['kd']])
    (mine,), heard = model.terms['kd'].tensors(seen.student, seen.teacher)
    _, (scores,) = model.terms['kd'].connectors[0]([mine], heard)
    torch.testing.assert_close(
        model.terms['kd'](seen.student, seen.teacher, Targets())['loss_kd_kd'], pixelwise_kl_loss(mine, scores)
    )
    # By hand, from what the head predicts at the size of the masks.
    network = model.teacher.network
    masks = heard[1]
    classes = heard[0].softmax(-1)[..., :-1]
    evidence = torch.einsum('bqc,bqhw->bchw', classes, masks.sigmoid()) + 1e-6
    want = evidence / evidence.sum(1, keepdim=True)
    factor = masks.shape[2] // mine.shape[2]
    pooled = want.unflatten(3, (-1, factor)).unflatten(2, (-1, factor)).mean((3, 5)) if factor > 1 else want
    torch.testing.assert_close(scores.softmax(1), pooled, rtol=1e-4, atol=1e-6)
    predicted = marginals(network, batch['inputs'], batch['data_samples'])
    big = interpolate(masks, predicted.shape[2:], mode='bilinear', align_corners=False)
    torch.testing.assert_close(torch.einsum('bqc,bqhw->bchw', classes, big.sigmoid()), predicted)
    _, (whole,) = QueryMarginals([10], [11, 20])([torch.zeros_like(predicted)], heard)
    torch.testing.assert_close(whole.softmax(1), predicted / predicted.sum(1, keepdim=True), rtol=1e-3, atol=1e-5)


def test_both_outputs_can_be_named_in_any_order_and_in_a_group():
    torch.manual_seed(0)
    cfg = mask2former()
    names = ['decode_head[1][-1]', 'decode_head[0][-1]']
    model = distiller(cfg, {'tap': dict(student='decode_head.conv_seg', teacher=names)}).train()
    first = model(**toy_batch(), mode='loss')['loss_kd_kd']
    names = [f'big.{name}' for name in names]
    group = StructuredDistiller(
        student=model.student,
        teachers=dict(big=dict(config=cfg, allow_random=True)),
        terms=dict(
            kd=dict(
                tap=dict(student='decode_head.conv_seg', teacher='big.decode_head'),
                connector=dict(type='mmstructkd.QueryMarginals'),
                loss=dict(type='mmstructkd.PixelwiseKLLoss'),
            )
        ),
    )
    group.teacher.members['big'].network.load_state_dict(model.teacher.network.state_dict())
    group.train()
    for module in model.student.modules():
        if isinstance(module, (nn.Dropout2d, nn.BatchNorm2d)):
            module.eval()
    one = model(**toy_batch(), mode='loss')['loss_kd_kd']
    torch.testing.assert_close(group.eval()(**toy_batch(), mode='loss')['loss_kd_kd'].shape, one.shape)
    assert first.isfinite()


def test_finer_classes_are_added_up():
    torch.manual_seed(0)
    finer = [k // 2 for k in range(10)]
    student = toy_segmentor(2, 5)
    term = dict(
        tap=dict(student='decode_head.conv_seg', teacher='decode_head'),
        connector=dict(type='mmstructkd.QueryMarginals'),
        loss=dict(type='mmstructkd.PixelwiseKLLoss', class_map=finer),
    )
    model = StructuredDistiller(
        student=student, teacher=dict(config=mask2former(), allow_random=True), terms=dict(kd=term)
    ).train()
    batch = toy_batch()
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data = sample.gt_sem_seg.data % 5
    _, seen = model.observe(batch['inputs'], batch['data_samples'], [model.terms['kd']])
    (mine,), heard = model.terms['kd'].tensors(seen.student, seen.teacher)
    _, (scores,) = model.terms['kd'].connectors[0]([mine], heard)
    summed = scores.softmax(1).unflatten(1, (5, 2)).sum(2).log()
    got = model.terms['kd'](seen.student, seen.teacher, Targets())['loss_kd_kd']
    torch.testing.assert_close(got, pixelwise_kl_loss(mine, summed))


@pytest.mark.parametrize('loss', [PixelwiseKLLoss, DecoupledKLLoss, DistLoss])
def test_log_probabilities_stand_for_logits(loss):
    """Any constant a pixel may be added: the loss sees the distribution alone."""
    torch.manual_seed(0)
    student = torch.randn(2, 4, 6, 6, requires_grad=True)
    _, (scores,) = QueryMarginals([4], [5, 3])([student], [torch.randn(2, 3, 5), torch.randn(2, 3, 3, 3)])
    targets = Targets(labels=torch.zeros(2, 6, 6, dtype=torch.long))
    for temperature in (1.0, 3.0):
        one, two = (
            loss(temperature=temperature)(student, t, targets) for t in (scores, scores + torch.randn(2, 1, 6, 6))
        )
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    'loss',
    [
        dict(type='mmstructkd.BinaryKLLoss'),
        dict(type='mmstructkd.ChannelwiseKLLoss'),
        dict(type='mmstructkd.FeatureMSELoss'),
    ],
    ids=lambda loss: loss['type'],
)
@pytest.mark.parametrize('chain', [False, True])
def test_a_loss_that_reads_no_distribution_over_classes_is_refused(loss, chain):
    connector = dict(type='mmstructkd.QueryMarginals')
    with pytest.raises(
        ConfigError, match=r"term 'kd': `loss` must compare distributions over classes behind QueryMarg"
    ):
        distiller(mask2former(), {'loss': loss, 'connector': [connector] if chain else connector})


def test_k_net_shows_scores_of_each_pixel():
    torch.manual_seed(0)
    tap = dict(student='decode_head.conv_seg', teacher='decode_head.kernel_update_head.1[0]')
    model = distiller(knet(), {'connector': None, 'tap': tap})
    assert model.train()(**toy_batch(), mode='loss')['loss_kd_kd'] > 0
    with pytest.raises(ShapeError, match='Scores of each pixel need no connector'):
        distiller(knet(), {'tap': tap})


def test_other_classes_are_told():
    with pytest.raises((ConfigError, ShapeError), match=r"term 'kd'.*classes"):
        distiller(mask2former(), classes=6)


def test_what_is_not_queries_is_told():
    student, classes, masks = torch.zeros(1, 4, 6, 6), torch.zeros(1, 3, 5), torch.zeros(1, 3, 3, 3)
    connector = QueryMarginals([4], [5, 3])
    for students, teachers in (([student] * 2, [classes, masks]), ([student], [masks]), ([student], [masks, masks])):
        with pytest.raises(ShapeError, match='QueryMarginals: `(student|teacher)` must tap'):
            connector(students, teachers)
    with pytest.raises(ShapeError, match='must share B and Q'):
        connector([student], [classes[:, :2], masks])


def test_last_layer_of_a_list_or_a_stack():
    layers = [torch.full((2, 3, 5), float(k)) for k in range(3)]
    tap = Tap.parse('decode_head[0][last]')
    assert str(tap) == 'decode_head[0][last]'
    for value in (layers, tuple(layers), torch.stack(layers)):
        (found,) = tap.pick((value, None))
        assert torch.equal(found, layers[-1])
    with pytest.raises(TapError, match='an index would pick an image'):
        tap.pick((layers[0], None))
    with pytest.raises(TapError, match='an index would pick an image'):
        Tap.parse('decode_head[last]').pick(torch.zeros(2, 3, 4, 5))
    assert torch.equal(Tap.parse('head[last]').pick({'last': layers[1]})[0], layers[1])
