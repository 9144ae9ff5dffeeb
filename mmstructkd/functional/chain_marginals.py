r"""Linear chains of labels: their marginals, and a student taught with those of a teacher.

Shape shorthand: B chains of up to N positions, K labels. Transitions are written
``[to, from]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_positive, check_same
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean

__all__ = ['ChainMarginals', 'chain_cross_entropy_loss', 'chain_marginals']

#: Scores of what is forbidden (-1e12, or minus infinity) end here, so that no difference of two is NaN.
_FORBIDDEN = -1e15


class ChainMarginals(NamedTuple):
    """What a chain says about its parts.

    Attributes:
        nodes: probability of each label at each position, (B, N, K); 0 behind a
            chain's end.
        pairs: probability of each pair of neighbours, (B, N - 1, K, K), ``[to,
            from]``; 0 behind a chain's end.
        log_partition: logarithm of the sum over all sequences, (B,).
    """

    nodes: Tensor
    pairs: Tensor
    log_partition: Tensor


def _check_chain(
    owner: str, name: str, scores: Tensor, transitions: Tensor, start: Tensor | None, end: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, transitions, start and end, bounded from below."""
    labels = scores.shape[2]
    prefix = 'teacher_' if name == 'teacher' else ''
    if tuple(transitions.shape) != (labels, labels):
        raise ShapeError(
            f'{owner}: `{prefix}transitions` must have shape ({labels}, {labels}), got {tuple(transitions.shape)}.'
        )
    ends = []
    for argument, given in (('start', start), ('end', end)):
        if given is not None and tuple(given.shape) != (labels,):
            raise ShapeError(f'{owner}: `{prefix}{argument}` must have shape ({labels},), got {tuple(given.shape)}.')
        ends.append(scores.new_zeros(labels) if given is None else given)
    return (
        scores.clamp(min=_FORBIDDEN),
        transitions.clamp(min=_FORBIDDEN),
        ends[0].clamp(min=_FORBIDDEN),
        ends[1].clamp(min=_FORBIDDEN),
    )


def _check_lengths(owner: str, scores: Tensor, lengths: Tensor | None) -> Tensor:
    """Positions that are there, (B, N)."""
    number, positions = scores.shape[:2]
    if lengths is None:
        return torch.ones(number, positions, dtype=torch.bool, device=scores.device)
    if tuple(lengths.shape) != (number,):
        raise ShapeError(f'{owner}: `lengths` must have shape ({number},), got {tuple(lengths.shape)}.')
    return torch.arange(positions, device=scores.device) < lengths.to(scores.device)[:, None]


def _forward(scores: Tensor, transitions: Tensor, start: Tensor, there: Tensor) -> list[Tensor]:
    """Logarithm of the sum over all beginnings up to each position, (B, K) each; held behind the end."""
    reached = [scores[:, 0] + start]
    for i in range(1, scores.shape[1]):
        further = scores[:, i] + torch.logsumexp(transitions + reached[-1][:, None], dim=2)
        reached.append(torch.where(there[:, i, None], further, reached[-1]))
    return reached


def _backward(scores: Tensor, transitions: Tensor, end: Tensor, there: Tensor) -> list[Tensor]:
    """Logarithm of the sum over all ends from each position on, its own score apart, (B, K) each."""
    ahead = [end.expand(scores.shape[0], -1)]
    for i in range(scores.shape[1] - 1, 0, -1):
        earlier = torch.logsumexp(transitions + (scores[:, i] + ahead[-1])[:, :, None], dim=1)
        ahead.append(torch.where(there[:, i, None], earlier, ahead[-1]))
    return ahead[::-1]


def _marginals(scores: Tensor, transitions: Tensor, start: Tensor, end: Tensor, there: Tensor) -> ChainMarginals:
    before = torch.stack(_forward(scores, transitions, start, there), dim=1)
    ahead = torch.stack(_backward(scores, transitions, end, there), dim=1)
    log_partition = torch.logsumexp(before[:, -1] + end, dim=1)
    # Divided position by position: what rounding adds over the length of a chain cancels.
    nodes = torch.softmax(before + ahead, dim=2)
    joint = before[:, :-1, None, :] + transitions + (scores + ahead)[:, 1:, :, None]
    pairs = torch.softmax(joint.flatten(2), dim=2).view_as(joint)
    return ChainMarginals(
        nodes=torch.where(there[..., None], nodes, 0),
        pairs=torch.where(there[:, 1:, None, None], pairs, 0),
        log_partition=torch.where(there[:, 0], log_partition, 0),
    )


@full_precision
def chain_marginals(
    scores: Tensor,
    transitions: Tensor,
    *,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
) -> ChainMarginals:
    r"""Marginal probabilities of a linear chain, by the forward-backward recursion.

    .. math::
        p(y) \propto \exp \frac{1}{T} \Big( s_{y_1} + \sum_i z_{i y_i} + \sum_{i > 1} A_{y_i y_{i-1}} + e_{y_N} \Big)

    Structural knowledge distillation (arXiv:2010.05010): a student without the
    structure learns from the marginals of a teacher that has it. The whole chain is
    tempered; its authors' code computes the marginals at T = 1 and tempers those
    (``pixelwise_kl_loss`` with their logarithms as the teacher), which is not the same
    except at T = 1.

    Args:
        scores: z, shape (B, N, K), any float dtype. A label that is forbidden has a
            score of -1e12 or less.
        transitions: A, shape (K, K), ``[to, from]``.
        start: s, shape (K,). ``None``: 0.
        end: e, shape (K,). ``None``: 0.
        lengths: of the chains, integer, shape (B,). ``None``: N.
        temperature: T, above 0.

    Returns:
        Marginals of positions and of pairs of neighbours, and the logarithm of the
        sum over all sequences, at least float32, differentiable. Time and memory
        O(B N K^2), in N steps.

    Raises:
        ShapeError: a shape does not fit.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> z, stay = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> chain_marginals(z, stay).nodes.round(decimals=2)
        tensor([[[0.7300, 0.2700],
                 [0.6800, 0.3200]]])
    """
    owner = 'chain_marginals'
    check_positive(owner, 'temperature', temperature)
    check_ndim(owner, 'scores', scores, 3, '(B, N, K)')
    parts = _check_chain(owner, 'scores', scores, transitions, start, end)
    there = _check_lengths(owner, scores, lengths)
    first, *rest = (part / temperature for part in parts)
    # Whatever stands behind the end, NaN included, goes nowhere.
    return _marginals(torch.where(there[..., None], first, 0), rest[0], rest[1], rest[2], there)


@full_precision
def chain_cross_entropy_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    teacher_transitions: Tensor | None = None,
    teacher_start: Tensor | None = None,
    teacher_end: Tensor | None = None,
    lengths: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    r"""Cross-entropy of whole label sequences between a teacher and a student that is a chain.

    .. math::
        L = \frac{T^2}{B} \sum_b \big( \log Z^s_b - \mathbb E_{y \sim p^t_b} [S^s_b(y)] \big)

    with the score S of a sequence, divided by T, and the sum Z over all of them. The
    expectation needs the teacher's marginals of positions and pairs only: those of a
    chain (``teacher_transitions``), or products for independent positions. Structural
    knowledge distillation (arXiv:2010.05010), its cases of equal factors and of a
    teacher with finer ones. It is the cross-entropy, not the divergence: not 0 on
    itself, its gradient is that of the divergence.

    Same value as the authors' code at T = 1. Elsewhere that code tempers the
    student's chain, but computes a teacher's marginals at T = 1 and divides their
    logarithms by T; here the teacher's chain is tempered like the student's.

    The gradient reaches ``student``, ``transitions``, ``start`` and ``end``.

    Args:
        student: scores, shape (B, N, K), any float dtype. A label that is forbidden
            has a score of -1e12 or less.
        teacher: scores, same shape. Detached here, with all that belongs to it.
        transitions: of the student, shape (K, K), ``[to, from]``.
        start: of the student, shape (K,). ``None``: 0.
        end: of the student, shape (K,). ``None``: 0.
        teacher_transitions: shape (K, K). ``None``: independent positions.
        teacher_start: shape (K,). ``None``: 0.
        teacher_end: shape (K,). ``None``: 0.
        lengths: of the chains, integer, shape (B,). ``None``: N.
        temperature: T, above 0.

    Returns:
        Scalar in nats of a whole sequence, at least float32: the mean over chains with
        a position, 0 with a graph if there is none. Time and memory O(B N K^2).

    Raises:
        ShapeError: a shape does not fit.
        ConfigError: ``temperature`` is not above 0, or start or end are given of a
            teacher without transitions.

    Example:
        >>> z = torch.zeros(1, 3, 2)
        >>> round(chain_cross_entropy_loss(z, z, transitions=torch.zeros(2, 2)).item(), 4)  # 3 log 2
        2.0794
    """
    owner = 'chain_cross_entropy_loss'
    check_positive(owner, 'temperature', temperature)
    check_ndim(owner, 'student', student, 3, '(B, N, K)')
    check_ndim(owner, 'teacher', teacher, 3, '(B, N, K)')
    check_same(owner, student, teacher, (0, 1, 2), 'B, N and K', 'Both are chains of the same labels.')
    if teacher_transitions is None and not (teacher_start is None and teacher_end is None):
        raise ConfigError(
            f'{owner}: `teacher_transitions` must be given with `teacher_start` or `teacher_end`, got None. '
            'Add both to the scores of independent positions.'
        )
    there = _check_lengths(owner, student, lengths)
    inside = there[..., None]
    parts = _check_chain(owner, 'student', torch.where(inside, student, 0), transitions, start, end)
    scores, steps, first, last = (part / temperature for part in parts)
    teacher = torch.where(inside, teacher.detach(), 0) / temperature
    if teacher_transitions is None:
        nodes = torch.where(inside, torch.softmax(teacher, dim=2), 0)
        pairs = nodes[:, 1:, :, None] * nodes[:, :-1, None, :]
    else:
        ends = [None if part is None else part.detach() / temperature for part in (teacher_start, teacher_end)]
        chain = _check_chain(owner, 'teacher', teacher, teacher_transitions.detach() / temperature, *ends)
        nodes, pairs, _ = _marginals(*chain, there)
    final = there & ~torch.cat([there[:, 1:], torch.zeros_like(there[:, :1])], dim=1)
    ended = torch.where(final[..., None], nodes, 0).sum(dim=1)
    score = (
        _expected(nodes, scores).sum(dim=(1, 2))
        + _expected(pairs, steps).sum(dim=(1, 2, 3))
        + _expected(nodes[:, 0], first).sum(dim=1)
        + _expected(ended, last).sum(dim=1)
    )
    log_partition = torch.logsumexp(_forward(scores, steps, first, there)[-1] + last, dim=1)
    # At least 0 but for rounding: a sum of probabilities is at most 1.
    loss = (log_partition - score).clamp(min=0)
    return temperature**2 * masked_mean(loss, there[:, 0])


def _expected(probability: Tensor, score: Tensor) -> Tensor:
    """Their product; what never happens costs nothing, however forbidden it is."""
    # Not `probability > 0`: what is not a number stays one.
    return torch.where(probability <= 0, 0, probability * score)
