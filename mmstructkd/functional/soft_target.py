r"""Labels against the soft target of another network: weighed, or one of them as a constraint.

Shape shorthand: B images, C classes, H x W the grid, N = H W, M rows.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmstructkd.errors import ConfigError, check_finite_number, check_positive
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.scores import class_scores, label_losses
from mmstructkd.functional.core.softening import check_temperature, kl_along, log_of_classes, teacher_log_of_classes
from mmstructkd.functional.core.valid import zero_elsewhere

__all__ = ['ConstrainedLoss', 'constrained_soft_target', 'next_multiplier', 'soft_target_loss']


def _parts(
    owner: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    reverse: bool,
    ignore_index: int,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the labels and T squared times the divergence, both means over the pixels that count."""
    check_temperature(owner, temperature)
    student, teacher = class_scores(owner, student, teacher)
    hard, valid_mask = label_losses(student, labels, ignore_index=ignore_index, valid=valid, owner=owner)
    student = zero_elsewhere(student, valid_mask)
    log_s = log_of_classes(student, temperature)
    log_t = teacher_log_of_classes(teacher, temperature, valid_mask)
    gap = kl_along(log_t, log_s, 1) if reverse else kl_along(log_s, log_t, 1)
    return masked_mean(hard, valid_mask), temperature**2 * masked_mean(gap, valid_mask)


@full_precision
def soft_target_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    weight: float = 0.5,
    temperature: float | Tensor = 1.0,
    reverse: bool = False,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with the labels and divergence from another network, weighed.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \left[ (1 - w) \, \mathrm{CE}(z^s_i, y_i)
          + w \, T^2 \, \mathrm{KL}(p^t_i \| p^s_i) \right], \quad p = \mathrm{softmax}_C(z / T)

    ``student`` is whoever learns. In ProKT (arXiv:2107.09305) that is the student
    with w = 1 at T = 1, and likewise the *teacher*, who follows the student of the
    moment with w = 0.4 (0.3 for recurrent networks); there the two swap places.
    In joint adaptation and distillation (LIVIAETS/KD_UDA) it is the student on the
    source domain, with w = 0.3 at T = 20.

    Same value as the code of ProKT. The code of KD_UDA hands the arguments of its
    divergence over in the wrong order: it minimises
    :math:`\mathrm{KL}(p^s \| p^t)`, which ``reverse=True`` reproduces; the default
    is the direction of the paper.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when a constant is added to all logits of a pixel.

    Args:
        student: logits of who learns, shape (B, C, H, W) or (M, C), any float
            dtype. One channel is the score of a sigmoid.
        teacher: logits of the other, same shape; one and two channels fit. Detached
            here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,).
        weight: w, in [0, 1].
        temperature: T, above 0, a number or a scalar tensor.
        reverse: the divergence of the teacher's distribution from the student's
            instead.
        ignore_index: pixels with this label do not count, in neither part; nor do
            labels that are no class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count, 0
        with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, the shapes differ, or
            ``labels`` or ``valid`` does not fit.
        ConfigError: ``temperature`` is not above 0, or ``weight`` not in [0, 1].

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> round(soft_target_loss(0 * z, z, labels=torch.tensor([1]), weight=0.4).item(), 4)
        0.547
    """
    owner = 'soft_target_loss'
    check_finite_number(owner, 'weight', weight, minimum=0)
    if weight > 1:
        raise ConfigError(f'{owner}: `weight` must lie in [0, 1], got {weight!r}.')
    hard, soft = _parts(owner, student, teacher, labels, temperature, reverse, ignore_index, valid)
    return (1 - weight) * hard + weight * soft


class ConstrainedLoss(NamedTuple):
    """What a constrained objective gives.

    Attributes:
        loss: scalar to be minimised.
        gap: by how much the constraint is broken, a detached scalar; negative
            where it holds.
    """

    loss: Tensor
    gap: Tensor


@full_precision
def constrained_soft_target(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    multiplier: float | Tensor,
    bound: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> ConstrainedLoss:
    r"""Cross-entropy with the labels, while the divergence from another network stays below a bound.

    .. math:: L = \mathrm{CE} + b \, (D - \epsilon), \quad D = T^2 \, \mathrm{KL}(p^t \| p^s)

    with the multiplier b of a Lagrangian and the bound :math:`\epsilon`. Dual form
    of ProKT (arXiv:2107.09305): how strongly the teacher is held to the student is
    found by :func:`next_multiplier` instead of being set. In its code, which
    starts with b = 1 and :math:`\epsilon = 1`, though not its default.

    The gradient reaches ``student`` only; that of the multiplier is the gap, which
    is returned by itself, for b goes up where L shall go down.

    Args:
        student: logits of who learns (in ProKT the teacher's), shape (B, C, H, W)
            or (M, C), any float dtype.
        teacher: logits of the other (in ProKT the student's), same shape.
            Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,).
        multiplier: b, at least 0, a number or a scalar tensor. Detached here.
        bound: the divergence that is allowed, in nats, at least 0.
        temperature: T, above 0, a number or a scalar tensor.
        ignore_index: pixels with this label do not count, in neither part; nor do
            labels that are no class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        The loss, a scalar in nats, at least float32; and the gap
        :math:`D - \epsilon`. CE and D are means over the pixels that count, 0 with
        a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, the shapes differ, or
            ``labels`` or ``valid`` does not fit.
        ConfigError: ``temperature`` is not above 0, or ``multiplier`` or ``bound``
            is negative.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> loss, gap = constrained_soft_target(z, z, labels=torch.tensor([1]), multiplier=1.0, bound=0.5)
        >>> round(loss.item(), 4), gap.item()
        (0.1931, -0.5)
    """
    owner = 'constrained_soft_target'
    check_finite_number(owner, 'bound', bound, minimum=0)
    if not isinstance(multiplier, Tensor):
        check_finite_number(owner, 'multiplier', multiplier, minimum=0)
    hard, soft = _parts(owner, student, teacher, labels, temperature, False, ignore_index, valid)
    gap = soft - bound
    held = multiplier.detach() if isinstance(multiplier, Tensor) else multiplier
    return ConstrainedLoss(hard + held * gap, gap.detach())


def next_multiplier(multiplier: Tensor, gap: Tensor, *, rate: float = 1e-3) -> Tensor:
    r"""Multiplier of a constraint after one step of gradient ascent.

    .. math:: b \leftarrow \max(0, b + \eta \, g)

    Args:
        multiplier: b, a scalar tensor.
        gap: by how much the constraint is broken, a scalar tensor, from
            :func:`constrained_soft_target`. Several processes average theirs
            before.
        rate: :math:`\eta`, above 0; 1e-3 in the code of ProKT.

    Returns:
        The new multiplier, a scalar tensor without a graph, in the dtype of the
        old one.

    Raises:
        ConfigError: ``rate`` is not above 0.

    Example:
        >>> import torch
        >>> next_multiplier(torch.tensor(1.0), torch.tensor(0.5), rate=0.1)
        tensor(1.0500)
        >>> next_multiplier(torch.tensor(0.0), torch.tensor(-0.5), rate=0.1)
        tensor(0.)
    """
    check_positive('next_multiplier', 'rate', rate)
    risen = multiplier.detach() + rate * gap.detach().to(multiplier)
    return risen.clamp(min=0)
