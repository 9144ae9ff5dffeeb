"""What losses that compare features position by position share.

Shape shorthand: B images, D channels, H x W the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_ndim, check_same
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.resize import RESIZE_OR_CONNECT

__all__ = ['REDUCTIONS', 'check_same_features', 'mean_over_images', 'smallest_normal']

REDUCTIONS = ('mean', 'sum')


def check_same_features(owner: str, student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are maps (B, D, H, W) of one shape."""
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', RESIZE_OR_CONNECT)


def smallest_normal(*tensors: Tensor) -> float:
    """The smallest normal number of the coarsest dtype: in half precision, what lies below has lost its digits."""
    return max(float(torch.finfo(t.dtype).tiny) for t in tensors)


def mean_over_images(per_image: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Mean of (B,) over the images with a position that counts."""
    return masked_mean(per_image, None if valid_mask is None else valid_mask.flatten(1).any(dim=1))
