r"""What a map is on average.

Shape shorthand: B images, D channels, H x W the grid, V the positions that count.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_ndim, check_same
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['spatial_mean_loss']


def _means(features: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Mean over the positions that count, (B, D); 0 for an image without any."""
    features = features.flatten(2)
    if valid_mask is None:
        share: Tensor | float = 1 / max(features.shape[2], 1)
    else:
        # Whatever stands where nothing counts, NaN included, goes nowhere.
        features = zero_elsewhere(features, valid_mask)
        share = 1 / valid_mask.sum(dim=1).clamp(min=1).to(features.dtype)[:, None, None]
    # Divided before the sum: that of many large features may leave the range, their mean does not.
    return (features * share).sum(dim=2)


@full_precision
def spatial_mean_loss(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Squared distance of the mean features of an image.

    .. math::
        L = \frac{1}{B D} \sum_{b,d} (\mu^s_{bd} - \mu^t_{bd})^2, \quad
        \mu_{bd} = \frac{1}{|V_b|} \sum_{i \in V_b} f_{bdi}

    The statistics of Semantic Representational Distillation (arXiv:2205.06701), of
    a feature projected to the teacher's width; its other part lets the teacher's
    classifier read that projection. Same value as the authors' code. A mean says
    nothing about where: on dense maps it complements a loss of each position.

    The gradient reaches ``student`` only. The value does not change when positions
    are permuted, in either network for itself.

    Args:
        student: features, shape (B, D, H_s, W_s), any float dtype.
        teacher: features, shape (B, D, H_t, W_t); sizes may differ. Detached here.
        valid: positions that count, bool, shape (B, h, w), brought to the size of
            each map by nearest. ``None``: all.

    Returns:
        Scalar in squared units of the feature, at least float32: the mean over
        channels of the images that have a position that counts in both, 0 with a
        graph if there is none. Differences above 1e19 leave float32's range. Time
        and memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, B or D differ, or ``valid`` is not a map
            of B images.
        ConfigError: ``valid`` is not boolean.

    Example:
        >>> import torch
        >>> x = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
        >>> spatial_mean_loss(x, x.flip(-1)).item(), spatial_mean_loss(x, x + 3).item()
        (0.0, 9.0)
    """
    owner = 'spatial_mean_loss'
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(owner, student, teacher, (0, 1), 'B and D', 'Put a connector in front of the student.')
    some = None
    valid_s = valid_t = None
    if valid is not None:
        valid_s, valid_t = (
            mask.flatten(1) for f in (student, teacher) if (mask := valid_pixels(owner, f, valid=valid)) is not None
        )
        some = (valid_s.any(dim=1) & valid_t.any(dim=1))[:, None]
    gap = _means(student, valid_s) - _means(teacher.detach(), valid_t)
    return masked_mean(gap.square(), some)
