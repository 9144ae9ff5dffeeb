r"""How far two sets of features are from being drawn alike.

Shape shorthand: n and m rows of the two sets, D entries each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_finite_number, check_ndim, is_count
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.valid import valid_entries, zero_elsewhere

__all__ = ['mean_discrepancy_loss']


def _checked(owner: str, name: str, rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows, 0 where they do not count, and which do."""
    check_ndim(owner, name, rows, 2, '(n, D)')
    valid = valid_entries(owner, rows.shape[:1], valid, like=rows, name=f'{name}_valid')
    return zero_elsewhere(rows, valid), valid


@full_precision
def mean_discrepancy_loss(
    source: Tensor,
    target: Tensor,
    *,
    kernels: int = 5,
    spread: float = 2.0,
    source_valid: Tensor | None = None,
    target_valid: Tensor | None = None,
) -> Tensor:
    r"""Maximum mean discrepancy of two sets of features, with Gaussian kernels.

    .. math::
        L = \overline{k(s_i, s_j)} + \overline{k(t_i, t_j)} - 2 \, \overline{k(s_i, t_j)}, \quad
        k(x, y) = \sum_{q=1}^{Q} \exp\Big(-\frac{\|x - y\|^2}{r^{q - 1 - \lfloor Q/2 \rfloor} \, h}\Big)

    with means over all pairs, a row with itself included, and the mean squared
    distance h between different rows of both sets together, which carries no
    gradient. How an adapting teacher is brought to give features of source and
    target domain that look alike (LIVIAETS/KD_UDA, after arXiv:1502.02791). Same
    value as that code, which sums the kernels too, for sets of one size; there
    they must be.

    No side is a teacher: the gradient reaches both sets. The value does not change
    when both are shifted, rotated or scaled together, nor when a set is permuted,
    and it is symmetric.

    For maps, take rows of them first, e.g. ``cell_nodes(features, (8, 8))[0]``
    with the first two axes flattened: pairs are quadratic in the rows.

    Args:
        source: rows of one set, shape (n, D), any float dtype.
        target: rows of the other, shape (m, D).
        kernels: Q, at least 1.
        spread: r, the ratio of neighbouring widths, at least 1.
        source_valid: rows that count, bool, shape (n,). ``None``: all.
        target_valid: likewise, (m,).

    Returns:
        Scalar in [0, 2 Q], rounding aside, no unit, at least float32, 0 with a
        graph where a set has no row that counts, or all rows are the same. Time O((n + m)^2 D),
        memory O((n + m)^2).

    Raises:
        ShapeError: an input is not 2-D, the widths differ, or a mask does not fit.
        ConfigError: ``kernels`` is no integer above 0, or ``spread`` below 1.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]])
        >>> abs(mean_discrepancy_loss(x, x.flip(0)).item()) < 1e-6
        True
        >>> round(mean_discrepancy_loss(x, x + 5).item(), 4)
        6.56
    """
    owner = 'mean_discrepancy_loss'
    if not is_count(kernels) or kernels < 1:
        raise ConfigError(f'{owner}: `kernels` must be an integer above 0, got {kernels!r}.')
    check_finite_number(owner, 'spread', spread, minimum=1)
    source, valid_s = _checked(owner, 'source', source, source_valid)
    target, valid_t = _checked(owner, 'target', target, target_valid)
    if source.shape[1] != target.shape[1]:
        raise ShapeError(
            f'{owner}: `source` and `target` must share D, got {tuple(source.shape)} and {tuple(target.shape)}.'
        )
    rows, valid_mask = torch.cat([source, target]), torch.cat([valid_s, valid_t])
    if rows.numel() == 0:
        return rows.sum()
    # The value is blind to a common shift and scale: centred, and at most 1, distances as a product of
    # matrices keep their digits. Scaled first, for a difference of large numbers may leave the range.
    peak = rows.detach().abs().amax()
    rows = rows / torch.where(peak == 0, 1, peak)
    number = valid_mask.sum().to(rows.dtype)
    center = rows.detach().sum(dim=0) / number.clamp(min=1)
    rows = zero_elsewhere(rows - center, valid_mask)
    peak = rows.detach().abs().amax()
    rows = rows / torch.where(peak == 0, 1, peak)
    squares = rows.square().sum(dim=1)
    with exact_matmul(rows.device.type):
        distance = (squares[:, None] + squares - 2 * rows @ rows.mT).clamp(min=0)
    # Rounding leaves a row at a small distance from itself.
    distance = distance - torch.diag_embed(distance.diagonal())
    # Over pairs of different rows of a centred set: 2 n sum |x|^2 / (n^2 - n).
    width = 2 * squares.detach().sum() / (number - 1).clamp(min=1)
    relative = distance / torch.where(width == 0, 1, width)
    near = torch.stack([torch.exp(-relative / spread ** (q - kernels // 2)) for q in range(kernels)]).sum(dim=0)
    share_s, share_t = (some.to(rows.dtype) / some.sum().clamp(min=1).to(rows.dtype) for some in (valid_s, valid_t))
    sign = torch.cat([share_s, -share_t])
    with exact_matmul(rows.device.type):
        loss = sign @ (near @ sign)
    # One set alone is no pair of sets.
    return torch.where(valid_s.any() & valid_t.any(), loss, 0 * loss)
