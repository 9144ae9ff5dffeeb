"""Classes of an image: which occur, and where on the map each is likely.

Shape shorthand: B images, C classes, H x W the grid, N = H W. A class's
*distribution* is the softmax of its scores over the positions of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.functional.core.sharing import once
from mmstructkd.functional.core.softening import log_of_positions

__all__ = ['RESIZE_TO_SAME_CLASSES', 'position_distributions', 'present_classes']

RESIZE_TO_SAME_CLASSES = 'Resize the teacher with resize_map; both networks must know the same classes.'
# Log-probabilities stop here, so that products and squares of them stay in range.
_LOWEST = -1e15


def position_distributions(
    scores: Tensor, temperature: float | Tensor, valid_mask: Tensor | None, dim: int
) -> tuple[Tensor, Tensor]:
    """Probabilities along ``dim`` and their logarithms; both 0 where nothing counts."""
    log = once(log_of_positions, scores, temperature, valid_mask, dim).clamp(min=_LOWEST)
    probability = log.exp()
    if valid_mask is None:
        return probability, log
    return torch.where(valid_mask, probability, 0), torch.where(valid_mask, log, 0)


def present_classes(labels: Tensor, num_classes: int, *, valid: Tensor | None = None) -> Tensor:
    """Return which classes occur in each image.

    Args:
        labels: integers, shape (B, H, W); what is no class (below 0, from
            ``num_classes`` on) is left out.
        num_classes: C.
        valid: pixels that count, bool, shape (B, H, W). ``None``: all.

    Returns:
        Bool, shape (B, C).

    Example:
        >>> present_classes(torch.tensor([[[0, 2, 255]]]), 3)
        tensor([[ True, False,  True]])
    """
    inside = (labels >= 0) & (labels < num_classes)
    if valid is not None:
        inside = inside & valid
    # What does not count goes to a column of its own, which is cut off.
    index = torch.where(inside, labels.long(), num_classes).flatten(1)
    seen = torch.zeros(labels.shape[0], num_classes + 1, dtype=torch.bool, device=labels.device)
    return seen.scatter_(1, index, True)[:, :num_classes]
