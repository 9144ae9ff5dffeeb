r"""Losses between depth maps.

Shape shorthand: B images, H x W the grid, N = H W, K pairs or triplets an image.
Depth is in metres along the optical axis, shape (B, 1, H, W) or (B, H, W). Where
the *teacher's* is 0, negative or not finite there is no reading, and the pixel
does not count; what the student says always is a prediction, and makes the value
NaN where it is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as torch_functional
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
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import masked_mean, mean_of_sum, nan_unless_finite, valid_pixels
from mmstructkd.functional.sampling import draw_positions

__all__ = [
    'depth_l1_loss',
    'depth_of_disparity',
    'depth_readings',
    'disparity_of_depth',
    'gradient_matching_loss',
    'normalize_depth',
    'ordinal_relation_loss',
    'scale_shift_invariant_loss',
    'silog_loss',
    'virtual_normal_loss',
]

_WAY_OUT = 'Resize the teacher with resize_map; logits over depth bins belong into pixelwise_kl_loss.'

# Metres beyond which a prediction is cut off: products of four still fit into float32.
_FARTHEST = 1e8
# Norm of the cross product (square metres) below which a triangle has no direction.
_FLAT = 1e-8


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


def _prepare(
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
    counts = depth_readings(teacher)
    given = valid_pixels(owner, student[:, None], valid=valid)
    if given is not None:
        counts = counts & given
    # Before any arithmetic, so that whatever stands where nothing counts, NaN included, goes nowhere.
    student = torch.where(counts, student, 1)
    # A network that overflows must show: cut off, its infinity would be a place far away.
    student = torch.where(student.isinf(), torch.nan, student.clamp(-_FARTHEST, _FARTHEST))
    return student, torch.where(counts, teacher, 1).clamp(max=_FARTHEST), counts


def _log(depth: Tensor, eps: float) -> Tensor:
    """Logarithm, below ``eps`` continued by its tangent: also what is 0 or negative has a slope."""
    return depth.clamp(min=eps).log() + (depth.clamp(max=eps) - eps) / eps


def _image_mean(values: Tensor, counts: Tensor) -> Tensor:
    """Mean of each image over what counts, shape (B, 1, 1); 0 where nothing does."""
    total = torch.where(counts, values, 0).sum(dim=(1, 2), keepdim=True)
    return mean_of_sum(total, counts.sum(dim=(1, 2), keepdim=True))


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
    depth_s, depth_t, counts = _prepare('depth_l1_loss', student, teacher, valid)
    return masked_mean((depth_s - depth_t).abs(), counts)


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
    depth_s, depth_t, counts = _prepare(owner, student, teacher, valid)
    gap = _log(depth_s, eps) - _log(depth_t, eps)
    mean = _image_mean(gap, counts)
    value = (_image_mean((gap - mean) ** 2, counts) + (1 - variance_weight) * mean**2).flatten()
    if root:
        hit = value == 0
        value = torch.where(hit, 0 * value, torch.where(hit, 1, value).sqrt())
    return masked_mean(value, counts.flatten(1).any(dim=1))


def _check_share(owner: str, argument: str, value: float) -> None:
    check_finite_number(owner, argument, value, minimum=0)
    if value > 1:
        raise ConfigError(f'{owner}: `{argument}` must be at most 1, got {value!r}.')


def _align(student: Tensor, teacher: Tensor, counts: Tensor, eps: float) -> Tensor:
    """Map the student of each image onto the teacher by least squares, slope and offset; 0 where nothing counts."""
    mean_s, mean_t = _image_mean(student, counts), _image_mean(teacher, counts)
    centred_s = torch.where(counts, student - mean_s, 0)
    covariance = _image_mean(centred_s * (teacher - mean_t), counts)
    slope = covariance / _image_mean(centred_s**2, counts).clamp(min=eps**2)
    return slope * centred_s + mean_t


def _median(values: Tensor, counts: Tensor) -> Tensor:
    """Lower median of each image over what counts, shape (B, 1, 1); 0 where nothing does."""
    number = counts.flatten(1).sum(dim=1, keepdim=True)
    ordered = values.masked_fill(~counts, torch.inf).flatten(1).sort(dim=1).values
    middle = ordered.gather(1, ((number - 1) // 2).clamp(min=0))
    return torch.where(number > 0, middle, 0)[:, :, None]


@full_precision
def scale_shift_invariant_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    robust: bool = False,
    eps: float = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Distance between two depth maps once scale and offset of each image are taken out.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} (a_b d^s_i + c_b - d^t_i)^2,
        \quad (a_b, c_b) = \arg\min \sum_{i \in V_b} (a d^s_i + c - d^t_i)^2

    and, with ``robust``,

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \left| \frac{d^s_i - m^s_b}{\sigma^s_b} - \frac{d^t_i - m^t_b}{\sigma^t_b}
        \right|, \quad m = \mathrm{median}, \; \sigma = \overline{|d - m|}

    Both are of MiDaS (arXiv:1907.01341). Differs from that code: the mean is
    over all pixels of the batch that count, without the half of the quadratic
    form; no share of the residuals is cut off. MiDaS compares inverse depth: hand
    over that where the teacher gives it. The median is the lower one.

    The gradient reaches ``student`` only, through slope and offset as well. The
    quadratic value does not change under ``a * student + c`` with any a but 0
    (it does not tell a map from its negative); the robust one with a above 0.

    Args:
        student: metres (or any unit), shape (B, 1, H, W) or (B, H, W), any float
            dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        robust: median and mean deviation on both sides instead of least squares.
        eps: in the maps' unit, above 0; a spread of the student (standard or
            mean deviation) below it counts as ``eps``, so that flat maps have a
            finite gradient. ``robust`` bounds the teacher's too.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar in square metres (``robust``: no unit), at least float32: the mean
        over pixels that count, 0 with a graph if there is none. Time O(B N), with
        ``robust`` O(B N log N); memory O(B N).

    Raises:
        ShapeError: an input is no depth map, or B, H or W differ.
        ConfigError: ``eps`` is not above 0.

    Example:
        >>> t = torch.tensor([[[1.0, 2.0, 4.0, 7.0]]])
        >>> scale_shift_invariant_loss(0.5 * t + 3, t).item() < 1e-10
        True
        >>> scale_shift_invariant_loss(0.5 * t + 3, t, robust=True).item() < 1e-6
        True
    """
    owner = 'scale_shift_invariant_loss'
    check_positive(owner, 'eps', eps)
    check_flag(owner, 'robust', robust)
    depth_s, depth_t, counts = _prepare(owner, student, teacher, valid)
    if not robust:
        return masked_mean((_align(depth_s, depth_t, counts, eps) - depth_t) ** 2, counts)

    def standardized(depth: Tensor) -> Tensor:
        centred = depth - _median(depth, counts)
        return centred / _image_mean(centred.abs(), counts).clamp(min=eps)

    return masked_mean((standardized(depth_s) - standardized(depth_t)).abs(), counts)


@full_precision
def gradient_matching_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    scales: int = 4,
    align: bool = False,
    eps: float = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Difference of the slopes of two depth maps, on a pyramid of grids.

    .. math::
        L = \frac{1}{S} \sum_{k=0}^{S-1} \frac{1}{|P_k|} \sum_{(i,j) \in P_k} |r_i - r_j|,
        \quad r = d^s - d^t

    :math:`P_k` are the pairs of horizontal and vertical neighbours on the grid of
    every :math:`2^k`-th row and column, both of which count. Edges of the teacher
    shall be edges of the student. Multi-scale gradient matching of MegaDepth
    (arXiv:1804.00607) and MiDaS (arXiv:1907.01341). Differs from the code of the
    latter: the mean is over pairs, not over pixels, and over scales, not their
    sum; the maps are aligned only with ``align``.

    The gradient reaches ``student`` only. The value does not change when a
    constant is added to an image.

    Args:
        student: metres, shape (B, 1, H, W) or (B, H, W), any float dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        scales: S, number of grids, at least 1; grids without a pair leave the
            mean.
        align: first map the student of each image onto the teacher by least
            squares, as :func:`scale_shift_invariant_loss` does.
        eps: metres, above 0; smallest standard deviation ``align`` divides by.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar in metres a grid step, at least float32, 0 with a graph if no pair
        counts. Time and memory O(B N).

    Raises:
        ShapeError: an input is no depth map, or B, H or W differ.
        ConfigError: ``scales`` is no integer of at least 1, ``eps`` not above 0.

    Example:
        >>> t = torch.tensor([[[1.0, 2.0, 4.0, 7.0]]])
        >>> gradient_matching_loss(t + 5, t).item()
        0.0
        >>> gradient_matching_loss(2 * t, t, scales=1).item()
        2.0
    """
    owner = 'gradient_matching_loss'
    check_positive(owner, 'eps', eps)
    check_flag(owner, 'align', align)
    _check_count(owner, 'scales', scales)
    depth_s, depth_t, counts = _prepare(owner, student, teacher, valid)
    if align:
        depth_s = _align(depth_s, depth_t, counts, eps)
    residual = depth_s - depth_t
    means, some = [], []
    for scale in range(scales):
        step = 2**scale
        coarse, there = residual[:, ::step, ::step], counts[:, ::step, ::step]
        across, down = coarse.diff(dim=2).abs(), coarse.diff(dim=1).abs()
        pairs_across, pairs_down = there[:, :, 1:] & there[:, :, :-1], there[:, 1:] & there[:, :-1]
        total = torch.where(pairs_across, across, 0).sum() + torch.where(pairs_down, down, 0).sum()
        number = pairs_across.sum() + pairs_down.sum()
        means.append(mean_of_sum(total, number))
        some.append(number > 0)
    return masked_mean(torch.stack(means), torch.stack(some))


def _check_count(owner: str, argument: str, value: int) -> None:
    if not is_count(value) or value < 1:
        raise ConfigError(f'{owner}: `{argument}` must be an integer of at least 1, got {value!r}.')


def _positions(
    owner: str, argument: str, given: Tensor | None, student: Tensor, count: int, arity: int, seed: int
) -> Tensor:
    """The given places (checked), or drawn ones, shape (B, K, arity)."""
    batch, size = student.shape[0], student.shape[1] * student.shape[2]
    if given is None:
        _check_count(owner, f'num_{argument}', count)
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


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Values of (B, H, W) at flat positions (B, K, M), shape (B, K, M)."""
    return values.flatten(1).gather(1, positions.flatten(1)).view(positions.shape)


@full_precision
def ordinal_relation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    pairs: Tensor | None = None,
    num_pairs: int = 5000,
    seed: int = 0,
    ratio_threshold: float = 0.03,
    eps: float = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Ranking loss on pairs of pixels: which is nearer, or are they equally far.

    .. math::
        L = \frac{1}{|P|} \sum_{(i,j) \in P} \begin{cases}
        \log(1 + e^{-r_{ij} (\ell_i - \ell_j)}) & r_{ij} = \pm 1 \\
        (\ell_i - \ell_j)^2 & r_{ij} = 0 \end{cases}, \quad \ell = \log d^s

    :math:`r_{ij}` is the order that the teacher sees: 0 where the larger of its
    two depths is at most :math:`1 + \tau` times the smaller. The loss of Chen et
    al. (arXiv:1604.03901) with the ratio rule of Xian et al. (CVPR 2020),
    :math:`\tau` = 0.03. Differs from both: the order is the teacher's, and the
    student's numbers are logarithms of depth, so that a margin is a ratio too.

    It does not become 0 on itself: a wider gap in the right order always
    scores better, ever more slowly. The gradient reaches ``student`` only. The
    value does not change when an image's depth is multiplied by a factor.

    Args:
        student: metres, shape (B, 1, H, W) or (B, H, W), any float dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        pairs: flat positions (row * W + column), int64, shape (B, K, 2).
            ``None``: drawn uniformly.
        num_pairs: K, how many to draw an image.
        seed: of the draw, a function of nothing else
            (:func:`~mmstructkd.functional.sampling.draw_positions`).
        ratio_threshold: :math:`\tau`, at least 0.
        eps: metres, above 0; below it the student's logarithm goes on as its
            tangent.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar without a unit, at least float32: the mean over the pairs of the
        batch whose two pixels differ and count, 0 with a graph if there is none.
        Time and memory O(B (N + K)).

    Raises:
        ShapeError: an input is no depth map, B, H or W differ, or ``pairs`` has
            another shape.
        ConfigError: ``num_pairs``, ``ratio_threshold`` or ``eps`` is out of range.

    Example:
        >>> t = torch.tensor([[[1.0, 2.0, 4.0]]])
        >>> good, bad = ordinal_relation_loss(t, t), ordinal_relation_loss(1 / t, t)
        >>> bool(good < bad)
        True
    """
    owner = 'ordinal_relation_loss'
    check_positive(owner, 'eps', eps)
    check_finite_number(owner, 'ratio_threshold', ratio_threshold, minimum=0)
    depth_s, depth_t, counts = _prepare(owner, student, teacher, valid)
    pairs = _positions(owner, 'pairs', pairs, depth_s, num_pairs, 2, seed)
    gap_s, gap_t = (-_at(_log(depth, eps), pairs).diff(dim=-1)[..., 0] for depth in (depth_s, depth_t))
    order = gap_t.sign() * (gap_t.abs() > math.log1p(ratio_threshold))
    ranked = torch_functional.softplus(-order * gap_s)
    there = _at(counts, pairs).all(dim=-1) & (pairs[..., 0] != pairs[..., 1])
    # Also where no draw meets the pixel.
    return masked_mean(torch.where(order == 0, gap_s**2, ranked), there) + nan_unless_finite(depth_s, counts)


@full_precision
def virtual_normal_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    triplets: Tensor | None = None,
    num_triplets: int = 10000,
    seed: int = 0,
    focal_length: float | Sequence[float] | None = None,
    field_of_view: float = 60.0,
    min_distance: float = 0.6,
    min_angle: float = 30.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Difference of the normals of planes through three far-apart points of the scene.

    .. math::
        L = \frac{1}{|T|} \sum_{(i,j,k) \in T} \lVert n^s_{ijk} - n^t_{ijk} \rVert_1, \quad
        n = \frac{(P_j - P_i) \times (P_k - P_i)}{\lVert (P_j - P_i) \times (P_k - P_i) \rVert}

    :math:`P = d \, ((u - u_0) / f_x, (v - v_0) / f_y, 1)`, a pinhole camera with
    the principal point in the centre of the map. T are the triplets whose three
    points count and, in the *teacher's* scene, are at least ``min_distance``
    apart and span a triangle without an angle below ``min_angle``.

    Virtual Normal (arXiv:1907.12209): 0.6 m and angles from 30 to 120 degrees
    are the paper's; where no angle is below 30 none is above 120. Differs from
    the authors' code, which works on 1 cm along each axis, keeps the worst three
    quarters of the triplets and draws them from numpy's global stream.

    The gradient reaches ``student`` only. The value does not change when an
    image of the student is multiplied by a factor above 0: it says nothing about
    scale. Three points of the student on a line have no normal: theirs is 0.

    Args:
        student: metres, shape (B, 1, H, W) or (B, H, W), any float dtype.
        teacher: the same B, H and W. Detached here; 0 or not finite: no reading.
        triplets: flat positions (row * W + column), int64, shape (B, K, 3).
            ``None``: drawn uniformly.
        num_triplets: K, how many to draw an image.
        seed: of the draw, a function of nothing else
            (:func:`~mmstructkd.functional.sampling.draw_positions`).
        focal_length: in pixels *of this map*, one number or (f_x, f_y). ``None``:
            from ``field_of_view``.
        field_of_view: horizontal, in degrees between 0 and 180.
        min_distance: metres, at least 0.
        min_angle: degrees, at least 0 and below 60.
        valid: pixels that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all readings.

    Returns:
        Scalar in [0, 2 sqrt(3)], no unit, at least float32: the mean over the
        triplets T of the batch, 0 with a graph if there is none. Time and memory
        O(B (N + K)).

    Raises:
        ShapeError: an input is no depth map, B, H or W differ, or ``triplets``
            has another shape.
        ConfigError: a number is out of range.

    Example:
        >>> t = torch.tensor([[[2.0, 3.0], [4.0, 2.5]]])
        >>> virtual_normal_loss(5 * t, t).item() < 1e-5
        True
    """
    owner = 'virtual_normal_loss'
    focal = check_camera(owner, focal_length, field_of_view)
    check_triangle(owner, min_distance, min_angle)
    depth_s, depth_t, counts = _prepare(owner, student, teacher, valid)
    height, width = depth_s.shape[1:]
    if focal is None:
        focal = (width / (2 * math.tan(math.radians(field_of_view) / 2)),) * 2
    triplets = _positions(owner, 'triplets', triplets, depth_s, num_triplets, 3, seed)
    rows, columns = triplets // max(width, 1), triplets % max(width, 1)
    across, down = (places.to(depth_s.dtype) for places in (columns, rows))
    rays = torch.stack(
        [
            (across - (width - 1) / 2) / focal[0],
            (down - (height - 1) / 2) / focal[1],
            torch.ones_like(across),
        ],
        dim=-1,
    )

    def corners(depth: Tensor) -> tuple[Tensor, ...]:
        points = _at(depth, triplets)[..., None] * rays
        return tuple(points.unbind(dim=2))

    def normal(points: tuple[Tensor, ...]) -> Tensor:
        upright: Tensor = torch.linalg.cross(points[1] - points[0], points[2] - points[0])
        length: Tensor = torch.linalg.vector_norm(upright, dim=-1, keepdim=True)
        return upright / length.clamp(min=_FLAT)

    points_t = corners(depth_t)
    good = _at(counts, triplets).all(dim=-1) & _spans_triangle(points_t, min_distance, min_angle)
    distance = (normal(corners(depth_s)) - normal(points_t)).abs().sum(dim=-1)
    # Also where no draw meets the pixel.
    return masked_mean(distance, good) + nan_unless_finite(depth_s, counts)


def _spans_triangle(points: tuple[Tensor, ...], min_distance: float, min_angle: float) -> Tensor:
    """Whether three points lie apart, and not along a line."""
    sides = [points[(k + 1) % 3] - points[k] for k in range(3)]
    lengths = [torch.linalg.vector_norm(side, dim=-1) for side in sides]
    longest_cosine = math.cos(math.radians(min_angle))
    # Twice the same pixel is no triangle, however small the distance that is asked for.
    good = torch.stack(lengths).amin(dim=0) >= max(min_distance, 1e-6)
    for k in range(3):
        cosine = -(sides[k] * sides[k - 1]).sum(dim=-1) / (lengths[k] * lengths[k - 1]).clamp(min=1e-12)
        good = good & (cosine <= longest_cosine)
    return good


def check_camera(
    owner: str, focal_length: float | Sequence[float] | None, field_of_view: float
) -> tuple[float, float] | None:
    """Check both ways of describing the camera; return the focal lengths (f_x, f_y), if given."""
    check_positive(owner, 'field_of_view', field_of_view)
    if field_of_view >= 180:
        raise ConfigError(f'{owner}: `field_of_view` must be below 180 degrees, got {field_of_view!r}.')
    if focal_length is None:
        return None
    both = tuple(focal_length) if isinstance(focal_length, Sequence) else (focal_length, focal_length)
    if len(both) != 2:
        raise ConfigError(
            f'{owner}: `focal_length` must be one number or (f_x, f_y), got {focal_length!r}. '
            'It is in pixels; leave it out for a field_of_view.'
        )
    for value in both:
        check_positive(owner, 'focal_length', value)
    return (float(both[0]), float(both[1]))


def check_triangle(owner: str, min_distance: float, min_angle: float) -> None:
    """Raise :class:`ConfigError` unless some triangle meets both limits."""
    check_finite_number(owner, 'min_distance', min_distance, minimum=0)
    check_finite_number(owner, 'min_angle', min_angle, minimum=0)
    if min_angle >= 60:
        raise ConfigError(
            f'{owner}: `min_angle` must be below 60 degrees, got {min_angle!r}. No triangle has three such angles.'
        )


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
    depth, reference, counts = _prepare(owner, depth, reference, valid, ('depth', 'reference'))
    if log:
        depth, reference = _log(depth, eps), _log(reference, eps)
    most = reference.masked_fill(~counts, -torch.inf).flatten(1).amax(dim=1)
    least = reference.masked_fill(~counts, torch.inf).flatten(1).amin(dim=1)
    spread = (most - least).clamp(min=eps)[:, None, None]
    centred = depth - _image_mean(reference, counts)
    return torch.where(counts, centred / spread, 0).view(shape)
