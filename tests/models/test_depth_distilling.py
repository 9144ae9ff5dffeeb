"""Depth estimators under the distiller: every kind of term finds its tap in the light heads."""

from __future__ import annotations

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.testing.toy_depth import toy_depth_estimator

DEPTH = 'decode_head.to_depth'
TERMS = {
    'pairwise': dict(tap='decode_head.convs', loss=dict(type='mmstructkd.PairwiseAffinityLoss', loss_weight=10.0)),
    'channel': dict(tap='backbone[3]', loss=dict(type='mmstructkd.ChannelwiseKLLoss')),
    'holistic': dict(
        tap=DEPTH,
        loss=dict(type='mmstructkd.HolisticLoss', normalize='log_depth', critic=dict(base_channels=4), loss_weight=0.1),
    ),
    'metric': dict(tap=DEPTH, loss=dict(type='mmstructkd.DepthRegressionLoss', where='unlabelled')),
    'silog': dict(tap=DEPTH, loss=dict(type='mmstructkd.DepthRegressionLoss', kind='silog', max_depth=24.0)),
    'shape': dict(tap=DEPTH, loss=dict(type='mmstructkd.ScaleShiftInvariantLoss', robust=True)),
    'edges': dict(tap=DEPTH, loss=dict(type='mmstructkd.GradientMatchingLoss')),
    'order': dict(tap=DEPTH, loss=dict(type='mmstructkd.OrdinalRelationLoss', num_pairs=500)),
    'normal': dict(tap=DEPTH, loss=dict(type='mmstructkd.VirtualNormalLoss', min_distance=0.0, focal_length=60.0)),
}
BINS = dict(tap='decode_head.conv_depth', loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=2.0))
SIZE = (64, 96)


def distiller(student, teacher, terms):
    return MODELS.build(
        dict(
            type='mmstructkd.StructuredDistiller',
            student=toy_depth_estimator(4, student),
            teacher=dict(config=toy_depth_estimator(8, teacher), allow_random=True),
            terms=terms,
        )
    )


def batch():
    """Two images, the second padded by 20 columns; the upper half without a reading."""
    samples = []
    for width in (96, 76):
        depth = 1 + 20 * torch.rand(1, *SIZE)
        depth[:, :32] = 0
        depth[..., width:] = 255.0
        sample = SegDataSample(
            metainfo=dict(
                img_shape=(64, width), ori_shape=(64, width), pad_shape=SIZE, padding_size=(0, 96 - width, 0, 0)
            )
        )
        sample.set_data({'gt_depth_map': PixelData(data=depth)})
        samples.append(sample)
    return torch.randn(2, 3, *SIZE), samples


@pytest.mark.parametrize('teacher', ['DepthRegressionHead', 'DepthClassificationHead'])
@pytest.mark.parametrize('student', ['DepthRegressionHead', 'DepthClassificationHead'])
def test_every_term_reaches_the_student(student, teacher):
    both_bins = student == teacher == 'DepthClassificationHead'
    model = distiller(student, teacher, {**TERMS, **(dict(bins=BINS) if both_bins else {})}).train()
    inputs, samples = batch()
    losses = model(inputs, samples, mode='loss')
    parameters = list(model.student.parameters())
    for name in model.terms:
        value = losses[f'loss_kd_{name}']
        assert value.isfinite(), name
        assert value.item() != 0, name
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.any() for g in grads), name
        assert all(g is None or g.isfinite().all() for g in grads), name
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    assert all(p.grad is not None for p in parameters)


def test_bins_of_another_number_are_an_error():
    with pytest.raises(ConfigError, match=r"term 'bins': the teacher must have .* got num_classes=12 .* and 1 for"):
        distiller('DepthRegressionHead', 'DepthClassificationHead', dict(bins=BINS))


def test_resume_keeps_the_draws():
    terms = {name: TERMS[name] for name in ('order', 'normal')}
    model = distiller('DepthRegressionHead', 'DepthRegressionHead', terms).train()
    data = batch()
    for _ in range(2):
        model(*data, mode='loss')
    other = distiller('DepthRegressionHead', 'DepthRegressionHead', terms).train()
    other.load_training_state(model.training_state())
    assert [loss.stream.tolist() for term in other.terms.values() for loss in term.losses] == [[0, 2], [0, 2]]
