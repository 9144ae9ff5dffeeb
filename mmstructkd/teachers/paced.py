"""A teacher that is asked at every k-th step only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mmstructkd.errors import ConfigError, is_count
from mmstructkd.taps import Tap
from mmstructkd.teachers.base import TeacherSource
from mmstructkd.teachers.wrapper import TeacherWrapper

__all__ = ['PacedTeacher', 'check_every']


def check_every(owner: str, every: Any) -> int:
    """Check the option ``every`` of a teacher.

    Args:
        owner: the type of the teacher, for the message.
        every: what was given.

    Returns:
        The number.

    Raises:
        ConfigError: not a whole number of at least 1.
    """
    if not is_count(every) or not 1 <= every <= 10**9:
        raise ConfigError(f'{owner}: `every` must be a whole number of at least 1, got {every!r}.')
    return every


class PacedTeacher(TeacherWrapper):
    """Counts at every k-th step only, k times as much: the mean over k steps is that of asking at each.

    It is no part of running a batch. Before each step the hook that sets the
    weights of the terms asks for the factor; where that is 0 for all terms, nobody
    asks the teacher.

    Args:
        wrapped: any teacher that need not run at each step.
        every: k.

    Raises:
        ConfigError: ``every`` is out of range, or the teacher runs at each step anyway.
    """

    def __init__(self, wrapped: TeacherSource, every: int) -> None:
        super().__init__(wrapped)
        owner = type(wrapped).__name__
        self.every = check_every(owner, every)
        reason = wrapped.cannot_rest()
        if reason is not None:
            raise ConfigError(f'{owner}: `every` must be left out, got {every!r}. {reason}')

    @property
    def period(self) -> int:
        """Steps after which what is asked repeats."""
        return self.every * self.wrapped.period

    def interval_factor(self, step: int, taps: Iterable[Tap] = ()) -> float:
        """``every`` times the wrapped teacher's factor at each step that is a multiple of it, else 0.

        Args:
            step: iterations done so far.
            taps: the teacher's taps of a term.

        Returns:
            The factor of the term.
        """
        return self.every * self.wrapped.interval_factor(step, taps) if step % self.every == 0 else 0.0
