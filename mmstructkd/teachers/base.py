"""The interface of every teacher: whatever can show tensors at taps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Regions, Tap
from mmstructkd.tasks.targets import head_of, num_classes_of

__all__ = ['Records', 'Shown', 'TeacherSource']

Records = Mapping[Tap, list[Tensor]]


@dataclass
class Shown:
    """What a source of several networks showed in a probe, in the form of a :class:`~mmstructkd.taps.Capture`.

    Attributes:
        records: for each tap its tensors.
        passes: how often each was passed.
        partial: whether a network stopped behind its taps.
    """

    records: dict[Tap, list[Tensor]]
    passes: dict[Tap, int]
    partial: bool = False


class TeacherSource(ABC):
    """Gives the teacher's tensor at each tap for a batch.

    Terms know nothing else about a teacher. A source is no ``nn.Module``, so a
    distiller that holds one does not own what is inside: it is in no
    ``parameters()``, ``state_dict()``, EMA copy or DDP bucket. What a source does
    train, or keeps from step to step, lies in :attr:`trained`, which the distiller
    owns: it moves, is optimised and resumed with the terms, and is never in a
    ``state_dict()`` or an exported file.

    Attributes:
        hooks: hooks that it needs in a run, by name.
        reads: taps of the student that it looks at.
        beside: taps of other members of its group that it looks at, with their names.
        follows: it shows nothing before the student has run.
        trained: modules that train beside the student (or an average that is
            kept); ``None``: there are none. Set by :meth:`probe` at the latest.
        own_optimizer: config of an optimiser for ``trained``; ``None``: they go
            with the student's settings.
        terms: terms of its own by name, between it and the student with the
            roles swapped; they follow their schedules as all terms do.
        network: what its taps name; ``None`` until there is one.
    """

    hooks: tuple[str, ...] = ()
    reads: tuple[Tap, ...] = ()
    beside: tuple[Tap, ...] = ()
    follows: bool = False
    trained: nn.Module | None = None
    own_optimizer: dict | None = None
    terms: Mapping[str, Any] = {}
    network: nn.Module | None = None

    def join(self, name: str, members: Mapping[str, TeacherSource]) -> None:
        """Learn which other teachers there are, before :meth:`attach`; one that stands alone is not told.

        Args:
            name: its own name in the group.
            members: all of the group.
        """
        return

    @abstractmethod
    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Learn about the student, once, before anything else is asked.

        Args:
            student: the student.
            config: its config, where it was given as one.
        """

    def begin(self, student: nn.Module) -> None:
        """Called when the student has been initialised, before any weights are loaded into it.

        Args:
            student: the student.
        """
        return

    @abstractmethod
    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> Capture | Shown:
        """Run once on a small input, plan later runs by it, and build what depends on sizes.

        Args:
            inputs: a small batch in the student's normalisation.
            data_samples: one per image, or ``None``.
            taps: every tap that will be asked for.
            student: the student's tensors at :attr:`reads`.
            targets: what the batches of the task know.
            regions: what the student's RoI and point heads looked at, where it has chosen them.

        Returns:
            The tensors at ``taps``, and how often each was passed.
        """

    @abstractmethod
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
        """Return the tensors at ``taps`` for a batch of the student.

        They may have a graph: every loss detaches its teacher's side.

        Args:
            inputs: a batch in the student's normalisation, shape (B, 3, H, W).
            data_samples: one per image, or ``None``.
            taps: taps that were probed.
            student: the student's tensors at :attr:`reads`, for a source that
                :attr:`follows`.
            regions: those that the student's RoI head pooled, where a tap lies in
                the teacher's.
            labelled: whether the samples have the labels of the task; without them a
                source that trains shows tensors and has no objective.
        """

    def objectives(self, student: Records, targets: Targets) -> dict[str, Any]:
        """Its own losses of the batch that was observed last, weighted, by log key.

        Args:
            student: the student's tensors at :attr:`reads`.
            targets: what the batch knows.

        Returns:
            Losses (summed with the student's where the key contains ``loss``) and
            numbers that are only logged.
        """
        return {}

    @abstractmethod
    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what the distiller's ``.to()`` applies to its own tensors, to what ``trained`` does not hold."""

    def set_progress(self, step: int, last: int) -> None:
        """Called before each iteration; a pure function of the progress, so that resuming needs no state.

        Args:
            step: iterations done so far.
            last: iterations of the training.
        """
        return

    def after_step(self, student: nn.Module) -> None:
        """Called after each iteration, when the student has been updated.

        Args:
            student: the student.
        """
        return

    def pace(self, step: int, taps: Iterable[Tap] = ()) -> float:
        """Factor of the terms on some taps at a step: 0 where the teacher is not asked.

        Args:
            step: iterations done so far.
            taps: the teacher's taps of a term.

        Returns:
            1, unless the source leaves out steps; then the mean over them is 1.
        """
        return 1.0

    def without_cache(self) -> None:
        """Keep no outputs from now on: for whoever tries a batch, or measures what the teacher costs."""
        return

    def report(self) -> list[str]:
        """What to log when the training ends, a line each."""
        return []

    def member(self, tap: Tap) -> TeacherSource:
        """The teacher that a tap lies in: this one, or one of several."""
        return self

    def has_learned(self, tap: Tap) -> bool:
        """Whether what a tap lies in knows the task before this training, so that it may be held against labels."""
        return getattr(self, 'checkpoint', '') is not None

    def part_of(self, tap: Tap) -> tuple[nn.Module | None, Tap]:
        """The network that a tap lies in, and the tap as that network names it."""
        return self.network, tap

    def resolve(self, tap: Tap, owner: str) -> None:
        """Check that a tap names a module, as far as the network is there already.

        Args:
            tap: a tap of the teacher.
            owner: who asks, for the message.

        Raises:
            TapError: it names nothing.
        """
        network, own = self.part_of(tap)
        if network is not None:
            own.resolve(network, owner)

    def parameter_groups(self) -> list[tuple[dict | None, list[nn.Parameter]]]:
        """What is optimised of :attr:`trained`, with the settings of an optimiser of its own or ``None``."""
        found = [] if self.trained is None else [p for p in self.trained.parameters() if p.requires_grad]
        return [(self.own_optimizer, found)] if found else []

    def num_classes(self, tap: Tap) -> int | None:
        """Number of classes of the network that a tap lies in, where it has a head that knows."""
        return None if self.network is None else num_classes_of(head_of(self.network))

    @property
    def is_trained(self) -> bool:
        """Whether it has parameters that are optimised: it then runs at each step, whatever the terms do."""
        return self.trained is not None and any(p.requires_grad for p in self.trained.parameters())

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Say in plain values what this teacher is; saved with checkpoints."""
