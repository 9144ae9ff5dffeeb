r"""Contrast of instances with other instances, and of sets with sets.

Shape shorthand: n instances with D entries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_flag, check_ndim, check_positive, check_same, is_count
from mmstructkd.functional.core.nodes import unit_vectors
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.softening import check_temperature
from mmstructkd.functional.core.valid import valid_entries, zero_elsewhere

__all__ = ['region_contrast_loss', 'sinkhorn_loss', 'wasserstein_contrast_loss']


def _instances(
    owner: str,
    student: Tensor,
    teacher: Tensor,
    classes: Tensor | None,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Which instances count (n,), and which pairs are negatives (n, n)."""
    check_ndim(owner, 'student', student, 2, '(n, D)')
    check_ndim(owner, 'teacher', teacher, 2, '(n, D)')
    check_same(owner, student, teacher, (0, 1), 'n and D', 'Embed both in one width.')
    return _negatives(owner, student, classes, valid)


def _negatives(owner: str, like: Tensor, classes: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    count = like.shape[0]
    if classes is not None and tuple(classes.shape) != (count,):
        raise ShapeError(f'{owner}: `classes` must have shape ({count},), got {tuple(classes.shape)}.')
    valid_mask = valid_entries(owner, (count,), valid, like=like)
    index = torch.arange(count, device=like.device) if classes is None else classes
    other = index[:, None] != index
    return valid_mask, other & valid_mask & valid_mask[:, None]


@full_precision
def region_contrast_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    classes: Tensor | None = None,
    valid: Tensor | None = None,
    memory: Tensor | None = None,
    memory_classes: Tensor | None = None,
    memory_valid: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    detach_teacher: bool = True,
) -> Tensor:
    r"""The student's embedding of an instance shall single out the teacher's of the same one.

    .. math::
        L = \overline{\ell(s_i; t_i, \mathcal N_i)} + \overline{\ell(t_i; s_i, \mathcal N'_i)}, \quad
        \ell(a; p, \mathcal N) = -\log \frac{e^{\cos(a, p) / T}}
        {e^{\cos(a, p) / T} + \sum_{q \in \mathcal N} e^{\cos(a, q) / T}}

    Contrastive distillation, CRD (arXiv:1910.10699), for instances that are
    regions instead of images: centres of classes, or boxes. Negatives of an
    instance are the other network's embeddings of instances of *other classes*,
    in the first direction also those of the memory. Differs from the authors'
    code: the softmax form of the contrast, which needs no estimate of a
    normalising constant; negatives of the batch and of a short queue instead of
    two banks over the whole dataset; no index of samples.

    The gradient reaches ``student``, and ``teacher`` only with
    ``detach_teacher=False``. The value does not change when an embedding is
    scaled by a positive number. It is not 0 where student and teacher agree.

    Args:
        student: embeddings, shape (n, D), any float dtype.
        teacher: embeddings of the same instances, the same shape.
        classes: class of each, integer (n,). ``None``: every other instance is a
            negative.
        valid: instances that count, bool (n,). ``None``: all.
        memory: more embeddings of the teacher, (M, D). ``None``: none.
        memory_classes: their classes, (M,); needed with ``memory``, as
            ``classes`` then is.
        memory_valid: which are there, bool (M,). ``None``: all.
        temperature: T, above 0, a number or a scalar tensor.
        detach_teacher: keep the gradient out of ``teacher``. A learned embedding
            of the teacher's features must be trained: the features themselves
            are to be detached before it.

    Returns:
        Scalar in nats, at least float32: the sum of the means over instances
        that count and have a negative, 0 with a graph if there is none. Time
        O(n (n + M) D), memory O(n (n + M)).

    Raises:
        ShapeError: an input is not 2-D, or shapes differ.
        ConfigError: ``temperature`` is not above 0, or a memory has no classes.

    Example:
        >>> x = torch.eye(2)
        >>> round(region_contrast_loss(x, x, temperature=1).item(), 4)
        0.6265
        >>> region_contrast_loss(x, x, classes=torch.tensor([3, 3])).item()
        0.0
    """
    owner = 'region_contrast_loss'
    check_temperature(owner, temperature)
    check_flag(owner, 'detach_teacher', detach_teacher)
    valid_mask, negative = _instances(owner, student, teacher, classes, valid)
    if memory is not None and (classes is None or memory_classes is None):
        raise ConfigError(
            f'{owner}: `memory_classes` and `classes` must be given with a memory, got '
            f'{"no" if memory_classes is None else "some"} and {"no" if classes is None else "some"} classes. '
            'Without them a memory cannot tell a negative.'
        )
    if detach_teacher:
        teacher = teacher.detach()
    units_s, units_t = (unit_vectors(zero_elsewhere(e, valid_mask), 1) for e in (student, teacher))
    lowest = torch.finfo(units_s.dtype).min
    with exact_matmul(units_s.device.type):
        scores = units_s @ units_t.mT / temperature
    own = scores.diagonal()

    def part(against: Tensor, allowed: Tensor) -> Tensor:
        against = torch.where(allowed, against, lowest)
        loss = torch.logsumexp(torch.cat([own[:, None], against], dim=1), dim=1) - own
        return masked_mean(loss, valid_mask & allowed.any(dim=1))

    forward, allowed = scores, negative
    if memory is not None and memory_classes is not None and classes is not None:
        there = torch.ones_like(memory_classes, dtype=torch.bool) if memory_valid is None else memory_valid
        keys = zero_elsewhere(memory, there)
        keys = unit_vectors(keys.detach() if detach_teacher else keys, 1)
        with exact_matmul(units_s.device.type):
            forward = torch.cat([scores, units_s @ keys.mT / temperature], dim=1)
        foreign = (classes[:, None] != memory_classes) & there & valid_mask[:, None]
        allowed = torch.cat([negative, foreign], dim=1)
    return part(forward, allowed) + part(scores.mT, negative)


@full_precision
def wasserstein_contrast_loss(scores: Tensor, *, classes: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    r"""What a critic gives to pairs of one instance, below what it gives to pairs of different ones.

    .. math:: L = \overline{\{g_{ij} : i, j \text{ negatives}\}} - \overline{\{g_{ii}\}}

    Global part of Wasserstein contrastive distillation, WCoRD (arXiv:2012.08674):
    the dual form of the distance between the joint distribution of student and
    teacher and the product of theirs, for a critic g of slope at most 1. Student
    and critic pull the same way: both make L small. No code of the authors was
    found; the paper weighs the second mean by the ratio of negatives, which is
    left to means here.

    Args:
        scores: g of student i and teacher j, shape (n, n), any float dtype. Not
            detached: it is the critic who sees embeddings.
        classes: class of each instance, integer (n,): pairs of one class are no
            negatives. ``None``: all different instances are.
        valid: instances that count, bool (n,). ``None``: all.

    Returns:
        Scalar in units of the critic, at least float32, 0 with a graph where
        there is no negative. Time and memory O(n^2).

    Raises:
        ShapeError: the scores are not square, or shapes differ.

    Example:
        >>> wasserstein_contrast_loss(torch.tensor([[1.0, 0.0], [0.5, 1.0]])).item()
        -0.75
    """
    owner = 'wasserstein_contrast_loss'
    check_ndim(owner, 'scores', scores, 2, '(n, n)')
    if scores.shape[0] != scores.shape[1]:
        raise ShapeError(f'{owner}: `scores` must have shape (n, n), got {tuple(scores.shape)}.')
    valid_mask, negative = _negatives(owner, scores, classes, valid)
    gap = masked_mean(scores, negative) - masked_mean(scores.diagonal(), valid_mask & negative.any(dim=1))
    return torch.where(negative.any(), gap, 0 * gap)


def _transport(cost: Tensor, first: Tensor, second: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Entropic transport cost of log-weights ``first`` to ``second``, by Sinkhorn's iteration in logarithms."""
    potential = torch.zeros_like(second)
    other = torch.zeros_like(first)
    for _ in range(iterations):
        other = -epsilon * torch.logsumexp(second + (potential - cost) / epsilon, dim=1)
        potential = -epsilon * torch.logsumexp(first + (other - cost.mT) / epsilon, dim=1)
    # The dual value: weights of what does not count are exp(lowest) = 0.
    return (first.exp() * other).sum() + (second.exp() * potential).sum()


@full_precision
def sinkhorn_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    valid: Tensor | None = None,
    detach_teacher: bool = True,
) -> Tensor:
    r"""Transport distance between the set of the student's embeddings and the teacher's.

    .. math::
        L = W_\epsilon(S, T) - \tfrac12 W_\epsilon(S, S) - \tfrac12 W_\epsilon(T, T), \quad
        c_{ij} = 1 - \cos(s_i, t_j)

    Local part of Wasserstein contrastive distillation, WCoRD (arXiv:2012.08674):
    the primal form within a batch. W is the entropic optimal transport cost with
    equal weights; taking away the two own costs removes its bias, so that equal
    sets are at distance 0 (no code of the authors was found; this correction is
    ours). Which instance is which does not matter.

    The gradient reaches ``student``, through all iterations, and ``teacher`` only
    with ``detach_teacher=False``. The value does not change when an embedding is
    scaled by a positive number, or when instances change places.

    Args:
        student: embeddings, shape (n, D), any float dtype; a few hundred.
        teacher: embeddings, the same shape.
        epsilon: strength of the entropy, in units of the cost, above 0.
        iterations: of Sinkhorn's algorithm, at least 1.
        valid: instances that count, bool (n,). ``None``: all.
        detach_teacher: keep the gradient out of ``teacher``.

    Returns:
        Scalar, about [0, 2], no unit, at least float32; 0 with a graph if nothing
        counts. Time O(n^2 (D + iterations)), memory O(n^2 iterations).

    Raises:
        ShapeError: an input is not 2-D, or shapes differ.
        ConfigError: ``epsilon`` or ``iterations`` is out of range.

    Example:
        >>> x = torch.eye(2)
        >>> abs(sinkhorn_loss(3 * x.flip(0), x).item()) < 1e-6
        True
        >>> sinkhorn_loss(-x, x).item() > 0.9
        True
    """
    owner = 'sinkhorn_loss'
    check_positive(owner, 'epsilon', epsilon)
    check_flag(owner, 'detach_teacher', detach_teacher)
    if not is_count(iterations) or iterations < 1:
        raise ConfigError(f'{owner}: `iterations` must be an integer of at least 1, got {iterations!r}.')
    valid_mask, _ = _instances(owner, student, teacher, None, valid)
    if detach_teacher:
        teacher = teacher.detach()
    units_s, units_t = (unit_vectors(zero_elsewhere(e, valid_mask), 1) for e in (student, teacher))
    number = valid_mask.sum().clamp(min=1).to(units_s.dtype)
    weights = torch.where(valid_mask, -number.log(), -1e4 * math.log(10))

    def cost(first: Tensor, second: Tensor) -> Tensor:
        with exact_matmul(first.device.type):
            return 1 - first @ second.mT

    value = _transport(cost(units_s, units_t), weights, weights, epsilon, iterations)
    value = value - _transport(cost(units_s, units_s), weights, weights, epsilon, iterations) / 2
    value = value - _transport(cost(units_t, units_t), weights, weights, epsilon, iterations) / 2
    return torch.where(valid_mask.any(), value, 0 * value)
