r"""Features compared by where they are strong, inside the boxes of objects and outside.

Shape shorthand: B images, n boxes of an image, D channels, H x W the grid,
N = H W. Boxes are ``xyxy`` in pixels of the padded input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import check_finite_number, check_ndim, check_same
from mmstructkd.functional.core.boxes import box_masks, check_boxes
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean, mean_of_sum
from mmstructkd.functional.core.softening import check_temperature
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['focal_attention', 'focal_feature_loss']


@full_precision
def focal_attention(
    features: Tensor, *, temperature: float | Tensor = 0.5, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Where a feature is strong, and in which channels, as weights of mean 1.

    .. math::
        A_i = |V| \, \mathrm{softmax}_{i \in V}\Bigl(\frac{1}{D T} \sum_d |f_{di}|\Bigr), \quad
        C_d = D \, \mathrm{softmax}_d\Bigl(\frac{1}{|V| T} \sum_{i \in V} |f_{di}|\Bigr)

    Of Focal and Global Distillation (arXiv:2111.11837). The gradient reaches
    ``features``.

    Args:
        features: shape (B, D, H, W), any float dtype.
        temperature: T, above 0, a number or a scalar tensor.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Two tensors, at least float32: (B, H, W), 0 where nothing counts, and
        (B, D). Time and memory O(B D N).

    Raises:
        ShapeError: ``features`` is not 4-D, or ``valid`` is not a map of B images.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> positions, channels = focal_attention(torch.ones(1, 3, 2, 2))
        >>> positions.flatten().tolist(), channels.flatten().tolist()
        ([1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    """
    owner = 'focal_attention'
    check_temperature(owner, temperature)
    check_ndim(owner, 'features', features, 4, '(B, D, H, W)')
    valid_mask = valid_pixels(owner, features, valid=valid)
    features = zero_elsewhere(features, valid_mask)
    strength = features.abs().flatten(2)
    channels, number = strength.shape[1:]
    positions = strength.mean(dim=1) / temperature
    total: Tensor | int = number
    if valid_mask is not None:
        valid_mask = valid_mask.flatten(1)
        total = valid_mask.sum(dim=1, keepdim=True)
        positions = torch.where(valid_mask, positions, torch.finfo(positions.dtype).min)
    weights = total * positions.softmax(dim=1)
    means = mean_of_sum(strength.sum(dim=2), total) / temperature
    if valid_mask is not None:
        weights = torch.where(valid_mask, weights, 0)
    return weights.unflatten(1, features.shape[2:]), channels * means.softmax(dim=1)


@full_precision
def focal_feature_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    boxes: Sequence[Tensor],
    input_size: tuple[int, int],
    foreground_weight: float = 1e-3,
    background_weight: float = 5e-4,
    attention_weight: float = 5e-4,
    temperature: float | Tensor = 0.5,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of features inside and outside of boxes, weighed by the teacher's attention.

    .. math::
        L = \frac{1}{B} \sum_b \Bigl[ \sum_i (\alpha M_{bi} + \beta \bar M_{bi}) A^t_{bi}
            \sum_d C^t_{bd} (f^s_{bdi} - f^t_{bdi})^2
            + \gamma \bigl( \textstyle\sum_i |A^s_{bi} - A^t_{bi}| + \sum_d |C^s_{bd} - C^t_{bd}| \bigr) \Bigr]

    Focal part of Focal and Global Distillation (arXiv:2111.11837), with the
    masks M and M-bar of :func:`box_masks` and the attention A, C of
    :func:`focal_attention`: each box has the same weight, whatever its size, and
    so has the background. Differs from the authors' code as said there.

    The gradient reaches ``student`` only: through the difference, and through
    the student's attention in the last sum.

    Args:
        student: features, shape (B, D, H, W), any float dtype.
        teacher: same shape. Detached here.
        boxes: one tensor an image, shape (n, 4); an image without a box is all
            background.
        input_size: (h, w) of the padded input, whose pixels the boxes are given
            in.
        foreground_weight: alpha, at least 0.
        background_weight: beta, at least 0.
        attention_weight: gamma, at least 0.
        temperature: of the attention, above 0, a number or a scalar tensor.
        valid: pixels that count, bool, shape (B, h', w'), brought to H x W by
            nearest: the others take no part, in the attention neither.

    Returns:
        Scalar, at least float32: a sum over positions and channels, averaged
        over the images with a position that counts, 0 with a graph if there is
        none. Differences above 1e19 leave float32's range. Time
        O(B N (D + n)), memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, ``boxes`` are not
            those of B images, or ``valid`` is not a map of B images.
        ConfigError: a weight, the temperature or ``input_size`` is none.

    Example:
        >>> x = torch.rand(2, 3, 4, 4)
        >>> boxes = (torch.tensor([[0.0, 0.0, 16.0, 16.0]]), torch.zeros(0, 4))
        >>> focal_feature_loss(x, x, boxes=boxes, input_size=(32, 32)).item()
        0.0
    """
    owner = 'focal_feature_loss'
    weights = (foreground_weight, background_weight, attention_weight)
    for name, value in zip(('foreground_weight', 'background_weight', 'attention_weight'), weights, strict=True):
        check_finite_number(owner, name, value, minimum=0)
    check_temperature(owner, temperature)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    way_out = 'Resize the teacher with resize_map, or put a connector in front of the student.'
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', way_out)
    check_boxes(owner, boxes, student.shape[0])
    valid_mask = valid_pixels(owner, student, valid=valid)
    teacher = teacher.detach()
    # First of all: whatever stands where nothing counts, NaN included, goes nowhere.
    student = zero_elsewhere(student, valid_mask)
    teacher = zero_elsewhere(teacher, valid_mask)
    positions_s, channels_s = focal_attention(student, temperature=temperature, valid=valid_mask)
    positions_t, channels_t = focal_attention(teacher, temperature=temperature, valid=valid_mask)
    boxes = [box.to(student.device) for box in boxes]
    size = (student.shape[2], student.shape[3])
    foreground, background = box_masks(boxes, size, input_size=input_size, valid=valid_mask)
    share = positions_t * (foreground_weight * foreground + background_weight * background).to(student.dtype)
    gap = ((student - teacher).square() * channels_t[:, :, None, None]).sum(dim=1)
    attention = (positions_s - positions_t).abs().sum(dim=(1, 2)) + (channels_s - channels_t).abs().sum(dim=1)
    per_image = (gap * share).sum(dim=(1, 2)) + attention_weight * attention
    return masked_mean(per_image, None if valid_mask is None else valid_mask.flatten(1).any(dim=1))
