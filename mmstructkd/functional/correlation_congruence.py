r"""Correlations of nodes, by a kernel or of neighbours in the batch.

Shape shorthand: G sets of n nodes with D entries (student and teacher may differ
in D), B images, H x W a grid, N = H W. Functions of nodes take (n, D), one set;
(G, n, D), several; or (B, D, H, W), one set whose nodes are the whole images,
flattened. ``valid`` then marks the nodes that count, (n,) or (G, n), or the
positions of the images, (B, h, w).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, check_positive, check_same, is_count
from mmstructkd.functional.core.nodes import as_sets, norm_floor, sum_in_blocks, unit_vectors
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean, mean_of_sum

__all__ = ['adjacent_correlation_loss', 'correlation_congruence_loss']


@full_precision
def _congruence(
    student: Tensor, teacher: Tensor, valid_mask: Tensor | None, floor: float, gamma: float, order: int
) -> Tensor:
    units_s, units_t = unit_vectors(student, 2, floor), unit_vectors(teacher, 2, floor)
    sets, nodes = units_s.shape[:2]
    series = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]

    def kernel(units: Tensor, part: slice) -> Tensor:
        with exact_matmul(units.device.type):
            cosine = torch.bmm(units[:, part], units.mT)
        value = torch.full_like(cosine, series[-1])
        for factor in reversed(series[:-1]):
            value = value * cosine + factor
        return value

    def block(part: slice) -> Tensor:
        gap = (kernel(units_s, part) - kernel(units_t, part)).square()
        if valid_mask is not None:
            gap = torch.where(valid_mask[:, part, None] & valid_mask[:, None], gap, 0)
        return gap.sum()

    if nodes == 0:
        return units_s.sum()
    count = sets * nodes**2 if valid_mask is None else valid_mask.sum(dim=1).square().sum()
    return mean_of_sum(sum_in_blocks(block, nodes, sets * nodes), count)


def correlation_congruence_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 0.4,
    order: int = 2,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance between the kernel matrices of the nodes.

    .. math::
        L = \frac{1}{G n^2} \sum_{g,i,j} (k^s_{gij} - k^t_{gij})^2, \quad
        k_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (\hat f_i \cdot \hat f_j)^p

    Correlation congruence (arXiv:1904.01802), the paper's form: a Gaussian
    kernel of unit features as a Taylor series. torchdistill takes the norm
    without the square, over n^2, with weight 0.003. What the authors handed out
    is another formula: :func:`adjacent_correlation_loss`.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when a node is scaled by a positive number, or all are rotated.

    Args:
        student: nodes, see the module, any float dtype.
        teacher: as many nodes. Detached here.
        gamma: of the kernel, above 0.
        order: P, an integer of at least 1.
        valid: which count. ``None``: all.

    Returns:
        Scalar in [0, 4], no unit, at least float32: the mean over ordered pairs
        of nodes that count, each node with itself included, 0 with a graph if
        there is none. Time O(G n^2 D); of n^2 only blocks are in memory.

    Raises:
        ShapeError: the nodes of student and teacher differ in number, or the
            mask does not fit them.
        ConfigError: ``gamma`` or ``order`` is out of range.

    Example:
        >>> x = torch.eye(2)
        >>> correlation_congruence_loss(3 * x, x).item()
        0.0
        >>> round(correlation_congruence_loss(torch.ones(2, 3), x).item(), 4)
        0.1266
    """
    owner = 'correlation_congruence_loss'
    check_positive(owner, 'gamma', gamma)
    if not is_count(order) or order < 1:
        raise ConfigError(f'{owner}: `order` must be an integer of at least 1, got {order!r}.')
    floor = norm_floor(student, teacher)
    set_s, set_t, valid_mask = as_sets(owner, student, teacher.detach(), valid)
    return _congruence(set_s, set_t, valid_mask, floor, gamma, order)


@full_precision
def adjacent_correlation_loss(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Products of the deviations of neighbouring nodes from the teacher's.

    .. math::
        L = \frac{1}{G (n - 1)} \sum_{g,i} \sum_d |f^s - f^t|_{g,i,d} \, |f^s - f^t|_{g,i+1,d}

    Correlation congruence (arXiv:1904.01802) as its authors handed the code to
    RepDistiller, with weight 0.02: no correlation, and not what the paper
    prints, see :func:`correlation_congruence_loss`. Neighbours are consecutive
    in the batch.

    The gradient reaches ``student`` only. The value is a sum over D, in squared
    units of the features, and 0 as soon as every other node fits.

    Args:
        student: nodes, see the module, any float dtype.
        teacher: the same shape. Detached here.
        valid: which count; a pair counts where both do. ``None``: all.

    Returns:
        Scalar, at least float32: the mean over pairs of neighbours that count, 0
        with a graph if there is none. Time and memory O(G n D).

    Raises:
        ShapeError: the shapes differ, or the mask does not fit.

    Example:
        >>> adjacent_correlation_loss(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1)).item()
        4.0
    """
    owner = 'adjacent_correlation_loss'
    set_s, set_t, valid_mask = as_sets(owner, student, teacher.detach(), valid)
    check_same(owner, set_s, set_t, (2,), 'widths', 'Put a connector in front of the student.')
    deviation = (set_s - set_t).abs()
    product = (deviation[:, :-1] * deviation[:, 1:]).sum(dim=2)
    return masked_mean(product, None if valid_mask is None else valid_mask[:, :-1] & valid_mask[:, 1:])
