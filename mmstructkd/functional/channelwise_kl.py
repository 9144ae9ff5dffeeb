r"""Where each channel is active, compared as distributions over positions.

Shape shorthand: B images, C channels, H x W the grid, N = H W.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_ndim, check_same
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.resize import RESIZE_OR_CONNECT
from mmstructkd.functional.core.sharing import once
from mmstructkd.functional.core.softening import check_temperature, kl_along, log_of_positions, tempered_mean
from mmstructkd.functional.core.valid import valid_pixels

__all__ = ['channelwise_kl_loss']


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
        >>> import torch
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
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, C, H and W', RESIZE_OR_CONNECT)
    valid_mask = valid_pixels(owner, student, valid=valid)
    some = None
    if valid_mask is not None:
        valid_mask = valid_mask.flatten(1)[:, None]
        some = valid_mask.any(dim=-1)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.flatten(2)
    log_s = log_of_positions(student.flatten(2), temperature, valid_mask)
    log_t = once(log_of_positions, teacher.detach().flatten(2), temperature, valid_mask, -1)
    if isinstance(temperature, Tensor) and temperature.dim():
        temperature = temperature.flatten(1)[:, None]
    return tempered_mean(kl_along(log_s, log_t, dim=-1), temperature, some)
