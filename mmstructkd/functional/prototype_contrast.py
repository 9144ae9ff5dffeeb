r"""Contrast within and across networks that learn from each other.

Shape shorthand: P peers, n embeddings of D entries, B images, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmstructkd.errors import (
    ConfigError,
    ShapeError,
    check_finite_number,
    check_ndim,
    check_positive,
    check_same,
    is_count,
)
from mmstructkd.functional.core.nodes import norm_floor, unit_vectors
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.regions import class_centers
from mmstructkd.functional.core.softening import check_temperature, kl_along
from mmstructkd.functional.core.valid import valid_entries, zero_elsewhere

__all__ = ['MutualContrast', 'mutual_contrast_losses', 'prototype_contrast_loss']


class MutualContrast(NamedTuple):
    """Parts of a mutual contrast, scalars, each a sum over peers or ordered pairs of them.

    Attributes:
        within: contrast among the embeddings of each peer (published weight 0.1).
        soft_within: divergence of a peer's similarities from another's (1).
        across: contrast of a peer's embeddings with another's (0.1).
        soft_across: divergence of similarities across, seen from one side, from
            the same seen from the other (1).
    """

    within: Tensor
    soft_within: Tensor
    across: Tensor
    soft_across: Tensor


def _contrast(scores: Tensor, positive: Tensor, valid_mask: Tensor, apart: Tensor) -> Tensor:
    """Mean over anchors with a positive of minus the mean log-probability of the positives.

    Args:
        scores: similarity over temperature, (n, n).
        positive: which keys are, (n, n).
        valid_mask: keys and anchors there are, (n,).
        apart: keys that are not the anchor itself, (n, n).
    """
    lowest = torch.finfo(scores.dtype).min
    against = torch.where(apart & valid_mask, scores, lowest)
    log_p = scores - torch.logsumexp(against, dim=1, keepdim=True)
    number = positive.sum(dim=1)
    mean = torch.where(positive, log_p, 0).sum(dim=1) / number.clamp(min=1).to(scores.dtype)
    return masked_mean(-mean, valid_mask & (number > 0))


def _soft(student: Tensor, teacher: Tensor, valid_mask: Tensor, temperature: float) -> Tensor:
    """T squared times the mean divergence of rows of similarities; an embedding is its own key here.

    The teacher's side is detached by the caller, all but its temperature.
    """
    lowest = torch.finfo(student.dtype).min
    log_s, log_t = (torch.where(valid_mask, z / temperature, lowest).log_softmax(1) for z in (student, teacher))
    return temperature**2 * masked_mean(kl_along(log_s, log_t, 1), valid_mask)


@full_precision
def mutual_contrast_losses(
    embeddings: Sequence[Tensor],
    *,
    labels: Tensor,
    temperature: float | Tensor = 0.1,
    kd_temperature: float = 3.0,
    valid: Tensor | None = None,
) -> MutualContrast:
    r"""Contrast of embeddings within and across peers, and what each can tell the others of it.

    With unit embeddings :math:`e_i` of peer i and :math:`G_{ij} = e_i e_j^\top / \tau`:

    .. math::
        \mathrm{con}(G) = -\overline{\frac{1}{|P_a|} \sum_{p \in P_a}
          \log \frac{e^{G_{ap}}}{\sum_{k \ne a} e^{G_{ak}}}}, \quad
        D(G, G') = T^2 \, \overline{\mathrm{KL}(\mathrm{softmax}(G'_a / T) \| \mathrm{softmax}(G_a / T))}

    within :math:`= \sum_i \mathrm{con}(G_{ii})`, soft within
    :math:`= \sum_{i \ne j} D(G_{ii}, G_{jj})`, across
    :math:`= \sum_{i \ne j} \mathrm{con}(G_{ij})`, soft across
    :math:`= \sum_{i \ne j} D(G_{ij}, G_{ij}^\top)`. Positives P of an anchor are the
    others of its class.

    Mutual contrastive learning, MCL (AAAI 2022), whose weights are 0.1, 1, 0.1 and
    1. Same values as the authors' code, and so: an anchor's own image is no positive
    across peers either; the other view of the similarities across is the transpose,
    so that each row is compared with a column; the soft parts keep an embedding's
    similarity with itself. Differs where a class occurs once: there that code
    divides 0 by 0, here such an anchor is left out.

    The gradient reaches all peers. What is a target in a soft part is detached.

    Args:
        embeddings: one tensor a peer, at least two, shape (n, D) each, rows of
            length 1: they are not normalised here, so that the gradient is that of
            the published code. See :func:`unit_vectors`.
        labels: class of each row, integer, shape (n,).
        temperature: :math:`\tau`, above 0, a number or a scalar tensor.
        kd_temperature: T of the soft parts, above 0.
        valid: rows that count, bool, shape (n,). ``None``: all.

    Returns:
        Four scalars in nats, at least float32: sums over peers or ordered pairs of
        means over anchors, 0 with a graph if there is none. Time O(P^2 n^2 D),
        memory O(P^2 n^2).

    Raises:
        ShapeError: there are less than two peers, one is not 2-D, or shapes differ.
        ConfigError: a temperature is not above 0.

    Example:
        >>> e = torch.eye(2).repeat_interleave(2, 0)
        >>> parts = mutual_contrast_losses([e, e], labels=torch.tensor([0, 0, 1, 1]), temperature=1.0)
        >>> [round(part.item(), 4) for part in parts]
        [1.1029, 0.0, 1.1029, 0.0]
    """
    owner = 'mutual_contrast_losses'
    check_temperature(owner, temperature)
    check_positive(owner, 'kd_temperature', kd_temperature)
    if len(embeddings) < 2:
        raise ShapeError(f'{owner}: `embeddings` must be those of at least 2 peers, got {len(embeddings)}.')
    for peer in embeddings:
        check_ndim(owner, 'embeddings', peer, 2, '(n, D)')
    if any(peer.shape != embeddings[0].shape for peer in embeddings):
        raise ShapeError(
            f'{owner}: `embeddings` must share n and D, got {[tuple(peer.shape) for peer in embeddings]}. '
            'Embed all in one width.'
        )
    number = embeddings[0].shape[0]
    if tuple(labels.shape) != (number,):
        raise ShapeError(f'{owner}: `labels` must have shape ({number},), got {tuple(labels.shape)}.')
    valid_mask = valid_entries(owner, (number,), valid, like=labels)
    rows = [zero_elsewhere(peer, valid_mask) for peer in embeddings]
    apart = ~torch.eye(number, dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels) & apart & valid_mask & valid_mask[:, None]
    with exact_matmul(rows[0].device.type):
        near = [[one @ other.mT / temperature for other in rows] for one in rows]
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]

    def total(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).sum()

    return MutualContrast(
        within=total([_contrast(near[i][i], positive, valid_mask, apart) for i in range(len(rows))]),
        soft_within=total([_soft(near[i][i], near[j][j].detach(), valid_mask, kd_temperature) for i, j in pairs]),
        across=total([_contrast(near[i][j], positive, valid_mask, apart) for i, j in pairs]),
        soft_across=total([_soft(near[i][j], near[j][i].detach(), valid_mask, kd_temperature) for i, j in pairs]),
    )


@full_precision
def _between_centers(
    centers: Sequence[Tensor],
    valid_mask: Tensor,
    classes: Tensor,
    temperature: float | Tensor,
    kd_temperature: float,
    weights: Sequence[float],
) -> Tensor:
    """The contrast of unit centres (n, D) of student and teacher, of which ``valid_mask`` are there."""
    one, other = centers
    apart = ~torch.eye(len(classes), dtype=torch.bool, device=one.device)
    positive = (classes[:, None] == classes) & apart & valid_mask & valid_mask[:, None]
    with exact_matmul(one.device.type):
        own, across = one @ one.mT / temperature, one @ other.mT / temperature
    within, between, soft_within, soft_between = weights
    loss = one.sum() * 0
    if within:
        loss = loss + within * _contrast(own, positive, valid_mask, apart)
    if between:
        loss = loss + between * _contrast(across, positive, valid_mask, apart)
    if soft_within:
        with exact_matmul(one.device.type):
            theirs = other @ other.mT / temperature
        loss = loss + soft_within * _soft(own, theirs, valid_mask, kd_temperature)
    if soft_between:
        with exact_matmul(one.device.type):
            back = other @ one.detach().mT / temperature
        loss = loss + soft_between * _soft(across, back, valid_mask, kd_temperature)
    return loss


def prototype_contrast_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    num_classes: int,
    temperature: float | Tensor = 0.1,
    kd_temperature: float = 3.0,
    soft_weight: float = 0.0,
    weights: Sequence[float] | None = None,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Contrast of class centres of different images, within the student and against the teacher.

    .. math:: L = \mathrm{con}(G_{ss}) + \mathrm{con}(G_{st}) + w \, [D(G_{ss}, G_{tt}) + D(G_{st}, G_{st}^\top)]

    with con and D of :func:`mutual_contrast_losses`, whose anchors are images; here
    they are the centres of the classes of each image, brought to length 1 (ours).
    Positives are the centres of the same class in other images: a class that only
    one image has is no anchor, yet keeps the others apart. Published weights of
    mutual contrast are those of this loss times 0.1 with ``soft_weight=10``.

    The gradient reaches ``student`` only: of the parts across, that of the anchor.
    For two networks that learn, each has this loss with the other as its teacher.

    Args:
        student: embeddings, shape (B, D, H, W), any float dtype.
        teacher: embeddings, same shape. Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest. What
            is no class does not count.
        num_classes: K.
        temperature: :math:`\tau`, above 0, a number or a scalar tensor.
        kd_temperature: T of the soft parts, above 0.
        soft_weight: w, at least 0.
        weights: of the four parts in the order of the formula, each at least 0.
            ``None``: 1, 1, w and w.
        ignore_index: pixels with this label do not count.
        valid: pixels that count, bool, shape (B, h, w), likewise. ``None``: all.

    Returns:
        Scalar in nats, at least float32: means over the centres that are anchors (the
        soft parts over all centres), 0 with a graph if there is none. It is not 0
        where student and teacher agree. Time O(B K D N + (B K)^2 D), memory
        O(B (K + D) N + (B K)^2).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or labels or mask are no
            map of B images.
        ConfigError: a temperature or ``num_classes`` is not above 0, or
            ``soft_weight`` is negative.

    Example:
        >>> x = torch.eye(2).view(1, 2, 1, 2).repeat(2, 1, 1, 1)
        >>> labels = torch.tensor([[[0, 1]], [[0, 1]]])
        >>> round(prototype_contrast_loss(x, x, labels=labels, num_classes=2, temperature=1.0).item(), 4)
        1.1029
        >>> round(prototype_contrast_loss(x[:1], x[:1], labels=labels[:1], num_classes=2).item(), 4)
        0.0
    """
    owner = 'prototype_contrast_loss'
    check_temperature(owner, temperature)
    check_positive(owner, 'kd_temperature', kd_temperature)
    check_finite_number(owner, 'soft_weight', soft_weight, minimum=0)
    shares = (1.0, 1.0, soft_weight, soft_weight) if weights is None else tuple(weights)
    for share in shares:
        check_finite_number(owner, 'weights', share, minimum=0)
    if len(shares) != 4 or (weights is not None and soft_weight):
        raise ConfigError(
            f'{owner}: `weights` must be four numbers, and `soft_weight` 0 beside them, got {shares!r} and '
            f'{soft_weight:g}.'
        )
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', 'Embed both in one width and size.')
    if not is_count(num_classes) or num_classes < 1:
        raise ConfigError(f'{owner}: `num_classes` must be an integer above 0, got {num_classes!r}.')
    floor = norm_floor(student, teacher)
    centers = []
    for features in (student, teacher.detach()):
        found, amount = class_centers(features, labels, num_classes, ignore_index=ignore_index, valid=valid)
        centers.append(unit_vectors(found, 2, floor).flatten(0, 1))
    valid_mask = (amount > 0).flatten()
    classes = torch.arange(num_classes, device=student.device).repeat(student.shape[0])
    loss: Tensor = _between_centers(centers, valid_mask, classes, temperature, kd_temperature, shares)
    return loss
