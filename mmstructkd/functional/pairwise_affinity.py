r"""Relations between the places of a map: which parts look alike.

Shape shorthand: B images, D channels (student and teacher may differ), H x W
the grid of the input, a *node* a pooled patch of it, n the nodes of an image.
A unit is a node's feature divided by its norm, F the D x n matrix of units of
an image, A = F'F its affinities, E the student's affinities minus the teacher's.

Three exact ways lead to the sum of E squared:

* **dense**: A block by block of rows, O(n^2 D) time;
* **closed**: with the D x D matrices FF', by
  :math:`\|A_s - A_t\|^2 = \|F_s F_s'\|^2 - 2 \|F_s F_t'\|^2 + \|F_t F_t'\|^2`,
  O(n D^2) time and no tensor of n x n at all;
* **local**: one product of shifted maps for each offset in range, O(n r^2 D).

None keeps a graph: the gradient, 4 F_s E, is formed along with the value, and
is all that is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmstructkd.errors import MAX_SIDE, ConfigError, check_flag, check_ndim, check_one_of, check_same, is_count
from mmstructkd.functional.core.nodes import norm_floor
from mmstructkd.functional.core.pooling import POOLS, check_kernel_size, pool_patches
from mmstructkd.functional.core.precision import exact_matmul, full_precision, wide_dtype
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.valid import valid_pixels
from mmstructkd.functional.core.windows import half_of_offsets, shifted_views

__all__ = ['pairwise_affinity_loss']

FORMS = ('dense', 'closed', 'local')
# No block of affinities, and no D x D matrix of the closed form, has more elements (64 MiB in float32).
MAX_BLOCK = 2**24
# Nodes that the closed form takes at a time. Also how long a sum in float32 gets before it goes on in
# float64: rounding errors grow with the length of a sum, those of several sums average out.
_CHUNK = 256
# Few nodes are compared in float64, and so are the narrow features of a closed form, where it costs little;
# and below this mean a closed form goes to float64 for any width.
_NARROW = 64
_FEW_DIGITS = 1e-4
# Costs in multiply-adds of a matrix product: passes over an n x n block, and one multiply-add of the
# shifted products, which run at the speed of memory.
_PASSES_COST = 64
_SHIFT_COST = 16


def _units(nodes: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return units along axis -2 and the reciprocal norms; both 0 where there is no direction.

    Dividing by the largest entry first keeps squares inside the range of the
    dtype for any finite input. A NaN stays one: it must reach the loss.
    """
    # On CPUs these reductions are ten times as fast as torch.linalg.vector_norm over an outer axis.
    peak = nodes.abs().amax(dim=-2, keepdim=True)
    scaled = nodes / torch.where(peak == 0, 1, peak)
    norm = scaled.square().sum(dim=-2, keepdim=True).sqrt()
    nothing = norm * peak <= floor
    units = scaled.div_(torch.where(nothing, torch.inf, norm))
    return units, 1 / torch.where(nothing, torch.inf, norm * peak)


def _through_norm(grad: Tensor, units: Tensor, inverse: Tensor, detach_norm: bool) -> Tensor:
    """Turn a gradient with respect to units into one with respect to nodes, in place."""
    if not detach_norm:
        grad.sub_(units * (grad * units).sum(dim=-2, keepdim=True))
    return grad.mul_(inverse)


def _looks_are_free(tensor: Tensor) -> bool:
    """Whether the host may read a value without waiting for a device."""
    return tensor.device.type == 'cpu'


def _square_sum(block: Tensor) -> Tensor:
    """Sum of squares, without a second tensor of the block's size."""
    rows: Tensor = torch.linalg.vector_norm(block, dim=-1)
    return rows.to(wide_dtype(block)).square().sum()


def _blocks(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))


def _closed(
    student: Tensor, teacher: Tensor, floor: float, detach_norm: bool, with_grad: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Sum of E squared and its gradient from D x D matrices computed in ``dtype``; nodes (B, D, n)."""
    wide = wide_dtype(student)
    batch, dim_s, count = student.shape
    dim_t = teacher.shape[1]
    total = student.new_zeros((), dtype=wide)
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if with_grad else None
    for b in range(batch):
        gram_ss = student.new_zeros((dim_s, dim_s), dtype=wide)
        gram_st = student.new_zeros((dim_s, dim_t), dtype=wide)
        gram_tt = student.new_zeros((dim_t, dim_t), dtype=wide)
        # The teacher's units are kept for the gradient; the student's are cheaper to form again than to keep
        # beside the gradient.
        units_t = []
        for part in _blocks(count, _CHUNK):
            unit_s, _ = _units(student[b, :, part].to(dtype), floor)
            unit_t, _ = _units(teacher[b, :, part].to(dtype), floor)
            gram_ss += unit_s @ unit_s.mT
            gram_st += unit_s @ unit_t.mT
            gram_tt += unit_t @ unit_t.mT
            if with_grad:
                units_t.append(unit_t)
        total += gram_ss.square().sum() - 2 * gram_st.square().sum() + gram_tt.square().sum()
        if grad is None:
            continue
        gram_ss, gram_st = gram_ss.to(dtype), gram_st.to(dtype)
        for part, unit_t in zip(_blocks(count, _CHUNK), units_t, strict=True):
            unit_s, inverse = _units(student[b, :, part].to(dtype), floor)
            # F_s E = (F_s F_s') F_s - (F_s F_t') F_t
            step = torch.addmm(gram_ss @ unit_s, gram_st, unit_t, alpha=-1).mul_(4)
            grad[b, :, part] = _through_norm(step, unit_s, inverse, detach_norm)
    # Rounding may leave a little less than nothing. The gradient is not touched by this.
    return total.clamp(min=0), grad


def _closed_with_care(
    student: Tensor, teacher: Tensor, floor: float, detach_norm: bool, with_grad: bool, count: Tensor | int
) -> tuple[Tensor, Tensor | None]:
    """Take the closed form in the working precision, and in float64 where that leaves too few digits.

    It subtracts large sums which are nearly equal where the affinities are: in
    float32 an error of 1e-9 remains in the mean, whatever the mean. To look at
    the mean costs nothing on a CPU. On an accelerator the host would wait for
    all that is queued, so that float64 is taken at once there.
    """
    wide = wide_dtype(student)
    wide_features = max(student.shape[1], teacher.shape[1]) > _NARROW
    if student.dtype != wide and wide_features and _looks_are_free(student):
        total, grad = _closed(student, teacher, floor, detach_norm, with_grad, student.dtype)
        if not bool(total < _FEW_DIGITS * count):
            return total, grad
        del total, grad
    return _closed(student, teacher, floor, detach_norm, with_grad, wide)


def _dense(
    student: Tensor,
    teacher: Tensor,
    floor: float,
    detach_norm: bool,
    with_grad: bool,
    grid: tuple[int, int],
    radius: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Sum of E squared and its gradient from blocks of rows of E; nodes (B, D, n)."""
    batch, _, count = student.shape
    total = student.new_zeros((), dtype=wide_dtype(student))
    grad = torch.empty_like(student, memory_format=torch.contiguous_format) if with_grad else None
    index = torch.arange(count, device=student.device)
    y, x = index // grid[1], index % grid[1]
    images = max(1, min(batch, MAX_BLOCK // max(count * count, 1)))
    rows = max(1, min(count, MAX_BLOCK // max(count, 1)))
    for some in _blocks(batch, images):
        unit_s, inverse = _units(student[some], floor)
        unit_t, _ = _units(teacher[some], floor)
        step = torch.empty_like(unit_s) if with_grad else None
        for part in _blocks(count, rows):
            block = torch.baddbmm(unit_s[..., part].mT @ unit_s, unit_t[..., part].mT, unit_t, alpha=-1)
            if radius is not None:
                far = (y[part, None] - y).abs().maximum((x[part, None] - x).abs()) > radius
                block.masked_fill_(far, 0)
            total += _square_sum(block)
            if step is not None:
                torch.mul(unit_s @ block.mT, 4, out=step[..., part])
        if grad is not None and step is not None:
            grad[some] = _through_norm(step, unit_s, inverse, detach_norm)
    return total, grad


def _local(
    student: Tensor,
    teacher: Tensor,
    floor: float,
    detach_norm: bool,
    with_grad: bool,
    grid: tuple[int, int],
    radius: int,
) -> tuple[Tensor, Tensor | None]:
    """Sum of E squared in range and its gradient from shifted maps; nodes (B, D, n)."""
    unit_s, inverse = _units(student, floor)
    unit_t, _ = _units(teacher, floor)
    map_s, map_t = unit_s.unflatten(-1, grid), unit_t.unflatten(-1, grid)
    total = student.new_zeros((), dtype=wide_dtype(student))
    step = torch.zeros_like(map_s) if with_grad else None
    for dy, dx in half_of_offsets(grid, radius):
        first, second = shifted_views(map_s, dy, dx)
        first_t, second_t = shifted_views(map_t, dy, dx)
        block = (first * second).sum(1) - (first_t * second_t).sum(1)
        # A pair of different nodes is met once here and counts twice, as (i, j) and (j, i).
        twice = 1 if (dy, dx) == (0, 0) else 2
        total += twice * _square_sum(block)
        if step is not None:
            grad_first, grad_second = shifted_views(step, dy, dx)
            block = block[:, None] * (2 * twice)
            grad_first.addcmul_(block, second)
            grad_second.addcmul_(block, first)
    if step is None:
        return total, None
    return total, _through_norm(step.flatten(2), unit_s, inverse, detach_norm)


def _pairs(valid: Tensor | None, batch: int, grid: tuple[int, int], radius: int | None) -> Tensor | int:
    """Number of ordered pairs (i, j) in range of which both count, each node with itself included."""
    if valid is None:
        if radius is None:
            return batch * (grid[0] * grid[1]) ** 2
        axes = [sum(max(0, size - abs(d)) for d in range(-radius, radius + 1)) for size in grid]
        return batch * axes[0] * axes[1]
    if radius is None:
        return valid.flatten(1).sum(1).square().sum()
    total = torch.zeros((), dtype=torch.int64, device=valid.device)
    for dy, dx in half_of_offsets(grid, radius):
        first, second = shifted_views(valid, dy, dx)
        total += (1 if (dy, dx) == (0, 0) else 2) * (first & second).sum()
    return total


def _choose(student: Tensor, teacher: Tensor, grid: tuple[int, int], radius: int | None) -> str:
    """Return the form with the lowest cost among those that fit; nodes (B, D, n)."""
    count, dim_s, dim_t = student.shape[-1], student.shape[1], teacher.shape[1]
    dense = count * count * (2 * dim_s + dim_t + _PASSES_COST)
    if radius is not None:
        offsets = (min(radius, grid[0] - 1) * 2 + 1) * (min(radius, grid[1] - 1) * 2 + 1)
        local = _SHIFT_COST * count * (offsets // 2 + 1) * (2 * dim_s + dim_t)
        return 'dense' if dense <= local else 'local'
    closed = count * (2 * dim_s**2 + 2 * dim_s * dim_t + dim_t**2)
    fits = max(dim_s, dim_t) ** 2 <= MAX_BLOCK
    return 'closed' if fits and closed < dense else 'dense'


class _AffinityGap(torch.autograd.Function):
    """Sum of E squared over the pairs in range; differentiable once, in the student."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        form: str,
        grid: tuple[int, int],
        radius: int | None,
        floor: float,
        detach_norm: bool,
        with_grad: bool,
        count: Tensor | int,
    ) -> Tensor:
        dtype = student.dtype
        if student.shape[-1] <= _NARROW:
            student, teacher = student.to(wide_dtype(student)), teacher.to(wide_dtype(teacher))
        with exact_matmul(student.device.type):
            if form == 'closed':
                total, grad = _closed_with_care(student, teacher, floor, detach_norm, with_grad, count)
            elif form == 'dense' or radius is None:
                total, grad = _dense(student, teacher, floor, detach_norm, with_grad, grid, radius)
            else:
                total, grad = _local(student, teacher, floor, detach_norm, with_grad, grid, radius)
        if grad is not None:
            ctx.save_for_backward(grad.to(dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # What is stored is a constant: differentiated again it would silently give zero.
        if torch.is_grad_enabled():
            raise RuntimeError(
                'pairwise_affinity_loss: `create_graph` must be False, got True. '
                'Its gradient is formed along with the value and has no graph of its own.'
            )
        (grad,) = ctx.saved_tensors
        return (grad * grad_output.to(grad.dtype), *[None] * 8)


@full_precision
def _gap(
    student: Tensor,
    teacher: Tensor,
    form: str,
    grid: tuple[int, int],
    radius: int | None,
    floor: float,
    detach_norm: bool,
    count: Tensor | int,
) -> Tensor:
    # One dtype for both, the wider: a float64 student against a float32 teacher stays float64.
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    with_grad = torch.is_grad_enabled() and student.requires_grad
    total = _AffinityGap.apply(
        student.to(dtype), teacher.to(dtype), form, grid, radius, floor, detach_norm, with_grad, count
    )
    return mean_of_sum(total, count).to(dtype)


def check_radius(owner: str, radius: int | None) -> None:
    """Raise :class:`ConfigError` unless ``radius`` is ``None`` or an integer of at least 0."""
    if radius is not None and not (is_count(radius) and 0 <= radius <= MAX_SIDE):
        raise ConfigError(
            f'{owner}: `radius` must be None or an integer of at least 0, got {radius!r}. Use None for all pairs.'
        )


def pairwise_affinity_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    pool: str = 'avg',
    kernel_size: int | tuple[int, int] = 2,
    radius: int | None = None,
    detach_norm: bool = False,
    valid: Tensor | None = None,
    form: str | None = None,
) -> Tensor:
    r"""Squared distance between the affinities among nodes in student and teacher.

    .. math::
        L = \frac{1}{|\mathcal P|} \sum_{(b,i,j) \in \mathcal P} (a^s_{bij} - a^t_{bij})^2,
        \quad a_{bij} = \cos(f_{bi}, f_{bj})

    Pair-wise term of Structured Knowledge Distillation (arXiv:1903.04197). The
    nodes f are patches of the map, pooled in ceil mode: a patch that hangs over
    the edge is pooled over what it covers, so the grid of nodes has
    ceil(H / h) x ceil(W / w) of them. P holds the ordered pairs of nodes of one
    image, each node with itself included. The defaults are the paper's (average
    over 2 x 2, all pairs). The authors' released code takes the maximum over
    about half the map's size and keeps the norm out of the graph:
    ``pool='max', kernel_size=(H // 2, W // 2), detach_norm=True``.

    The gradient reaches ``student`` only, once (it cannot be differentiated
    again). Widths may differ. The value does not change when the feature of a
    node is scaled by a positive number. A node whose norm is zero (at most
    1e-12, in half precision at most the smallest normal number) has affinity 0
    with all, itself included, and gets no gradient.

    Args:
        student: features, shape (B, D_s, H, W), any float dtype.
        teacher: features, shape (B, D_t, H, W). Detached here.
        pool: ``'avg'`` or ``'max'``.
        kernel_size: size of a patch in positions, one number or (h, w); 1 for
            no pooling.
        radius: pairs further apart than this many nodes, in rows or in columns
            (Chebyshev), do not count. ``None``: all pairs do.
        detach_norm: leave the norms out of the gradient, as the released code
            does. The value is the same.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. Patches are pooled over these alone, and a patch without
            any is no node. ``None``: all.
        form: ``'dense'``, ``'closed'`` or ``'local'``, for tests and timing.
            ``None`` takes the cheapest. All are exact.

    Returns:
        Scalar in [0, 4], no unit, at least float32: the mean over P, 0 with a
        graph if P is empty. With n nodes, time O(n min(n D, D^2)), with a
        ``radius`` O(n min(n, radius^2) D). Memory: some copies of the pooled
        features, and no block of more than 64 MiB (float32) besides, whatever
        n; the n x n affinities are never stored beyond that. The closed form,
        taken for all pairs where n is well above D, works in float64 where
        float32 would leave too few digits.

    Raises:
        ShapeError: an input is not 4-D, B, H or W differ, or ``valid`` is not a
            map of B images.
        ConfigError: ``pool``, ``kernel_size``, ``radius`` or ``form`` is none,
            or the form does not fit the radius.

    Example:
        >>> x = torch.arange(24.).view(1, 2, 3, 4)
        >>> pairwise_affinity_loss(3 * x, x).item() < 1e-10
        True
        >>> s = torch.tensor([[1.0, 1.0], [0.0, 0.0]]).view(1, 2, 1, 2)
        >>> t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> pairwise_affinity_loss(s, t, kernel_size=1).item()
        0.5
    """
    owner = 'pairwise_affinity_loss'
    check_one_of(owner, 'pool', pool, POOLS)
    kernel = check_kernel_size(owner, kernel_size)
    check_radius(owner, radius)
    check_flag(owner, 'detach_norm', detach_norm)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(
        owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map; channels may differ.'
    )
    valid_mask = valid_pixels(owner, student, valid=valid)
    floor = norm_floor(student, teacher)
    # Half precision has room above it once promoted; bfloat16 has the range of float32.
    nodes_s, valid_s = pool_patches(student, kernel, pool, valid_mask, student.dtype == torch.bfloat16)
    nodes_t, _ = pool_patches(teacher.detach(), kernel, pool, valid_mask, teacher.dtype == torch.bfloat16)
    grid = (nodes_s.shape[-2], nodes_s.shape[-1])
    reach = radius if radius is not None and radius < max(grid) - 1 else None
    nodes_s, nodes_t = nodes_s.flatten(2), nodes_t.flatten(2)
    if form is None:
        chosen = _choose(nodes_s, nodes_t, grid, reach)
    else:
        check_one_of(owner, 'form', form, FORMS)
        if (form == 'closed' and reach is not None) or (form == 'local' and radius is None):
            raise ConfigError(
                f"{owner}: `form` must fit `radius`: 'closed' takes all pairs, 'local' a radius, "
                f'got {form!r} with radius {radius!r}. Leave `form` out to get the cheapest that fits.'
            )
        chosen = form
    if chosen == 'local':
        reach = radius
    pairs = _pairs(valid_s, student.shape[0], grid, reach)
    # Compiled code knows neither the check in the backward pass nor the choice of digits in the forward one.
    # Asked here and not written as a decorator, since `disable` imports the whole compiler.
    gap = torch.compiler.disable(_gap) if torch.compiler.is_compiling() else _gap
    loss: Tensor = gap(nodes_s, nodes_t, chosen, grid, reach, floor, detach_norm, pairs)
    return loss
