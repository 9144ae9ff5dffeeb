r"""Class maps of sigmoids, each class a binary decision of its own.

Shape shorthand: B images, K classes, A anchors a position, H x W the grid of a level.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_one_of, check_same, is_count
from mmstructkd.functional.core.boxes import TAP_THE_SAME_OUTPUT
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import mean_of_sum, nan_unless_finite
from mmstructkd.functional.core.softening import LOWEST, check_temperature
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['binary_kl_loss']


@full_precision
def binary_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    anchors: int = 1,
    normalizer: str | Tensor | float = 'weights',
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the student's independent class probabilities from the teacher's.

    .. math::
        L = \frac{T^2}{\sum_i w_i} \sum_i w_i \sum_k \mathrm{KL}(B(p^t_{ik}) \| B(p^s_{ik})), \quad
        p_{ik} = \mathrm{sigmoid}(z_{ik} / T), \quad w_i = \max_k \mathrm{sigmoid}(z^t_{ik})

    For heads whose classes are sigmoids (FCOS, RetinaNet, GFL): each class of each
    anchor is a coin B(p) of its own. Nearly all positions of a detector are
    background in which both agree; the teacher's best score weighs them down.
    The detection form of pixel-wise distillation; no released code has it, so
    weight and normaliser are this project's.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    Infinite logits make the value NaN.

    Args:
        student: logits, shape (B, A K, H, W) with the classes of an anchor side by
            side, or (M, K); any float dtype.
        teacher: the same shape. Detached here.
        temperature: T, above 0, a number or a scalar tensor; or one for each position
            or image, (B, 1, H, W), (B, 1, 1, 1) or (M, 1), its square inside the sum.
            The weights are taken at temperature 1.
        anchors: A of a map; each anchor of a position has its own weight.
        normalizer: what the weighted sum is divided by: ``'weights'``, their sum;
            ``'positions'``, the number of positions and anchors that count; or a
            number, such as the positives of the batch (no less than 1 is used).
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest, or (M,). ``None``: all.

    Returns:
        Scalar in nats, at least float32, 0 with a graph if nothing counts. Time
        and memory O(B A K H W).

    Raises:
        ShapeError: the shapes differ, channels do not split into anchors, or
            ``valid`` does not fit.
        ConfigError: an argument is out of range.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> binary_kl_loss(z, z).item()
        0.0
        >>> round(binary_kl_loss(0 * z, z).item(), 4)
        0.3278
    """
    owner = 'binary_kl_loss'
    if isinstance(normalizer, str):
        check_one_of(owner, 'normalizer', normalizer, ('weights', 'positions'))
    if not is_count(anchors) or anchors < 1:
        raise ConfigError(f'{owner}: `anchors` must be an integer above 0, got {anchors!r}.')
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, A K, H, W) or (M, K)')
    check_same(owner, student, teacher, range(student.dim()), 'their shape', TAP_THE_SAME_OUTPUT)
    if student.shape[1] % anchors or (student.dim() == 2 and anchors != 1):
        raise ShapeError(
            f'{owner}: `student` must be a map of a multiple of {anchors} channels for anchors={anchors}, '
            f'got {tuple(student.shape)}.'
        )
    check_temperature(owner, temperature, student)
    valid_mask = valid_pixels(owner, student, valid=valid)
    teacher = teacher.detach()
    shape = (student.shape[0], anchors, student.shape[1] // anchors, *student.shape[2:])
    student = zero_elsewhere(student, valid_mask)
    teacher = zero_elsewhere(teacher, valid_mask)
    weights = teacher.sigmoid().reshape(shape).amax(dim=2)
    if valid_mask is not None:
        weights = weights * valid_mask.unsqueeze(1)

    soft_s, soft_t = student / temperature, teacher / temperature
    values = soft_t.sigmoid() * (_log_sigmoid(soft_t) - _log_sigmoid(soft_s))
    values = values + (-soft_t).sigmoid() * (_log_sigmoid(-soft_t) - _log_sigmoid(-soft_s))
    values = values.reshape(shape).sum(dim=2)
    if isinstance(temperature, Tensor) and temperature.dim():
        # The square of each position's own stands inside the sum.
        values, temperature = temperature.square() * values, 1.0
    total = (weights * values).sum()
    if isinstance(normalizer, str) and normalizer == 'weights':
        total = total / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    elif isinstance(normalizer, str):
        total = mean_of_sum(total, weights.numel() if valid_mask is None else anchors * valid_mask.sum())
    else:
        total = total / (normalizer.clamp(min=1) if isinstance(normalizer, Tensor) else max(normalizer, 1))
    # A sigmoid turns infinity into a sure yes or no: a network that overflows would teach, or learn, that.
    return temperature**2 * total + nan_unless_finite(student) + nan_unless_finite(teacher)


def _log_sigmoid(logits: Tensor) -> Tensor:
    """Logarithm of the sigmoid, no lower than what may be summed over a map."""
    return torch_functional.logsigmoid(logits).clamp(min=LOWEST)
