"""One thing that is transferred: its taps, its connectors, its loss, its weight over time."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.connectors.tokens import grid_of
from mmstructkd.distillers.schedule import WeightSchedule
from mmstructkd.distillers.targets import point_targets, region_targets
from mmstructkd.errors import ConfigError, ShapeError, TapError, check_finite_number, check_one_of, suggest
from mmstructkd.functional.resize import resize_map
from mmstructkd.functional.sharing import once
from mmstructkd.losses.base import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import Regions, Tap, in_region_head

__all__ = ['Level', 'Term', 'parse_terms']

KEYS = ('tap', 'loss', 'connector', 'schedule', 'match')
MATCHES = ('stride', 'order')
#: Parts of a transformer whose rows are queries, not positions.
QUERIES = ('bbox_head', 'panoptic_head', 'decoder', 'transformer_decoder', 'cls_embed', 'mask_embed')

Records = Mapping[Tap, list[Tensor]]


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
    """

    def __init__(
        self,
        name: str,
        tap: Any,
        loss: dict,
        connector: dict | None = None,
        schedule: dict | None = None,
        match: str = 'stride',
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
        self.schedule = WeightSchedule.from_config(schedule, owner)
        self.factor = self.schedule.factor(0, 1)
        self.pace = 1.0  # of the teacher, see TeacherSource.pace
        self.losses = nn.ModuleList([self._build_loss()])
        self.connectors = nn.ModuleList()
        self.joint = False
        self.on_points = False  # whether the taps lie in a head that scores points of its own choice
        self.order: tuple[int, ...] | None = None  # the teacher's tensor for each of the student's
        self._input_size: tuple[int, int] | None = None  # of the probe
        self.levels: tuple[Level, ...] = ()
        self.log_keys: tuple[str, ...] = ()

    @staticmethod
    def _sides(tap: Any, owner: str) -> Mapping[str, Any]:
        """Split ``tap`` into the two networks'."""
        if not isinstance(tap, Mapping):
            return {'student': tap, 'teacher': tap}
        if set(tap) != {'student', 'teacher'}:
            raise ConfigError(
                f"{owner}: `tap` must have the keys 'student' and 'teacher', got {sorted(tap)}. "
                "One string serves both networks: tap='decode_head.conv_seg'."
            )
        return tap

    @staticmethod
    def _parse(taps: Any, owner: str) -> tuple[Tap, ...]:
        """Read one tap or several."""
        several = taps if isinstance(taps, (list, tuple)) else [taps]
        if not several:
            raise TapError(f'{owner} must name at least one tap, got {taps!r}.')
        return tuple(Tap.parse(text, owner) for text in several)

    def _build_loss(self) -> DistillLoss:
        """Build the loss from its config, with the term's name in the errors."""
        config = self.loss_config
        if not isinstance(config, Mapping) or 'type' not in config:
            raise ConfigError(
                f'term {self.name!r}: `loss` must be a dict with a `type`, got {config!r}. '
                "Example: dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=1.0)."
            )
        kind = config['type']
        if isinstance(kind, str) and MODELS.get(kind) is None:
            known = [k for k, v in MODELS.module_dict.items() if issubclass(v, DistillLoss)]
            raise ConfigError(
                f'term {self.name!r}: `loss` must name a registered loss, got {kind!r}. '
                f'{suggest(kind.split(".")[-1], known)}'
            )
        try:
            loss = MODELS.build(dict(config))
        except (TypeError, ValueError) as err:
            raise ConfigError(f'term {self.name!r}: `loss` cannot be built. {err}') from err
        if not isinstance(loss, DistillLoss):
            raise ConfigError(
                f'term {self.name!r}: `loss` must be a distillation loss, got {type(loss).__name__}. '
                'Losses of mmseg and mmdet compare with labels; subclass mmstructkd.losses.DistillLoss.'
            )
        return loss

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
            raise TapError(
                f'term {self.name!r}: `tap` must give as many tensors of the student as of the teacher, '
                f'got {len(students)} and {len(teachers)} ({[str(t) for t in self.student_taps]} and '
                f'{[str(t) for t in self.teacher_taps]}). Pick levels by index or list.'
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
        classes: tuple[int | None, int | None],
        targets: Targets,
        regions: Regions,
        network: nn.Module | None,
    ) -> None:
        """Build connectors and sized losses from the probe, and try the loss once.

        Args:
            student: records of the probe of the student.
            teacher: records of the probe of the teacher.
            classes: number of classes of student and teacher.
            targets: what the batches of this task know.
            regions: what RoI heads pooled in the probe.
            network: the teacher's network, where it has one.

        Raises:
            ConfigError: the teacher has other classes, or the connector cannot
                be built.
            ShapeError: the loss cannot take these shapes.
            TapError: levels cannot be matched.
        """
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
            self.connectors = nn.ModuleList([self._build_connector(*self.tensors(student, teacher), classes)])
        else:
            self.connectors = nn.ModuleList([self._build_connector([s], [t], classes) for s, t in pairs])
        self.attach(network)
        self.connectors.eval()  # one small image makes no batch statistics, and draws count from the first step
        with torch.no_grad(), self._named_errors(*pairs[0], classes):
            made = self._comparable(*self.tensors(student, teacher), targets.input_size)
        self.connectors.train()
        self.losses = nn.ModuleList([self.loss] + [self._build_loss() for _ in made[1:]])
        for loss, (made_s, made_t), pair in zip(self.losses, made, (pairs * len(made))[: len(made)], strict=True):
            with self._named_errors(*pair, classes):
                loss.bind(made_s, made_t)
        labels_t += labels_t[-1:] * (len(labels_s) - len(labels_t))
        levels = []
        for index, (feat_s, feat_t) in enumerate(pairs):
            connector = self.connectors[0 if self.joint else index]
            shown = 'none' if isinstance(connector, nn.Identity) else type(connector).__name__
            levels.append(Level(labels_s[index], labels_t[index], tuple(feat_s.shape), tuple(feat_t.shape), shown))
        self.levels = tuple(levels)
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
                    f'term {self.name!r}: `connector` {type(connector).__name__} needs the network of the teacher, '
                    'got a source without one. Use a FrozenTeacher.'
                )
            connector.attach(network)

    @contextlib.contextmanager
    def _named_errors(self, student: Tensor, teacher: Tensor, classes: tuple[int | None, int | None]) -> Iterator[None]:
        """Put the term's name into errors of its loss; say so where other classes are the reason."""
        try:
            yield
        except ShapeError as err:
            if self._over_classes(student, teacher, classes):
                raise self._other_classes(classes) from err
            raise ShapeError(f'term {self.name!r}: {err}{self._about_tokens(student, teacher)}') from err
        except ValueError as err:
            raise type(err)(f'term {self.name!r}: {err}') from err

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

    def _over_classes(self, student: Tensor, teacher: Tensor, classes: tuple[int | None, int | None]) -> bool:
        """Whether two tensors have other widths because they are scores over other classes.

        Per position: one score a class, one a class and anchor, or one more for
        the background.
        """
        if None in classes or classes[0] == classes[1] or 1 in (student.dim(), teacher.dim()):
            return False
        wide = student.shape[1], teacher.shape[1]
        anchors = {width / count for width, count in zip(wide, classes, strict=True)}
        return len(anchors) == 1 or wide == (classes[0] + 1, classes[1] + 1)

    def _other_classes(self, classes: tuple[int | None, int | None]) -> ConfigError:
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
        return MODELS.get(kind) if isinstance(kind, str) else kind

    def _build_connector(
        self, student: list[Tensor], teacher: list[Tensor], classes: tuple[int | None, int | None]
    ) -> nn.Module:
        """The configured connector, or the automatic one."""
        wide_s, wide_t = ([channels_of(tensor) for tensor in side] for side in (student, teacher))
        widths = {'in_channels': wide_s, 'out_channels': wide_t}
        if not self.joint:
            widths = {name: width[0] for name, width in widths.items()}
        differ = wide_s != wide_t
        scores = (wide_s[0], wide_t[0]) == classes and not getattr(self.loss, 'maps_classes', False)
        if differ and scores and self.loss.needs_equal_channels:
            raise self._other_classes(classes)
        if self.connector_config is None:
            needed = differ and self.loss.needs_equal_channels
            return MODELS.build({'type': 'mmstructkd.ConvConnector', **widths}) if needed else nn.Identity()
        config = self.connector_config
        if isinstance(config, (list, tuple)):
            config = {'type': 'mmstructkd.SequentialConnector', 'connectors': list(config)}
        kind = config.get('type') if isinstance(config, Mapping) else None
        if isinstance(kind, str) and MODELS.get(kind) is None:
            known = [name for name in MODELS.module_dict if name.endswith('Connector')]
            raise ConfigError(
                f'term {self.name!r}: `connector` must name a registered connector, got {kind!r}. '
                f'{suggest(kind.split(".")[-1], known)}'
            )
        try:
            return MODELS.build({**widths, **config})
        except (TypeError, KeyError, ValueError) as err:
            raise ConfigError(f'term {self.name!r}: `connector` cannot be built. {err}') from err

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
        if self.on_regions and regions is not None:
            mask = any('.mask_' in tap.module for tap in self.student_taps)
            targets = region_targets(targets, (regions.masks if mask else regions.boxes)[0])
        points = getattr(regions, 'points', ())
        if self.on_points and points:
            targets = point_targets(targets, points[0])
        parts: dict[str, list[Tensor]] = {}
        if not self.joint:
            self.pairs(student, teacher)  # an equal number of both
        for loss, pair in zip(
            self.losses, self._comparable(*self.tensors(student, teacher), targets.input_size), strict=True
        ):
            # a region has one label, which does not spread over a map of it
            spread = self.on_regions and pair[0].dim() == 4
            value = loss(*pair, dataclasses.replace(targets, labels=None) if spread else targets)
            for part, number in (value if isinstance(value, dict) else {'': value}).items():
                parts.setdefault(part, []).append(number)
        out = {}
        for part, numbers in parts.items():
            factor = self.pace if part else self.pace * self.factor
            out[f'loss_kd_{self.name}' + (f'_{part}' if part else '')] = torch.stack(numbers).mean() * factor
        return out

    def silence(self) -> Tensor:
        """A zero that reaches every parameter of the term, so that DDP waits for none."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum((p.sum() * 0.0 for p in parameters), torch.zeros(()))

    def extra_repr(self) -> str:
        """Show the taps in the model's print-out."""
        return f'student={[str(t) for t in self.student_taps]}, teacher={[str(t) for t in self.teacher_taps]}'


def parse_terms(terms: Any) -> nn.ModuleDict:
    """Build the terms of a config.

    Args:
        terms: dict of dicts by name.

    Returns:
        The terms by name.

    Raises:
        ConfigError: not a dict, an unknown key, a missing one, or a name that
            cannot be logged.
    """
    if not isinstance(terms, Mapping) or not terms:
        raise ConfigError(
            f'StructuredDistiller: `terms` must be a dict of terms by name, got {terms!r}. '
            "Example: terms=dict(pixel=dict(tap='decode_head.conv_seg', loss=dict(...)))."
        )
    built = nn.ModuleDict()
    for name, config in terms.items():
        owner = f'term {name!r}'
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(f'{owner}: `name` must be a plain identifier, got {name!r}.')
        if name in dir(nn.ModuleDict) or '__' in name:
            raise ConfigError(f'{owner}: `name` must not be one of torch.nn.ModuleDict, got {name!r}. Rename it.')
        if not isinstance(config, Mapping):
            raise ConfigError(f'{owner}: the term must be a dict with the keys {KEYS}, got {config!r}.')
        for key in config:
            if key not in KEYS:
                raise ConfigError(f'{owner}: a term must have only the keys {KEYS}, got {key!r}. {suggest(key, KEYS)}')
        for key in ('tap', 'loss'):
            if key not in config:
                raise ConfigError(f'{owner}: `{key}` must be given, got keys {sorted(config)}.')
        built[name] = Term(name, **config)
        check_finite_number(owner, 'loss_weight', built[name].loss.loss_weight, minimum=0)
    return built
