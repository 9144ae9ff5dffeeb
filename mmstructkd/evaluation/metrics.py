"""A metric of mmengine's log as it is shown: its name, its unit, and which direction is better."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ['Metric', 'mean_and_std']


@dataclass(frozen=True)
class Metric:
    """One number of an evaluation.

    Attributes:
        key: its name in the log.
        title: its name in a table.
        factor: the log's number times this is what is shown (100 for per cent).
        digits: decimals that are shown.
        higher_is_better: whether more is better.
        if_missing: what a log without it means; ``None``: that something is
            wrong. A detector that finds nothing logs no average precision.

    Example:
        >>> error = Metric('abs_rel', 'abs rel', digits=3, higher_is_better=False)
        >>> error.text([0.125])
        '0.125'
        >>> error.gain(0.25, 0.75)
        0.5
    """

    key: str
    title: str
    factor: float = 1.0
    digits: int = 2
    higher_is_better: bool = True
    if_missing: float | None = None

    def gain(self, value: float, reference: float) -> float:
        """By how much ``value`` is better than ``reference``; negative where it is worse."""
        return value - reference if self.higher_is_better else reference - value

    def text(self, values: Sequence[float], *, signed: bool = False) -> str:
        """Write a mean, with the standard deviation where there are several values."""
        return mean_and_std(values, self.digits, signed=signed)


def mean_and_std(values: Sequence[float], digits: int = 2, *, signed: bool = False) -> str:
    """Write a mean, with the sample's standard deviation where there are several values.

    Args:
        values: at least one.
        digits: decimals.
        signed: write a plus before what is not negative.

    Returns:
        Such as ``'42.00 ± 2.00'``.

    Example:
        >>> mean_and_std([1.0, 3.0], signed=True)
        '+2.00 ± 1.41'
    """
    # plus 0.0: what rounds to zero has no minus
    mean = f'{round(statistics.mean(values), digits) + 0.0:{"+" if signed else ""}.{digits}f}'
    return mean if len(values) < 2 else f'{mean} ± {statistics.stdev(values):.{digits}f}'
