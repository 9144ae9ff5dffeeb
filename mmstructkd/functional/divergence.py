r"""Divergences between the distributions that two maps stand for.

Shape shorthand: B images, C classes or channels, H x W the grid, N = H W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_ndim, check_same
from mmstructkd.functional.binary import as_two_classes
from mmstructkd.functional.instance_temperature import instance_temperature_kl_loss
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import masked_mean, valid_pixels
from mmstructkd.functional.sharing import once
from mmstructkd.functional.softening import (
    check_temperature,
    kl_along,
    log_of_classes,
    log_of_positions,
    teacher_log_of_classes,
    tempered_mean,
)

__all__ = ['channelwise_kl_loss', 'pixelwise_kl_loss']

_WAY_OUT = 'Resize the teacher with resize_map, or put a connector in front of the student.'


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
            :func:`~mmstructkd.functional.instance_temperature.instance_temperature_kl_loss`.
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
    check_same(owner, student, teacher, axes, 'B, C, H and W' if student.dim() == 4 else 'M and C', _WAY_OUT)
    counts = valid_pixels(owner, student, labels=labels, ignore_index=ignore_index, valid=valid)
    if counts is not None:
        # Before the softmax, so that whatever stands at an ignored pixel, NaN included, goes nowhere.
        student = torch.where(counts.unsqueeze(1), student, 0)
    log_s = log_of_classes(student, temperature)
    log_t = teacher_log_of_classes(teacher, temperature, counts)
    return temperature**2 * masked_mean(kl_along(log_s, log_t, dim=1), counts)


@full_precision
def channelwise_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of where each channel is active in the student from where in the teacher.

    .. math::
        L = \frac{T^2}{B C} \sum_{b,c} \mathrm{KL}(q^t_{bc} \| q^s_{bc}),
        \quad q_{bc} = \mathrm{softmax}_N(z_{bc} / T)

    Channel-wise Knowledge Distillation (arXiv:2011.13256). Differs from the
    authors' code: ``log_softmax`` instead of the logarithm of a softmax, which
    is minus infinity on peaked maps, and positions can be left out.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when a constant is added to a channel. It is a sum over positions: it grows with N.

    Args:
        student: logits or features, shape (B, C, H, W), any float dtype.
        teacher: same shape; a pair of one and two channels stands for scores
            (0, z) of two classes, z the difference of the two. Detached here.
        temperature: T, above 0, a number or a scalar tensor; or one for each image,
            shape (B, 1, 1, 1), its square inside the mean.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest: both distributions live on these alone. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the channels of images
        with a position that counts, 0 with a graph if there is none. Time and
        memory O(B C N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``valid`` is not
            a map of B images.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> z = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2)
        >>> channelwise_kl_loss(z + 3, z).item() < 1e-6
        True
        >>> round(channelwise_kl_loss(0 * z, z, temperature=1).item(), 4)
        0.3278
    """
    owner = 'channelwise_kl_loss'
    check_ndim(owner, 'student', student, 4, '(B, C, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, C, H, W)')
    # Positions share a distribution, and so a temperature.
    check_temperature(owner, temperature, student, per=('image',))
    student, teacher = as_two_classes(student, teacher, alone=False)
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, C, H and W', _WAY_OUT)
    counts = valid_pixels(owner, student, valid=valid)
    some = None
    if counts is not None:
        counts = counts.flatten(1)[:, None]
        some = counts.any(dim=-1)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.flatten(2)
    log_s = log_of_positions(student.flatten(2), temperature, counts)
    log_t = once(log_of_positions, teacher.detach().flatten(2), temperature, counts, -1)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.flatten(1)[:, None]
    return tempered_mean(kl_along(log_s, log_t, dim=-1), temperature, some)
