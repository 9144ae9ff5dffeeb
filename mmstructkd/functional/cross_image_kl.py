r"""How each pixel of a batch resembles those of each image.

Shape shorthand: B images, D channels, H x W a grid, N = H W.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_ndim, check_same
from mmstructkd.functional.core.nodes import norm_floor, similarity_kl_sum, unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.softening import check_temperature
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['cross_image_kl_loss']


@full_precision
def _cross_image(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, floor: float, temperature: float | Tensor
) -> Tensor:
    def places(features: Tensor) -> Tensor:
        features = zero_elsewhere(features, valid_mask)
        return unit_vectors(features, 1, floor).flatten(2).mT.contiguous()

    units_s, units_t = places(student), places(teacher)
    flat = None if valid_mask is None else valid_mask.flatten(1)
    total, count = similarity_kl_sum(
        (units_s.flatten(0, 1), units_s),
        (units_t.flatten(0, 1), units_t),
        temperature=temperature,
        rows_valid=None if flat is None else flat.flatten(),
        keys_valid=flat,
    )
    return mean_of_sum(total, count)


def cross_image_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of how like the places of each image of the batch a place is.

    .. math::
        L = \frac{1}{B^2 N} \sum_{a,b} \sum_{i} \mathrm{KL}(p^t_{abi} \| p^s_{abi}), \quad
        p_{abi} = \mathrm{softmax}_{j} \frac{\cos(f_{ai}, f_{bj})}{T}

    Mini-batch term of Cross-Image Relational distillation, CIRKD (CVPR 2022):
    place i of image a against all places of image b, for all pairs of images, b
    = a included. Same value as the authors' code, whose weight is 1; that one
    averages over 4 x 4 positions where a map has at least 256 x 256.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when the feature of a place is scaled by a positive number. A feature
    whose norm is zero (at most 1e-12, in half precision at most the smallest
    normal number) has cosine 0 with all.

    Args:
        student: features, shape (B, D_s, H, W), any float dtype.
        teacher: features, shape (B, D_t, H, W). Detached here.
        temperature: T, above 0, a number or a scalar tensor.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest: as rows and as columns. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over places that count and
        images with one, 0 with a graph if there is none. Time O(B^2 N^2 D); of
        the (B N)^2 similarities only blocks of 2^22 are in memory, computed
        again in the backward pass. Pool large maps first.

    Raises:
        ShapeError: an input is not 4-D, B, H or W differ, or ``valid`` is no
            map of B images.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> import torch
        >>> x = torch.arange(24.0).view(2, 2, 3, 2)
        >>> cross_image_kl_loss(3 * x, x).item() < 1e-6
        True
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> round(cross_image_kl_loss(torch.ones_like(x), x, temperature=1).item(), 4)
        0.1109
    """
    owner = 'cross_image_kl_loss'
    check_temperature(owner, temperature)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(
        owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map; channels may differ.'
    )
    valid_mask = valid_pixels(owner, student, valid=valid)
    return _cross_image(student, teacher.detach(), valid_mask, norm_floor(student, teacher), temperature)
