"""Connectors where they are used: in the terms of a distiller."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_distiller


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
            dict(student='in:decode_head.conv_seg', teacher='decode_head.conv_seg'),
            dict(type='mmstructkd.TeacherHeadConnector', head='decode_head.conv_seg'),
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
    before = {k: v.clone() for k, v in model.teacher.network.state_dict().items()}
    step(model)
    assert all(p.grad is None for p in model.teacher.network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.network.state_dict().items())
