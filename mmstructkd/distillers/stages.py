"""Stages of one training: which terms count, what the task weighs and what is frozen, by the number of the step."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from mmstructkd.errors import ConfigError, check_finite_number, is_count, shown, suggest
from mmstructkd.terms.schedule import MAX_STEPS, WeightSchedule

__all__ = ['Stage', 'StagedSchedule', 'compile_terms', 'freeze_statistics', 'parse_stages', 'stage_at']

OWNER = 'StructuredDistiller'
KEYS = ('end', 'terms', 'task_weight', 'freeze')


@dataclass(frozen=True)
class Stage:
    """A part of a training.

    Attributes:
        begin: its first iteration.
        end: the one after its last; ``None``: the end of the training.
        terms: names of the terms that count in it.
        task_weight: factor of the student's own losses in it.
        freeze: dotted names of modules of the student that stay as they are.
    """

    begin: int
    end: int | None
    terms: tuple[str, ...]
    task_weight: float = 1.0
    freeze: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f'terms {", ".join(self.terms)}' if self.terms else 'no term', f'task weight {self.task_weight:g}']
        return ', '.join(parts + ([f'frozen {", ".join(self.freeze)}'] if self.freeze else []))


@dataclass(frozen=True)
class StagedSchedule(WeightSchedule):
    """A term's own schedule inside the stages that name the term, and 0 outside.

    The own schedule counts iterations from the beginning of the training, not of a stage.

    Args:
        windows: (first iteration, the one after the last) of each stage with the term.
    """

    windows: tuple[tuple[int, int | None], ...] = ()

    def factor(self, step: int, last: int) -> float:
        """Return the factor.

        Args:
            step: iterations done so far.
            last: iterations of the training.

        Returns:
            That of the own schedule, or 0.
        """
        inside = any(begin <= step and (end is None or step < end) for begin, end in self.windows)
        return super().factor(step, last) if inside else 0.0


def parse_stages(config: Any, terms: Mapping[str, Any], student: nn.Module) -> tuple[Stage, ...]:
    """Read ``stages`` of a distiller.

    Args:
        config: list of dicts with ``end``, ``terms`` (default: all), ``task_weight`` (default: 1) and
            ``freeze`` (default: nothing); all but the last have an ``end``.
        terms: the distiller's, by name.
        student: whose modules can be frozen.

    Returns:
        The stages in their order; none where ``config`` is ``None``.

    Raises:
        ConfigError: something else, an unknown key, term or module, an ``end`` that does not lie after the one
            before, a term that is in no stage, or a stage that trains nothing.
    """
    if config is None:
        return ()
    if not isinstance(config, (list, tuple)) or not config or not all(isinstance(one, Mapping) for one in config):
        raise ConfigError(
            f'{OWNER}: `stages` must be a list of dicts, got {shown(config)}. '
            "Example: stages=[dict(end=1000, terms=['hint'], task_weight=0.0), dict(terms=['kd'])]."
        )
    stages: list[Stage] = []
    for place, settings in enumerate(config):
        begin = stages[-1].end if stages else 0
        stages.append(_stage(settings, f'stages[{place}]', begin or 0, place == len(config) - 1, terms, student))
    unused = [name for name in terms if not any(name in stage.terms for stage in stages)]
    if unused:
        raise ConfigError(
            f'{OWNER}: `stages` must name each term in one of them at least, got none with {unused[0]!r}. '
            'Remove the term, or name it.'
        )
    return tuple(stages)


def _stage(
    settings: Mapping[str, Any], name: str, begin: int, last: bool, terms: Mapping[str, Any], student: nn.Module
) -> Stage:
    """Read one of them."""
    for key in settings:
        if key not in KEYS:
            raise ConfigError(
                f'{OWNER}: `{name}` must have only the keys {KEYS}, got {key!r}. {suggest(str(key), KEYS)}'
            )
    end = settings.get('end')
    if last and end is not None:
        raise ConfigError(f'{OWNER}: `{name}.end` must be left out of the last stage, got {shown(end)}: it lasts on.')
    later = isinstance(end, int) and is_count(end) and begin < end <= MAX_STEPS
    if not last and not later:
        raise ConfigError(
            f'{OWNER}: `{name}.end` must be an iteration after {begin}, where the stage begins, got {shown(end)}.'
        )
    chosen = _names(settings.get('terms', list(terms)), f'{name}.terms', list(terms), 'terms of the distiller')
    weight = settings.get('task_weight', 1.0)
    check_finite_number(OWNER, f'{name}.task_weight', weight, minimum=0)
    if not chosen and weight == 0:
        raise ConfigError(f'{OWNER}: `{name}.task_weight` must be above 0 in a stage without terms, got {weight}.')
    modules = [path for path, _ in student.named_modules() if path]
    frozen = _names(settings.get('freeze', ()), f'{name}.freeze', modules, f'modules of {type(student).__name__}')
    for path in frozen:
        if next(student.get_submodule(path).parameters(), None) is None:
            raise ConfigError(
                f'{OWNER}: `{name}.freeze` must name modules with parameters, got {path!r}, which has none.'
            )
    return Stage(begin, end, chosen, float(weight), frozen)


def _names(given: Any, argument: str, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Read a list of known names."""
    good = isinstance(given, (list, tuple)) and all(isinstance(name, str) for name in given)
    if not good or len(set(given)) < len(given):
        raise ConfigError(f'{OWNER}: `{argument}` must be a list of {what}, each once, got {shown(given)}.')
    for name in given:
        if name not in known:
            raise ConfigError(f'{OWNER}: `{argument}` must name {what}, got {name!r}. {suggest(name, known)}')
    return tuple(given)


def compile_terms(stages: Sequence[Stage], terms: Mapping[str, Any]) -> None:
    """Give each term the schedule that its stages make of its own.

    Args:
        stages: see :func:`parse_stages`; without any, the terms stay as they are.
        terms: by name; changed.

    Raises:
        ConfigError: a term's own schedule counts epochs, and stages count iterations.
    """
    for name, term in terms.items() if stages else ():
        if term.schedule.by_epoch:
            raise ConfigError(
                f'term {name!r}: `schedule.by_epoch` must be False beside `stages`, which count iterations, got True.'
            )
        own = {field.name: getattr(term.schedule, field.name) for field in fields(WeightSchedule)}
        windows = tuple((stage.begin, stage.end) for stage in stages if name in stage.terms)
        term.schedule = StagedSchedule(**own, windows=windows)
        term.factor = term.schedule.factor(0, 1)


def stage_at(stages: Sequence[Stage], step: int) -> Stage | None:
    """Return the stage of a step.

    Args:
        stages: in their order.
        step: iterations done so far.

    Returns:
        The stage; ``None`` where there are none.

    Example:
        >>> stage_at([Stage(0, 5, ()), Stage(5, None, ())], 5).begin
        5
    """
    if not stages:
        return None
    return stages[bisect.bisect_right([stage.begin for stage in stages], step) - 1]


def freeze_statistics(student: nn.Module, names: Sequence[str]) -> None:
    """Put normalisation layers with running statistics inside some modules in eval.

    Args:
        student: in train mode.
        names: of its modules.
    """
    for name in names:
        for module in student.get_submodule(name).modules():
            if getattr(module, 'running_mean', None) is not None:
                module.eval()
