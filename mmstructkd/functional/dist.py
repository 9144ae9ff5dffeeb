r"""Correlations of class probabilities, between the classes and within each.

Shape shorthand: B images, C classes, H x W the grid, M rows (regions, samples).
Rows stand for the pixels of a batch wherever a map is not needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_finite_number
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean, mean_of_sum
from mmstructkd.functional.core.scores import class_scores
from mmstructkd.functional.core.softening import LOWEST, check_temperature, log_of_classes, teacher_log_of_classes
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['dist_loss']

# Deviations below this, relative to the largest probability along the axis, are rounding noise: there is
# nothing to correlate. Also the floor of a norm, which bounds the gradient.
_FLAT = 1e-6


def _correlation(
    log_s: Tensor, log_t: Tensor, axes: tuple[int, ...], valid_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Pearson's correlation of two families of probabilities along ``axes``, and where it is defined.

    From log-probabilities, each divided by the largest one along the axes, which changes no correlation:
    the squares of a rare class's probabilities would underflow.

    Returns:
        The correlation, and whether the teacher varies; both with the axes kept, of length 1.
    """

    def unit(log_p: Tensor) -> tuple[Tensor, Tensor]:
        if valid_mask is not None:
            log_p = torch.where(valid_mask, log_p, LOWEST)
        p = (log_p - log_p.detach().amax(axes, keepdim=True)).exp()
        if valid_mask is None:
            number: Tensor | int = torch.Size([p.shape[a] for a in axes]).numel()
            centred = p - p.mean(axes, keepdim=True)
        else:
            number = valid_mask.sum(axes, keepdim=True)
            p = torch.where(valid_mask, p, 0)
            centred = torch.where(valid_mask, p - mean_of_sum(p.sum(axes, keepdim=True), number), 0)
        square = mean_of_sum(centred.square().sum(axes, keepdim=True), number)
        # Of length sqrt(number), or shorter where it is flat.
        return centred / square.clamp(min=_FLAT**2).sqrt(), square

    unit_s, _ = unit(log_s)
    unit_t, square_t = unit(log_t)
    number = (
        torch.Size([unit_t.shape[a] for a in axes]).numel()
        if valid_mask is None
        else valid_mask.sum(axes, keepdim=True)
    )
    # Not `square_t > ...`: a teacher that is not a number varies, so that the value shows it.
    return mean_of_sum((unit_s * unit_t).sum(axes, keepdim=True), number), ~(square_t <= _FLAT**2)


@full_precision
def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""One minus the correlation of the class probabilities, among classes and among pixels.

    .. math::
        L = T^2 \Big[ w_\mathrm{inter} \Big(1 - \frac{1}{|V|} \sum_{i \in V} \rho(p^s_{i \cdot}, p^t_{i \cdot})\Big)
          + w_\mathrm{intra} \Big(1 - \frac{1}{C} \sum_c \rho(p^s_{\cdot c}, p^t_{\cdot c})\Big) \Big]

    with Pearson's correlation :math:`\rho` and :math:`p_i = \mathrm{softmax}_C(z_i / T)`.
    DIST (arXiv:2205.10536): the student shall rank like the teacher, how sharp it
    is stays its own affair. A map is the same as the rows of all pixels of the
    batch, so the second part sees the batch of one process. The factor T squared
    is that of the released code for rows.

    Differs from the released code: the norms have a floor instead of a number
    added to their product, so that the loss of equal inputs is 0 whatever their
    scale; and a pixel (a class) whose probabilities do not vary in the *teacher*
    is left out of the mean, since nothing correlates with a constant. Where only
    the student's do not vary, the correlation is 0.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when all probabilities of a pixel go through an
    increasing affine map (first part), or all of a class (second part).

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One
            channel is the score z of a sigmoid: the two classes (0, z).
        teacher: logits, same shape; a pair of one and two channels fits as well.
            Detached here.
        inter_weight: factor of the part among the classes of a pixel, at least 0.
        intra_weight: factor of the part among the pixels of a class.
        temperature: T, above 0, a number or a scalar tensor.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,); only compared with ``ignore_index``.
        ignore_index: pixels with this label do not count.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar without unit, at least float32, within T squared times [0, 2] for
        each part: means over the pixels V that count, and over the classes; 0
        with a graph where nothing counts. A single pixel has no second part.
        Time and memory O(B C N).

    Raises:
        ShapeError: the shapes differ or are no scores, or ``labels`` or
            ``valid`` does not fit.
        ConfigError: ``temperature`` is not above 0, or a weight is negative.

    Example:
        >>> z = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
        >>> abs(dist_loss(z + 5, z).item()) < 1e-6
        True
        >>> round(dist_loss(-z, z, intra_weight=0).item(), 3)
        1.837
    """
    owner = 'dist_loss'
    check_temperature(owner, temperature)
    check_finite_number(owner, 'inter_weight', inter_weight, minimum=0)
    check_finite_number(owner, 'intra_weight', intra_weight, minimum=0)
    student, teacher = class_scores(owner, student, teacher)
    valid_mask = valid_pixels(owner, student, labels=labels, ignore_index=ignore_index, valid=valid)
    student = zero_elsewhere(student, valid_mask)
    log_s = log_of_classes(student, temperature).clamp(min=LOWEST)
    log_t = teacher_log_of_classes(teacher, temperature, valid_mask).clamp(min=LOWEST)
    inter, varies = _correlation(log_s, log_t, (1,), None)
    among_classes = masked_mean(1 - inter, varies if valid_mask is None else varies & valid_mask.unsqueeze(1))
    over = (0, 2, 3) if student.dim() == 4 else (0,)
    intra, varies = _correlation(log_s, log_t, over, None if valid_mask is None else valid_mask.unsqueeze(1))
    among_pixels = masked_mean(1 - intra, varies)
    return temperature**2 * (inter_weight * among_classes + intra_weight * among_pixels)
