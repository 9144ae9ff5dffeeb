"""Prototype contrast: two embeddings, each trained by its own part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.functional import prototype_contrast_loss
from mmstructkd.losses import PrototypeContrastLoss
from mmstructkd.structures import Targets

LABELS = torch.tensor([[[0, 0, 1], [0, 1, 1]], [[1, 1, 0], [2, 2, 255]]])
TARGETS = Targets(labels=LABELS, num_classes=3)


def pair() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 4, 2, 3, requires_grad=True), torch.randn(2, 5, 2, 3, requires_grad=True)


def made(**settings: object) -> tuple[PrototypeContrastLoss, Tensor, Tensor]:
    student, teacher = pair()
    loss = PrototypeContrastLoss(seed=0, **settings)
    loss.bind(student, teacher)
    return loss.eval(), student, teacher


def test_the_published_weights_are_the_defaults() -> None:
    loss, student, teacher = made()
    got = loss(student, teacher, TARGETS)
    settings = dict(labels=LABELS, num_classes=3, temperature=0.1, kd_temperature=3.0)
    embedded = loss.embedding(teacher)
    want = prototype_contrast_loss(student, embedded, weights=(0.1, 0.1, 1.0, 1.0), **settings)
    torch.testing.assert_close(got[''], want)
    own = prototype_contrast_loss(embedded, embedded, weights=(0.1, 0, 0, 0), **settings)
    torch.testing.assert_close(got['embedding'], own)


def test_each_side_is_trained_by_its_own_part() -> None:
    loss, student, teacher = made()
    got = loss(student, teacher, TARGETS)
    parameters = list(loss.embedding.parameters())
    grads = torch.autograd.grad(got[''], [student, *parameters], retain_graph=True, allow_unused=True)
    assert grads[0].any()
    assert all(grad is None for grad in grads[1:])
    got['embedding'].backward()
    assert student.grad is None
    assert teacher.grad is None
    assert all(p.grad is not None for p in parameters)


@pytest.mark.parametrize(
    'labels', [LABELS[:1], torch.full((2, 2, 3), 255), torch.tensor([[[0] * 3] * 2, [[1] * 3] * 2])]
)
def test_nothing_is_learned_where_no_class_is_in_two_images(labels: Tensor) -> None:
    loss, student, teacher = made(soft_within_weight=0, soft_across_weight=0)
    size = len(labels)
    got = loss(student[:size], teacher[:size], Targets(labels=labels, num_classes=3))
    sum(got.values()).backward()
    assert got[''] == got['embedding'] == 0
    assert not student.grad.any()


def test_without_an_embedding_the_widths_are_compared_as_they_are() -> None:
    student, _ = pair()
    loss = PrototypeContrastLoss(embedding=None)
    loss.bind(student, student)
    assert list(loss(student, student, TARGETS)) == ['']
    assert not list(loss.parameters())


@pytest.mark.parametrize(
    ('settings', 'targets', 'match'),
    [
        ({}, Targets(num_classes=3), '`targets.labels` must be the class of each pixel'),
        ({}, Targets(labels=LABELS), '`num_classes` must be given'),
        ({'embedding': dict(type='mmstructkd.DeepProjectr')}, TARGETS, "got 'mmstructkd.DeepProjectr'"),
    ],
)
def test_mistakes(settings: dict, targets: Targets, match: str) -> None:
    def run() -> None:
        loss, student, teacher = made(**settings)
        loss(student, teacher, targets)

    with pytest.raises(ConfigError, match=match):
        run()
