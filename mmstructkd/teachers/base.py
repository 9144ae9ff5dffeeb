"""The interface of every teacher: whatever can show tensors at taps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmstructkd.errors import ConfigError
from mmstructkd.structures import Blend, Targets
from mmstructkd.taps import Capture, Regions, Tap
from mmstructkd.tasks.targets import head_of, num_classes_of

__all__ = ['LEARNS', 'ProbedTensors', 'Records', 'Repeatable', 'TeacherSource', 'check_one_batch']

Records = Mapping[Tap, list[Tensor]]
#: Why a teacher that learns cannot leave out steps.
LEARNS = 'It learns in this training and runs at each step whatever the terms do: resting would save nothing.'


@dataclass
class ProbedTensors:
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
        stream: name of the only stream on which it shows anything; ``None``: it shows on each batch.
        trained: modules that train beside the student (or an average that is
            kept); ``None``: there are none. Set by :meth:`probe` at the latest.
        own_optimizer: config of an optimiser for ``trained``; ``None``: they go
            with the student's settings.
        terms: terms of its own by name, between it and the student with the
            roles swapped; they follow their schedules as all terms do.
        network: what its taps name; ``None`` until there is one.
        compiled: its network runs through ``torch.compile``.
    """

    #: What the config of each may have besides, see :func:`~mmstructkd.teachers.building.build_source`.
    config_options: ClassVar[tuple[str, ...]] = ('every', 'cache')

    hooks: tuple[str, ...] = ()
    reads: tuple[Tap, ...] = ()
    beside: tuple[Tap, ...] = ()
    follows: bool = False
    stream: str | None = None
    trained: nn.Module | None = None
    own_optimizer: dict | None = None
    terms: Mapping[str, Any] = {}
    network: nn.Module | None = None
    compiled: bool = False

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

    def listen(self, taps: Iterable[Tap]) -> None:
        """Learn, before the probe, what will be asked for; :attr:`reads` may depend on it.

        Args:
            taps: every tap that terms have of it.
        """
        return

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
    ) -> Capture | ProbedTensors:
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
        """Return the tensors at ``taps`` for the batch of a stream: those of :meth:`observe` without labels.

        Args:
            inputs: its images in the student's normalisation, shape (B', 3, h, w).
            data_samples: one per image, or ``None``.
            taps: taps that were probed.
            student: the student's tensors at :attr:`reads` on it.
            plain: those on the labelled batch that the stream was made of.
            blend: how that was blended, where the images are blends.
        """
        return self.observe(inputs, data_samples, taps, student=student, labelled=False)

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

    def interval_factor(self, step: int, taps: Iterable[Tap] = ()) -> float:
        """Factor of the terms on some taps at a step: 0 where the teacher is not asked.

        Args:
            step: iterations done so far.
            taps: the teacher's taps of a term.

        Returns:
            1, unless the source leaves out steps; then the mean over them is 1.
        """
        return 1.0

    @property
    def period(self) -> int:
        """Steps after which what is asked of it repeats."""
        return 1

    @property
    def unwrapped(self) -> TeacherSource:
        """The teacher itself, without wrappers."""
        return self

    def repeatable(self) -> Repeatable | str:
        """Itself as a function of the image alone, for a cache; or why it is none, in a sentence."""
        return 'It does not say that what it shows depends on the image alone, so none of it can be kept.'

    def cannot_rest(self) -> str | None:
        """Why it cannot leave out steps, in a sentence; ``None``: it can."""
        if self.is_trained:
            return LEARNS
        return None

    def held_modules(self) -> list[nn.Module]:
        """Modules that it keeps in memory and the distiller does not own; tensors may be shared among them."""
        return []

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


class Repeatable(TeacherSource):
    """A teacher whose tensors for an image can be made a function of that image alone.

    A :class:`~mmstructkd.teachers.cached.CachedTeacher` keeps them.
    """

    def repeatable(self) -> Repeatable | str:
        """Itself."""
        return self

    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that decides its tensors before it has met a student: config, weights, options."""

    @abstractmethod
    def run_state(self, device: torch.device) -> list[Any]:
        """What decides its tensors besides, at this moment (precision, ...), in plain values.

        Args:
            device: of the images.
        """

    @property
    @abstractmethod
    def wants_whole_batches(self) -> bool:
        """Whether a part of a batch costs more than all of it."""

    @abstractmethod
    def check_repeatable(self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Sequence[Tap]) -> None:
        """Find out, after a probe, how an image must be run to show the same each time.

        Args:
            inputs: one image in the student's normalisation.
            data_samples: its sample, or ``None``.
            taps: those that were probed.

        Raises:
            ConfigError: it shows something else each time.
        """

    @abstractmethod
    def observe_each(
        self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Sequence[Tap]
    ) -> dict[Tap, list[Tensor]]:
        """Show each image as it would alone, at any step.

        Args:
            inputs: a batch, or a part of one, in the student's normalisation.
            data_samples: one per image, or ``None``.
            taps: taps that were probed.

        Returns:
            For each tap its tensors, without graph.
        """


def check_one_batch(owner: str, inputs: Any) -> None:
    """Refuse batches in branches.

    Args:
        owner: the teacher, for the message.
        inputs: what should be one tensor of images.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(inputs, Tensor):
        branches = f' of {sorted(map(str, inputs))}' if isinstance(inputs, Mapping) else ''
        raise ConfigError(
            f'{owner}: `inputs` must be one batch of images, got {type(inputs).__name__}{branches}. Batches '
            'in branches (semi-supervised training) cannot be distilled: give the student a data preprocessor '
            'that makes one batch.'
        )
