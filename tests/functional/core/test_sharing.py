"""What several losses compute of the same teacher is computed once, and is the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmstructkd import functional as F
from mmstructkd.functional.core.sharing import once, sharing
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor


class Count(TorchDispatchMode):
    """Counts the softmaxes, and the resizings, of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.softmaxes = self.resized = 0

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        name = func.overloadpacket.__name__
        self.softmaxes += name in ('_log_softmax', '_softmax')
        self.resized += name == 'upsample_bilinear2d'
        return func(*args, **(kwargs or {}))


class Doubling:
    """A function that counts its calls; hashable by identity."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tensor: Tensor, factor: float = 2.0) -> Tensor:
        self.calls += 1
        return factor * tensor


def test_outside_nothing_is_remembered() -> None:
    double, x = Doubling(), torch.ones(3)
    assert once(double, x) is not once(double, x)
    with sharing():
        pass
    once(double, x)
    assert double.calls == 3


def test_the_same_memory_is_the_same_tensor() -> None:
    double, x = Doubling(), torch.ones(4, 2)
    with sharing():
        first = once(double, x)
        assert once(double, x.detach()) is first
        assert once(double, x.view(4, 2)) is first
        assert double.calls == 1
    with sharing():
        assert once(double, x) is not first


@pytest.mark.parametrize(
    'other',
    [
        lambda x: x.clone(),
        lambda x: x.t(),
        lambda x: x[1:],
        lambda x: x.view(torch.int32),
        lambda x: x.flatten(),
        lambda x: x.requires_grad_(True),
        lambda x: x.add_(1),
    ],
    ids=['copy', 'other strides', 'other place', 'other dtype', 'other shape', 'in a graph', 'written to'],
)
def test_another_tensor_is_computed(other: Callable[[Tensor], Tensor]) -> None:
    double, x = Doubling(), torch.arange(4.0).view(2, 2)
    with sharing():
        once(double, x)
        y = other(x)
        assert torch.equal(once(double, y), 2.0 * y)
    assert double.calls == 2


def test_other_arguments_are_computed() -> None:
    double, x = Doubling(), torch.ones(3)
    with sharing():
        assert once(double, x, 3.0)[0] == 3
        assert once(double, x, 4.0)[0] == 4
        assert once(double, x, 4)[0] == 4
    assert double.calls == 2


def test_memory_is_not_given_away_while_it_is_remembered() -> None:
    double = Doubling()
    with sharing():
        for value in range(50):
            assert once(double, torch.full((1000,), float(value)))[0] == 2 * value


@pytest.mark.parametrize('strange', [torch.ones(2, device='meta'), torch.eye(2).to_sparse()], ids=['meta', 'sparse'])
def test_what_has_no_plain_memory_is_computed(strange: Tensor) -> None:
    double = Doubling()
    with sharing():
        once(double, strange)
        once(double, strange)
    assert double.calls == 2


def test_inference_tensors_are_computed() -> None:
    double = Doubling()
    with torch.inference_mode():
        x = torch.ones(2)
        with sharing():
            once(double, x)
            once(double, x)
    assert double.calls == 2


def losses(labels: Tensor, valid: Tensor | None) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    return {
        'pixel': lambda s, t: F.pixelwise_kl_loss(s, t, labels=labels, valid=valid),
        'dist': lambda s, t: F.dist_loss(s, t, labels=labels, valid=valid),
        'decoupled': lambda s, t: F.decoupled_kl_loss(s, t, labels=labels, valid=valid),
        'soft labels': lambda s, t: F.weighted_soft_label_loss(s, t, labels=labels, temperature=1.0, valid=valid),
        'channel': lambda s, t: F.channelwise_kl_loss(s, t, temperature=4.0, valid=valid),
        'classes': lambda s, t: F.interclass_similarity_loss(s, t, temperature=4.0, valid=valid),
    }


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('masked', [False, True])
def test_losses_are_the_same_and_share_the_teachers_softmax(masked: bool, dtype: torch.dtype) -> None:
    student, teacher = (torch.randn(2, 5, 6, 8, dtype=dtype) for _ in range(2))
    labels = torch.randint(0, 5, (2, 12, 16))
    labels[:, :2] = 255
    valid = torch.rand(2, 12, 16) > 0.2 if masked else None
    student.requires_grad_(True)
    apart, together = [], []
    for name, loss in losses(labels, valid).items():
        value = loss(student, teacher)
        apart.append((name, value.detach(), torch.autograd.grad(value, student)[0]))
    with sharing(), Count() as count:
        for name, loss in losses(labels, valid).items():
            value = loss(student, teacher)
            together.append((name, value.detach(), torch.autograd.grad(value, student)[0]))
    for (name, *want), (_, *got) in zip(apart, together, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=name)
    # One for each of the student's, one more for its hardness, two of the split among the other classes; of the
    # teacher one over the classes and one over the positions.
    assert count.softmaxes == 6 + 1 + 2 + 2


KINDS = ('PixelwiseKLLoss', 'DistLoss', 'WeightedSoftLabelLoss')


def step(*kinds: str) -> tuple[dict[str, Tensor], Count]:
    """A step of a distiller whose teacher has a coarser map, with terms on one tap."""
    terms = {
        kind: dict(tap='decode_head.conv_seg', loss=dict(type=f'mmstructkd.{kind}', loss_weight=1.0, temperature=1.0))
        for kind in kinds
    }
    teacher = toy_segmentor(8)
    teacher.backbone.strides, teacher.backbone.dilations = (1, 2, 2, 2), (1, 1, 1, 1)
    torch.manual_seed(0)
    distiller = MODELS.build(toy_distiller(terms=terms, teacher=dict(config=teacher, allow_random=True)))
    with Count() as count:
        losses = distiller(**toy_batch(), mode='loss')
    return losses, count


def test_terms_of_one_tap_share_its_softmax_and_its_size() -> None:
    alone = {kind: step(kind) for kind in KINDS}
    task_softmaxes = alone[KINDS[0]][1].softmaxes - 2  # that of either network
    losses, count = step(*KINDS)
    for kind, (apart, _) in alone.items():
        torch.testing.assert_close(losses[f'loss_kd_{kind}'], apart[f'loss_kd_{kind}'], rtol=0, atol=0)
    students = 1 + 1 + 2
    assert count.softmaxes == task_softmaxes + students + 1
    assert count.resized == alone[KINDS[0]][1].resized
