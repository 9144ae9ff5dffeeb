r"""Distributions of the edges of boxes, compared edge by edge.

Shape shorthand: B images, A anchors a position, H x W the grid of a level, n + 1
bins of an edge's distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_one_of, check_same, is_count
from mmstructkd.functional.core.boxes import TAP_THE_SAME_OUTPUT
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.softening import check_temperature, divided, kl_along
from mmstructkd.functional.core.valid import valid_pixels

__all__ = ['edge_confidence', 'localization_kl_loss']


def _split_edges(owner: str, name: str, logits: Tensor, edges: int) -> Tensor:
    """Shape (B, edges, n + 1, H, W) of a map, (M, 1, n + 1) of rows."""
    if logits.dim() == 2:
        return logits.unsqueeze(1)
    if logits.shape[1] % edges:
        raise ShapeError(
            f'{owner}: `{name}` must have a multiple of {edges} channels, {edges} distributions of n + 1 bins, got '
            f'{tuple(logits.shape)}. Set `edges`, or tap a head with distributions (GFLHead; not plain offsets).'
        )
    return logits.reshape(logits.shape[0], edges, -1, *logits.shape[2:])


@full_precision
def edge_confidence(logits: Tensor, *, edges: int = 4) -> Tensor:
    """How peaked the distributions of a position's box edges are.

    Args:
        logits: edge logits, shape (B, 4 (n + 1), H, W).
        edges: distributions a position.

    Returns:
        Shape (B, H, W), within [1 / (n + 1), 1]: the probability of the likeliest
        bin, mean over the edges. Without a graph.

    Raises:
        ShapeError: ``logits`` is not 4-D, or its channels do not split.

    Example:
        >>> edge_confidence(torch.zeros(1, 8, 1, 1)).item()
        0.5
    """
    check_ndim('edge_confidence', 'logits', logits, 4, '(B, 4 (n + 1), H, W)')
    split = _split_edges('edge_confidence', 'logits', logits.detach(), edges)
    return split.softmax(dim=2).amax(dim=2).mean(dim=1)


@full_precision
def localization_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 10.0,
    edges: int = 4,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    bin_reduction: str = 'sum',
    reduction: str = 'mean',
) -> Tensor:
    r"""Divergence of the student's box-edge distributions from the teacher's.

    .. math::
        L = \frac{T^2}{|V|} \sum_{i \in V} \frac{w_i}{4} \sum_{e=1}^{4} \mathrm{KL}(p^t_{ie} \| p^s_{ie}),
        \quad p_{ie} = \mathrm{softmax}_{n+1}(z_{ie} / T)

    Localization Distillation (arXiv:2102.12252), for heads that predict where an
    edge of the box lies as a distribution over bins (GFL). V are the positive
    positions, those that answer for an object.

    Differs from the authors' code: that takes the mean over the bins of a
    distribution where a divergence is their sum (``bin_reduction='mean'``), and
    the sum over the positives, never divided by their number
    (``reduction='sum'``), so that its weight depends on the batch. ``weights``
    are its student's best class scores.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when a constant is added to the logits of an edge.

    Args:
        student: edge logits, shape (B, 4 (n + 1), H, W) with the bins of an edge
            side by side, or (M, n + 1), one edge a row; any float dtype.
        teacher: the same shape. Detached here.
        temperature: T, above 0, a number or a scalar tensor.
        edges: distributions a position of a map: 4, or 1 for depth in bins.
        weights: factor of each position, at least 0, shape (B, H, W) or (M,);
            detached. ``None``: 1.
        valid: positives, bool, shape (B, h, w), brought to H x W by nearest, or
            (M,). ``None``: all.
        bin_reduction: ``'sum'``, or ``'mean'`` over the n + 1 bins.
        reduction: ``'mean'`` over the positives, whatever their weights, or
            ``'sum'`` over them.

    Returns:
        Scalar in nats, at least float32, 0 with a graph if nothing is positive.
        Time and memory O(B 4 (n + 1) H W).

    Raises:
        ShapeError: the shapes differ, channels do not split into edges, or
            ``weights`` or ``valid`` does not fit.
        ConfigError: an argument is out of range.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> localization_kl_loss(z + 3, z).item() < 1e-6
        True
        >>> round(localization_kl_loss(0 * z, z, temperature=1).item(), 4)
        0.3278
    """
    owner = 'localization_kl_loss'
    check_temperature(owner, temperature)
    check_one_of(owner, 'bin_reduction', bin_reduction, ('sum', 'mean'))
    check_one_of(owner, 'reduction', reduction, ('mean', 'sum'))
    if not is_count(edges) or edges < 1:
        raise ConfigError(f'{owner}: `edges` must be an integer above 0, got {edges!r}.')
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, 4 (n + 1), H, W) or (M, n + 1)')
    check_same(owner, student, teacher, range(student.dim()), 'their shape', TAP_THE_SAME_OUTPUT)
    valid_mask = valid_pixels(owner, student, valid=valid)
    split_s = _split_edges(owner, 'student', student, edges)
    split_t = _split_edges(owner, 'teacher', teacher.detach(), edges)
    if valid_mask is not None:
        kept = valid_mask[:, None, None]
        split_s, split_t = torch.where(kept, split_s, 0), torch.where(kept, split_t, 0)
    log_s = torch.log_softmax(divided(split_s, temperature), dim=2)
    log_t = torch.log_softmax(divided(split_t, temperature), dim=2)
    values = kl_along(log_s, log_t, dim=2).mean(dim=1)
    if bin_reduction == 'mean':
        values = values / split_s.shape[2]
    if weights is not None:
        if weights.shape != values.shape:
            raise ShapeError(
                f'{owner}: `weights` must have shape {tuple(values.shape)}, one for each position, '
                f'got {tuple(weights.shape)}.'
            )
        values = values * weights.detach()
    if valid_mask is not None:
        values = torch.where(valid_mask, values, 0)
    total = values.sum()
    if reduction == 'mean':
        total = mean_of_sum(total, values.numel() if valid_mask is None else valid_mask.sum())
    return temperature**2 * total
