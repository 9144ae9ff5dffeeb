"""Weights that follow the training: pure functions of the progress, 0 at its begin and 1 at its end."""

from __future__ import annotations

import math
from typing import NamedTuple

from mmstructkd.errors import ConfigError, check_finite_number, check_one_of, check_positive

__all__ = ['ObjectiveWeights', 'adaptation_factor', 'exponential_factor', 'objective_weights']

MODES = ('fading', 'released_code')


def _check_progress(owner: str, progress: float) -> None:
    check_finite_number(owner, 'progress', progress, minimum=0)
    if progress > 1:
        raise ConfigError(f'{owner}: `progress` must lie in [0, 1], got {progress!r}.')


def exponential_factor(progress: float, *, start: float = 0.1, end: float = 0.9) -> float:
    r"""Weight that moves from one number to another by a constant ratio.

    .. math:: \beta(r) = \beta_0 \, (\beta_1 / \beta_0)^r

    Joint adaptation and distillation (LIVIAETS/KD_UDA), where it weighs distillation
    and one minus it the teacher's adaptation: from 0.1 to 0.9.

    Args:
        progress: r, in [0, 1]. That code counts epochs from 1 of E and does not
            reach the end: r = (e - 1) / E.
        start: :math:`\beta_0`, above 0.
        end: :math:`\beta_1`, above 0.

    Returns:
        The weight, between the two.

    Raises:
        ConfigError: ``progress`` is not in [0, 1], or an end not above 0.

    Example:
        >>> [round(exponential_factor(r), 4) for r in (0.0, 0.5, 1.0)]
        [0.1, 0.3, 0.9]
    """
    owner = 'exponential_factor'
    _check_progress(owner, progress)
    check_positive(owner, 'start', start)
    check_positive(owner, 'end', end)
    return float(start * (end / start) ** progress)


def adaptation_factor(progress: float, *, steepness: float = 10.0) -> float:
    r"""Weight of a domain's discrepancy, which comes in as features become worth comparing.

    .. math:: \gamma(r) = \frac{2}{1 + e^{-k r}} - 1

    Of gradient reversal (arXiv:1409.7495). LIVIAETS/KD_UDA lets it start anew in each
    epoch, where r is the part of the epoch that is over; elsewhere r is that of the
    training.

    Args:
        progress: r, in [0, 1].
        steepness: k, above 0.

    Returns:
        The weight, 0 at the begin, 0.9999 at the end for k = 10.

    Raises:
        ConfigError: ``progress`` is not in [0, 1], or ``steepness`` not above 0.

    Example:
        >>> [round(adaptation_factor(r), 4) for r in (0.0, 0.1, 1.0)]
        [0.0, 0.4621, 0.9999]
    """
    owner = 'adaptation_factor'
    _check_progress(owner, progress)
    check_positive(owner, 'steepness', steepness)
    return math.tanh(steepness * progress / 2)


class ObjectiveWeights(NamedTuple):
    """What the parts of an objective are multiplied by.

    Attributes:
        task: the student's own loss.
        relation: the similarity of classes.
        pixel: the divergence of pixels.
    """

    task: float
    relation: float
    pixel: float


def objective_weights(progress: float, *, mode: str = 'fading') -> ObjectiveWeights:
    r"""Adaptive weighting of a task and what a teacher adds to it.

    ``'fading'``, with progress r: :math:`(1, 1 - r, 1 - r)`. The teacher's part
    fades, the task stays. ``'released_code'``: :math:`(r, r, 1 - r)`, what stands,
    commented out, in the code of AICSD (arXiv:2308.04243) with r = e / E: it begins
    without any task, and the similarity of classes grows.

    Args:
        progress: r, in [0, 1].
        mode: ``'fading'`` or ``'released_code'``.

    Returns:
        Three factors.

    Raises:
        ConfigError: ``progress`` is not in [0, 1], or ``mode`` is neither.

    Example:
        >>> objective_weights(0.25)
        ObjectiveWeights(task=1.0, relation=0.75, pixel=0.75)
        >>> objective_weights(0.25, mode='released_code')
        ObjectiveWeights(task=0.25, relation=0.25, pixel=0.75)
    """
    owner = 'objective_weights'
    _check_progress(owner, progress)
    check_one_of(owner, 'mode', mode, MODES)
    rest = 1.0 - progress
    if mode == 'fading':
        return ObjectiveWeights(task=1.0, relation=rest, pixel=rest)
    return ObjectiveWeights(task=float(progress), relation=float(progress), pixel=rest)
