r"""Features compared as they are.

Shape shorthand: B images, D channels, H x W the grid, N = H W, V the positions
that count.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_one_of
from mmstructkd.functional.core.features import REDUCTIONS, check_same_features, mean_over_images
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['feature_mse_loss']


@full_precision
def feature_mse_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: str = 'mean',
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of raw features.

    .. math:: L = \frac{1}{D |V|} \sum_{d} \sum_{i \in V} (f^s_{di} - f^t_{di})^2

    Hints of FitNets (arXiv:1412.6550), trained along with the task as it is done
    today, not in a stage before it. The channels with the largest values decide:
    :func:`standardized_mse_loss` weighs them alike.

    The gradient reaches ``student`` only.

    Args:
        student: features, shape (B, D, H, W), any float dtype.
        teacher: same shape. Detached here.
        reduction: ``'mean'``, or ``'sum'``: the sum over channels and positions
            that count, averaged over the images that have one. It grows with
            the size of the map.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Scalar in squared units of the feature, at least float32: the mean over
        channels and positions V that count, 0 with a graph if there is none.
        Differences above 1e19 leave float32's range. Time and memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``valid`` is not
            a map of B images.
        ConfigError: ``reduction`` is neither.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 3, 2, 2)
        >>> feature_mse_loss(x + 2, x).item()
        4.0
        >>> feature_mse_loss(x + 2, x, reduction='sum').item()
        48.0
    """
    owner = 'feature_mse_loss'
    check_one_of(owner, 'reduction', reduction, REDUCTIONS)
    check_same_features(owner, student, teacher)
    valid_mask = valid_pixels(owner, student, valid=valid)
    gap = (zero_elsewhere(student, valid_mask) - zero_elsewhere(teacher.detach(), valid_mask)).square()
    if reduction == 'sum':
        return mean_over_images(gap.flatten(1).sum(dim=1), valid_mask)
    return masked_mean(gap, None if valid_mask is None else valid_mask[:, None])
