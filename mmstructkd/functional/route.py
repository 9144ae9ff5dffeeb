"""Routes of teachers: which checkpoint of a training teaches when, and which are worth a stop."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from mmstructkd.errors import ConfigError, check_finite_number, is_count

__all__ = ['equal_hardness_route', 'equal_interval_route', 'next_stop', 'route_stage']


def _check_count(owner: str, argument: str, value: int, most: int | None = None) -> None:
    rule = 'be an integer above 0' + ('' if most is None else f', at most {most}')
    if not is_count(value) or value < 1 or (most is not None and value > most):
        raise ConfigError(f'{owner}: `{argument}` must {rule}, got {value!r}.')


def route_stage(step: int, begins: Sequence[int]) -> int:
    """Return which stop of a route is on, from the step alone: the same after a resume.

    Args:
        step: iterations (or epochs) done so far, at least 0.
        begins: first step of each stop; the first is 0, and they increase.

    Returns:
        Number of the stop, from 0.

    Raises:
        ConfigError: ``step`` is negative, or ``begins`` is no such sequence.

    Example:
        >>> [route_stage(step, [0, 10, 25]) for step in (0, 9, 10, 24, 25, 1000)]
        [0, 0, 1, 1, 2, 2]
    """
    owner = 'route_stage'
    check_finite_number(owner, 'step', step, minimum=0)
    starts = list(begins)
    if not starts or starts[0] != 0 or starts != sorted(set(starts)):
        raise ConfigError(f'{owner}: `begins` must start with 0 and increase, got {starts!r}.')
    return bisect.bisect_right(starts, step) - 1


def equal_interval_route(checkpoints: int, stops: int) -> list[int]:
    """Choose stops at equal distances along a training: the simple rule of RCO.

    Args:
        checkpoints: how many there are, in order of the training.
        stops: how many to choose, at most all.

    Returns:
        Their numbers, from 0, increasing; the last is the last checkpoint.

    Raises:
        ConfigError: a number is not above 0, or there are more stops than
            checkpoints.

    Example:
        >>> equal_interval_route(10, 4)
        [2, 4, 7, 9]
    """
    owner = 'equal_interval_route'
    _check_count(owner, 'checkpoints', checkpoints)
    _check_count(owner, 'stops', stops, checkpoints)
    # Rounded up: the last is exact, and no two are the same.
    return [-(-checkpoints * (k + 1) // stops) - 1 for k in range(stops)]


def _checked(owner: str, hardness: Sequence[float]) -> list[float]:
    values = [float(h) for h in hardness]
    if not values or not all(math.isfinite(h) and h >= 0 for h in values):
        raise ConfigError(f'{owner}: `hardness` must hold finite numbers of at least 0, got {values!r}.')
    return values


def equal_hardness_route(hardness: Sequence[float], stops: int) -> list[int]:
    """Choose stops of equal gains in hardness.

    Hardness is the divergence of an untaught student from each checkpoint. Between
    stops it rises by about the same amount; where it goes down from one checkpoint to
    the next, the highest so far counts.

    Args:
        hardness: of each checkpoint, in order of the training.
        stops: how many to choose, at most all; fewer are returned where one
            checkpoint spans several steps.

    Returns:
        Their numbers, from 0, increasing; the last is the last checkpoint.

    Raises:
        ConfigError: a hardness is negative or not finite, or ``stops`` out of range.

    Example:
        >>> equal_hardness_route([0.1, 0.2, 0.9, 1.0, 1.9, 2.1], 2)
        [4, 5]
        >>> equal_hardness_route([0.5, 1.0, 1.5, 2.0], 4)
        [0, 1, 2, 3]
    """
    owner = 'equal_hardness_route'
    values = _checked(owner, hardness)
    _check_count(owner, 'stops', stops, len(values))
    highest = [max(values[: k + 1]) for k in range(len(values))]
    chosen = set()
    for k in range(1, stops):
        wanted = highest[-1] * k / stops
        chosen.add(next(j for j, reached in enumerate(highest) if reached >= wanted))
    return sorted(chosen | {len(values) - 1})


def next_stop(hardness: Sequence[float], current: int, *, ratio: float) -> int:
    r"""Choose the next stop from how hard each checkpoint is for the student as it is now.

    The last checkpoint j behind the current one i with :math:`h_j \le \rho h_i`, at
    least the next. Greedy rule of RCO (arXiv:1904.09149) as we remember its abstract:
    no code of the authors was found, and how its hardness is scaled is unverified.

    Args:
        hardness: divergence of the student, taught up to the current stop, from each
            checkpoint, in order of the training.
        current: number of the current stop, from 0; not the last.
        ratio: :math:`\rho`, how much harder than the current stop the next may be, at
            least 1.

    Returns:
        Number of the next stop.

    Raises:
        ConfigError: a hardness is negative or not finite, ``current`` names no stop
            with another behind it, or ``ratio`` is below 1.

    Example:
        >>> next_stop([0.2, 0.25, 0.3, 0.7], 0, ratio=1.5)
        2
        >>> next_stop([0.2, 0.9, 1.3], 0, ratio=1.5)
        1
    """
    owner = 'next_stop'
    values = _checked(owner, hardness)
    check_finite_number(owner, 'ratio', ratio, minimum=1)
    if not is_count(current) or not 0 <= current < len(values) - 1:
        raise ConfigError(
            f'{owner}: `current` must be the number of a stop with another behind it, '
            f'from 0 to {len(values) - 2}, got {current!r}.'
        )
    within = [j for j in range(current + 1, len(values)) if values[j] <= ratio * values[current]]
    return max([current + 1, *within])
