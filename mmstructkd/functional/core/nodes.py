r"""Nodes of relations: pooled places, unit vectors, and sums over blocks of rows.

Shape shorthand: B images, D channels, H x W the grid, n nodes of a set, G sets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmstructkd.errors import MAX_SIDE, ConfigError, ShapeError, check_ndim, is_count
from mmstructkd.functional.core.pooling import check_kernel_size, pool_patches
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.softening import kl_along
from mmstructkd.functional.core.valid import valid_entries, valid_pixels, zero_elsewhere

__all__ = [
    'as_sets',
    'by_peak',
    'cell_nodes',
    'norm_floor',
    'pairs_of',
    'pool_nodes',
    'similarity_kl_sum',
    'sum_in_blocks',
    'unit_vectors',
]

#: No block of rows has more elements (16 MiB in float32).
MAX_BLOCK = 2**22
# A sum over a patch near the end of float32's range is formed on this scale, a power of two.
_RANGE = 2.0**-16


def norm_floor(*tensors: Tensor) -> float:
    """Return the norm below which a vector has no direction.

    1e-12, in half precision at least the smallest normal number: what lies
    below has lost its digits, and one over it would leave the dtype's range.

    Args:
        tensors: in the dtype they were given in, before any promotion.

    Returns:
        The floor.

    Example:
        >>> norm_floor(torch.zeros(1))
        1e-12
    """
    return float(max([1e-12, *(torch.finfo(t.dtype).tiny for t in tensors)]))


def unit_vectors(vectors: Tensor, dim: int, floor: float = 1e-12) -> Tensor:
    """Divide by the Euclidean norm along ``dim``; 0, and no gradient, where that is at most ``floor``.

    Dividing by the largest entry first keeps the squares inside the range of
    the dtype for any finite input. A NaN stays one.

    Args:
        vectors: any shape, floating point.
        dim: axis of the vectors' entries.
        floor: norms up to this have no direction.

    Returns:
        Same shape.

    Example:
        >>> unit_vectors(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 1)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    # The result does not depend on the divisor, so the divisor needs no gradient.
    peak = vectors.detach().abs().amax(dim, keepdim=True)
    scaled = vectors / torch.where(peak == 0, 1, peak)
    square = scaled.square().sum(dim, keepdim=True)
    nothing = square.detach().sqrt() * peak <= floor
    return torch.where(nothing, 0, scaled / torch.where(nothing, 1, square).sqrt())


def by_peak(tensor: Tensor, floor: float = 1e-12) -> Tensor:
    """Divide each entry of the first axis by its largest magnitude, a constant for the gradient.

    For formulas that are blind to that scale: what follows stays in range.

    Args:
        tensor: shape (G, ...).
        floor: an entry whose largest magnitude is at most this becomes 0.

    Returns:
        Same shape, magnitudes at most 1.

    Example:
        >>> by_peak(torch.tensor([[2.0, -4.0], [0.0, 0.0]]))
        tensor([[ 0.5000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    if tensor.numel() == 0:
        return tensor
    peak = tensor.detach().abs().amax(dim=tuple(range(1, tensor.dim())), keepdim=True)
    nothing = peak <= floor
    return torch.where(nothing, 0, tensor / torch.where(nothing, 1, peak))


@full_precision
def pool_nodes(
    features: Tensor, kernel_size: int | tuple[int, int], valid: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Average over patches of fixed size, in ceil mode, over the positions that count.

    Args:
        features: shape (B, D, H, W).
        kernel_size: side of a patch, or (h, w).
        valid: bool, shape (B, H, W). ``None``: all count.

    Returns:
        Nodes (B, D, h, w), 0 where none counts, and which count (B, h, w) or ``None``.

    Example:
        >>> pool_nodes(torch.tensor([[[[1.0, 3.0, 5.0]]]]), (1, 2))[0]
        tensor([[[[2., 5.]]]])
    """
    return pool_patches(features, check_kernel_size('pool_nodes', kernel_size), 'avg', valid, True)


@full_precision
def cell_nodes(features: Tensor, grid: tuple[int, int], valid: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Average over the cells of a grid that covers the map: a fixed number of nodes an image.

    Args:
        features: shape (B, D, H, W).
        grid: (h, w) cells, at most one a position.
        valid: positions that count, bool, shape (B, h', w'), brought to H x W
            by nearest. ``None``: all.

    Returns:
        Nodes (B, n, D), 0 where no position counts, and which nodes have one
        (B, n), or ``None``.

    Example:
        >>> cell_nodes(torch.tensor([[[[1.0, 3.0, 5.0, 7.0]]]]), (8, 2))[0].squeeze()
        tensor([2., 6.])
    """
    check_ndim('cell_nodes', 'features', features, 4, '(B, D, H, W)')
    valid_mask = valid_pixels('cell_nodes', features, valid=valid)
    size = (min(grid[0], features.shape[2]), min(grid[1], features.shape[3]))
    if valid_mask is None:
        pooled = torch_functional.adaptive_avg_pool2d(features * _RANGE, size) / _RANGE
        return pooled.flatten(2).transpose(1, 2), None
    # Before anything else, so that whatever stands where nothing counts, NaN included, goes nowhere.
    features = zero_elsewhere(features, valid_mask)
    share = torch_functional.adaptive_avg_pool2d(valid_mask[:, None].to(features.dtype), size)
    some = share > 0
    pooled = torch_functional.adaptive_avg_pool2d(features * _RANGE, size) / torch.where(some, share, 1) / _RANGE
    return pooled.flatten(2).transpose(1, 2), some.flatten(1)


def sum_in_blocks(function: Callable[[slice], Tensor], rows: int, elements: int) -> Tensor:
    """Add ``function`` over blocks of rows, of which only one is in memory at a time.

    Several blocks are computed again in the backward pass instead of being kept.

    Args:
        function: maps a slice of rows to a sum over them.
        rows: how many there are, at least 1.
        elements: how many numbers one row makes.

    Returns:
        The sum.

    Example:
        >>> x = torch.arange(4.0)
        >>> sum_in_blocks(lambda part: x[part].sum(), 4, 2**21).item()
        6.0
    """
    step = max(1, MAX_BLOCK // max(elements, 1))
    if rows <= step:
        return function(slice(0, rows))
    parts = []
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, part, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(part))
    return torch.stack(parts).sum()


def similarity_kl_sum(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    *,
    temperature: float | Tensor,
    rows_valid: Tensor | None = None,
    keys_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor | int]:
    r"""Sum of KL(t || s) between distributions of rows over sets of keys, block by block.

    A row's distribution over a set is the softmax of its products with the
    set's keys, divided by the temperature.

    Args:
        student: rows (R, D_s) and keys (G, M, D_s).
        teacher: rows (R, D_t) and keys (G, M, D_t).
        temperature: above 0, a number or a scalar tensor.
        rows_valid: rows that count, bool (R,). ``None``: all.
        keys_valid: keys there are, bool (G, M). ``None``: all. A set without
            any does not count.

    Returns:
        The sum over rows and sets that count, and their number.

    Example:
        >>> rows, keys = torch.eye(2), torch.eye(2)[None]
        >>> total, count = similarity_kl_sum((rows, keys), (rows, keys), temperature=1.0)
        >>> total.item(), count
        (0.0, 2)
    """
    rows_s, keys_s = student
    rows_t, keys_t = teacher
    sets, members = keys_s.shape[:2]
    flat_s, flat_t = keys_s.flatten(0, 1).mT, keys_t.flatten(0, 1).mT
    every_row = rows_s.new_ones(rows_s.shape[0], dtype=torch.bool)
    every_set = rows_s.new_ones(sets, dtype=torch.bool)
    some = every_set if keys_valid is None else keys_valid.any(dim=1)
    counting = every_row if rows_valid is None else rows_valid

    def block(part: slice) -> Tensor:
        with exact_matmul(rows_s.device.type):
            near_s = (rows_s[part] @ flat_s).unflatten(1, (sets, members)) / temperature
            near_t = (rows_t[part] @ flat_t).unflatten(1, (sets, members)) / temperature
        if keys_valid is not None:
            # The lowest finite number: a set without a key must stay free of NaN. It does not count below.
            near_s = torch.where(keys_valid, near_s, torch.finfo(near_s.dtype).min)
            near_t = torch.where(keys_valid, near_t, torch.finfo(near_t.dtype).min)
        gap = kl_along(torch.log_softmax(near_s, dim=-1), torch.log_softmax(near_t, dim=-1), dim=-1)
        return torch.where(counting[part, None] & some, gap, 0).sum()

    total = sum_in_blocks(block, rows_s.shape[0], sets * members)
    if rows_valid is None and keys_valid is None:
        return total, rows_s.shape[0] * sets
    return total, counting.sum() * some.sum()


def as_sets(owner: str, student: Tensor, teacher: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bring what a relation takes to sets of nodes (G, n, D), and the mask to (G, n).

    (n, D): one set. (G, n, D): sets. (B, D, H, W): one set whose nodes are
    whole images, flattened. What does not count becomes 0.
    """
    for name, tensor in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, tensor, (2, 3, 4), '(n, D), (G, n, D) or (B, D, H, W)')
    axes = {2: 1, 3: 2, 4: 1}[student.dim()]
    same = student.dim() == teacher.dim() and student.shape[:axes] == teacher.shape[:axes]
    if student.dim() == 4 and same and valid is not None:
        same = student.shape[2:] == teacher.shape[2:]
    if not same:
        raise ShapeError(
            f'{owner}: `student` and `teacher` must share the nodes, '
            f'got {tuple(student.shape)} and {tuple(teacher.shape)}. Only widths may differ.'
        )
    valid_mask = None
    if student.dim() == 4:
        pixels = valid_pixels(owner, student, valid=valid)
        if pixels is not None:
            student = zero_elsewhere(student, pixels)
            teacher = zero_elsewhere(teacher, pixels)
            valid_mask = pixels.flatten(1).any(dim=1)[None]
        return student.flatten(1)[None], teacher.flatten(1)[None], valid_mask
    if valid is not None:
        valid_mask = valid_entries(owner, student.shape[:-1], valid, like=student)
    if student.dim() == 2:
        student, teacher = student[None], teacher[None]
        valid_mask = None if valid_mask is None else valid_mask[None]
    if valid_mask is not None:
        student = torch.where(valid_mask[..., None], student, 0)
        teacher = torch.where(valid_mask[..., None], teacher, 0)
    return student, teacher, valid_mask


def pairs_of(valid_mask: Tensor | None) -> Tensor | None:
    """Ordered pairs of nodes that count, (G, n, n), from the nodes that do."""
    return None if valid_mask is None else valid_mask[:, :, None] & valid_mask[:, None, :]


def check_grid(owner: str, grid: int | Sequence[int]) -> tuple[int, int]:
    """Return ``grid`` as (h, w), or raise :class:`~mmstructkd.errors.ConfigError`."""
    sides = (grid, grid) if isinstance(grid, int) else tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(sides) != 2 or not all(is_count(s) and 0 < s <= MAX_SIDE for s in sides):
        raise ConfigError(f'{owner}: `grid` must be an integer above 0 or two of them (h, w), got {grid!r}.')
    return sides[0], sides[1]
