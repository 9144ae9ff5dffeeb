r"""One teacher's scores out of several: with weights, and pixel by pixel by how sure each is.

Shape shorthand: K teachers, B images, C classes, H x W the grid, N = H W, M rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_finite_number, check_ndim, check_one_of, check_positive
from mmstructkd.functional.core.binary import two_classes
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.softening import LOWEST, log_of_classes

__all__ = ['CONFIDENCES', 'fuse_scores', 'score_confidence']

CONFIDENCES = ('maximum', 'margin', 'entropy')
FUSED = ('scores', 'probabilities')


@full_precision
def score_confidence(scores: Tensor, *, by: str = 'maximum', temperature: float = 1.0) -> Tensor:
    r"""How sure a network is at each pixel.

    With :math:`p = \mathrm{softmax}_C(z / T)`:

    - ``'maximum'``: :math:`\max_c p_c`, in [1/C, 1];
    - ``'margin'``: the largest probability less the second, in [0, 1];
    - ``'entropy'``: :math:`1 + \sum_c p_c \log p_c / \log C`, in [0, 1].

    Args:
        scores: logits, shape (B, C, H, W) or (M, C), any float dtype. One channel is
            the score of a sigmoid.
        by: one of the three.
        temperature: T, above 0.

    Returns:
        Shape (B, H, W) or (M,), at least float32, in the graph of ``scores``. Time
        and memory O(B C N).

    Raises:
        ShapeError: ``scores`` is neither 4-D nor 2-D.
        ConfigError: ``by`` is none of them, or ``temperature`` not above 0.

    Example:
        >>> score_confidence(torch.tensor([[0.5, 0.3, 0.2]]).log())
        tensor([0.5000])
        >>> score_confidence(torch.tensor([[0.5, 0.3, 0.2]]).log(), by='margin')
        tensor([0.2000])
    """
    owner = 'score_confidence'
    check_one_of(owner, 'by', by, CONFIDENCES)
    check_positive(owner, 'temperature', temperature)
    check_ndim(owner, 'scores', scores, (2, 4), '(B, C, H, W) or (M, C)')
    scores = two_classes(scores)
    classes = scores.shape[1]
    log_p = log_of_classes(scores, temperature).clamp(min=LOWEST)
    if by == 'entropy':
        # Rounding may leave [0, 1] by the last digit.
        return (1 + (log_p.exp() * log_p).sum(1) / math.log(classes)).clamp(0, 1)
    if by == 'maximum':
        return log_p.amax(1).exp()
    first, second = log_p.topk(2, dim=1).values.exp().unbind(1)
    return first - second


@full_precision
def fuse_scores(
    teachers: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    confidence: str | None = None,
    sharpness: float = 1.0,
    of: str = 'scores',
) -> Tensor:
    r"""Weighted mean of what several teachers say, pixel by pixel.

    .. math::
        z_i = \sum_k \alpha_{ki} z_{ki}, \quad
        \alpha_{ki} = \frac{w_k \, c_{ki}^s}{\sum_j w_j \, c_{ji}^s}

    with the confidence c of teacher k at pixel i from :func:`score_confidence`
    (``confidence=None``: 1) and the sharpness s: 0 is the plain weighted mean, a
    large one lets the surest teacher speak alone. ``of='probabilities'`` averages
    probabilities instead, and gives the logarithm of the mixture: where teachers
    disagree, a mean of scores is a compromise, a mixture keeps both opinions.

    Several teachers as in SimReg (BMVC 2021) have one term each and need none of
    this; a fused teacher is for one term on all. The weights by confidence are
    ours.

    Nothing here carries a gradient: the result is a target.

    Args:
        teachers: scores of each, at least one, shape (B, C, H, W) or (M, C), any
            float dtype. One channel is the score of a sigmoid. Detached here.
        weights: w, one a teacher, at least 0 and not all 0. ``None``: all alike.
        confidence: ``None``, ``'maximum'``, ``'margin'`` or ``'entropy'``.
        sharpness: s, at least 0.
        of: ``'scores'`` or ``'probabilities'``.

    Returns:
        Scores, the shape of one teacher's (two classes for one channel of which
        probabilities are averaged), at least float32. Where no teacher with
        a weight is sure at all (all c are 0), the plain weighted mean. Time
        O(K B C N), memory for two such maps.

    Raises:
        ShapeError: there is no teacher, one is neither 4-D nor 2-D, or the shapes
            differ.
        ConfigError: the weights do not fit, or another argument is out of range.

    Example:
        >>> sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.4]])
        >>> fuse_scores([sure, unsure], weights=[0.25, 0.75])
        tensor([[1.0000, 0.3000]])
        >>> fuse_scores([sure, unsure], confidence='margin', sharpness=20).round(decimals=3)
        tensor([[4., 0.]])
    """
    owner = 'fuse_scores'
    check_one_of(owner, 'of', of, FUSED)
    check_finite_number(owner, 'sharpness', sharpness, minimum=0)
    if confidence is not None:
        check_one_of(owner, 'confidence', confidence, CONFIDENCES)
    if not teachers:
        raise ShapeError(f'{owner}: `teachers` must hold at least one tensor, got none.')
    for teacher in teachers:
        check_ndim(owner, 'teachers', teacher, (2, 4), '(B, C, H, W) or (M, C)')
    if any(teacher.shape != teachers[0].shape for teacher in teachers):
        raise ShapeError(
            f'{owner}: `teachers` must share one shape, got {[tuple(teacher.shape) for teacher in teachers]}. '
            'Resize with resize_map, or map classes with map_logits.'
        )
    shares = [1.0] * len(teachers) if weights is None else list(weights)
    for share in shares:
        check_finite_number(owner, 'weights', share, minimum=0)
    if len(shares) != len(teachers) or not sum(shares) > 0:
        raise ConfigError(
            f'{owner}: `weights` must be one number a teacher, not all 0, got {shares!r} for {len(teachers)} teachers.'
        )
    # A teacher without a weight has no say, whatever it says.
    voices = [(share / sum(shares), teacher.detach()) for share, teacher in zip(shares, teachers, strict=True) if share]
    logs = [math.log(share) for share, _ in voices]
    plain = torch.stack([torch.full_like(voices[0][1][:, :1], log) for log in logs])
    part = plain
    if confidence is not None:
        sure = torch.stack([score_confidence(z, by=confidence).unsqueeze(1) for _, z in voices])
        known = (sure > 0).any(dim=0, keepdim=True)
        # In logarithms, so that no power underflows for all of them.
        part = torch.where(known, plain + sharpness * sure.log().clamp(min=LOWEST), plain)
    part = torch.log_softmax(part, dim=0)
    if of == 'scores':
        fused = torch.zeros_like(voices[0][1])
        for log, (_, z) in zip(part, voices, strict=True):
            fused = fused + log.exp() * z
        return fused
    # One teacher after the other: the sum over all at once would need K maps.
    logs_of = (log_of_classes(two_classes(z), 1.0).clamp(min=LOWEST) for _, z in voices)
    mixture = part[0] + next(logs_of)
    for log, log_p in zip(part[1:], logs_of, strict=True):
        mixture = torch.logaddexp(mixture, log + log_p)
    return mixture
