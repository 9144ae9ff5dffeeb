r"""Cross-entropy with labels, over the pixels that have one.

Shape shorthand: B images, C classes, H x W the grid, N = H W, M rows.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.scores import label_losses

__all__ = ['cross_entropy_loss']


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
        >>> import torch
        >>> round(cross_entropy_loss(torch.zeros(2, 4), torch.tensor([1, 255])).item(), 4)
        1.3863
    """
    losses, valid_mask = label_losses(
        student, labels, ignore_index=ignore_index, valid=valid, owner='cross_entropy_loss'
    )
    return masked_mean(losses, valid_mask)
