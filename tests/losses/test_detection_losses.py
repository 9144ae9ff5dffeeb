"""The shells of losses on dense detection heads: which positions count, and what divides them."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.losses import BinaryKLLoss, LocalizationKLLoss
from mmstructkd.structures import Targets
from tests.reference import detection as reference

SHAPE = (2, 12, 4, 5)
BOXES = [[[0.0, 0.0, 12.0, 20.0], [30.5, 10.0, 39.0, 31.0]], []]


def pair(shape=SHAPE):
    student, teacher = (2 * torch.randn(2, *shape, dtype=torch.float64)).unbind()
    return student.clone().requires_grad_(), teacher


def targets(**changes):
    boxes = tuple(torch.tensor(image).reshape(-1, 4) for image in BOXES)
    return Targets(**{'boxes': boxes, 'input_size': (32, 40), **changes})


def inside():
    return reference.inside_boxes(BOXES, (4, 5), (32, 40))


def test_localization_counts_what_lies_in_a_box():
    student, teacher = pair()
    assert 0 < inside().sum() < 20
    got = LocalizationKLLoss(3.0, temperature=2.0)(student, teacher, targets())
    torch.testing.assert_close(got, 3 * reference.localization_kl(student, teacher, 2.0, valid=inside()))
    valid = torch.rand(2, 4, 5) > 0.4
    got = LocalizationKLLoss(3.0, temperature=2.0)(student, teacher, targets(valid=valid))
    torch.testing.assert_close(got, 3 * reference.localization_kl(student, teacher, 2.0, valid=inside() & valid))


def test_localization_in_other_regions():
    student, teacher = pair()
    confidence = torch.tensor(
        [sum(float(edge.softmax(0).max()) for edge in place) / 4 for place in reference.edges_of(teacher, 4)]
    ).view(2, 4, 5)
    ordered = confidence.flatten().sort().values
    threshold = (ordered[19] + ordered[20]).item() / 2
    got = LocalizationKLLoss(1.0, region='confident', threshold=threshold)(student, teacher)
    sharp = confidence >= threshold
    assert sharp.sum() == 20
    torch.testing.assert_close(got, reference.localization_kl(student, teacher, 10.0, valid=sharp))
    got = LocalizationKLLoss(1.0, region='all', edges=3)(student, teacher)
    torch.testing.assert_close(got, reference.localization_kl(student, teacher, 10.0, edges=3))


def test_localization_defaults_and_preset():
    student, teacher = pair()
    want = reference.localization_kl(student, teacher, 10.0, valid=inside())
    torch.testing.assert_close(LocalizationKLLoss()(student, teacher, targets()), 0.25 * want)
    got = LocalizationKLLoss(preset='code')(student, teacher, targets())
    # Three bins, and the sum over the positives.
    torch.testing.assert_close(got, 0.25 * want / 3 * inside().sum())
    with pytest.raises(ConfigError, match=r"`reduction` must be 'sum' with preset='code', got 'mean'"):
        LocalizationKLLoss(preset='code', reduction='mean')


def test_localization_of_rows_counts_all():
    student, teacher = pair((6, 5))
    got = LocalizationKLLoss(1.0)(student, teacher, targets())
    torch.testing.assert_close(got, reference.localization_kl(student, teacher, 10.0))


def test_images_without_boxes_are_zero_with_a_graph():
    student, teacher = pair()
    none = targets(boxes=(torch.zeros(0, 4), torch.zeros(0, 4)))
    for loss in (LocalizationKLLoss(), LocalizationKLLoss(preset='code')):
        got = loss(student, teacher, none)
        assert got.item() == 0
        assert not torch.autograd.grad(got, student)[0].any()


def test_binary():
    student, teacher = pair()
    valid = torch.rand(2, 4, 5) > 0.4
    got = BinaryKLLoss(3.0, temperature=2.0, anchors=3)(student, teacher, targets(valid=valid))
    torch.testing.assert_close(got, 3 * reference.binary_kl(student, teacher, 2.0, 3, valid=valid))
    got = BinaryKLLoss(normalizer='positions')(student, teacher)
    torch.testing.assert_close(got, reference.binary_kl(student, teacher, 1.0, normalizer='positions'))
    got = BinaryKLLoss(normalizer='boxes')(student, teacher, targets(valid=valid))
    number = float((inside() & valid).sum())
    torch.testing.assert_close(got, reference.binary_kl(student, teacher, 1.0, normalizer=number, valid=valid))
    none = targets(boxes=(torch.zeros(0, 4), torch.zeros(0, 4)))
    got = BinaryKLLoss(normalizer='boxes')(student, teacher, none)
    torch.testing.assert_close(got, reference.binary_kl(student, teacher, 1.0, normalizer=1.0))


def test_binary_of_rows():
    student, teacher = pair((6, 5))
    torch.testing.assert_close(BinaryKLLoss()(student, teacher, targets()), reference.binary_kl(student, teacher, 1.0))


def test_missing_boxes():
    student, teacher = pair()
    with pytest.raises(
        ConfigError, match=r"LocalizationKLLoss: `targets\.boxes` must be given for region='boxes', got"
    ):
        LocalizationKLLoss()(student, teacher)
    with pytest.raises(ConfigError, match=r"`targets\.input_size` must be given .*, got None\. Set region='confident'"):
        LocalizationKLLoss()(student, teacher, targets(input_size=None))
    loss = BinaryKLLoss(normalizer='boxes')
    rule = r"BinaryKLLoss: `normalizer` must be 'weights' or 'positions' .*, got 'boxes' with "
    for tensors, known, what in (
        ((student, teacher), Targets(), 'no boxes'),
        ((student, teacher), targets(input_size=None), 'no input size'),
        (pair((6, 5)), targets(), 'rows'),
    ):
        with pytest.raises(ConfigError, match=rule + what):
            loss(*tensors, known)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="LocalizationKLLoss: `region` must be one of .*, got 'box'"):
        LocalizationKLLoss(region='box')
    with pytest.raises(ConfigError, match='LocalizationKLLoss: `edges` must be an integer of at least 1, got 0'):
        LocalizationKLLoss(edges=0)
    with pytest.raises(ConfigError, match='LocalizationKLLoss: `threshold` must be a finite number'):
        LocalizationKLLoss(threshold=-1)
    with pytest.raises(ConfigError, match='BinaryKLLoss: `anchors` must be an integer of at least 1, got 1.0'):
        BinaryKLLoss(anchors=1.0)
    with pytest.raises(ConfigError, match="BinaryKLLoss: `normalizer` must be one of .*, got 'sum'"):
        BinaryKLLoss(normalizer='sum')
    for kind in (BinaryKLLoss, LocalizationKLLoss):
        with pytest.raises(ConfigError, match=f'{kind.__name__}: `temperature` must be one that leaves the scores'):
            kind(temperature={'type': 'mmstructkd.StandardizedTemperature'})
        assert not kind.needs_equal_channels
