r"""Class scores of two networks brought to one form, with labels and without.

Shape shorthand: B images, C classes, H x W the grid, M rows (regions, samples).
Rows stand for the pixels of a batch wherever a map is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_same, is_count
from mmstructkd.functional.core.binary import as_two_classes, two_class_logits, two_classes
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.softening import LOWEST, log_of_classes
from mmstructkd.functional.core.valid import labelled_pixels, zero_elsewhere

__all__ = ['class_scores', 'label_losses', 'map_logits']

_WAY_OUT = 'Resize the teacher with resize_map, or map its classes with map_logits.'


def class_scores(owner: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as scores of classes, two of them for the one channel of a sigmoid; raise unless they are alike."""
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, C, H, W) or (M, C)')
    student, teacher = as_two_classes(student, teacher)
    axes, names = (range(4), 'B, C, H and W') if student.dim() == 4 else (range(2), 'M and C')
    check_same(owner, student, teacher, axes, names, _WAY_OUT)
    return student, teacher


@full_precision
def map_logits(logits: Tensor, class_map: Sequence[int]) -> Tensor:
    r"""Log-probabilities of coarse classes from the scores of fine ones.

    .. math:: \log p_k = \log \sum_{j : m(j) = k} \mathrm{softmax}_C(z)_j

    For a teacher whose classes are finer than the student's, or in another order:
    the probabilities of all its classes that are one class of the student are
    added up. The result may stand wherever scores may: its softmax is p, less
    what went to classes without a counterpart.

    Args:
        logits: shape (B, C, H, W) or (M, C), any float dtype; one channel is the
            score of class 1 of two.
        class_map: for each of the C classes the number k of the class it belongs
            to, from 0 on without a gap; -1: it has no counterpart.

    Returns:
        Shape (B, K, H, W) or (M, K), at least float32, differentiable; classes in
        the order of their number. Time and memory O(B C N).

    Raises:
        ShapeError: ``logits`` is neither 4-D nor 2-D, or C is not the length of
            ``class_map``.
        ConfigError: ``class_map`` does not number classes 0, 1, ... without a gap.

    Example:
        >>> z = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
        >>> map_logits(z, [1, 0, 1, -1]).exp().mul(10).round().tolist()
        [[2.0, 4.0]]
    """
    owner = 'map_logits'
    check_ndim(owner, 'logits', logits, (2, 4), '(B, C, H, W) or (M, C)')
    numbers = list(class_map)
    if any(not is_count(k) or k < -1 for k in numbers):
        raise ConfigError(f'{owner}: `class_map` must hold integers of at least -1, got {numbers!r}.')
    reached = sorted(set(numbers) - {-1})
    if not reached or reached != list(range(len(reached))):
        raise ConfigError(
            f'{owner}: `class_map` must number the classes it maps to 0, 1, ... without a gap, got {numbers!r}.'
        )
    if logits.shape[1] == 1:
        logits = two_class_logits(logits)
    if logits.shape[1] != len(numbers):
        raise ShapeError(
            f'{owner}: `logits` must have the {len(numbers)} classes of `class_map`, got {tuple(logits.shape)}.'
        )
    log_p = torch.log_softmax(logits, dim=1).clamp(min=LOWEST)
    groups = [[j for j, k in enumerate(numbers) if k == wanted] for wanted in reached]
    if all(len(group) == 1 for group in groups):
        return log_p[:, [group[0] for group in groups]]
    return torch.stack([log_p[:, group].logsumexp(1) for group in groups], dim=1)


@full_precision
def label_losses(
    scores: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    valid: Tensor | None = None,
    owner: str = 'label_losses',
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each pixel with its label, and which pixels have one.

    Args:
        scores: logits, shape (B, C, H, W) or (M, C), any float dtype. One channel is
            the score of a sigmoid.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,).
        ignore_index: pixels with this label do not count; nor do labels that are
            no class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.
        owner: who asks, for messages.

    Returns:
        Losses in nats, shape (B, H, W) or (M,), at least float32, 0 where a pixel
        does not count; and which count, bool, the same shape. Time and memory
        O(B C N).

    Raises:
        ShapeError: ``scores`` is neither 4-D nor 2-D, or ``labels`` or ``valid``
            does not fit.

    Example:
        >>> losses, counts = label_losses(torch.zeros(2, 2), torch.tensor([1, 255]))
        >>> losses, counts
        (tensor([0.6931, 0.0000]), tensor([ True, False]))
    """
    check_ndim(owner, 'scores', scores, (2, 4), '(B, C, H, W) or (M, C)')
    scores = two_classes(scores)
    index, valid_mask = labelled_pixels(
        owner, scores, labels, num_classes=scores.shape[1], ignore_index=ignore_index, valid=valid
    )
    scores = zero_elsewhere(scores, valid_mask)
    own = log_of_classes(scores, 1.0).clamp(min=LOWEST).gather(1, index.unsqueeze(1)).squeeze(1)
    return torch.where(valid_mask, -own, 0), valid_mask
