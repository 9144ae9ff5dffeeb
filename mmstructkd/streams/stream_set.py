"""The streams of one distiller: which terms may use them, and what these make of their batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, shown, suggest
from mmstructkd.streams.base import Stream, StreamBatch, statistics_kept
from mmstructkd.streams.building import LABELLED, build_streams
from mmstructkd.streams.preprocessing import StreamPreprocessor
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Observation, Tap

if TYPE_CHECKING:
    from mmstructkd.teachers import TeacherSource
    from mmstructkd.teachers.base import Records
    from mmstructkd.terms import Term

__all__ = ['StreamSet', 'TrainingBatch']

#: Runs the student on the batch of a stream: its taps, and the batch's targets as the student sees it.
RunStudent = Callable[[StreamBatch, Sequence[Tap]], tuple[Capture, Targets]]


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """The labelled batch of a step, of which streams make theirs.

    Attributes:
        inputs: images in the student's normalisation, shape (B, 3, H, W).
        data_samples: one per image.
        targets: what the task knows of it.
        others: batches of streams that read data, by name.
        step: iterations done so far.
        student: the student's tensors on it, at the taps that the teacher reads.
    """

    inputs: Tensor
    data_samples: Sequence[Any] | None
    targets: Targets
    others: Mapping[str, Any]
    step: int
    student: Records = field(default_factory=dict)


class StreamSet(Mapping[str, Stream]):
    """Streams by name, and the terms' comparison on them.

    Args:
        config: a config of each stream by name; ``None``: there is none.

    Raises:
        ConfigError: see :func:`~mmstructkd.streams.build_streams`.
    """

    def __init__(self, config: Any) -> None:
        self._streams = build_streams(config)

    def __getitem__(self, name: str) -> Stream:
        return self._streams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._streams)

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def reading(self) -> list[str]:
        """Names of the streams that read images of their own from the data loader."""
        return [name for name, stream in self.items() if stream.reads_data]

    def wrap_preprocessor(self, preprocessor: nn.Module) -> nn.Module:
        """The student's data preprocessor, for the batches of streams as well where any reads data."""
        return StreamPreprocessor(preprocessor, self.reading) if self.reading else preprocessor

    def check_terms(self, terms: Iterable[Term], teacher: TeacherSource) -> None:
        """Check that each term compares on streams that there are, and that know what it needs.

        Args:
            terms: all terms of the distiller.
            teacher: source of the teacher's tensors.

        Raises:
            ConfigError: no such stream, a loss that needs labels on a stream without
                any, taps in a RoI head, or a teacher that shows nothing there.
        """
        for term in terms:
            for tap in term.teacher_taps:
                self._check_place(term, teacher.member(tap))
            for name in term.on:
                self._warn_without_views(term, name)
                if name != LABELLED:
                    self._check_term(term, name)

    def _warn_without_views(self, term: Term, name: str) -> None:
        """Say so where a loss that compares views is given a batch of one."""
        if term.loss.needs_views and not (self[name].views if name in self else ()):
            print_log(
                f'term {term.name!r}: {type(term.loss).__name__} compares turned copies with the upright batch, '
                f"and {name!r} does not hold both: it compares the images with themselves. Set on='<stream>' "
                "with streams=dict(<stream>=dict(type='mmstructkd.TurnedStream', turns=('none', 'half'))).",
                'current',
                level=logging.WARNING,
            )

    def _check_place(self, term: Term, teacher: TeacherSource) -> None:
        """Check that a teacher that shows something on one stream alone is asked there, and that there are blends."""
        name = teacher.stream
        if name is None:
            return
        owner = type(teacher).__name__
        if name not in self:
            raise ConfigError(
                f'{owner}: `stream` must name a stream of the distiller, got {name!r}. {suggest(name, [*self])}'
            )
        if not self[name].blends:
            raise ConfigError(
                f'{owner}: `stream` must name a stream of blends, got {name!r}, a {type(self[name]).__name__}. Set '
                f"streams=dict({name}=dict(type='mmstructkd.MixedStream'))."
            )
        if tuple(term.on) != (name,):
            raise ConfigError(
                f'term {term.name!r}: `on` must be {name!r} with a {owner}, got {shown(list(term.on))}. It shows '
                f'nothing on other batches: set on={name!r}.'
            )

    def _check_term(self, term: Term, name: str) -> None:
        """Check one term on one stream."""
        if name not in self:
            raise ConfigError(
                f'term {term.name!r}: `on` must name a stream of the distiller, got {name!r}. '
                f'{suggest(name, [LABELLED, *self])}'
            )
        asking = [loss for loss in term.losses if loss.needs_labels or loss.where == 'labelled']
        if asking and not self[name].labelled:
            raise ConfigError(
                f'term {term.name!r}: `on` must name a stream with labels for {type(asking[0]).__name__}, got '
                f"{name!r}, which has none. Take on='labelled', or a loss (or where='inside') that needs none."
            )
        if term.on_regions:
            raise ConfigError(
                f'term {term.name!r}: `on` must be {LABELLED!r} for taps in a RoI head, got {name!r}. Its '
                'regions are chosen with the labels of the batch: tap the neck.'
            )

    def score(
        self,
        run_student: RunStudent,
        teacher: TeacherSource,
        terms: Collection[Term],
        batch: TrainingBatch,
        trained: Sequence[nn.Module],
    ) -> dict[str, dict[str, Tensor]]:
        """Compare both networks on each stream that a term asks for.

        Args:
            run_student: runs the student on the batch of a stream.
            teacher: source of the teacher's tensors.
            terms: all terms, those that do not count at this step included.
            batch: the labelled batch.
            trained: the student and what trains beside it, whose statistics a stream
                with ``norm='frozen'`` keeps.

        Returns:
            By term and stream its losses, with the stream's name in the keys.
        """
        scores: dict[str, dict[str, Tensor]] = {}
        for name, stream in self.items():
            here = [term for term in terms if name in term.on]
            active = [term for term in here if term.active]
            seen = Observation(Capture(trained[0], ()), {}, batch.targets, None)
            if active:
                others = batch.others.get(name) or {}
                made = stream.make(batch.inputs, batch.data_samples, batch.targets, others, batch.step)
                with statistics_kept(*(trained if stream.norm == 'frozen' else ())):
                    seen = _observe(run_student, teacher, made, active, batch.student)
            for term in here:
                if not active or term in active:
                    scored = term(seen.student, seen.teacher, seen.targets, None)
                    scores[f'{term.name} on {name}'] = {f'{key}_{name}': value for key, value in scored.items()}
                else:
                    scores[f'{term.name} on {name}'] = {f'loss_kd_{term.name}_{name}': term.zero_loss()}
        return scores


def _observe(
    run_student: RunStudent, teacher: TeacherSource, batch: StreamBatch, terms: Sequence[Term], plain: Records
) -> Observation:
    """Run both networks on a batch of a stream."""
    teacher_taps = [tap for term in terms for tap in term.teacher_taps]
    student_taps = list(dict.fromkeys([tap for term in terms for tap in term.student_taps]))
    student_taps += [tap for tap in teacher.reads if tap not in student_taps]
    capture, targets = run_student(batch, student_taps)
    teachers = teacher.observe_stream(
        batch.inputs, batch.data_samples, teacher_taps, student=capture.records, plain=plain, blend=batch.blend
    )
    return Observation(capture, teachers, targets, None)
