r"""Where a teacher works against the label.

Shape shorthand: B images, C classes, H x W the grid, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.scores import class_scores
from mmstructkd.functional.core.softening import check_temperature, log_of_classes
from mmstructkd.functional.core.valid import labelled_pixels, zero_elsewhere

__all__ = ['regularization_share']


@full_precision
def regularization_share(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    temperature: float = 1.0,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Share of pixels whose label the divergence from the teacher makes less likely.

    .. math:: r = \frac{1}{|V|} \big|\{i \in V : p^t_{i y_i} < p^s_{i y_i}\}\big|

    The gradient of the divergence by the score of the labelled class is
    :math:`p^s_{i y_i} - p^t_{i y_i}` times a positive number: where it is positive, a
    step of the divergence alone lowers that score. Regularization samples of
    weighted soft labels (arXiv:2102.00650), in the form that holds for the plain
    divergence; a number to look at, no loss.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One channel is
            the score of a sigmoid. Detached here.
        teacher: logits, same shape; one and two channels fit. Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,).
        temperature: of the divergence, above 0.
        ignore_index: pixels with this label do not count; nor do labels that are no
            class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in [0, 1], at least float32, without a graph; 0 where nothing counts.

    Raises:
        ShapeError: the shapes differ or are no scores, or ``labels`` or ``valid`` does
            not fit.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 3.0], [0.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 2.0]])
        >>> regularization_share(student, teacher, labels=torch.tensor([1, 1])).item()
        0.5
    """
    owner = 'regularization_share'
    check_temperature(owner, temperature)
    student, teacher = class_scores(owner, student, teacher)
    index, valid_mask = labelled_pixels(
        owner, student, labels, num_classes=student.shape[1], ignore_index=ignore_index, valid=valid
    )
    student, teacher = zero_elsewhere(student.detach(), valid_mask), zero_elsewhere(teacher.detach(), valid_mask)
    own_s, own_t = (log_of_classes(z, temperature).gather(1, index.unsqueeze(1)).squeeze(1) for z in (student, teacher))
    return masked_mean((own_t < own_s).to(torch.promote_types(student.dtype, torch.float32)), valid_mask)
