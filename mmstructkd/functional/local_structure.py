r"""How a place resembles its neighbours on the grid.

Shape shorthand: B images, D channels, H x W a grid, N = H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, check_flag, check_ndim, check_same, is_count
from mmstructkd.functional.core.nodes import norm_floor, unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.softening import check_temperature, kl_along
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere
from mmstructkd.functional.core.windows import half_of_offsets, shifted_views

__all__ = ['local_structure_loss']


def _window(values: list[Tensor], grid: tuple[int, int], radius: int, fill: float | bool) -> Tensor:
    """Stack what belongs to a place and each offset of the window, (B, offsets, H, W)."""
    planes = []
    for (dy, dx), value in zip(half_of_offsets(grid, radius), values, strict=True):
        rows, columns = (0, dy), (max(0, -dx), max(0, dx))
        # The product belongs to its first place (offset forwards) and to its second (backwards).
        planes.append(torch_functional.pad(value, (*columns, *rows), value=fill))
        if (dy, dx) != (0, 0):
            planes.append(torch_functional.pad(value, (*columns[::-1], *rows[::-1]), value=fill))
    return torch.stack(planes, dim=1)


@full_precision
def _local_structure(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    floor: float,
    radius: int,
    temperature: float | Tensor,
    include_self: bool,
) -> Tensor:
    batch, _, height, width = student.shape
    grid = (height, width)
    here = (
        torch.ones(batch, height, width, dtype=torch.bool, device=student.device) if valid_mask is None else valid_mask
    )
    offsets = list(half_of_offsets(grid, radius))
    both = []
    for dy, dx in offsets:
        first, second = shifted_views(here, dy, dx)
        both.append((first & second) if include_self or (dy, dx) != (0, 0) else torch.zeros_like(first))
    neighbours = _window(both, grid, radius, False)

    def log_structure(features: Tensor) -> Tensor:
        features = zero_elsewhere(features, valid_mask)
        units = unit_vectors(features, 1, floor)
        products = []
        for dy, dx in offsets:
            first, second = shifted_views(units, dy, dx)
            products.append((first * second).sum(dim=1))
        scores = _window(products, grid, radius, 0.0) / temperature
        # The lowest finite number: a place without a neighbour must stay free of NaN. It does not count below.
        return torch.log_softmax(torch.where(neighbours, scores, torch.finfo(scores.dtype).min), dim=1)

    gap = kl_along(log_structure(student), log_structure(teacher), dim=1)
    return masked_mean(gap, here & neighbours.any(dim=1))


def local_structure_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    radius: int = 1,
    temperature: float | Tensor = 0.1,
    include_self: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of how like each neighbour a place is in the student from how in the teacher.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \mathrm{KL}(l^t_i \| l^s_i), \quad
        l_i = \mathrm{softmax}_{j \in \mathcal N(i)} \frac{\cos(f_i, f_j)}{T}

    Local structure preserving (CVPR 2020), made for graphs, on a grid: the
    neighbours of a place are those at most ``radius`` away in rows and columns.
    The authors' code has the similarity exp(-|f_i - f_j| / 100) with the L1
    norm, and this direction of the divergence; as far as is known the paper has
    a Gaussian kernel and the other direction. Cosine over T is blind to the
    scale of features. It complements
    :func:`~mmstructkd.functional.pairwise_affinity.pairwise_affinity_loss`, which
    compares affinities one by one.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when the feature of a place is scaled by a positive number. A feature
    whose norm is zero (at most 1e-12, in half precision at most the smallest
    normal number) has cosine 0 with all.

    Args:
        student: features, shape (B, D_s, H, W), any float dtype.
        teacher: features, shape (B, D_t, H, W). Detached here.
        radius: r, an integer of at least 1.
        temperature: T, above 0, a number or a scalar tensor.
        include_self: a place is its own neighbour, with cosine 1: what the
            others are measured against. Without, only their order counts.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest; the others are no neighbours either. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over places that count and
        have a neighbour, 0 with a graph if there is none. With K = (2 r + 1)^2:
        time O(B K D N), memory O(B (K + D) N).

    Raises:
        ShapeError: an input is not 4-D, B, H or W differ, or ``valid`` is no
            map of B images.
        ConfigError: ``radius`` or ``temperature`` is out of range.

    Example:
        >>> x = torch.arange(24.0).view(1, 2, 3, 4)
        >>> local_structure_loss(3 * x, x).item() < 1e-8
        True
        >>> x = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> local_structure_loss(torch.ones_like(x), x, temperature=1).item() > 0.01
        True
    """
    owner = 'local_structure_loss'
    if not is_count(radius) or radius < 1:
        raise ConfigError(f'{owner}: `radius` must be an integer of at least 1, got {radius!r}.')
    check_temperature(owner, temperature)
    check_flag(owner, 'include_self', include_self)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(
        owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map; channels may differ.'
    )
    valid_mask = valid_pixels(owner, student, valid=valid)
    return _local_structure(
        student, teacher.detach(), valid_mask, norm_floor(student, teacher), radius, temperature, include_self
    )
