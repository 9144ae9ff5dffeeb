r"""Cross-entropy with labels, over the pixels that have one.

Shape shorthand: B images, C classes, H x W the grid, N = H W, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_ndim
from mmstructkd.functional.binary import two_class_logits
from mmstructkd.functional.logits import _labelled, _only
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import masked_mean
from mmstructkd.functional.softening import LOWEST, log_of_classes

__all__ = ['cross_entropy_loss', 'label_losses', 'two_classes']


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
    index, counts = _labelled(owner, scores, labels, ignore_index, valid)
    (scores,) = _only(counts, scores)
    own = log_of_classes(scores, 1.0).clamp(min=LOWEST).gather(1, index.unsqueeze(1)).squeeze(1)
    return torch.where(counts, -own, 0), counts


def cross_entropy_loss(
    student: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy with the labels.

    .. math:: L = -\frac{1}{|V|} \sum_{i \in V} \log \mathrm{softmax}_C(z_i)_{y_i}

    The task's side of objectives that weigh labels against another network.
    Differs from mmseg's by default: ignored pixels are not in the denominator.

    The gradient reaches ``student``. The value does not change when a constant
    is added to all logits of a pixel.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One channel
            is the score of a sigmoid.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,).
        ignore_index: pixels with this label do not count; nor do labels that are
            no class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count, 0
        with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: ``student`` is neither 4-D nor 2-D, or ``labels`` or ``valid``
            does not fit.

    Example:
        >>> round(cross_entropy_loss(torch.zeros(2, 4), torch.tensor([1, 255])).item(), 4)
        1.3863
    """
    losses, counts = label_losses(student, labels, ignore_index=ignore_index, valid=valid, owner='cross_entropy_loss')
    return masked_mean(losses, counts)
