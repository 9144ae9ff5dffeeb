"""What wrappers of a teacher have in common: all that they do not change is the wrapped teacher's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmstructkd.structures import Blend, Targets
from mmstructkd.taps import Capture, Regions, Tap
from mmstructkd.teachers.base import ProbedTensors, Records, Repeatable, TeacherSource

__all__ = ['TeacherWrapper']


class TeacherWrapper(TeacherSource):
    """A teacher that hands each question on to another one; subclasses answer some themselves.

    Args:
        wrapped: the teacher that is asked.
    """

    def __init__(self, wrapped: TeacherSource) -> None:
        self.wrapped = wrapped

    def __deepcopy__(self, memo: dict) -> TeacherWrapper:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin.wrapped = copy.deepcopy(self.wrapped, memo)
        return twin

    @property
    def hooks(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the wrapped teacher."""
        return self.wrapped.hooks

    @property
    def reads(self) -> tuple[Tap, ...]:  # type: ignore[override]
        """Those of the wrapped teacher."""
        return self.wrapped.reads

    @property
    def beside(self) -> tuple[Tap, ...]:  # type: ignore[override]
        """Those of the wrapped teacher."""
        return self.wrapped.beside

    @property
    def follows(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher does."""
        return self.wrapped.follows

    @property
    def stream(self) -> str | None:  # type: ignore[override]
        """That of the wrapped teacher."""
        return self.wrapped.stream

    @property
    def trained(self) -> nn.Module | None:  # type: ignore[override]
        """What the wrapped teacher trains."""
        return self.wrapped.trained

    @property
    def own_optimizer(self) -> dict | None:  # type: ignore[override]
        """That of the wrapped teacher."""
        return self.wrapped.own_optimizer

    @property
    def terms(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Those of the wrapped teacher."""
        return self.wrapped.terms

    @property
    def network(self) -> nn.Module | None:  # type: ignore[override]
        """That of the wrapped teacher."""
        return self.wrapped.network

    @property
    def compiled(self) -> bool:  # type: ignore[override]
        """Whether the wrapped teacher is."""
        return self.wrapped.compiled

    @property
    def period(self) -> int:
        """That of the wrapped teacher."""
        return self.wrapped.period

    @property
    def is_trained(self) -> bool:
        """Whether the wrapped teacher is."""
        return self.wrapped.is_trained

    @property
    def unwrapped(self) -> TeacherSource:
        """The teacher itself."""
        return self.wrapped.unwrapped

    def join(self, name: str, members: Mapping[str, TeacherSource]) -> None:
        """Introduce the wrapped teacher to the others."""
        self.wrapped.join(name, members)

    def listen(self, taps: Iterable[Tap]) -> None:
        """Tell the wrapped teacher."""
        self.wrapped.listen(taps)

    def begin(self, student: nn.Module) -> None:
        """Tell the wrapped teacher."""
        self.wrapped.begin(student)

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Introduce the wrapped teacher to the student."""
        self.wrapped.attach(student, config)

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> Capture | ProbedTensors:
        """Probe the wrapped teacher."""
        return self.wrapped.probe(inputs, data_samples, taps, student=student, targets=targets, regions=regions)

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
        """Ask the wrapped teacher."""
        return self.wrapped.observe(inputs, data_samples, taps, student=student, regions=regions, labelled=labelled)

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
        """Ask the wrapped teacher."""
        return self.wrapped.observe_stream(inputs, data_samples, taps, student=student, plain=plain, blend=blend)

    def objectives(self, student: Records, targets: Targets) -> dict[str, Any]:
        """Those of the wrapped teacher."""
        return self.wrapped.objectives(student, targets)

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move the wrapped teacher."""
        self.wrapped.move(function)

    def set_progress(self, step: int, last: int) -> None:
        """Tell the wrapped teacher."""
        self.wrapped.set_progress(step, last)

    def after_step(self, student: nn.Module) -> None:
        """Tell the wrapped teacher."""
        self.wrapped.after_step(student)

    def interval_factor(self, step: int, taps: Iterable[Tap] = ()) -> float:
        """That of the wrapped teacher."""
        return self.wrapped.interval_factor(step, taps)

    def repeatable(self) -> Repeatable | str:
        """The wrapped teacher as a function of the image, or why it is none."""
        return self.wrapped.repeatable()

    def cannot_rest(self) -> str | None:
        """Why the wrapped teacher cannot leave out steps."""
        return self.wrapped.cannot_rest()

    def without_cache(self) -> None:
        """Tell the wrapped teacher."""
        self.wrapped.without_cache()

    def report(self) -> list[str]:
        """What the wrapped teacher has to say."""
        return self.wrapped.report()

    def member(self, tap: Tap) -> TeacherSource:
        """The teacher that the tap lies in, without wrappers."""
        return self.wrapped.member(tap)

    def has_learned(self, tap: Tap) -> bool:
        """Whether the wrapped teacher has."""
        return self.wrapped.has_learned(tap)

    def part_of(self, tap: Tap) -> tuple[nn.Module | None, Tap]:
        """The wrapped teacher's network, and the tap in it."""
        return self.wrapped.part_of(tap)

    def resolve(self, tap: Tap, owner: str) -> None:
        """Check the tap in the wrapped teacher."""
        self.wrapped.resolve(tap, owner)

    def parameter_groups(self) -> list[tuple[dict | None, list[nn.Parameter]]]:
        """Those of the wrapped teacher."""
        return self.wrapped.parameter_groups()

    def num_classes(self, tap: Tap) -> int | None:
        """Of the wrapped teacher's network."""
        return self.wrapped.num_classes(tap)

    def held_modules(self) -> list[nn.Module]:
        """Those of the wrapped teacher."""
        return self.wrapped.held_modules()

    def provenance(self) -> dict[str, Any]:
        """That of the wrapped teacher: a wrapper changes neither weights nor what they show."""
        return self.wrapped.provenance()
