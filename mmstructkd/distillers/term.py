"""One thing that is transferred: its taps, its connectors, its loss, its weight over time."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.distillers.schedule import WeightSchedule
from mmstructkd.errors import ConfigError, ShapeError, TapError, check_finite_number, suggest
from mmstructkd.functional.resize import resize_map
from mmstructkd.losses.base import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import Tap

__all__ = ['Level', 'Term', 'parse_terms']

KEYS = ('tap', 'loss', 'connector', 'schedule')

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


class Term(nn.Module):
    """A pair of taps (or of lists of taps), made comparable and scored.

    Args:
        name: name of the term; its loss is logged as ``loss_kd_<name>``.
        tap: a tap, a list of taps, or ``dict(student=..., teacher=...)`` of them.
        loss: config of a registered loss.
        connector: config of a registered connector; ``None``: a 1x1 convolution
            where the loss needs equal widths and they differ.
        schedule: config of a :class:`WeightSchedule`; ``None``: constant.
    """

    def __init__(
        self,
        name: str,
        tap: Any,
        loss: dict,
        connector: dict | None = None,
        schedule: dict | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        owner = f'term {name!r}'
        sides = self._sides(tap, owner)
        self.student_taps = self._parse(sides['student'], f'{owner}: `student`')
        self.teacher_taps = self._parse(sides['teacher'], f'{owner}: `teacher`')
        self.connector_config = copy.deepcopy(connector)
        self.loss_config = copy.deepcopy(loss)
        self.schedule = WeightSchedule.from_config(schedule, owner)
        self.factor = self.schedule.factor(0, 1)
        self.losses = nn.ModuleList([self._build_loss()])
        self.connectors = nn.ModuleList()
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
        return self.factor > 0 and self.loss.loss_weight > 0

    def pairs(self, student: Records, teacher: Records) -> list[tuple[Tensor, Tensor]]:
        """Match what the taps recorded, level by level.

        Args:
            student: records of the student's capture.
            teacher: records of the teacher.

        Returns:
            Pairs of tensors.

        Raises:
            TapError: a tap was not passed, or the numbers differ.
        """
        sides = []
        for owner, taps, records in (('student', self.student_taps, student), ('teacher', self.teacher_taps, teacher)):
            for tap in taps:
                if not records[tap]:
                    raise TapError(
                        f'term {self.name!r}: `{owner}` must name a module that runs in training, got {str(tap)!r}, '
                        'which the forward pass does not reach.'
                    )
            sides.append([tensor for tap in taps for tensor in records[tap]])
        if len(sides[0]) != len(sides[1]):
            raise TapError(
                f'term {self.name!r}: `tap` must give as many tensors of the student as of the teacher, '
                f'got {len(sides[0])} and {len(sides[1])} ({[str(t) for t in self.student_taps]} and '
                f'{[str(t) for t in self.teacher_taps]}). Pick levels by index or list.'
            )
        return list(zip(*sides, strict=True))

    def _labels(self, taps: tuple[Tap, ...], records: Records) -> list[str]:
        """Name each recorded tensor."""
        return [
            str(tap) if len(records[tap]) == 1 else f'{tap} #{call}'
            for tap in taps
            for call in range(len(records[tap]))
        ]

    def bind(self, student: Records, teacher: Records, classes: tuple[int | None, int | None]) -> None:
        """Build connectors and sized losses from the probe, and try the loss once.

        Args:
            student: records of the probe of the student.
            teacher: records of the probe of the teacher.
            classes: number of classes of student and teacher.

        Raises:
            ConfigError: the teacher has other classes, or the connector cannot
                be built.
            ShapeError: the loss cannot take these shapes.
        """
        pairs = self.pairs(student, teacher)
        names = zip(self._labels(self.student_taps, student), self._labels(self.teacher_taps, teacher), strict=True)
        self.losses = nn.ModuleList([self.loss] + [self._build_loss() for _ in pairs[1:]])
        levels = []
        for index, ((feat_s, feat_t), (name_s, name_t)) in enumerate(zip(pairs, names, strict=True)):
            connector = self._connector(feat_s, feat_t, classes)
            self.connectors.append(connector)
            with torch.no_grad():
                made_s, made_t = self._comparable(index, feat_s, feat_t)
            with self._named_errors(feat_s, feat_t, classes):
                self.losses[index].bind(made_s, made_t)
            shown = 'none' if isinstance(connector, nn.Identity) else type(connector).__name__
            levels.append(Level(name_s, name_t, tuple(feat_s.shape), tuple(feat_t.shape), shown))
        self.levels = tuple(levels)
        with self._named_errors(*pairs[0], classes):
            self._try(pairs, classes)

    @contextlib.contextmanager
    def _named_errors(self, student: Tensor, teacher: Tensor, classes: tuple[int | None, int | None]) -> Iterator[None]:
        """Put the term's name into errors of its loss; say so where other classes are the reason."""
        try:
            yield
        except ShapeError as err:
            if classes[0] != classes[1] and (student.shape[1], teacher.shape[1]) == classes:
                raise self._other_classes(classes) from err
            raise ShapeError(f'term {self.name!r}: {err}') from err
        except ValueError as err:
            raise type(err)(f'term {self.name!r}: {err}') from err

    def _other_classes(self, classes: tuple[int | None, int | None]) -> ConfigError:
        """The error for logits over other classes."""
        return ConfigError(
            f'term {self.name!r}: the teacher must have the classes of the student, got num_classes={classes[1]} '
            f'for the teacher and {classes[0]} for the student. '
            'Tap a feature instead of the logits, or use a teacher of the same classes.'
        )

    def _try(self, pairs: list[tuple[Tensor, Tensor]], classes: tuple[int | None, int | None]) -> None:
        """Compute the loss on copies of the probe: shapes that do not fit fail here."""
        twin = copy.deepcopy(self)
        records_s = {tap: [] for tap in self.student_taps}
        records_t = {tap: [] for tap in self.teacher_taps}
        for number, (feat_s, feat_t) in enumerate(pairs):
            records_s[self.student_taps[min(number, len(self.student_taps) - 1)]].append(feat_s.detach().clone())
            records_t[self.teacher_taps[min(number, len(self.teacher_taps) - 1)]].append(feat_t.detach().clone())
        batch, size = pairs[0][0].shape[0], (32, 32)
        targets = Targets(
            labels=torch.zeros(batch, *size, dtype=torch.int64),
            valid=torch.ones(batch, *size, dtype=torch.bool),
            num_classes=classes[0],
            images=torch.zeros(batch, 3, *size),
            input_size=size,
        )
        with torch.enable_grad():
            for feats in records_s.values():
                for feat in feats:
                    feat.requires_grad_(True)
            twin.eval()
            scored = twin(records_s, records_t, targets, all_parts=True)
        self.log_keys = tuple(scored)

    def _connector(self, student: Tensor, teacher: Tensor, classes: tuple[int | None, int | None]) -> nn.Module:
        """The configured connector, or the automatic one."""
        widths = {'in_channels': student.shape[1], 'out_channels': teacher.shape[1]}
        differ = widths['in_channels'] != widths['out_channels']
        if differ and self.loss.needs_equal_channels and tuple(widths.values()) == classes:
            raise self._other_classes(classes)
        if self.connector_config is not None:
            try:
                return MODELS.build({**widths, **self.connector_config})
            except (TypeError, KeyError) as err:
                raise ConfigError(f'term {self.name!r}: `connector` cannot be built. {err}') from err
        if differ and self.loss.needs_equal_channels:
            return MODELS.build({'type': 'mmstructkd.ConvConnector', **widths})
        return nn.Identity()

    def _comparable(self, index: int, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both tensors of a level to equal width and size."""
        student = self.connectors[index](student)
        same_size = student.shape[2:] == teacher.shape[2:]
        if self.losses[index].needs_equal_size and student.dim() == teacher.dim() == 4 and not same_size:
            teacher = resize_map(teacher, tuple(student.shape[2:]))
        return student, teacher

    def forward(
        self, student: Records, teacher: Records, targets: Targets, *, all_parts: bool = False
    ) -> dict[str, Tensor]:
        """Score a batch.

        Args:
            student: the student's tapped tensors.
            teacher: the teacher's.
            targets: what the batch knows besides.
            all_parts: score although the term is not active (the probe does).

        Returns:
            ``loss_kd_<name>``, mean over levels, weighted; and
            ``loss_kd_<name>_<part>`` for objectives of the loss's own modules.
        """
        if not (self.active or all_parts):
            return {f'loss_kd_{self.name}': self.silence()}
        parts: dict[str, list[Tensor]] = {}
        for index, (feat_s, feat_t) in enumerate(self.pairs(student, teacher)):
            value = self.losses[index](*self._comparable(index, feat_s, feat_t), targets)
            for part, number in (value if isinstance(value, dict) else {'': value}).items():
                parts.setdefault(part, []).append(number)
        out = {}
        for part, numbers in parts.items():
            mean = torch.stack(numbers).mean()
            out[f'loss_kd_{self.name}' + (f'_{part}' if part else '')] = mean if part else mean * self.factor
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
