"""Several teachers at once, of any kind, each under a name."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import ConfigError, TapError, suggest
from mmstructkd.registry import MODELS
from mmstructkd.structures import Blend, Targets
from mmstructkd.taps import Regions, Tap
from mmstructkd.teachers.base import ProbedTensors, Records, TeacherSource
from mmstructkd.teachers.building import build_source
from mmstructkd.teachers.mean import TeacherMean

__all__ = ['TeacherGroup']


@MODELS.register_module()
class TeacherGroup(TeacherSource):
    """Teachers by name; a tap begins with the name: ``'big.decode_head.conv_seg'``.

    ``teachers=dict(big=dict(...), ema=dict(...))`` of a distiller builds one. Each
    member keeps its own normalisation, options, interval (`every`) and objectives; one term per
    teacher, each with a connector of its own, is the form of SimReg (a head for
    each teacher). :class:`TeacherMean` as a member shows the weighted mean of
    others.

    Args:
        **members: a config of a teacher (or a built one) by name.

    Raises:
        ConfigError: there is none, or a name or a config cannot be used.
    """

    def __init__(self, **members: Any) -> None:
        owner = type(self).__name__
        if not members:
            raise ConfigError(f'{owner}: at least one teacher must be named, got none.')
        self.members: dict[str, TeacherSource] = {}
        for name, member in members.items():
            if not name.isidentifier() or name in dir(nn.ModuleDict):
                raise ConfigError(f'{owner}: a name must be an identifier of its own, got {name!r}. Rename it.')
            self.members[name] = member if isinstance(member, TeacherSource) else build_source(member, name)
        for name, member in self.members.items():
            member.join(name, self.members)
        self._link()

    def _link(self) -> None:
        """Collect what the distiller asks for."""
        members = self.members.values()
        self.hooks = tuple(dict.fromkeys(hook for member in members for hook in member.hooks))
        self.reads = tuple(dict.fromkeys(tap for member in members for tap in member.reads))
        self.follows = any(member.follows for member in members)
        self.terms = {f'{name}_{key}': term for name, m in self.members.items() for key, term in m.terms.items()}
        kept = {name: member.trained for name, member in self.members.items() if member.trained is not None}
        self.trained = nn.ModuleDict(kept) if kept else None

    def __deepcopy__(self, memo: dict) -> TeacherGroup:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.members = {name: copy.deepcopy(member, memo) for name, member in self.members.items()}
        for name, member in twin.members.items():
            member.join(name, twin.members)
        twin._link()
        return twin

    @property
    def network(self) -> nn.Module | None:
        """The networks of all members by name."""
        found = {name: member.network for name, member in self.members.items() if member.network is not None}
        return nn.ModuleDict(found) if found else None

    def member_of(self, tap: Tap) -> tuple[str, Tap]:
        """Split a tap into the member and its own tap.

        Args:
            tap: a tap of the group.

        Returns:
            Name of the member, and the tap in it.

        Raises:
            TapError: it names no member.
        """
        name, _, module = tap.module.partition('.')
        if name not in self.members or not module:
            raise TapError(
                f'{type(self).__name__}: a tap of the teacher must begin with the name of a teacher, got '
                f'{str(tap)!r}. {suggest(name, self.members)}'
            )
        return name, replace(tap, module=module)

    def _split(self, taps: Iterable[Tap]) -> dict[str, dict[Tap, Tap]]:
        """For each member its own taps, and whose they are."""
        parts: dict[str, dict[Tap, Tap]] = {name: {} for name in self.members}
        for tap in taps:
            name, own = self.member_of(tap)
            parts[name][own] = tap
        for name, member in self.members.items():
            for whole in member.beside:
                other, own = self.member_of(whole)
                parts[other].setdefault(own, whole)
            if isinstance(member, TeacherMean):
                for own in parts[name]:
                    for other in member.weights:
                        parts[other].setdefault(own, replace(own, module=f'{other}.{own.module}'))
        return parts

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Introduce each member to the student."""
        for member in self.members.values():
            member.attach(student, config)

    def listen(self, taps: Iterable[Tap]) -> None:
        """Tell each member what is asked of it."""
        for name, own in self._split(taps).items():
            self.members[name].listen(list(own))
        self._link()

    def begin(self, student: nn.Module) -> None:
        """Tell each member."""
        for member in self.members.values():
            member.begin(student)

    def _each(self, parts: Mapping[str, Mapping[Tap, Tap]], ask: Callable[..., Records]) -> dict[Tap, list[Tensor]]:
        """Ask each member; those that look at others go behind them, means last."""
        found: dict[Tap, list[Tensor]] = {}
        ordered = sorted(
            self.members,
            key=lambda name: (isinstance(self.members[name], TeacherMean), bool(self.members[name].beside)),
        )
        shown: dict[str, Records] = {}
        for name in ordered:
            member, own = self.members[name], parts[name]
            if isinstance(member, TeacherMean):
                shown[name] = member.mean(list(own), shown)
            elif own or member.is_trained:
                shown[name] = ask(member, list(own), {tap: found[tap] for tap in member.beside})
            else:
                continue
            found.update({whole: shown[name][tap] for tap, whole in own.items()})
        return found

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> ProbedTensors:
        """Probe each member."""
        parts = self._split(taps)
        passes: dict[Tap, int] = {}
        partial: list[bool] = []

        def ask(member: TeacherSource, own: list[Tap], others: Records) -> Records:
            more = {} if regions is None else {'regions': regions}
            known = {**(student or {}), **others}
            seen = member.probe(inputs, data_samples, own, student=known, targets=targets, **more)
            name = next(key for key, value in self.members.items() if value is member)
            passes.update({whole: seen.passes[tap] for tap, whole in parts[name].items()})
            partial.append(seen.partial)
            return seen.records

        found = self._each(parts, ask)
        self._link()
        for tap, tensors in found.items():
            passes.setdefault(tap, len(tensors))
        return ProbedTensors(found, passes, any(partial))

    def observe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        regions: Regions | None = None,
        labelled: bool = True,
    ) -> dict[Tap, list[Tensor]]:
        """Ask each member that is tapped, or that trains."""

        def ask(member: TeacherSource, own: list[Tap], others: Records) -> Records:
            known = {**(student or {}), **others}
            return member.observe(inputs, data_samples, own, student=known, regions=regions, labelled=labelled)

        return self._each(self._split(taps), ask)

    def observe_stream(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records,
        plain: Records,
        blend: Blend | None = None,
    ) -> dict[Tap, list[Tensor]]:
        """Ask each member that is tapped, or that trains."""

        def ask(member: TeacherSource, own: list[Tap], others: Records) -> Records:
            known = {**student, **others}
            return member.observe_stream(inputs, data_samples, own, student=known, plain=plain, blend=blend)

        return self._each(self._split(taps), ask)

    def objectives(self, student: Records, targets: Targets) -> dict[str, Any]:
        """Those of all members, each with its name in the keys."""
        return {
            f'{name}_{key}': value
            for name, member in self.members.items()
            if member.is_trained
            for key, value in member.objectives(student, targets).items()
        }

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move each member's own."""
        for member in self.members.values():
            member.move(function)

    def set_progress(self, step: int, last: int) -> None:
        """Tell each member."""
        for member in self.members.values():
            member.set_progress(step, last)

    def after_step(self, student: nn.Module) -> None:
        """Tell each member."""
        for member in self.members.values():
            member.after_step(student)

    def interval_factor(self, step: int, taps: Iterable[Tap] = ()) -> float:
        """That of the member that is tapped; several in one term must have one."""
        asked: dict[str, list[Tap]] = {}
        for tap in taps:
            name, own = self.member_of(tap)
            member = self.members[name]
            for other in member.weights if isinstance(member, TeacherMean) else (name,):
                asked.setdefault(other, []).append(own)
        factors = {self.members[name].interval_factor(step, own) for name, own in asked.items()}
        if len(factors) > 1:
            raise ConfigError(
                f'{type(self).__name__}: teachers that one term taps must have the same `every`, got {sorted(asked)}.'
            )
        return factors.pop() if factors else 1.0

    @property
    def period(self) -> int:
        """Steps after which what is asked of all members repeats."""
        return math.lcm(*(member.period for member in self.members.values()))

    def repeatable(self) -> str:
        """No: some members may be, each for itself."""
        return f'Each teacher has a cache of its own: give `cache` to one of {sorted(self.members)}.'

    def cannot_rest(self) -> str:
        """Why not: each member has a pace of its own."""
        return f'Each teacher has a pace of its own: give `every` to one of {sorted(self.members)}.'

    def held_modules(self) -> list[nn.Module]:
        """Those of all members, each once."""
        found = {id(one): one for member in self.members.values() for one in member.held_modules()}
        return list(found.values())

    def without_cache(self) -> None:
        """Tell each member."""
        for member in self.members.values():
            member.without_cache()

    def report(self) -> list[str]:
        """Those of all members, each with its name."""
        return [f'{name}: {line}' for name, member in self.members.items() for line in member.report()]

    def member(self, tap: Tap) -> TeacherSource:
        """The member that is tapped; of a mean its first teacher."""
        name, own = self.member_of(tap)
        member = self.members[name]
        if isinstance(member, TeacherMean):
            member = self.members[next(iter(member.weights))]
        return member.member(own)

    def has_learned(self, tap: Tap) -> bool:
        """Whether the member that is tapped has; of a mean its first teacher."""
        return self.member(tap).has_learned(self.member_of(tap)[1])

    def part_of(self, tap: Tap) -> tuple[nn.Module | None, Tap]:
        """The member's network, and the tap in it."""
        name, own = self.member_of(tap)
        return self.members[name].part_of(own)

    def parameter_groups(self) -> list[tuple[dict | None, list[nn.Parameter]]]:
        """Those of all members."""
        return [group for member in self.members.values() for group in member.parameter_groups()]

    def num_classes(self, tap: Tap) -> int | None:
        """Of the member that is tapped."""
        name, own = self.member_of(tap)
        return self.members[name].num_classes(own)

    def provenance(self) -> dict[str, Any]:
        """That of each member by name."""
        return {
            'type': type(self).__name__,
            'members': {name: member.provenance() for name, member in self.members.items()},
        }
