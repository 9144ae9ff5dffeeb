r"""Depth maps compared pixel by pixel, in metres or by the logarithm.

Shape shorthand: B images, H x W the grid, N = H W, K pairs or triplets an image.
Depth is in metres, see :mod:`mmstructkd.functional.core.depth`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, check_finite_number, check_flag, check_positive
from mmstructkd.functional.core.depth import log_depth, mean_of_each_image, prepare_depths
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean

__all__ = ['depth_l1_loss', 'silog_loss']


@full_precision
def depth_l1_loss(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Mean distance between two depth maps.

    .. math:: L = \frac{1}{|V|} \sum_{i \in V} |d^s_i - d^t_i|

    The plainest regression on a teacher's depth; V are its readings.

    The gradient reaches ``student`` only and is of size 1 / |V| at each pixel.

    Args:
        student: metres, shape (B, 1, H, W) or (B, H, W), any float dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar in metres, at least float32: the mean over pixels that count, 0
        with a graph if there is none. Time and memory O(B N).

    Raises:
        ShapeError: an input is no depth map, or B, H or W differ.

    Example:
        >>> t = torch.tensor([[[2.0, 0.0, 4.0]]])
        >>> depth_l1_loss(torch.tensor([[[3.0, 9.0, 4.0]]]), t).item()
        0.5
    """
    depth_s, depth_t, valid_mask = prepare_depths('depth_l1_loss', student, teacher, valid)
    return masked_mean((depth_s - depth_t).abs(), valid_mask)


@full_precision
def silog_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    variance_weight: float = 0.5,
    root: bool = False,
    eps: float = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Scale-invariant distance between the logarithms of two depth maps.

    .. math::
        L = \frac{1}{B} \sum_b \overline{g^2} - \lambda \, \overline{g}^2,
        \quad g_i = \log d^s_i - \log d^t_i

    Eigen et al. (arXiv:1406.2283); their training used :math:`\lambda = 1/2`.
    ``root=True`` takes the root of each image's value, as mmseg's ``SiLogLoss``
    and most later work do. Computed as :math:`\overline{(g - \bar g)^2} +
    (1 - \lambda) \bar g^2`, which never is negative. Differs from mmseg's:
    images without a reading leave the mean, and the gradient is 0, not NaN,
    where an image is hit exactly.

    The gradient reaches ``student`` only. With ``variance_weight=1`` the value
    does not change when an image's depth is multiplied by a factor.

    Args:
        student: metres, shape (B, 1, H, W) or (B, H, W), any float dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        variance_weight: :math:`\lambda`, from 0 (all of the error in scale
            counts) to 1 (none does).
        root: take the root of each image's value.
        eps: metres, above 0; below it the logarithm goes on as its tangent, so
            that a prediction of 0 or less is finite and is pushed back.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar in nats squared (``root``: nats), at least float32: the mean over
        images with a pixel that counts, 0 with a graph if there is none. Time
        and memory O(B N).

    Raises:
        ShapeError: an input is no depth map, or B, H or W differ.
        ConfigError: ``variance_weight`` is not in [0, 1], ``eps`` not above 0.

    Example:
        >>> t = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> silog_loss(3 * t, t, variance_weight=1.0).item() < 1e-10
        True
        >>> round(silog_loss(t.exp() * t, t, variance_weight=0.0).item(), 3)
        7.0
    """
    owner = 'silog_loss'
    check_positive(owner, 'eps', eps)
    check_flag(owner, 'root', root)
    _check_share(owner, 'variance_weight', variance_weight)
    depth_s, depth_t, valid_mask = prepare_depths(owner, student, teacher, valid)
    gap = log_depth(depth_s, eps) - log_depth(depth_t, eps)
    mean = mean_of_each_image(gap, valid_mask)
    value = (mean_of_each_image((gap - mean) ** 2, valid_mask) + (1 - variance_weight) * mean**2).flatten()
    if root:
        hit = value == 0
        value = torch.where(hit, 0 * value, torch.where(hit, 1, value).sqrt())
    return masked_mean(value, valid_mask.flatten(1).any(dim=1))


def _check_share(owner: str, argument: str, value: float) -> None:
    check_finite_number(owner, argument, value, minimum=0)
    if value > 1:
        raise ConfigError(f'{owner}: `{argument}` must be at most 1, got {value!r}.')
