"""Connectors where they are used: in the terms of a distiller."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.connectors import SequentialConnector
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor


def distiller(tap, connector, loss=None, **changes):
    loss = loss or dict(type='mmstructkd.PairwiseAffinityLoss')
    return MODELS.build(toy_distiller(terms=dict(a=dict(tap=tap, connector=connector, loss=loss)), **changes))


def step(model):
    batch = toy_batch()
    model.train()
    losses = model(**batch, mode='loss')
    term = losses['loss_kd_a']
    term.backward()
    assert term.isfinite()
    assert term > 0
    assert [n for n, p in model.terms.named_parameters() if p.requires_grad and p.grad is None] == []
    return losses


CHANNELWISE = dict(type='mmstructkd.ChannelwiseKLLoss')


@pytest.mark.parametrize(
    ('tap', 'connector', 'loss'),
    [
        ('decode_head.convs', dict(type='mmstructkd.PoolConnector', max_nodes=12), None),
        ('decode_head.convs', dict(type='mmstructkd.ProjectorEnsembleConnector'), CHANNELWISE),
        ('decode_head.convs', dict(type='mmstructkd.DeepProjectorConnector'), CHANNELWISE),
        (
            'backbone[*]',
            [dict(type='mmstructkd.ConvConnector'), dict(type='mmstructkd.StandardizeConnector')],
            CHANNELWISE,
        ),
        (
            dict(student='in:decode_head.conv_seg', teacher='decode_head.conv_seg'),
            dict(type='mmstructkd.TeacherHeadConnector', head='decode_head.conv_seg'),
            dict(type='mmstructkd.PixelwiseKLLoss'),
        ),
        (
            dict(student='in:decode_head.conv_seg', teacher='decode_head.conv_seg'),
            [
                dict(type='mmstructkd.TeacherHeadConnector', head='decode_head.conv_seg'),
                dict(type='mmstructkd.PoolConnector', kernel_size=2),
            ],
            dict(type='mmstructkd.PixelwiseKLLoss'),
        ),
        (
            dict(student='backbone.layer4.1', teacher=['backbone.layer4.0', 'backbone.layer4.1']),
            dict(type='mmstructkd.LayerMixConnector', entropy_floor=0.5),
            CHANNELWISE,
        ),
    ],
)
def test_trains(tap, connector, loss):
    model = distiller(tap, connector, loss)
    if isinstance(connector, list):
        assert isinstance(model.terms['a'].connectors[0], SequentialConnector)
    before = {k: v.clone() for k, v in model.teacher.network.state_dict().items()}
    step(model)
    assert all(p.grad is None for p in model.teacher.network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.network.state_dict().items())


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_transformer_beside_a_convolutional_network(side):
    transformer = toy_segmentor(4)
    transformer.backbone = dict(
        type='MixVisionTransformer',
        embed_dims=4,
        num_stages=4,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        sr_ratios=[1, 1, 1, 1],
        drop_path_rate=0.0,
    )
    for head, index in ((transformer.decode_head, 3), (transformer.auxiliary_head, 2)):
        head.in_channels, head.in_index = 4, index
    # the tokens of a block, before it is laid out: 1/16 of the input in each direction
    tap = {'student': 'backbone[3]', 'teacher': 'backbone[3]', side: 'backbone.layers.2.1.0'}
    networks = (
        dict(student=transformer) if side == 'student' else dict(teacher=dict(config=transformer, allow_random=True))
    )
    connector = [dict(type='mmstructkd.TokensToMapConnector'), dict(type='mmstructkd.ConvConnector')]
    model = distiller(tap, connector, CHANNELWISE, **networks)
    step(model)


def test_tokens_of_both_networks_are_laid_out_after_the_input():
    transformer = toy_segmentor(4)
    transformer.backbone = dict(
        type='MixVisionTransformer',
        embed_dims=4,
        num_stages=4,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        sr_ratios=[1, 1, 1, 1],
    )
    for head, index in ((transformer.decode_head, 3), (transformer.auxiliary_head, 2)):
        head.in_channels, head.in_index = 4, index
    model = distiller(
        'backbone.layers.2.1.0',
        dict(type='mmstructkd.TokensToMapConnector'),
        student=transformer,
        teacher=dict(config=transformer, allow_random=True),
    )
    step(model)
