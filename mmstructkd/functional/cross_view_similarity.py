r"""How a turned image resembles the upright ones, in student and teacher.

Shape shorthand: B images, V views of each, n = (V - 1) B turned rows, D entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_finite_number, check_ndim, is_count
from mmstructkd.functional.core.nodes import norm_floor, unit_vectors
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.softening import check_temperature, kl_along

__all__ = ['cross_view_similarity_loss', 'rows_worth_keeping']


def _check_share(owner: str, keep: float) -> None:
    check_finite_number(owner, 'keep', keep, minimum=0)
    if keep > 1:
        raise ConfigError(f'{owner}: `keep` must be a share in [0, 1], got {keep!r}.')


def rows_worth_keeping(scores: Tensor, own: Tensor, *, keep: float = 0.75) -> Tensor:
    r"""Rows that a teacher ranks right, and the better share of those that it ranks wrong.

    A row's rank is the number of other entries above the right one (entries that
    equal it come behind it only if their index is larger). Rank 0 is right. Of the
    w wrong rows the :math:`\lfloor \mathrm{keep} \cdot w \rfloor` of the lowest ranks
    are kept; among equal ranks those with the lower index (in the code of SSKD the
    order among equals is whatever a sort makes of it).

    Args:
        scores: the teacher's, shape (n, K).
        own: index of the right entry of each row, integer, shape (n,).
        keep: share of wrong rows, in [0, 1]; 1 keeps all.

    Returns:
        Bool, shape (n,). Nothing waits for the device. Time O(n (K + log n)).

    Raises:
        ShapeError: ``scores`` is not 2-D, or ``own`` not one number a row.
        ConfigError: ``keep`` is not in [0, 1].

    Example:
        >>> scores = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0]])
        >>> rows_worth_keeping(scores, torch.tensor([0, 1, 2]), keep=0.5)
        tensor([ True, False,  True])
    """
    owner = 'rows_worth_keeping'
    _check_share(owner, keep)
    check_ndim(owner, 'scores', scores, 2, '(n, K)')
    if tuple(own.shape) != (scores.shape[0],):
        raise ShapeError(f'{owner}: `own` must have shape ({scores.shape[0]},), got {tuple(own.shape)}.')
    scores = scores.detach()
    right = scores.gather(1, own[:, None].long())
    before = torch.arange(scores.shape[1], device=scores.device) < own[:, None]
    rank = ((scores > right) | ((scores == right) & before)).sum(dim=1)
    wrong = (rank > 0).sum()
    # In float64, so that the floor is that of the exact product.
    number = rank.shape[0] - wrong + (wrong.double() * keep).floor().long()
    place = torch.empty_like(rank)
    place[rank.argsort(stable=True)] = torch.arange(rank.shape[0], device=rank.device)
    kept: Tensor = place < number
    return kept


@full_precision
def _similarity_kl(
    student: Tensor,
    teacher: Tensor,
    keep: float,
    temperature: float | Tensor,
    views: int,
    rows: Tensor | None,
    floor: float,
) -> Tensor:
    def near(embeddings: Tensor) -> Tensor:
        unit = unit_vectors(embeddings, 1, floor).unflatten(0, (-1, views))
        with exact_matmul(unit.device.type):
            likeness: Tensor = unit[:, 1:].flatten(0, 1) @ unit[:, 0].mT
        return likeness

    near_s, near_t = near(student), near(teacher)
    if rows is None:
        own = torch.arange(near_t.shape[1], device=near_t.device).repeat_interleave(views - 1)
        rows = rows_worth_keeping(near_t, own, keep=keep)
    log_s, log_t = (torch.log_softmax(near / temperature, dim=1) for near in (near_s, near_t))
    return temperature**2 * masked_mean(kl_along(log_s, log_t, 1), rows)


def cross_view_similarity_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    keep: float = 0.75,
    temperature: float | Tensor = 0.5,
    views: int = 4,
    rows: Tensor | None = None,
) -> Tensor:
    r"""Divergence of how like each turned image is to the upright ones.

    .. math::
        L = \frac{T^2}{|R|} \sum_{i \in R} \mathrm{KL}(q^t_i \| q^s_i), \quad
        q_i = \mathrm{softmax}_b \frac{\cos(e_i, u_b)}{T}

    with embeddings e of turned rows and u of upright ones. R are the rows that the
    teacher ranks right, its own image first, and the better share ``keep`` of the
    others, see :func:`rows_worth_keeping`. Self-supervision distillation, SSKD
    (ECCV 2020): published with T = 0.5, a share of 0.75 and the weight 10, on
    embeddings of a projection that the teacher was given for it. Same value as the
    authors' code, apart from which of equally ranked rows are kept.

    Cells of a map may stand for images: with the views brought onto one grid
    (:func:`turn_back`), the rows of a cell one after the other.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    Widths may differ. The value does not change when an embedding is scaled by a
    positive number.

    Args:
        student: embeddings, shape (V B, D_s), any float dtype; row V b is upright,
            V b + 1 to V b + V - 1 are its turns.
        teacher: embeddings, shape (V B, D_t), rows alike. Detached here.
        keep: share of wrong rows, in [0, 1].
        temperature: T, above 0, a number or a scalar tensor.
        views: V, at least 2.
        rows: turned rows that count, instead of the teacher's choice: bool, shape
            ((V - 1) B,), or the numbers of the rows. ``None``: by ``keep``.

    Returns:
        Scalar in nats, at least float32: the mean over the rows R, 0 with a graph
        if there is none. Time O(V B^2 D), memory O(V B^2).

    Raises:
        ShapeError: an input is not 2-D, the numbers of rows differ or are no
            multiple of V, or ``rows`` does not fit.
        ConfigError: ``temperature`` is not above 0, ``keep`` not in [0, 1], or
            ``views`` no integer of at least 2.

    Example:
        >>> x = torch.eye(2).repeat_interleave(2, 0)
        >>> cross_view_similarity_loss(3 * x, x, views=2).item()
        0.0
        >>> round(cross_view_similarity_loss(torch.ones(4, 1), x, views=2, temperature=1.0).item(), 4)
        0.1109
    """
    owner = 'cross_view_similarity_loss'
    check_temperature(owner, temperature)
    _check_share(owner, keep)
    if not is_count(views) or views < 2:
        raise ConfigError(f'{owner}: `views` must be an integer of at least 2, got {views!r}.')
    for name, tensor in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, tensor, 2, '(V B, D)')
    number = student.shape[0]
    if teacher.shape[0] != number or number % views:
        raise ShapeError(
            f'{owner}: `student` and `teacher` must have the same {views} rows an image, '
            f'got {tuple(student.shape)} and {tuple(teacher.shape)}.'
        )
    turned = number // views * (views - 1)
    if rows is not None and rows.dtype != torch.bool:
        chosen = torch.zeros(turned, dtype=torch.bool, device=student.device)
        rows = chosen.index_fill(0, rows.to(student.device, torch.int64), True)
    if rows is not None and tuple(rows.shape) != (turned,):
        raise ShapeError(f'{owner}: `rows` must have shape ({turned},), got {tuple(rows.shape)}.')
    floor = norm_floor(student, teacher)
    loss: Tensor = _similarity_kl(student, teacher.detach(), keep, temperature, views, rows, floor)
    return loss
