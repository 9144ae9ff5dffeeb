r"""Divergence of class probabilities in two parts: the label's class, and all others.

Shape shorthand: B images, C classes, H x W the grid, M rows (regions, samples).
Rows stand for the pixels of a batch wherever a map is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_finite_number
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.scores import class_scores
from mmstructkd.functional.core.softening import (
    LOWEST,
    check_temperature,
    divided,
    kl_along,
    log_of_classes,
    teacher_log_of_classes,
    tempered_mean,
)
from mmstructkd.functional.core.valid import labelled_pixels, zero_elsewhere

__all__ = ['decoupled_kl_loss']


@full_precision
def decoupled_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of class probabilities, split at the labelled class.

    .. math::
        L = \frac{T^2}{|V|} \sum_{i \in V} \left[ \alpha \, \mathrm{KL}(b^t_i \| b^s_i)
          + \beta \, \mathrm{KL}(q^t_i \| q^s_i) \right]

    with :math:`b_i = (p_{i y_i}, 1 - p_{i y_i})`, the labelled class against all
    others, and :math:`q_i` the distribution among the others. Decoupled Knowledge
    Distillation (arXiv:2203.08679). The plain divergence is the sum with
    :math:`\alpha = 1` and :math:`\beta = 1 - p^t_{i y_i}`, which is small wherever
    the teacher is sure; here it is a constant.

    Differs from the authors' code: both parts are formed from log-probabilities
    (that code takes the logarithm of a summed softmax, minus infinity where it is
    saturated, and subtracts 1000 from the labelled logit). The authors have not
    tried it on maps.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when a constant is added to all logits of a pixel.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One
            channel is the score z of a sigmoid: the two classes (0, z).
        teacher: logits, same shape; a pair of one and two channels fits as well.
            Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,). Rows of a box head include the background as a class.
        alpha: weight of the labelled class against the others, at least 0.
        beta: weight of the distribution among the others.
        temperature: T, above 0, a number or a scalar tensor; or one for each position
            or image, (B, 1, H, W), (B, 1, 1, 1) or (M, 1), its square inside the mean.
        ignore_index: pixels with this label do not count; nor do labels that are
            no class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count,
        0 with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: the shapes differ or are no scores, or ``labels`` or
            ``valid`` does not fit.
        ConfigError: ``temperature`` is not above 0, or a weight is negative.

    Example:
        >>> z = torch.tensor([[0.0, 1.0, 3.0]])
        >>> decoupled_kl_loss(z + 5, z, labels=torch.tensor([2])).item() < 1e-6
        True
        >>> round(decoupled_kl_loss(0 * z, z, labels=torch.tensor([2]), alpha=0).item(), 4)
        0.1109
    """
    owner = 'decoupled_kl_loss'
    check_finite_number(owner, 'alpha', alpha, minimum=0)
    check_finite_number(owner, 'beta', beta, minimum=0)
    student, teacher = class_scores(owner, student, teacher)
    check_temperature(owner, temperature, student)
    index, valid_mask = labelled_pixels(
        owner, student, labels, num_classes=student.shape[1], ignore_index=ignore_index, valid=valid
    )
    log_t = teacher_log_of_classes(teacher, temperature, valid_mask)
    student, teacher = zero_elsewhere(student, valid_mask), zero_elsewhere(teacher.detach(), valid_mask)
    one = torch.zeros_like(student, dtype=torch.bool).scatter_(1, index.unsqueeze(1), True)

    def split(logits: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_p.clamp(min=LOWEST)
        labelled = log_p.gather(1, index.unsqueeze(1))
        # Not log(1 - p): that is minus infinity as soon as p rounds to 1.
        others = log_p.masked_fill(one, -torch.inf).logsumexp(1, keepdim=True)
        # From the logits, where differences are exact; minus infinity of an impossible class must stay a
        # number, since it may be all that is left.
        kept = logits.clamp(min=torch.finfo(logits.dtype).min).masked_fill(one, -torch.inf)
        among = torch.log_softmax(kept, dim=1)
        return torch.cat([labelled, others], dim=1), among.masked_fill(one, LOWEST)

    against_s, among_s = split(divided(student, temperature), log_of_classes(student, temperature))
    against_t, among_t = split(divided(teacher, temperature), log_t)
    both = alpha * kl_along(against_s, against_t, 1) + beta * kl_along(among_s, among_t, 1)
    return tempered_mean(both, temperature, valid_mask)
