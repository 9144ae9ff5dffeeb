r"""Soft labels weighed by how the two networks' losses with the labels compare.

Shape shorthand: B images, C classes, H x W the grid, M rows (regions, samples).
Rows stand for the pixels of a batch wherever a map is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.scores import class_scores
from mmstructkd.functional.core.softening import (
    LOWEST,
    check_temperature,
    log_of_classes,
    teacher_log_of_classes,
    tempered_mean,
)
from mmstructkd.functional.core.valid import labelled_pixels, zero_elsewhere

__all__ = ['weighted_soft_label_loss']


@full_precision
def weighted_soft_label_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    temperature: float | Tensor = 2.0,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy to the teacher's soft labels, weighted where the student lags behind.

    .. math::
        L = \frac{T^2}{|V|} \sum_{i \in V} w_i \Big(-\sum_c p^t_{ic} \log p^s_{ic}\Big), \quad
        w_i = 1 - \exp\!\left(-\frac{\mathrm{CE}^s_i}{\mathrm{CE}^t_i + 10^{-7}}\right)

    with :math:`p = \mathrm{softmax}_C(z / T)` and CE the cross-entropy with the
    label at temperature 1. Weighted soft labels (arXiv:2102.00650): a sample that
    the student already has better than the teacher is hardly distilled. As in the
    authors' code this is the cross-entropy, not the divergence: it is *not* 0 on
    itself, its gradient is that of the weighted divergence (for a number as
    temperature). Differs: any number of classes, maps, and pixels left out.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor;
    the weights carry none.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One
            channel is the score z of a sigmoid: the two classes (0, z).
        teacher: logits, same shape; a pair of one and two channels fits as well.
            Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,).
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
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> round(weighted_soft_label_loss(z, z, labels=torch.tensor([1]), temperature=1).item(), 4)
        0.4382
    """
    owner = 'weighted_soft_label_loss'
    student, teacher = class_scores(owner, student, teacher)
    check_temperature(owner, temperature, student)
    index, valid_mask = labelled_pixels(
        owner, student, labels, num_classes=student.shape[1], ignore_index=ignore_index, valid=valid
    )
    student = zero_elsewhere(student, valid_mask)

    def hardness(log_p: Tensor) -> Tensor:
        return -log_p.gather(1, index.unsqueeze(1)).squeeze(1).clamp(min=LOWEST)

    hard_s = hardness(log_of_classes(student.detach(), 1.0))
    hard_t = hardness(teacher_log_of_classes(teacher, 1.0, valid_mask))
    weight = -torch.expm1(-hard_s / (hard_t + 1e-7))
    log_s = log_of_classes(student, temperature).clamp(min=LOWEST)
    p_t = teacher_log_of_classes(teacher, temperature, valid_mask).exp()
    return tempered_mean(weight * -(p_t * log_s).sum(1), temperature, valid_mask)
