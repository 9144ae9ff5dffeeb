from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import PixelwiseKLLoss
from mmstructkd.structures import Targets
from tests.reference import divergence as reference

SHAPE = (3, 4, 2, 5)


def pair():
    student, teacher = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    return student.clone().requires_grad_(), teacher


@pytest.mark.parametrize('where', ['inside', 'labelled'])
def test_equals_reference_with_labels_and_mask(where):
    student, teacher = pair()
    labels = torch.randint(0, 4, (3, 2, 5))
    labels[1, 0] = 9
    valid = torch.rand(3, 2, 5) > 0.2
    loss = PixelwiseKLLoss(3.0, temperature=2.0)
    loss.restrict(where)
    got = loss(student, teacher, Targets(labels=labels, valid=valid, ignore_index=9))
    counts = valid if where == 'inside' else valid & (labels != 9)
    torch.testing.assert_close(got, 3 * reference.pixelwise_kl(student, teacher, 2.0, counts))


def test_labels_alone_mask_where_only_labelled_pixels_count():
    student, teacher = pair()
    labels = torch.randint(0, 4, (3, 2, 5))
    labels[0] = 255
    loss = PixelwiseKLLoss()
    got = loss(student, teacher, Targets(labels=labels))
    torch.testing.assert_close(got, reference.pixelwise_kl(student, teacher, 1.0))
    loss.restrict('labelled')
    got = loss(student, teacher, Targets(labels=labels))
    torch.testing.assert_close(got, reference.pixelwise_kl(student, teacher, 1.0, labels != 255))


def test_defaults_and_presets():
    student, teacher = pair()
    mean = reference.pixelwise_kl(student, teacher, 1.0)
    torch.testing.assert_close(PixelwiseKLLoss()(student, teacher), mean)
    torch.testing.assert_close(PixelwiseKLLoss(preset='paper')(student, teacher), 10 * mean)
    # The released code sums over the batch.
    torch.testing.assert_close(PixelwiseKLLoss(preset='code')(student, teacher), 10 * 3 * mean)
    torch.testing.assert_close(PixelwiseKLLoss(batch_reduction='sum')(student, teacher), 3 * mean)


def test_preset_code_is_the_published_gradient():
    """Soft cross-entropy summed over everything, over the pixels of one image, weight 10."""
    student, teacher = pair()
    code = -(teacher.softmax(1) * student.log_softmax(1)).sum() / (SHAPE[2] * SHAPE[3])
    (want,) = torch.autograd.grad(10 * code, student)
    (got,) = torch.autograd.grad(PixelwiseKLLoss(preset='code')(student, teacher), student)
    torch.testing.assert_close(got, want)


def test_bad_arguments():
    with pytest.raises(ConfigError, match='PixelwiseKLLoss: `temperature` must be a finite number above 0, got 0'):
        PixelwiseKLLoss(temperature=0)
    with pytest.raises(ConfigError, match=r"`batch_reduction` must be one of \['mean', 'sum'\], got 'max'"):
        PixelwiseKLLoss(batch_reduction='max')
    with pytest.raises(ConfigError, match=r"`temperature` must be 1\.0 with preset='paper', got 4"):
        PixelwiseKLLoss(preset='paper', temperature=4)
    with pytest.raises(ConfigError, match=r"`preset` must be one of .*, got 'structkd'"):
        PixelwiseKLLoss(preset='structkd')


def test_other_classes_are_refused():
    student, teacher = pair()
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(3, 4, 2, 5\) and \(3, 2, 2, 5\)'):
        PixelwiseKLLoss()(student, teacher[:, :2])
    assert not PixelwiseKLLoss.needs_equal_channels
