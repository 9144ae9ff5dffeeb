r"""What losses between depth maps share: readings, alignment, places that are drawn.

Shape shorthand: B images, H x W the grid, N = H W, K pairs or triplets an image.
Depth is in metres along the optical axis, shape (B, 1, H, W) or (B, H, W). Where
the *teacher's* is 0, negative or not finite there is no reading, and the pixel
does not count; what the student says always is a prediction, and makes the value
NaN where it is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import (
    ConfigError,
    ShapeError,
    check_finite_number,
    check_flag,
    check_positive,
    check_same,
    is_count,
)
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.sampling import draw_positions
from mmstructkd.functional.core.valid import valid_pixels

__all__ = [
    'align_to_teacher',
    'check_at_least_one',
    'depth_of_disparity',
    'depth_readings',
    'disparity_of_depth',
    'given_or_drawn',
    'log_depth',
    'mean_of_each_image',
    'normalize_depth',
    'prepare_depths',
    'values_at',
]

_WAY_OUT = 'Resize the teacher with resize_map; logits over depth bins belong into pixelwise_kl_loss.'
# Metres beyond which a prediction is cut off: products of four still fit into float32.
_FARTHEST = 1e8


def _as_map(owner: str, argument: str, depth: Tensor) -> Tensor:
    """Return a depth map as (B, H, W)."""
    if depth.dim() == 4 and depth.shape[1] == 1:
        return depth[:, 0]
    if depth.dim() != 3:
        raise ShapeError(
            f'{owner}: `{argument}` must have shape (B, 1, H, W) or (B, H, W), got {tuple(depth.shape)}. '
            'Tap the depth map; logits over depth bins belong into pixelwise_kl_loss.'
        )
    return depth


def depth_readings(depth: Tensor, *, min_depth: float = 0.0, max_depth: float | None = None) -> Tensor:
    """Return where a depth map holds a reading.

    Args:
        depth: metres, shape (B, 1, H, W) or (B, H, W).
        min_depth: metres, at least 0; a reading is above 0 in any case.
        max_depth: metres; ``None``: no limit.

    Returns:
        Bool, shape (B, H, W): finite, above 0 and within both limits.

    Raises:
        ShapeError: ``depth`` is no depth map.

    Example:
        >>> depth_readings(torch.tensor([[[0.0, 2.0, 90.0, float('nan')]]]), max_depth=80.0)
        tensor([[[False,  True, False, False]]])
    """
    depth = _as_map('depth_readings', 'depth', depth)
    there = depth.isfinite() & (depth > 0) & (depth >= min_depth)
    return there if max_depth is None else there & (depth <= max_depth)


def depth_of_disparity(disparity: Tensor) -> Tensor:
    """Return one over a disparity map, for a teacher that predicts that.

    Args:
        disparity: one over metres, any shape.

    Returns:
        Metres, the same shape; 0 (no reading) where the disparity is 0, negative
        or not finite.

    Example:
        >>> depth_of_disparity(torch.tensor([0.5, 0.0, 4.0]))
        tensor([2.0000, 0.0000, 0.2500])
    """
    there = disparity.isfinite() & (disparity > 0)
    return torch.where(there, 1 / torch.where(there, disparity, 1), 0)


def disparity_of_depth(depth: Tensor, *, eps: float = 1e-3) -> Tensor:
    """Return one over a depth map, differentiable also where a prediction is 0 or negative.

    Args:
        depth: metres, any shape.
        eps: metres, above 0; below it the function goes on as its tangent.

    Returns:
        One over metres, the same shape; NaN where the depth is not finite, which
        would be the disparity of no place.

    Raises:
        ConfigError: ``eps`` is not above 0.

    Example:
        >>> disparity_of_depth(torch.tensor([2.0, 0.25]))
        tensor([0.5000, 4.0000])
    """
    check_positive('disparity_of_depth', 'eps', eps)
    inverse = 1 / depth.clamp(min=eps) + (eps - depth.clamp(max=eps)) / eps**2
    return torch.where(depth.isfinite(), inverse, torch.nan)


def prepare_depths(
    owner: str,
    student: Tensor,
    teacher: Tensor,
    valid: Tensor | None,
    names: tuple[str, str] = ('student', 'teacher'),
) -> tuple[Tensor, Tensor, Tensor]:
    """Both maps as (B, H, W), 1 m where nothing counts, and where something does."""
    student = _as_map(owner, names[0], student)
    teacher = _as_map(owner, names[1], teacher).detach()
    check_same(owner, student, teacher, (0, 1, 2), 'B, H and W', _WAY_OUT)
    valid_mask = depth_readings(teacher)
    given = valid_pixels(owner, student[:, None], valid=valid)
    if given is not None:
        valid_mask = valid_mask & given
    # Before any arithmetic, so that whatever stands where nothing counts, NaN included, goes nowhere.
    student = torch.where(valid_mask, student, 1)
    # A network that overflows must show: cut off, its infinity would be a place far away.
    student = torch.where(student.isinf(), torch.nan, student.clamp(-_FARTHEST, _FARTHEST))
    return student, torch.where(valid_mask, teacher, 1).clamp(max=_FARTHEST), valid_mask


def log_depth(depth: Tensor, eps: float) -> Tensor:
    """Logarithm, below ``eps`` continued by its tangent: also what is 0 or negative has a slope."""
    return depth.clamp(min=eps).log() + (depth.clamp(max=eps) - eps) / eps


def mean_of_each_image(values: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean of each image over what counts, shape (B, 1, 1); 0 where nothing does."""
    total = torch.where(valid_mask, values, 0).sum(dim=(1, 2), keepdim=True)
    return mean_of_sum(total, valid_mask.sum(dim=(1, 2), keepdim=True))


def align_to_teacher(student: Tensor, teacher: Tensor, valid_mask: Tensor, eps: float) -> Tensor:
    """Map the student of each image onto the teacher by least squares, slope and offset; 0 where nothing counts."""
    mean_s, mean_t = mean_of_each_image(student, valid_mask), mean_of_each_image(teacher, valid_mask)
    centred_s = torch.where(valid_mask, student - mean_s, 0)
    covariance = mean_of_each_image(centred_s * (teacher - mean_t), valid_mask)
    slope = covariance / mean_of_each_image(centred_s**2, valid_mask).clamp(min=eps**2)
    return slope * centred_s + mean_t


def check_at_least_one(owner: str, argument: str, value: int) -> None:
    """Raise :class:`ConfigError` unless ``value`` is an integer of at least 1."""
    if not is_count(value) or value < 1:
        raise ConfigError(f'{owner}: `{argument}` must be an integer of at least 1, got {value!r}.')


def given_or_drawn(
    owner: str, argument: str, given: Tensor | None, student: Tensor, count: int, arity: int, seed: int
) -> Tensor:
    """The given places (checked), or drawn ones, shape (B, K, arity)."""
    batch, size = student.shape[0], student.shape[1] * student.shape[2]
    if given is None:
        check_at_least_one(owner, f'num_{argument}', count)
        check_finite_number(owner, 'seed', seed, minimum=0)
        stream = torch.tensor([int(seed), 0], device=student.device)
        return draw_positions(
            stream, torch.arange(batch, device=student.device), count=count, arity=arity, size=max(size, 1)
        )
    if given.dim() != 3 or given.shape[0] != batch or given.shape[2] != arity or given.dtype != torch.int64:
        raise ShapeError(
            f'{owner}: `{argument}` must be int64 of shape (B, K, {arity}) with B = {batch}, '
            f'got {given.dtype} {tuple(given.shape)}. Draw them with draw_positions.'
        )
    return given


def values_at(values: Tensor, positions: Tensor) -> Tensor:
    """Values of (B, H, W) at flat positions (B, K, M), shape (B, K, M)."""
    return values.flatten(1).gather(1, positions.flatten(1)).view(positions.shape)


@full_precision
def normalize_depth(
    depth: Tensor, reference: Tensor, *, log: bool = False, eps: float = 1e-3, valid: Tensor | None = None
) -> Tensor:
    r"""Centre and scale depth maps by the mean and the range of a reference.

    .. math:: \tilde d = \frac{d - \overline{r}}{\max r - \min r}

    over the readings of each image of the reference r, in logarithms if ``log``.
    The reference itself becomes a map of mean 0 and range 1; what another map
    is off by stays. For what must not depend on how deep a scene is (a critic).

    Args:
        depth: metres, shape (B, 1, H, W) or (B, H, W).
        reference: the same B, H and W. Detached here; 0 or not finite: no reading.
        log: of the logarithms.
        eps: smallest range, in metres (``log``: nats), above 0; with ``log`` also
            the depth in metres below which the logarithm goes on as its tangent.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        The shape of ``depth``, at least float32, no unit; 0 where there is no
        reading of the reference.

    Raises:
        ShapeError: an input is no depth map, or B, H or W differ.
        ConfigError: ``eps`` is not above 0.

    Example:
        >>> t = torch.tensor([[[2.0, 6.0, 10.0, 0.0]]])
        >>> normalize_depth(t, t)
        tensor([[[-0.5000,  0.0000,  0.5000,  0.0000]]])
    """
    owner = 'normalize_depth'
    check_positive(owner, 'eps', eps)
    check_flag(owner, 'log', log)
    shape = depth.shape
    depth, reference, valid_mask = prepare_depths(owner, depth, reference, valid, ('depth', 'reference'))
    if log:
        depth, reference = log_depth(depth, eps), log_depth(reference, eps)
    most = reference.masked_fill(~valid_mask, -torch.inf).flatten(1).amax(dim=1)
    least = reference.masked_fill(~valid_mask, torch.inf).flatten(1).amin(dim=1)
    spread = (most - least).clamp(min=eps)[:, None, None]
    centred = depth - mean_of_each_image(reference, valid_mask)
    return torch.where(valid_mask, centred / spread, 0).view(shape)
