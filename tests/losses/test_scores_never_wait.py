"""Losses on scores never ask the device for a number: a device that has none is enough to run them."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

LEARNED = {'type': 'LearnableTemperature'}
STANDARDIZED = {'type': 'StandardizedTemperature'}
CASES = [
    ('PixelwiseKLLoss', {}),
    ('PixelwiseKLLoss', {'temperature': LEARNED}),
    ('PixelwiseKLLoss', {'temperature': STANDARDIZED}),
    ('PixelwiseKLLoss', {'class_map': [0, 1, 1, -1]}),
    ('ChannelwiseKLLoss', {'temperature': LEARNED}),
    ('ChannelwiseKLLoss', {'temperature': STANDARDIZED}),
    ('DistLoss', {'temperature': LEARNED}),
    ('DistLoss', {'class_map': [3, 0, 1, 2]}),
    ('DecoupledKLLoss', {'temperature': LEARNED}),
    ('DecoupledKLLoss', {'target': 'teacher'}),
    ('WeightedSoftLabelLoss', {'temperature': LEARNED}),
    ('ZipfLabelLoss', {}),
    ('ZipfLabelLoss', {'voter': 'teacher'}),
    ('LocalizationKLLoss', {'temperature': LEARNED}),
    ('LocalizationKLLoss', {'region': 'confident', 'preset': 'code'}),
    ('BinaryKLLoss', {'temperature': LEARNED, 'anchors': 2}),
    ('BinaryKLLoss', {'normalizer': 'boxes'}),
    ('BinaryKLLoss', {'normalizer': 'positions'}),
]


@pytest.mark.parametrize(('name', 'settings'), CASES)
def test_runs_on_a_device_without_numbers(name, settings):
    settings = {
        key: {**value, 'type': 'mmstructkd.' + value['type']} if key == 'temperature' else value
        for key, value in settings.items()
    }
    loss = MODELS.build({'type': f'mmstructkd.{name}', **settings}).to('meta')
    student = torch.empty(2, 4, 6, 5, device='meta', requires_grad=True)
    targets = Targets(
        labels=torch.empty(2, 12, 10, device='meta', dtype=torch.int64),
        valid=torch.empty(2, 12, 10, device='meta', dtype=torch.bool),
        boxes=(torch.empty(3, 4, device='meta'), torch.empty(0, 4, device='meta')),
        input_size=(12, 10),
    )
    value = loss(student, torch.empty(2, 4, 6, 5, device='meta'), targets)
    value.backward()
    assert value.shape == ()
    assert student.grad.shape == student.shape
