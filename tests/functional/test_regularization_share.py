from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ShapeError
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from mmstructkd.functional.regularization_share import regularization_share
from tests.functional import checks
from tests.reference.logits import probabilities, rows_of


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('temperature', [1.0, 3.0])
def test_share_of_pixels_whose_label_the_gradient_lowers(masked, temperature):
    student, teacher = checks.pair()
    labels = torch.randint(0, 4, (3, 2, 5))
    valid = checks.VALID if masked else torch.ones_like(checks.VALID)
    got = regularization_share(student, teacher, labels=labels, temperature=temperature, valid=valid)
    (grad,) = torch.autograd.grad(pixelwise_kl_loss(student, teacher, temperature=temperature), student)
    lowered = grad.gather(1, labels[:, None])[:, 0] > 0  # a step against the gradient lowers the score
    torch.testing.assert_close(got, lowered[valid].double().mean())
    own = [
        [probabilities(row, temperature)[y] for row, y in zip(rows_of(z), labels.flatten(), strict=True)]
        for z in (student, teacher)
    ]
    kept = valid.flatten().tolist()
    count = sum(t < s for s, t, some in zip(*own, kept, strict=True) if some)
    torch.testing.assert_close(got.item(), float(count) / sum(kept))
    assert not got.requires_grad


def test_edges():
    student, teacher = checks.pair()
    labels = torch.full((3, 2, 5), 255)
    assert regularization_share(student, teacher, labels=labels) == 0
    spoiled = torch.where(checks.VALID[:, None], student, float('nan'))
    labels = torch.where(checks.VALID, 1, 255)
    torch.testing.assert_close(
        regularization_share(spoiled, teacher, labels=labels), regularization_share(student, teacher, labels=labels)
    )
    assert regularization_share(teacher, teacher, labels=labels) == 0
    with pytest.raises(ShapeError, match='regularization_share: .* must share B, C, H and W'):
        regularization_share(student, teacher[:1], labels=labels)


def test_one_channel_is_a_sigmoid():
    student, teacher = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[2.0], [1.0], [-2.0]])
    labels = torch.tensor([1, 1, 0])
    torch.testing.assert_close(regularization_share(student, teacher, labels=labels).item(), 1 / 3)
