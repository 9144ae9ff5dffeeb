r"""Class probabilities compared pixel by pixel, at one temperature or one for each.

Shape shorthand: B images, C classes, H x W the grid, N = H W, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ShapeError, check_ndim, check_same
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.resize import RESIZE_OR_CONNECT
from mmstructkd.functional.core.scores import class_scores
from mmstructkd.functional.core.softening import check_temperature, kl_along, log_of_classes, teacher_log_of_classes
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['instance_temperature_kl_loss', 'pixelwise_kl_loss']


@full_precision
def pixelwise_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the student's class probabilities from the teacher's, pixel by pixel.

    .. math::
        L = \frac{T^2}{|V|} \sum_{i \in V} \mathrm{KL}(p^t_i \| p^s_i),
        \quad p_i = \mathrm{softmax}_C(z_i / T)

    Knowledge distillation (arXiv:1503.02531) and the pixel-wise term of
    Structured Knowledge Distillation (arXiv:1903.04197), whose paper prints the
    arguments the other way round; its code, the soft cross-entropy, has the
    gradient of the form here. That code sums over the batch: its gradient is B
    times this one at ``temperature=1``.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when a constant is added to all logits of a pixel.

    Args:
        student: logits, shape (B, C, H, W), or (M, C) for the M regions of a box
            head; any float dtype. One channel is the score z of a sigmoid: the
            two classes (0, z).
        teacher: logits, same shape; a pair of one and two channels fits as well.
            Detached here.
        temperature: T, above 0, a number or a scalar tensor. The factor T
            squared keeps the gradient's scale. A tensor with a temperature for each
            pixel or row is that of
            :func:`~mmstructkd.functional.pixelwise_kl.instance_temperature_kl_loss`.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,); only compared with ``ignore_index``.
        ignore_index: pixels with this label do not count.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count,
        0 with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, the shapes differ, or
            ``labels`` or ``valid`` does not fit them.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> z = torch.tensor([0.0, 2.0]).view(1, 2, 1, 1)
        >>> pixelwise_kl_loss(z + 3, z).item() < 1e-6
        True
        >>> round(pixelwise_kl_loss(0 * z, z).item(), 4)
        0.3278
    """
    owner = 'pixelwise_kl_loss'
    if isinstance(temperature, Tensor) and temperature.dim() > 1:
        return instance_temperature_kl_loss(
            student, teacher, temperature=temperature, labels=labels, ignore_index=ignore_index, valid=valid
        )
    check_temperature(owner, temperature)
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, C, H, W) or (M, C)')
    student, teacher = as_two_classes(student, teacher)
    axes = range(4) if student.dim() == 4 else range(2)
    check_same(owner, student, teacher, axes, 'B, C, H and W' if student.dim() == 4 else 'M and C', RESIZE_OR_CONNECT)
    valid_mask = valid_pixels(owner, student, labels=labels, ignore_index=ignore_index, valid=valid)
    # Before the softmax, so that whatever stands at an ignored pixel, NaN included, goes nowhere.
    student = zero_elsewhere(student, valid_mask)
    log_s = log_of_classes(student, temperature)
    log_t = teacher_log_of_classes(teacher, temperature, valid_mask)
    return temperature**2 * masked_mean(kl_along(log_s, log_t, dim=1), valid_mask)


@full_precision
def instance_temperature_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: Tensor,
    labels: Tensor | None = None,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of class probabilities, each pixel at its own temperature.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} T_i^2 \, \mathrm{KL}(p^t_i \| p^s_i),
        \quad p_i = \mathrm{softmax}_C(z_i / T_i)

    Instance-wise form of Curriculum Temperature (arXiv:2211.16231). Released is a
    sketch of the loss, which adds 1e-7 to the teacher's probabilities (below every
    tolerance here), not the network that gives the temperatures. Unlike in
    :func:`pixelwise_kl_loss` the factor stands inside the mean.

    The gradient reaches ``student`` and ``temperature``. The value does not change
    when a constant is added to all logits of a pixel.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One channel
            is the score of a sigmoid.
        teacher: logits, same shape; one and two channels fit. Detached here.
        temperature: above 0 wherever a pixel counts (not looked at, which would
            wait for the device), shape (B, 1, H, W), (B, 1, 1, 1) or (M, 1).
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,); only compared with ``ignore_index``.
        ignore_index: pixels with this label do not count.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count, 0
        with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, the shapes differ,
            ``temperature`` is not one a pixel or one an image, or ``labels`` or
            ``valid`` does not fit.

    Example:
        >>> z = torch.tensor([[0.0, 2.0], [0.0, 2.0]])
        >>> cold, warm = torch.ones(2, 1), torch.full((2, 1), 4.0)
        >>> round(instance_temperature_kl_loss(0 * z, z, temperature=cold).item(), 4)
        0.3278
        >>> round(instance_temperature_kl_loss(0 * z, z, temperature=warm).item(), 4)
        0.4848
    """
    owner = 'instance_temperature_kl_loss'
    student, teacher = class_scores(owner, student, teacher)
    number, size = student.shape[0], tuple(student.shape[2:])
    allowed = [(number, 1, *size)] if student.dim() == 2 else [(number, 1, *size), (number, 1, 1, 1)]
    if tuple(temperature.shape) not in allowed:
        raise ShapeError(
            f'{owner}: `temperature` must have shape {" or ".join(map(str, allowed))}, '
            f'got {tuple(temperature.shape)}. One number for all is for pixelwise_kl_loss.'
        )
    valid_mask = valid_pixels(owner, student, labels=labels, ignore_index=ignore_index, valid=valid)
    teacher = teacher.detach()
    if valid_mask is not None:
        # Whatever stands where nothing counts, NaN included, reaches no gradient, also not the temperature's.
        student, teacher = (zero_elsewhere(z, valid_mask) for z in (student, teacher))
        temperature = torch.where(valid_mask.unsqueeze(1), temperature, 1)
    # Minus infinity, a class of probability 0, would give a temperature that learns a gradient of NaN. Some way
    # above the end of the range, so that a temperature below 1 does not lead there either.
    lowest = torch.finfo(student.dtype).min / 256
    student, teacher = student.clamp(min=lowest), teacher.clamp(min=lowest)
    gap = kl_along(log_of_classes(student, temperature), log_of_classes(teacher, temperature), 1)
    return masked_mean(temperature.squeeze(1).square() * gap, valid_mask)
