"""One thing that is transferred: its taps, its connectors, its loss, its weight over time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.connectors import build_connector
from mmstructkd.connectors.tokens import grid_of
from mmstructkd.errors import (
    CheckpointError,
    ConfigError,
    ShapeError,
    TapError,
    check_finite_number,
    check_one_of,
    suggest,
)
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.functional.core.sharing import once
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.positions import PLACES
from mmstructkd.optim import check_optimizer
from mmstructkd.registry import MODELS, build_part, look_up
from mmstructkd.structures import Targets
from mmstructkd.taps import Regions, Tap, in_region_head, shows_regions
from mmstructkd.tasks.targets import head_at, num_classes_of, point_targets, region_targets, repeat_targets
from mmstructkd.terms.depth_order import check_depth_order
from mmstructkd.terms.schedule import WeightSchedule

__all__ = ['Level', 'Term', 'parse_terms']

KEYS = ('tap', 'loss', 'connector', 'schedule', 'match', 'where', 'on')
#: What configs give a term by mistake, and where it belongs.
MISPLACED = {
    **dict.fromkeys(('type', 'loss_weight', 'temperature', 'preset'), 'It belongs into `loss`.'),
    **dict.fromkeys(('student', 'teacher'), 'Taps that differ go into tap=dict(student=..., teacher=...).'),
}
MATCHES = ('stride', 'order')
#: Parts of a transformer whose rows are queries, not positions.
QUERIES = ('bbox_head', 'panoptic_head', 'decoder', 'transformer_decoder', 'cls_embed', 'mask_embed')

#: Modules whose output is a depth map in a depth estimator.
DEPTH_MAPS = ('to_depth', 'decode_head')
#: How many steps may look whether the teacher's depth agrees with the ground truth.
LOOKS = 3

Records = Mapping[Tap, list[Tensor]]
Pair = tuple[int | None, int | None]
Heads = tuple[nn.Module | None, nn.Module | None]


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


def channels_of(tensor: Tensor) -> int:
    """Width of a map (B, C, H, W), of tokens (B, N, C), or of rows (N, C)."""
    return int(tensor.shape[-1] if tensor.dim() == 3 else tensor.shape[min(1, tensor.dim() - 1)])


def _shape(tensor: Tensor) -> str:
    """Write a shape as 64x16x32."""
    return 'x'.join(str(side) for side in tensor.shape[1:])


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
    ) -> None:
        super().__init__()
        self.name = name
        owner = f'term {name!r}'
        sides = self._sides(tap, owner)
        check_one_of(owner, 'match', match, MATCHES)
        self.match = match
        self.student_taps = self._parse(sides['student'], f'{owner}: `student`')
        self.teacher_taps = self._parse(sides['teacher'], f'{owner}: `teacher`')
        self.connector_config = copy.deepcopy(connector)
        self.loss_config = copy.deepcopy(loss)
        if where is not None:
            check_one_of(owner, 'where', where, PLACES)
        self._where = where
        self.on = self._streams(on, owner)
        self.schedule = WeightSchedule.from_config(schedule, owner)
        self.factor = self.schedule.factor(0, 1)
        self.pace = 1.0  # of the teacher, see TeacherSource.pace
        self.used = False  # since the last update; what is not used does not move in it
        self.losses = nn.ModuleList([self._build_loss()])
        self.connectors = nn.ModuleList()
        self.joint = False
        self.on_points = False  # whether the taps lie in a head that scores points of its own choice
        self.order: tuple[int, ...] | None = None  # the teacher's tensor for each of the student's
        self.branches = 1  # copies of the batch that the student trains on, see branches_of
        self._input_size: tuple[int, int] | None = None  # of the probe
        self.levels: tuple[Level, ...] = ()
        self.log_keys: tuple[str, ...] = ()
        self.by_class = False  # whether class k of the student stands against class k of the teacher
        self._looks = LOOKS

    @staticmethod
    def _streams(on: Any, owner: str) -> tuple[str, ...]:
        """Read on which batches the term compares."""
        names = (on,) if isinstance(on, str) else tuple(on) if isinstance(on, (list, tuple)) else ()
        good = all(isinstance(name, str) and name.isidentifier() for name in names)
        if not names or not good or len(set(names)) < len(names):
            raise ConfigError(
                f"{owner}: `on` must be the name of a stream or a list of them, got {on!r}. 'labelled' is the batch "
                'that the task is trained on.'
            )
        return names

    @staticmethod
    def _sides(tap: Any, owner: str) -> Mapping[str, Any]:
        """Split ``tap`` into the two networks'."""
        if not isinstance(tap, Mapping):
            return {'student': tap, 'teacher': tap}
        if set(tap) != {'student', 'teacher'}:
            raise ConfigError(
                f"{owner}: `tap` must have the keys 'student' and 'teacher', got {list(tap)}. "
                "One string serves both networks: tap='decode_head.conv_seg'."
            )
        return tap

    @staticmethod
    def _parse(taps: Any, owner: str) -> tuple[Tap, ...]:
        """Read one tap or several."""
        several = taps if isinstance(taps, (list, tuple)) else [taps]
        if not several:
            raise TapError(f'{owner} must name at least one tap, got {taps!r}.')
        parsed = tuple(Tap.parse(text, owner) for text in several)
        if len(set(parsed)) < len(parsed):
            raise TapError(f'{owner} must name each `tap` once, got {list(several)!r}.')
        return parsed

    def _build_loss(self) -> DistillLoss:
        """Build the loss from its config, with the term's name in the errors."""
        loss = build_part(
            f'term {self.name!r}',
            'loss',
            self.loss_config,
            example="dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=1.0)",
            known=DistillLoss,
        )
        if not isinstance(loss, DistillLoss):
            raise ConfigError(
                f'term {self.name!r}: `loss` must be a distillation loss, got {type(loss).__name__}. '
                'Losses of mmseg and mmdet compare with labels; subclass mmstructkd.losses.DistillLoss.'
            )
        if loss.own_optimizer is not None:
            check_optimizer(f'term {self.name!r}', loss.own_optimizer)
        if self._where is not None:
            self._restrict(loss, self._where)
        return loss

    def _restrict(self, loss: DistillLoss, where: str) -> None:
        """Let a loss count where the term says."""
        own = self.loss_config.get('where')
        if own is not None and loss.where != where:
            raise ConfigError(
                f'term {self.name!r}: `where` must be said once, got {where!r} of the term and {own!r} of its loss. '
                'Leave one of them out.'
            )
        try:
            loss.restrict(where)
        except ConfigError as err:
            raise ConfigError(f'term {self.name!r}: {err}') from err

    @property
    def loss(self) -> DistillLoss:
        """The loss of the first level; the others are built alike."""
        return self.losses[0]

    @property
    def active(self) -> bool:
        """Whether the term counts at this point of the training."""
        return self.factor > 0 and self.pace > 0 and self.loss.loss_weight > 0

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
        sides = []
        for owner, taps, records in (('student', self.student_taps, student), ('teacher', self.teacher_taps, teacher)):
            for tap in taps:
                if not records[tap]:
                    raise TapError(
                        f'term {self.name!r}: `{owner}` must name a module that runs in training, got {str(tap)!r}, '
                        'which the forward pass does not reach.'
                    )
            tensors = [tensor for tap in taps for tensor in records[tap]]
            if self.on_points:  # (B, C, P) of a point head: a map of P rows, so that losses over positions take it
                tensors = [tensor[..., None] if tensor.dim() == 3 else tensor for tensor in tensors]
            sides.append(tensors)
        sides[1] = self._as_often(sides[1], student, teacher)
        if self.order is not None:
            sides[1] = [sides[1][place] for place in self.order]
        if self.branches > 1:  # a teacher that has not copied the batch shows each copy the same
            rows = [len(tensor) for tensor in sides[0]]
            sides[1] = [
                t.repeat(self.branches, *[1] * (t.dim() - 1))
                if rows[min(place, len(rows) - 1)] == self.branches * len(t)
                else t
                for place, t in enumerate(sides[1])
            ]
        return sides[0], sides[1]

    def _as_often(self, tensors: list[Tensor], student: Records, teacher: Records) -> list[Tensor]:
        """Give the teacher's tensor again where training runs a module twice on the same features.

        The earlier heads of mmseg's cascades are: once for their own loss, once
        for the next head. Inference runs them once.
        """
        if len(self.student_taps) != len(self.teacher_taps) or not any(
            re.match(r'decode_head\.\d+', tap.module) for tap in self.student_taps
        ):
            return tensors
        left, out = iter(tensors), []
        for tap_s, tap_t in zip(self.student_taps, self.teacher_taps, strict=True):
            mine = [next(left) for _ in teacher[tap_t]]
            twice = re.match(r'decode_head\.\d+', tap_s.module) and len(student[tap_s]) == 2 * len(mine)
            out += [tensor for tensor in mine for _ in range(2)] if twice else mine
        return out

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

    def _find_order(self, student: Records, teacher: Records) -> tuple[int, ...] | None:
        """Match the levels of two pyramids by the sizes of their maps in the probe."""
        students, teachers = self.tensors(student, teacher)
        maps = all(tensor.dim() == 4 for tensor in (*students, *teachers))
        if self.match == 'order' or self.on_regions or not maps or max(len(students), len(teachers)) == 1:
            return None
        sizes_s, sizes_t = ([tuple(t.shape[2:]) for t in side] for side in (students, teachers))
        if sizes_s == sizes_t or (len(set(sizes_s)) < len(sizes_s) or len(set(sizes_t)) < len(sizes_t)):
            return None  # the same pyramid, or several layers of one size: in order
        names = [
            self._labels(taps, records)
            for taps, records in ((self.student_taps, student), (self.teacher_taps, teacher))
        ]
        lost = [
            f'{name!r} ({_shape(t)})'
            for name, t in zip(names[0], students, strict=True)
            if tuple(t.shape[2:]) not in sizes_t
        ]
        if lost:
            has = ', '.join(f'{name!r} ({_shape(t)})' for name, t in zip(names[1], teachers, strict=True))
            raise TapError(
                f'term {self.name!r}: each level of the student must find one of the same stride in the teacher, got '
                f'none for {", ".join(lost)}; the teacher has {has} (channels x height x width in the probe). Leave '
                "levels out, e.g. tap=dict(student='neck[:4]', teacher='neck[*]'), or pair them as they come with "
                "match='order'."
            )
        return tuple(sizes_t.index(size) for size in sizes_s)

    def _labels(self, taps: tuple[Tap, ...], records: Records) -> list[str]:
        """Name each recorded tensor."""
        return [name for tap in taps for name in tap.names(len(records[tap]))]

    def bind(
        self,
        student: Records,
        teacher: Records,
        classes: Pair,
        targets: Targets,
        regions: Regions,
        network: nn.Module | None,
        student_network: nn.Module | None = None,
        trained: bool = True,
        teacher_tap: Tap | None = None,
    ) -> None:
        """Build connectors and sized losses from the probe, and try the loss once.

        Args:
            student: records of the probe of the student.
            teacher: records of the probe of the teacher.
            classes: number of classes of student and teacher.
            targets: what the batches of this task know.
            regions: what RoI heads pooled in the probe.
            network: the teacher's network, where it has one.
            student_network: the student.
            trained: the teacher's weights mean something. Those of a random one
                are not asked whether they agree with the ground truth.
            teacher_tap: its first tap as ``network`` names it; ``None``: as the term does.

        Raises:
            ConfigError: the teacher has other classes, a head does not predict
                what the loss compares, the connector cannot be built, or labels
                are asked for that the task has not.
            ShapeError: the loss cannot take these shapes.
            TapError: levels cannot be matched.
        """
        self._check_where(targets)
        heads = (
            head_at(student_network, self.student_taps[0].module),
            head_at(network, (teacher_tap or self.teacher_taps[0]).module),
        )
        with self._named():
            notes = self.loss.check_heads(*heads)
        for note in notes:
            print_log(f'term {self.name!r}: {note}', 'current', level=logging.WARNING)
        if not trained:
            self._looks = 0
        self._input_size = targets.input_size
        joint = self._connector_class()
        self.joint = joint is not None and getattr(joint, 'joint', False)
        if not self.joint or len(self.tensors(student, teacher)[0]) > 1:
            self.order = self._find_order(student, teacher)
        pairs = self.pairs(student, teacher)
        labels_s = self._labels(self.student_taps, student)
        labels_t = self._labels(self.teacher_taps, teacher)
        images = 1 if targets.images is None else len(targets.images)
        self._check_images_first('student', self.student_taps, student, images)
        self._check_images_first('teacher', self.teacher_taps, teacher, images)
        if self.order is not None:
            left = [label for place, label in enumerate(labels_t) if place not in self.order]
            if left:
                print_log(
                    f'term {self.name!r}: of the teacher {left} have no level of the student; left out.', 'current'
                )
            labels_t = [labels_t[place] for place in self.order]
        if self.joint:
            self.connectors = nn.ModuleList([self._build_connector(*self.tensors(student, teacher), classes, heads)])
        else:
            self.connectors = nn.ModuleList([self._build_connector([s], [t], classes, heads) for s, t in pairs])
        with self._named_errors(*pairs[0], classes):
            self.attach(network)
        self.connectors.eval()  # one small image makes no batch statistics, and draws count from the first step
        with torch.no_grad(), self._named_errors(*pairs[0], classes):
            made = self._comparable(*self.tensors(student, teacher), targets.input_size)
        self.connectors.train()
        self.losses = nn.ModuleList([self.loss] + [self._build_loss() for _ in made[1:]])
        for loss, (made_s, made_t), pair in zip(self.losses, made, (pairs * len(made))[: len(made)], strict=True):
            self._check_one_channel(made_s, made_t, classes, heads, targets)
            with self._named_errors(*pair, classes):
                loss.bind(made_s, made_t)
        labels_t += labels_t[-1:] * (len(labels_s) - len(labels_t))
        levels = []
        for index, (feat_s, feat_t) in enumerate(pairs):
            connector = self.connectors[0 if self.joint else index]
            shown = 'none' if isinstance(connector, nn.Identity) else type(connector).__name__
            levels.append(Level(labels_s[index], labels_t[index], tuple(feat_s.shape), tuple(feat_t.shape), shown))
        self.levels = tuple(levels)
        self.by_class = self._compares_classes(pairs[0], classes, heads)
        self._check_bins(pairs[0], heads)
        with self._named_errors(*pairs[0], classes):
            self._try(student, teacher, targets, regions)

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

    def _check_where(self, targets: Targets) -> None:
        """Raise where only labelled positions count and the task labels none."""
        if self.loss.where != 'labelled' or self.loss.needs_labels or self.on_regions:
            return
        if targets.labels is None and targets.depth is None:
            raise ConfigError(
                f"term {self.name!r}: `where` must be 'inside' for a task whose samples label no position (boxes do "
                "not), got 'labelled'. Leave it out, or take a loss that looks at boxes."
            )

    def _check_one_channel(
        self, student: Tensor, teacher: Tensor, classes: Pair, heads: Heads, targets: Targets
    ) -> None:
        """Raise where one channel is taken for classes and is none."""
        loss = self.loss
        maps = student.dim() in (2, 4) and teacher.dim() in (2, 4)
        if not maps or 1 not in (widths := (student.shape[1], teacher.shape[1])):
            return
        pairs = loss.by_class or loss.binary_pairs
        if max(widths) > 2 or not (loss.over_classes or (pairs and widths != (1, 1))):
            return  # more than two have an error of their own: other classes
        kind = type(loss).__name__
        if targets.depth is not None:
            raise ConfigError(
                f'term {self.name!r}: `tap` must name scores of classes or bins for {kind}, got one channel of '
                f'{" and ".join(type(head).__name__ for head in heads)}, which is depth. Take a loss on depth '
                "(DepthRegressionLoss), or tap the scores of a head with bins ('decode_head.conv_depth')."
            )
        for owner, head, width in zip(('student', 'teacher'), heads, widths, strict=True):
            known = getattr(head, 'out_channels', None)
            if self.connector_config is None and isinstance(known, int) and known != width:
                raise ConfigError(
                    f'term {self.name!r}: `{owner}` must tap the scores of all classes for {kind}, got {width} channel'
                    f'{"s" * (width > 1)} where {type(head).__name__} has out_channels={known}.'
                )
        if widths != (1, 1) and not self._binary(widths, heads):
            raise self._other_classes(classes)

    @staticmethod
    def _binary(widths: tuple[int, ...], heads: Heads) -> bool:
        """Whether two tensors are scores of two classes, one of them by a sigmoid: one channel and two."""
        if sorted(widths) != [1, 2]:
            return False
        return all(
            head is None or (num_classes_of(head) == 2 and getattr(head, 'out_channels', width) == width)
            for head, width in zip(heads, widths, strict=True)
        )

    def _compares_classes(self, pair: tuple[Tensor, Tensor], classes: Pair, heads: Heads) -> bool:
        """Whether the loss takes channel k of both networks for the same class."""
        loss = self.loss
        if loss.over_classes or loss.by_class:
            return True
        if not loss.needs_equal_channels or self.connector_config is not None or 1 in (pair[0].dim(), pair[1].dim()):
            return False
        scores = [getattr(head, 'out_channels', None) or count for head, count in zip(heads, classes, strict=True)]
        return [tensor.shape[1] for tensor in pair] == scores

    def _check_bins(self, pair: tuple[Tensor, Tensor], heads: Heads) -> None:
        """Raise where bin k of both heads is another depth."""
        bins = [getattr(head, 'to_depth', None) for head in heads]
        facts = [tuple(getattr(one, fact, None) for fact in ('num_bins', 'min_depth', 'max_depth')) for one in bins]
        scores = all(
            None not in (number, *ends) and tensor.dim() > 1 and tensor.shape[1] == number
            for (number, *ends), tensor in zip(facts, pair, strict=True)
        )
        loss = self.loss
        by_channel = loss.over_classes or loss.by_class or loss.needs_equal_channels or getattr(loss, 'bins', None)
        if by_channel and scores and facts[0] != facts[1]:
            shown = [f'{number} bins from {near:g} to {far:g} m' for number, near, far in facts]
            raise ConfigError(
                f'term {self.name!r}: the heads must have the same bins for {type(self.loss).__name__}, got {shown[0]} '
                f'of the student and {shown[1]} of the teacher: bin k is another depth. Tap the depth map '
                "('decode_head.to_depth') for a loss on depth, or give both heads the same range."
            )

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Put the term's name into errors."""
        try:
            yield
        except ValueError as err:
            raise type(err)(f'term {self.name!r}: {err}') from err

    @contextlib.contextmanager
    def _named_errors(self, student: Tensor, teacher: Tensor, classes: Pair) -> Iterator[None]:
        """Put the term's name into errors of its loss; say so where other classes are the reason."""
        try:
            yield
        except ShapeError as err:
            if self._over_classes(student, teacher, classes):
                raise self._other_classes(classes) from err
            raise ShapeError(f'term {self.name!r}: {err}{self._about_tokens(student, teacher)}') from err
        except (ConfigError, CheckpointError) as err:
            raise type(err)(f'term {self.name!r}: {err}') from err
        except Exception as err:  # torch and parts of others raise whatever they trip over
            raise ConfigError(
                f'term {self.name!r}: `loss` and `connector` must be able to take the tapped tensors, got '
                f'{tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher. '
                f'{type(err).__name__}: {err}'
            ) from err

    def _about_tokens(self, student: Tensor, teacher: Tensor) -> str:
        """How a transformer's tokens become what most losses take."""
        sides = [name for name, tensor in (('student', student), ('teacher', teacher)) if tensor.dim() == 3]
        if not sides or self.on_regions:
            return ''
        names = [part for tap in (*self.student_taps, *self.teacher_taps) for part in tap.module.split('.')]
        queries = any(part in QUERIES for part in names)
        counts = [tensor.shape[1] for tensor in (student, teacher) if tensor.dim() == 3]
        if queries or not all(map(self._covers_image, counts)):
            which = ' and the '.join(sides)
            return f' The {which} gave rows (B, N, C) that lie nowhere in the image (queries): tap a map.'
        return (
            f' The {" and the ".join(sides)} gave tokens (B, N, C): lay them out as a map with '
            "connector=dict(type='mmstructkd.TokensToMapConnector')."
        )

    def _covers_image(self, count: int) -> bool:
        """Whether so many tokens, with a class token or without, make a grid over the image; queries do not."""
        if self._input_size is None:
            return True
        return any(grid_of(number, *self._input_size) is not None for number in (count, count - 1) if number > 0)

    def _check_images_first(self, side: str, taps: tuple[Tap, ...], records: Records, images: int) -> None:
        """Refuse what has another axis than the images first: layers of a decoder, or positions of a sequence."""
        for tap in taps:
            for tensor in records[tap]:
                shape = tuple(tensor.shape)
                if len(shape) >= 3 and shape[0] != images and shape[1] == images and not self.on_regions:
                    raise TapError(
                        f'term {self.name!r}: `{side}` must give the images on its first axis, got {shape} for '
                        f'{images} image at {str(tap)!r}: layers of a decoder, or positions, come first. Tap a module '
                        "of one layer, e.g. 'decoder.layers.5', or one that gives maps."
                    )

    def _over_classes(self, student: Tensor, teacher: Tensor, classes: Pair) -> bool:
        """Whether two tensors have other widths because they are scores over other classes.

        Per position: one score a class, one a class and anchor, or one more for
        the background.
        """
        if None in classes or classes[0] == classes[1] or 1 in (student.dim(), teacher.dim()):
            return False
        wide = self._classes_of((student.shape[1], teacher.shape[1]), classes)
        anchors = {width / count for width, count in zip(wide, classes, strict=True)}
        return len(anchors) == 1 or wide == (classes[0] + 1, classes[1] + 1)

    @staticmethod
    def _classes_of(widths: tuple[int, int], classes: Pair) -> tuple[int, int]:
        """Widths with two in the place of the one channel of a binary head."""
        student, teacher = (
            2 if width == 1 and count == 2 else width for width, count in zip(widths, classes, strict=True)
        )
        return student, teacher

    def _other_classes(self, classes: Pair) -> ConfigError:
        """The error for logits over other classes."""
        return ConfigError(
            f'term {self.name!r}: the teacher must have the classes of the student, got num_classes={classes[1]} '
            f'for the teacher and {classes[0]} for the student. '
            'Tap a feature instead of the logits, or map the classes with `class_map` of a loss that has it.'
        )

    def _try(self, student: Records, teacher: Records, targets: Targets, regions: Regions) -> None:
        """Compute the loss on copies of the probe: shapes that do not fit fail here."""
        twin = copy.deepcopy(self).eval()
        taps = ((self.student_taps, student), (self.teacher_taps, teacher))
        copies = [{tap: [t.detach().clone() for t in records[tap]] for tap in side} for side, records in taps]
        with torch.enable_grad():
            for tensors in copies[0].values():
                for tensor in tensors:
                    tensor.requires_grad_(True)
            scored = twin(*copies, targets, regions, all_parts=True)
        self.log_keys = tuple(scored)

    def _connector_class(self) -> type | None:
        """Class of the configured connector; ``None`` where it is automatic."""
        config = self.connector_config
        if isinstance(config, (list, tuple)):
            return MODELS.get('mmstructkd.SequentialConnector')
        kind = config.get('type') if isinstance(config, Mapping) else None
        return look_up(MODELS, kind) if isinstance(kind, str) else kind

    def _build_connector(self, student: list[Tensor], teacher: list[Tensor], classes: Pair, heads: Heads) -> nn.Module:
        """The configured connector, or the automatic one."""
        wide_s, wide_t = ([channels_of(tensor) for tensor in side] for side in (student, teacher))
        widths = {'in_channels': wide_s, 'out_channels': wide_t}
        if not self.joint:
            widths = {name: width[0] for name, width in widths.items()}
        # A sigmoid's channel and a softmax's two are made comparable by the loss.
        binary = self.loss.binary_pairs and self._binary((wide_s[0], wide_t[0]), heads)
        differ = wide_s != wide_t and not binary
        scores = self._classes_of((wide_s[0], wide_t[0]), classes) == classes and classes[0] != classes[1]
        if differ and scores and not getattr(self.loss, 'maps_classes', False) and self.loss.needs_equal_channels:
            raise self._other_classes(classes)
        if self.connector_config is None:
            needed = differ and self.loss.needs_equal_channels
            return MODELS.build({'type': 'mmstructkd.ConvConnector', **widths}) if needed else nn.Identity()
        config = self.connector_config
        if isinstance(config, (list, tuple)):
            config = {'type': 'mmstructkd.SequentialConnector', 'connectors': list(config)}
        return build_connector(f'term {self.name!r}', config, wide_s, wide_t)

    def _comparable(
        self, students: list[Tensor], teachers: list[Tensor], input_size: tuple[int, int] | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Bring the tensors of each level to equal width and size."""
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
            return {f'loss_kd_{self.name}': self.silence()}
        self.used = self.used or torch.is_grad_enabled()
        targets = self._placed(targets)
        points = getattr(regions, 'points', ())
        if self.on_points and points:
            targets = point_targets(targets, points[0])
        known = self._known(student, targets, regions)
        parts: dict[str, list[Tensor]] = {}
        if not self.joint:
            self.pairs(student, teacher)  # an equal number of both
        made = self._comparable(*self.tensors(student, teacher), targets.input_size)
        if self._looks > 0 and self.training:
            self._look(made, targets)
        for place, (loss, pair) in enumerate(zip(self.losses, made, strict=True)):
            mine, regional = known[min(place, len(known) - 1)]
            # a region has one label, which does not spread over a map of it
            if regional and mine.labels is not None and (pair[0].dim() == 4 or len(pair[0]) != len(mine.labels)):
                mine = dataclasses.replace(mine, labels=None)
            value = loss(*pair, mine)
            for part, number in (value if isinstance(value, dict) else {'': value}).items():
                parts.setdefault(part, []).append(number)
        out = {}
        for part, numbers in parts.items():
            factor = self.pace if part else self.pace * self.factor
            out[f'loss_kd_{self.name}' + (f'_{part}' if part else '')] = torch.stack(numbers).mean() * factor
        return out

    def _known(self, student: Records, targets: Targets, regions: Regions | None) -> list[tuple[Targets, bool]]:
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

    def _placed(self, targets: Targets) -> Targets:
        """The targets with the positions that count for the loss."""
        if self.loss.where != 'labelled':
            return dataclasses.replace(targets, valid=targets.inside)
        images = targets.images
        if self.loss.needs_labels or targets.labels is not None or targets.depth is not None or images is None:
            return targets
        # A batch without labels in a task that has them: nothing is labelled.
        nothing = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
        return dataclasses.replace(targets, valid=nothing)

    def _look(self, pairs: list[tuple[Tensor, Tensor]], targets: Targets) -> None:
        """In the first step, where the host may wait: does the teacher's depth rise where the ground truth does?"""
        self._looks -= 1
        # What a head of depth gives, as it is: anything else of one channel may mean anything.
        plain = all(isinstance(connector, nn.Identity) for connector in self.connectors)
        depth = plain and all(tap.module.split('.')[-1] in DEPTH_MAPS for tap in self.student_taps)
        with self._named():
            decided = all(
                check_depth_order(loss, teacher, targets, depth=depth)
                for loss, (_, teacher) in zip(self.losses, pairs, strict=True)
            )
        if decided:
            self._looks = 0

    def silence(self) -> Tensor:
        """A zero that reaches every parameter of the term, so that DDP waits for none."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum((p.sum() * 0.0 for p in parameters), torch.zeros(()))

    def extra_repr(self) -> str:
        """Show the taps in the model's print-out."""
        return f'student={[str(t) for t in self.student_taps]}, teacher={[str(t) for t in self.teacher_taps]}'


def parse_terms(terms: Any, owner: str = 'StructuredDistiller') -> nn.ModuleDict:
    """Build the terms of a config.

    Args:
        terms: dict of dicts by name.
        owner: whose they are, for messages.

    Returns:
        The terms by name.

    Raises:
        ConfigError: not a dict, an unknown key, a missing one, or a name that
            cannot be logged.
    """
    whose = owner
    if not isinstance(terms, Mapping) or not terms:
        raise ConfigError(
            f'{whose}: `terms` must be a dict of terms by name, got {terms!r}. '
            "Example: terms=dict(pixel=dict(tap='decode_head.conv_seg', loss=dict(...)))."
        )
    built = nn.ModuleDict()
    for name, config in terms.items():
        owner = f'term {name!r}'
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f'{owner}: the name of a term in `terms` must be a plain identifier, got {name!r}.')
        if name in (*KEYS, *MISPLACED) and not isinstance(config, Mapping):
            raise ConfigError(
                f'{whose}: `terms` must be a dict of terms by name, got the key {name!r} of a single term. '
                'Give it a name: terms=dict(<name>=dict(tap=..., loss=...)).'
            )
        if name in dir(nn.ModuleDict) or '__' in name:
            raise ConfigError(f'{owner}: `name` must not be one of torch.nn.ModuleDict, got {name!r}. Rename it.')
        if not isinstance(config, Mapping):
            raise ConfigError(f'{owner}: each of `terms` must be a dict with the keys {KEYS}, got {config!r}.')
        for key in config:
            if key not in KEYS:
                way_out = MISPLACED.get(key) or suggest(key, KEYS)
                raise ConfigError(f'{owner}: a term must have only the keys {KEYS}, got {key!r}. {way_out}')
        for key in ('tap', 'loss'):
            if key not in config:
                raise ConfigError(f'{owner}: `{key}` must be given, got keys {list(config)}.')
        built[name] = Term(name, **config)
        check_finite_number(owner, 'loss_weight', built[name].loss.loss_weight, minimum=0)
    return built
