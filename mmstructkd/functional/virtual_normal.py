r"""Normals of planes through three places each, compared in space.

Shape shorthand: B images, H x W the grid, N = H W, K pairs or triplets an image.
Depth is in metres, see :mod:`mmstructkd.functional.core.depth`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, check_finite_number, check_positive
from mmstructkd.functional.core.depth import given_or_drawn, prepare_depths, values_at
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean, nan_unless_finite

__all__ = ['virtual_normal_loss']

# Norm of the cross product (square metres) below which a triangle has no direction.
_FLAT = 1e-8


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
            (:func:`~mmstructkd.functional.core.sampling.draw_positions`).
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
    depth_s, depth_t, valid_mask = prepare_depths(owner, student, teacher, valid)
    height, width = depth_s.shape[1:]
    if focal is None:
        focal = (width / (2 * math.tan(math.radians(field_of_view) / 2)),) * 2
    triplets = given_or_drawn(owner, 'triplets', triplets, depth_s, num_triplets, 3, seed)
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
        points = values_at(depth, triplets)[..., None] * rays
        return tuple(points.unbind(dim=2))

    def normal(points: tuple[Tensor, ...]) -> Tensor:
        upright: Tensor = torch.linalg.cross(points[1] - points[0], points[2] - points[0])
        length: Tensor = torch.linalg.vector_norm(upright, dim=-1, keepdim=True)
        return upright / length.clamp(min=_FLAT)

    points_t = corners(depth_t)
    good = values_at(valid_mask, triplets).all(dim=-1) & _spans_triangle(points_t, min_distance, min_angle)
    distance = (normal(corners(depth_s)) - normal(points_t)).abs().sum(dim=-1)
    # Also where no draw meets the pixel.
    return masked_mean(distance, good) + nan_unless_finite(depth_s, valid_mask)


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
