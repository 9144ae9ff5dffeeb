"""One thing that is transferred: its taps, its connectors, its loss, its weight over time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, TapError, check_one_of, prefix_errors
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.functional.core.sharing import once
from mmstructkd.functional.sample_selection import confident_pixels
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.positions import PLACES
from mmstructkd.structures import Targets
from mmstructkd.taps import Regions, in_region_head, shows_regions
from mmstructkd.tasks.targets import point_targets, region_targets, repeat_targets
from mmstructkd.terms.depth_order import check_depth_order
from mmstructkd.terms.matching import Records, recorded, repeat_for_branches, repeat_for_cascade
from mmstructkd.terms.reading import (
    MATCHES,
    build_loss,
    read_confidence,
    read_outputs,
    read_sides,
    read_streams,
    read_taps,
)
from mmstructkd.terms.schedule import WeightSchedule

__all__ = ['Level', 'Term']

#: Modules whose output is a depth map in a depth estimator.
DEPTH_MAPS = ('to_depth', 'decode_head')
#: How many steps may look whether the teacher's depth agrees with the ground truth.
DEPTH_CHECKS = 3


@dataclass(frozen=True)
class Level:
    """What the probe saw at one pair of tapped tensors.

    Attributes:
        student_tap: the student's tap, with the number of the call where a
            module is called several times.
        teacher_tap: the teacher's.
        student: shape of the student's tensor.
        teacher: shape of the teacher's tensor.
        connector: what stands between them.
    """

    student_tap: str
    teacher_tap: str
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    connector: str


class Term(nn.Module):
    """A pair of taps (or of lists of taps), made comparable and scored.

    Args:
        name: name of the term; its loss is logged as ``loss_kd_<name>``.
        tap: a tap, a list of taps, or ``dict(student=..., teacher=...)`` of them.
        loss: config of a registered loss.
        connector: config of a registered connector; ``None``: a 1x1 convolution
            where the loss needs equal widths and they differ.
        schedule: config of a :class:`WeightSchedule`; ``None``: constant.
        match: how the levels of a pyramid find each other: ``'stride'``, by the
            size of their maps (any order and number, each of the student's must
            find one of the teacher's; those of the teacher that none asks for
            are left out), or ``'order'``, first with first.
        where: which positions count: ``'inside'`` the images, labelled or not,
            or only the ``'labelled'`` ones (for depth: where the ground truth
            has a reading). ``None``: what the loss's method published.
        on: the batches on which it compares: ``'labelled'``, the one that the task is
            trained on, or streams of the distiller by name.
        confidence: ``dict(minimum=0.9, by='both')``: positions of which the networks are
            less sure do not count (selection of KD3, arXiv:2307.11469). ``by='teacher'``
            takes the largest probability of the teacher, ``'both'`` that of the teacher
            times that of the student. For taps at scores of classes; ``None``: all count.
    """

    def __init__(
        self,
        name: str,
        tap: Any,
        loss: dict,
        connector: dict | None = None,
        schedule: dict | None = None,
        match: str = 'stride',
        where: str | None = None,
        on: str | Sequence[str] = 'labelled',
        confidence: dict | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        owner = f'term {name!r}'
        sides = read_sides(tap, owner)
        check_one_of(owner, 'match', match, MATCHES)
        self.match = match
        self.student_taps = read_taps(sides['student'], f'{owner}: `student`')
        self.teacher_taps = read_outputs(read_taps(sides['teacher'], f'{owner}: `teacher`'), connector)
        self.connector_config = copy.deepcopy(connector)
        self.loss_config = copy.deepcopy(loss)
        if where is not None:
            check_one_of(owner, 'where', where, PLACES)
        self.where = where
        self.on = read_streams(on, owner)
        self.confidence = read_confidence(confidence, owner)
        self.schedule = WeightSchedule.from_config(schedule, owner)
        self.factor = self.schedule.factor(0, 1)
        self.interval_factor = 1.0  # of the teacher, see TeacherSource.interval_factor
        self.used = False  # since the last update; what is not used does not move in it
        self.losses = nn.ModuleList([build_loss(owner, self.loss_config, where)])
        self.connectors = nn.ModuleList()
        self.joint = False  # whether one connector sees all levels and both networks
        self.on_points = False  # whether the taps lie in a head that scores points of its own choice
        self.teacher_order: tuple[int, ...] | None = None  # the teacher's tensor for each of the student's
        self.branches = 1  # copies of the batch that the student trains on, see branches_of
        self.levels: tuple[Level, ...] = ()
        self.log_keys: tuple[str, ...] = ()
        self.by_class = False  # whether class k of the student stands against class k of the teacher
        self.depth_checks_left = DEPTH_CHECKS

    @property
    def loss(self) -> DistillLoss:
        """The loss of the first level; the others are built alike."""
        return self.losses[0]

    @property
    def active(self) -> bool:
        """Whether the term counts at this point of the training."""
        return self.factor > 0 and self.interval_factor > 0 and self.loss.loss_weight > 0

    @property
    def on_regions(self) -> bool:
        """Whether the taps lie in RoI heads, so that both must pool the same regions."""
        return any(in_region_head(tap) for tap in self.student_taps)

    def tensors(self, student: Records, teacher: Records) -> tuple[list[Tensor], list[Tensor]]:
        """Collect what the taps recorded.

        Args:
            student: records of the student's capture.
            teacher: records of the teacher.

        Returns:
            Tensors of the student, and those of the teacher in the order of the
            student's where the probe has matched them.

        Raises:
            TapError: a tap was not passed.
        """
        owner = f'term {self.name!r}'
        students = recorded(owner, 'student', self.student_taps, student)
        teachers = recorded(owner, 'teacher', self.teacher_taps, teacher)
        if self.on_points:  # (B, C, P) of a point head: a map of P rows, so that losses over positions take it
            students, teachers = (
                [tensor[..., None] if tensor.dim() == 3 else tensor for tensor in side] for side in (students, teachers)
            )
        teachers = repeat_for_cascade(teachers, self.student_taps, self.teacher_taps, student, teacher)
        if self.teacher_order is not None:
            teachers = [teachers[place] for place in self.teacher_order]
        if self.branches > 1:
            teachers = repeat_for_branches(students, teachers, self.branches)
        return students, teachers

    def pairs(self, student: Records, teacher: Records) -> list[tuple[Tensor, Tensor]]:
        """Match what the taps recorded, level by level.

        Args:
            student: records of the student's capture.
            teacher: records of the teacher.

        Returns:
            Pairs of tensors; for a joint connector that takes other numbers of
            both, as many as there are of the student, with the teacher's last
            repeated.

        Raises:
            TapError: a tap was not passed, or the numbers differ.
        """
        students, teachers = self.tensors(student, teacher)
        if self.joint:
            teachers = (teachers + teachers[-1:] * len(students))[: len(students)]
        elif len(students) != len(teachers):
            way_out = 'Pick levels by index or list.'
            if self.branches > 1:
                way_out = (
                    f'The student trains with {self.branches} branches, and a module inside them runs once for each: '
                    'tap the stage that holds it, whose output has all of them.'
                )
            raise TapError(
                f'term {self.name!r}: `tap` must give as many tensors of the student as of the teacher, '
                f'got {len(students)} and {len(teachers)} ({[str(t) for t in self.student_taps]} and '
                f'{[str(t) for t in self.teacher_taps]}). {way_out}'
            )
        return list(zip(students, teachers, strict=True))

    def attach(self, network: nn.Module | None) -> None:
        """Show the teacher's network to connectors that use a part of it.

        Args:
            network: the network; ``None``: the source has none.

        Raises:
            ConfigError: a connector needs it and there is none.
        """
        for connector in self.connectors:
            if not getattr(connector, 'needs_teacher', False):
                continue
            if network is None:
                raise ConfigError(
                    f'`connector` {type(connector).__name__} needs the network of the teacher, '
                    'got a source without one. Use a FrozenTeacher.'
                )
            connector.attach(network)

    def comparable(
        self, students: list[Tensor], teachers: list[Tensor], input_size: tuple[int, int] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Bring the tensors of each level to equal width and size.

        Args:
            students: tensors of the student, as :meth:`tensors` gives them.
            teachers: those of the teacher.
            input_size: (h, w) of the student's input, where it is known.

        Returns:
            Pairs of tensors that the loss can take.
        """
        for connector in self.connectors:
            if getattr(connector, 'needs_input_size', False):
                connector.input_size = input_size
        if self.joint:
            students, teachers = self.connectors[0](students, teachers)
        else:
            students = [connector(tensor) for connector, tensor in zip(self.connectors, students, strict=True)]
        pairs = []
        for student, teacher in zip(students, teachers, strict=True):
            maps = student.dim() == teacher.dim() == 4
            if self.loss.needs_equal_size and maps and student.shape[2:] != teacher.shape[2:]:
                teacher = once(resize_map, teacher, tuple(student.shape[2:]))
            pairs.append((student, teacher))
        return pairs

    def forward(
        self,
        student: Records,
        teacher: Records,
        targets: Targets,
        regions: Regions | None = None,
        *,
        all_parts: bool = False,
    ) -> dict[str, Tensor]:
        """Score a batch.

        Args:
            student: the student's tapped tensors.
            teacher: the teacher's.
            targets: what the batch knows besides.
            regions: what the student's RoI head pooled, where it is tapped.
            all_parts: score although the term is not active (the probe does).

        Returns:
            ``loss_kd_<name>``, mean over levels, weighted; and
            ``loss_kd_<name>_<part>`` for objectives of the loss's own modules.
        """
        if not (self.active or all_parts):
            return {f'loss_kd_{self.name}': self.zero_loss()}
        self.used = self.used or torch.is_grad_enabled()
        targets = self._limited(targets)
        points = getattr(regions, 'points', ())
        if self.on_points and points:
            targets = point_targets(targets, points[0])
        known = self._targets_by_tensor(student, targets, regions)
        parts: dict[str, list[Tensor]] = {}
        if not self.joint:
            self.pairs(student, teacher)  # an equal number of both
        made = self.comparable(*self.tensors(student, teacher), targets.input_size)
        if self.depth_checks_left > 0 and self.training:
            self._check_depth(made, targets)
        for place, (loss, pair) in enumerate(zip(self.losses, made, strict=True)):
            mine, regional = known[min(place, len(known) - 1)]
            # a region has one label, which does not spread over a map of it
            if regional and mine.labels is not None and (pair[0].dim() == 4 or len(pair[0]) != len(mine.labels)):
                mine = dataclasses.replace(mine, labels=None)
            value = loss(*pair, self._confident(*pair, mine))
            for part, number in (value if isinstance(value, dict) else {'': value}).items():
                parts.setdefault(part, []).append(number)
        out = {}
        for part, numbers in parts.items():
            factor = self.interval_factor if part else self.interval_factor * self.factor
            out[f'loss_kd_{self.name}' + (f'_{part}' if part else '')] = torch.stack(numbers).mean() * factor
        return out

    def _targets_by_tensor(
        self, student: Records, targets: Targets, regions: Regions | None
    ) -> list[tuple[Targets, bool]]:
        """For each tensor of the student what is known of its rows, and whether these are regions."""
        known = []
        for tap in self.student_taps:
            calls = student[tap]
            for call, tensor in enumerate(calls):
                regional = regions is not None and shows_regions(tap)
                copied = self.branches > 1 and targets.images is not None
                mine = targets
                if regional:
                    mine = region_targets(targets, regions.behind(tap, call, len(calls)))
                elif copied and len(tensor) == self.branches * len(targets.images):
                    mine = repeat_targets(targets, self.branches)
                known.append((mine, regional))
        return known

    def _limited(self, targets: Targets) -> Targets:
        """The targets with the positions that count for the loss."""
        if self.loss.where != 'labelled':
            return dataclasses.replace(targets, valid=targets.inside)
        images = targets.images
        if self.loss.needs_labels or targets.labels is not None or targets.depth is not None or images is None:
            return targets
        # A batch without labels in a task that has them: nothing is labelled.
        nothing = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
        return dataclasses.replace(targets, valid=nothing)

    def _confident(self, student: Tensor, teacher: Tensor, targets: Targets) -> Targets:
        """The targets with the positions that the networks are sure of."""
        if self.confidence is None:
            return targets
        sure = confident_pixels(
            student, teacher, minimum=self.confidence.minimum, by=self.confidence.by, valid=targets.valid
        )
        return dataclasses.replace(targets, valid=sure)

    def _check_depth(self, pairs: list[tuple[Tensor, Tensor]], targets: Targets) -> None:
        """In the first step, where the host may wait: does the teacher's depth rise where the ground truth does?"""
        self.depth_checks_left -= 1
        # What a head of depth gives, as it is: anything else of one channel may mean anything.
        plain = all(isinstance(connector, nn.Identity) for connector in self.connectors)
        depth = plain and all(tap.module.split('.')[-1] in DEPTH_MAPS for tap in self.student_taps)
        with prefix_errors(f'term {self.name!r}'):
            decided = all(
                check_depth_order(loss, teacher, targets, depth=depth)
                for loss, (_, teacher) in zip(self.losses, pairs, strict=True)
            )
        if decided:
            self.depth_checks_left = 0

    def zero_loss(self) -> Tensor:
        """A zero that reaches every parameter of the term, so that DDP waits for none."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum((p.sum() * 0.0 for p in parameters), torch.zeros(()))

    def extra_repr(self) -> str:
        """Show the taps in the model's print-out."""
        return f'student={[str(t) for t in self.student_taps]}, teacher={[str(t) for t in self.teacher_taps]}'
