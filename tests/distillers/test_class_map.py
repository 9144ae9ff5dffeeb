"""A teacher of other classes, and temperatures, through the distiller."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor


def distiller(loss: dict, teacher_classes: int) -> torch.nn.Module:
    config = toy_distiller(teacher=dict(config=toy_segmentor(8, num_classes=teacher_classes), allow_random=True))
    config.terms = dict(pixel=dict(tap='decode_head.conv_seg', loss=loss))
    return MODELS.build(config)


def test_a_finer_teacher_through_the_distiller() -> None:
    plain = dict(type='mmstructkd.PixelwiseKLLoss')
    classes = toy_segmentor(4).decode_head.num_classes
    with pytest.raises(ConfigError, match="term 'pixel': the teacher must have the classes of the student"):
        distiller(plain, classes + 2)
    numbers = [*range(classes), 0, -1]
    model = distiller(dict(plain, class_map=numbers), classes + 2).eval()
    losses = model(**toy_batch(), mode='loss')
    losses['loss_kd_pixel'].backward()
    assert losses['loss_kd_pixel'] > 0
    assert model.student.decode_head.conv_seg.weight.grad.any()


def test_the_class_map_must_fit_the_teacher() -> None:
    loss = dict(type='mmstructkd.PixelwiseKLLoss', class_map=[0, 1])
    with pytest.raises(ConfigError, match="term 'pixel'.*one entry for each of the teacher's 9 classes, got 2"):
        distiller(loss, 9)
