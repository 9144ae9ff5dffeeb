r"""Temperatures that every position, or every image, has for itself.

Shape shorthand: B images, C classes, H x W the grid, N = H W, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ShapeError, check_finite_number, check_positive
from mmstructkd.functional.logits import _scores
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import masked_mean, valid_pixels
from mmstructkd.functional.softening import kl_along, log_of_classes

__all__ = ['bounded_temperature', 'instance_temperature_kl_loss']


@full_precision
def bounded_temperature(scores: Tensor, *, lowest: float = 1.0, span: float = 20.0) -> Tensor:
    r"""Temperature between two bounds from a score without any.

    .. math:: T = T_0 + \Delta \, \sigma(x)

    The form of Curriculum Temperature (arXiv:2211.16231). Bounded on both sides: a
    temperature that learns against the student would otherwise silence any
    position by growing without end.

    Args:
        scores: x, any shape, any float dtype.
        lowest: :math:`T_0`, above 0.
        span: :math:`\Delta`, at least 0.

    Returns:
        Same shape, at least float32, in ``[lowest, lowest + span]``.

    Raises:
        ConfigError: a bound is out of range.

    Example:
        >>> bounded_temperature(torch.tensor([0.0, 1.0]))
        tensor([11.0000, 15.6212])
    """
    owner = 'bounded_temperature'
    check_positive(owner, 'lowest', lowest)
    check_finite_number(owner, 'span', span, minimum=0)
    return lowest + span * torch.sigmoid(scores)


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
    student, teacher = _scores(owner, student, teacher)
    number, size = student.shape[0], tuple(student.shape[2:])
    allowed = [(number, 1, *size)] if student.dim() == 2 else [(number, 1, *size), (number, 1, 1, 1)]
    if tuple(temperature.shape) not in allowed:
        raise ShapeError(
            f'{owner}: `temperature` must have shape {" or ".join(map(str, allowed))}, '
            f'got {tuple(temperature.shape)}. One number for all is for pixelwise_kl_loss.'
        )
    counts = valid_pixels(owner, student, labels=labels, ignore_index=ignore_index, valid=valid)
    teacher = teacher.detach()
    if counts is not None:
        # Whatever stands where nothing counts, NaN included, reaches no gradient, also not the temperature's.
        student, teacher = (torch.where(counts.unsqueeze(1), z, 0) for z in (student, teacher))
        temperature = torch.where(counts.unsqueeze(1), temperature, 1)
    # Minus infinity, a class of probability 0, would give a temperature that learns a gradient of NaN. Some way
    # above the end of the range, so that a temperature below 1 does not lead there either.
    lowest = torch.finfo(student.dtype).min / 256
    student, teacher = student.clamp(min=lowest), teacher.clamp(min=lowest)
    gap = kl_along(log_of_classes(student, temperature), log_of_classes(teacher, temperature), 1)
    return masked_mean(temperature.squeeze(1).square() * gap, counts)
