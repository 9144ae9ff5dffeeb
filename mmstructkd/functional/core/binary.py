r"""Heads with one channel for two classes: a score z that a sigmoid turns into the probability of class 1.

The two classes have the scores (0, z), whose softmax is that sigmoid. Of a head
with two channels only the difference of the scores means anything:
:math:`(z_0, z_1)` and :math:`(0, z_1 - z_0)` are the same probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_ndim
from mmstructkd.functional.core.sharing import once

__all__ = ['as_two_classes', 'two_class_logits', 'two_classes']


def two_class_logits(logits: Tensor) -> Tensor:
    """Scores of two classes of which the first is 0, from the scores of a binary head.

    Args:
        logits: shape (B, 1, H, W) or (M, 1), the score of class 1 of a sigmoid;
            or two channels, whose softmax stays what it is.

    Returns:
        Shape (B, 2, H, W) or (M, 2), in the same dtype, differentiable. Any other
        number of channels: the tensor itself.

    Raises:
        ShapeError: ``logits`` is neither 4-D nor 2-D.

    Example:
        >>> two_class_logits(torch.tensor([[2.0]]))
        tensor([[0., 2.]])
        >>> two_class_logits(torch.tensor([[1.0, 3.0]]))
        tensor([[0., 2.]])
    """
    check_ndim('two_class_logits', 'logits', logits, (2, 4), '(B, C, H, W) or (M, C)')
    if logits.shape[1] not in (1, 2):
        return logits
    score = logits[:, -1:] if logits.shape[1] == 1 else logits[:, 1:] - logits[:, :1]
    return torch.cat([torch.zeros_like(score), score], dim=1)


def as_two_classes(student: Tensor, teacher: Tensor, *, alone: bool = True) -> tuple[Tensor, Tensor]:
    """Bring the scores of two binary heads to two classes, where one of them has one channel.

    What is no pair of binary heads is returned as it is: two channels each, more
    than two, or tensors that are no scores.

    Args:
        student: scores, shape (B, C, H, W) or (M, C).
        teacher: scores, likewise. Detached where it is changed.
        alone: also where both have one channel. Losses whose distributions run
            over positions can compare these as they are.

    Returns:
        Student and teacher, see :func:`two_class_logits`.

    Example:
        >>> student, teacher = as_two_classes(torch.tensor([[2.0]]), torch.tensor([[1.0, 3.0]]))
        >>> student.tolist(), teacher.tolist()
        ([[0.0, 2.0]], [[0.0, 2.0]])
    """
    scores = student.dim() == teacher.dim() and student.dim() in (2, 4)
    widths = (student.shape[1], teacher.shape[1]) if scores else (0, 0)
    if widths not in ((1, 1), (1, 2), (2, 1)) or (widths == (1, 1) and not alone):
        return student, teacher
    # Of the teacher once a step for all losses that ask.
    return two_class_logits(student), once(two_class_logits, teacher.detach())


def two_classes(scores: Tensor) -> Tensor:
    """Scores (0, z) of two classes for one channel, the score z of a sigmoid; anything else as it is.

    Args:
        scores: shape (B, C, H, W) or (M, C).

    Returns:
        Shape (B, 2, H, W) or (M, 2) for C = 1.

    Example:
        >>> two_classes(torch.tensor([[3.0]]))
        tensor([[0., 3.]])
    """
    return two_class_logits(scores) if scores.shape[1] == 1 else scores
