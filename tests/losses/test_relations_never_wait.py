"""Losses over classes, nodes and memories on a device without numbers: whatever looked at one would fail."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

CASES = [
    ('CategorySimilarityLoss', {}),
    ('CorrelationCongruenceLoss', {}),
    ('CorrelationCongruenceLoss', {'preset': 'code'}),
    ('CrossImageKLLoss', {'max_positions': 12}),
    ('InterclassSimilarityLoss', {}),
    ('InterclassSimilarityLoss', {'present': 'labels'}),
    ('InterclassSimilarityLoss', {'preset': 'code'}),
    ('IntraClassVariationLoss', {}),
    ('LocalStructureLoss', {}),
    ('MemoryContrastLoss', {'num_classes': 3, 'max_anchors': 20}),
    ('PixelSimilarityLoss', {}),
    ('RegionContrastLoss', {'num_classes': 3, 'max_instances': 4}),
    ('RegionContrastLoss', {'num_classes': 3, 'regions': 'boxes'}),
    ('RegionContrastLoss', {'regions': 'cells', 'mode': 'wasserstein'}),
    ('RelationalLoss', {}),
    ('RelationalLoss', {'nodes': 'classes'}),
    ('SimilarityPreservingLoss', {}),
]


@pytest.mark.parametrize(('name', 'options'), CASES)
def test_no_number_is_looked_at(name, options):
    loss = MODELS.build({'type': f'mmstructkd.{name}', **options})
    loss.bind(torch.zeros(1, 4, 6, 5), torch.zeros(1, 4, 6, 5))
    loss = loss.train().to('meta')
    student = torch.empty(2, 4, 6, 5, device='meta', requires_grad=True)
    targets = Targets(
        labels=torch.empty(2, 12, 10, device='meta', dtype=torch.int64),
        valid=torch.empty(2, 12, 10, device='meta', dtype=torch.bool),
        num_classes=3,
        boxes=(torch.empty(2, 4, device='meta'),) * 2,
        box_labels=(torch.empty(2, device='meta', dtype=torch.int64),) * 2,
        input_size=(24, 20),
    )
    for _ in range(2):
        value = loss(student, torch.empty(2, 4, 6, 5, device='meta'), targets)
        value.backward()
    assert value.shape == ()
    assert student.grad.shape == student.shape
