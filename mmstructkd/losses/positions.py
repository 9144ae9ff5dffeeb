"""Which positions of a feature count."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.functional.reduce import valid_pixels
from mmstructkd.structures import Targets

__all__ = ['counting_positions']


def counting_positions(owner: str, student: Tensor, targets: Targets) -> Tensor | None:
    """Which positions of a feature count: inside the image and, where there is a label map, labelled.

    Args:
        owner: the loss, for messages.
        student: the student's feature, shape (B, D, H, W).
        targets: what the batch knows besides. One label an image or region says
            nothing about positions.

    Returns:
        Bool, shape (B, H, W); ``None``: all count.

    Raises:
        ShapeError: the feature is 4-D, and a label map or mask is not of B images.

    Example:
        >>> import torch
        >>> counting_positions('doc', torch.zeros(1, 3, 1, 2), Targets(labels=torch.tensor([[[0, 255]]])))
        tensor([[[ True, False]]])
        >>> counting_positions('doc', torch.zeros(2, 3, 7, 7), Targets(labels=torch.tensor([4, 255])))
    """
    if student.dim() != 4:
        return None
    labels, valid = (f if f is not None and f.dim() != 1 else None for f in (targets.labels, targets.valid))
    return valid_pixels(owner, student, labels=labels, ignore_index=targets.ignore_index, valid=valid)
