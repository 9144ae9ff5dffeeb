"""How a term's weight follows the training: a pure function of the progress."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mmstructkd.errors import (
    ConfigError,
    check_count,
    check_finite_number,
    check_flag,
    check_one_of,
    check_positive,
    is_count,
    shown,
    suggest,
)
from mmstructkd.functional.core.schedules import exponential_factor

__all__ = ['WeightSchedule']

#: Arguments that not every type reads.
READ_BY = {'start_factor': ('linear', 'cosine', 'exponential'), 'milestones': ('step',), 'gamma': ('step',)}
#: Iterations of any training.
MAX_STEPS = 10**12
KINDS = ('constant', 'linear', 'cosine', 'exponential', 'step', 'ramp_up')


@dataclass(frozen=True)
class WeightSchedule:
    r"""Factor of a term's weight at a point of the training.

    With progress :math:`r \in [0, 1]` from ``begin`` to ``end``:

    - ``constant``: ``end_factor`` in ``[begin, end)``, 0 outside;
    - ``linear``, ``cosine``: from ``start_factor`` to ``end_factor``, held
      before and after;
    - ``exponential``: likewise, by a constant ratio (both factors above 0; joint
      adaptation and distillation goes from 0.1 to 0.9);
    - ``step``: ``end_factor`` times ``gamma`` for each milestone passed, 0
      outside ``[begin, end)``;
    - ``ramp_up``: :math:`e^{-5(1-r)^2}` times ``end_factor``, 0 before
      ``begin``, held after ``end`` (the form of FRSKD's released code).

    A factor of 0 switches the term off: it is not computed, and the teacher
    does not run where no term is left.

    Args:
        type: one of the names above.
        begin: first iteration or epoch of the window.
        end: the one after its last; ``None``: the end of training.
        start_factor: factor at ``begin`` (``linear``, ``cosine``, ``exponential``).
        end_factor: factor at ``end``.
        milestones: for ``step``, increasing.
        gamma: for ``step``.
        by_epoch: count epochs instead of iterations.
        complement: take 1 minus the factor, for what fades as something else comes
            in; the factor must stay within 1.
    """

    type: str = 'constant'
    begin: int = 0
    end: int | None = None
    start_factor: float = 0.0
    end_factor: float = 1.0
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    by_epoch: bool = False
    complement: bool = False

    def __post_init__(self) -> None:
        owner = 'WeightSchedule'
        check_one_of(owner, 'type', self.type, KINDS)
        check_count(owner, 'begin', self.begin, 0, maximum=MAX_STEPS)
        for name in ('start_factor', 'end_factor', 'gamma'):
            check_finite_number(owner, name, getattr(self, name), minimum=0)
        check_flag(owner, 'by_epoch', self.by_epoch)
        check_flag(owner, 'complement', self.complement)
        if self.complement and max(self.start_factor, self.end_factor) > 1:
            raise ConfigError(
                f'{owner}: `complement` must go with factors of at most 1, got {self.start_factor:g} and '
                f'{self.end_factor:g}. A factor below 0 has no meaning.'
            )
        if self.type == 'exponential':
            check_positive(owner, 'start_factor', self.start_factor)
            check_positive(owner, 'end_factor', self.end_factor)
        if self.end is not None and not (is_count(self.end) and self.begin < self.end <= MAX_STEPS):
            raise ConfigError(f'{owner}: `end` must lie after `begin`={self.begin}, got {shown(self.end)}.')
        if not isinstance(self.milestones, (list, tuple)):
            raise ConfigError(f'{owner}: `milestones` must be a list of integers, got {shown(self.milestones)}.')
        for milestone in self.milestones:
            check_count(owner, 'milestones', milestone, 0)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ConfigError(f'{owner}: `milestones` must increase, got {list(self.milestones)}.')
        for name, kinds in READ_BY.items():
            value = getattr(self, name)
            if self.type not in kinds and value != getattr(WeightSchedule, name):
                raise ConfigError(
                    f'{owner}: `{name}` must be left out for type={self.type!r}, got {shown(value)}: '
                    f'only {" and ".join(map(repr, kinds))} reads it.'
                )
        if self.type == 'step' and not self.milestones:
            raise ConfigError("WeightSchedule: `milestones` must not be empty for type='step', got ().")

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, owner: str) -> WeightSchedule:
        """Read ``schedule=dict(...)`` of a term.

        Args:
            config: the dict, or ``None`` for a constant weight.
            owner: who asks, for the message.

        Returns:
            The schedule.

        Raises:
            ConfigError: an unknown key, or a value out of range.
        """
        if config is None:
            return cls()
        if not isinstance(config, Mapping):
            raise ConfigError(
                f'{owner}: `schedule` must be a dict, got {shown(config)}. '
                "Example: dict(type='linear', begin=0, end=1000)."
            )
        known = [f.name for f in fields(cls)]
        for key in config:
            if key not in known:
                raise ConfigError(
                    f'{owner}: `schedule` must have keys of WeightSchedule, got {key!r}. {suggest(key, known)}'
                )
        try:
            return cls(**config)
        except ConfigError as err:
            raise ConfigError(f'{owner}: {err}') from err

    def factor(self, step: int, last: int) -> float:
        """Return the factor.

        Args:
            step: iterations (or epochs) done so far.
            last: number of iterations (or epochs) of the training.

        Returns:
            The factor, at least 0.
        """
        value = self._rising(step, last)
        return 1.0 - value if self.complement else value

    def _rising(self, step: int, last: int) -> float:
        """The factor before a complement is taken."""
        end = last if self.end is None else self.end
        if self.type in ('constant', 'step'):
            if step < self.begin or (self.end is not None and step >= end):
                return 0.0
            passed = bisect.bisect_right(list(self.milestones), step) if self.type == 'step' else 0
            return self.end_factor * self.gamma**passed
        if self.type == 'ramp_up' and step < self.begin:
            return 0.0
        progress = min(max((step - self.begin) / max(end - self.begin, 1), 0.0), 1.0)
        if self.type == 'ramp_up':
            return self.end_factor * math.exp(-5.0 * (1.0 - progress) ** 2)
        if self.type == 'exponential':
            return exponential_factor(progress, start=self.start_factor, end=self.end_factor)
        if self.type == 'cosine':
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return self.start_factor + (self.end_factor - self.start_factor) * progress
