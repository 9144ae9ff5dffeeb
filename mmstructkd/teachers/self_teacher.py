"""The student's own features, refined, teach it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, TapError, suggest
from mmstructkd.models.given_features import GivenFeatures
from mmstructkd.registry import MODELS, build_part
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Regions, Tap
from mmstructkd.teachers.base import Records, TeacherSource
from mmstructkd.teachers.mean import TeacherMean
from mmstructkd.teachers.trained import TrainedTeacher

__all__ = ['SelfTeacher']

#: What a twin does not have: it starts from nothing, and one head is enough.
DROPPED = ('auxiliary_head', 'pretrained', 'init_cfg')


@MODELS.register_module()
class SelfTeacher(TrainedTeacher):
    """A twin of the student that reads the student's features through a refining neck.

    Feature Refinement via Self-Knowledge Distillation (FRSKD, arXiv:2103.08273).
    The twin is the student's own config with a backbone that hands on the student's
    features of the same step, a neck that refines them, and heads of its own. It
    learns the task beside the student, and what it shows is a better version of
    what the student shows: the taps have the student's names
    (``decode_head.conv_seg``), and the refined features are ``neck[*]``. There is
    no other network, no checkpoint, and nothing of it is exported.

    The gradient of the twin's task loss reaches the student's features, as in the
    released code; ``detach=True`` stops it there. Terms never send a gradient to
    the twin.

    Args:
        features: the student's tap that its heads read: ``'backbone[*]'``, or
            ``'neck[*]'`` for a student with a neck.
        neck: arguments of a :class:`~mmstructkd.models.RefinementNeck`, or of
            another registered neck by its ``type``; ``in_channels`` is filled in.
            Without ``end`` it ends where the student's head reads.
        also: a tap of another member of the group, e.g. ``'peer.backbone[*]'``: its
            maps are fused with the student's by a
            :class:`~mmstructkd.models.FusionNeck`, which takes the place of the
            refining neck (MFEF, arXiv:2206.08224). As many levels as ``features`` has.
        task_weight: factor of the twin's task loss.
        task_schedule: config of a :class:`WeightSchedule` for that factor.
        detach: keep the twin's gradient away from the student, and from who else is fused.

    Raises:
        ConfigError: the student was given as a built model, or ``features`` is not
            what its heads read.
    """

    follows = True

    def __init__(
        self,
        features: str = 'backbone[*]',
        neck: Mapping[str, Any] | None = None,
        task_weight: float = 1.0,
        task_schedule: Mapping[str, Any] | None = None,
        *,
        also: str | None = None,
        detach: bool = False,
    ) -> None:
        super().__init__(task_weight, task_schedule)
        if not isinstance(detach, bool):
            raise ConfigError(f'SelfTeacher: `detach` must be True or False, got {detach!r}.')
        self.features = Tap.parse(features, 'SelfTeacher: `features`')
        self.reads = (self.features,)
        self.beside = () if also is None else (Tap.parse(also, 'SelfTeacher: `also`'),)
        self._joined = False
        self.detach = detach
        self.neck = dict(neck or {})
        self._config: dict[str, Any] = {}

    def join(self, name: str, members: Mapping[str, TeacherSource]) -> None:
        """Check that the other network is there, and is asked before this one.

        Args:
            name: its own name in the group.
            members: all of the group.

        Raises:
            ConfigError: ``also`` names no other member, or one that looks at others itself.
        """
        self._joined = True
        for tap in self.beside:
            other, _, module = tap.module.partition('.')
            if other not in members or other == name or not module:
                raise ConfigError(
                    f'SelfTeacher {name!r}: `also` must name another teacher of the group and a module of it, got '
                    f'{str(tap)!r}. {suggest(other, [key for key in members if key != name])}'
                )
            if members[other].beside or isinstance(members[other], TeacherMean):
                raise ConfigError(
                    f'SelfTeacher {name!r}: `also` must name a teacher with a network of its own, got {str(tap)!r}, '
                    'which is made of others. Name one of these.'
                )

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Take the student's config.

        Args:
            student: the student.
            config: its config.
        """
        if self.beside and not self._joined:
            raise ConfigError(
                f'SelfTeacher: `also` must name a teacher beside it, got {str(self.beside[0])!r} and no other teacher. '
                "Write teachers=dict(peer=dict(...), fused=dict(type='mmstructkd.SelfTeacher', also='peer...'))."
            )
        if config is None:
            raise ConfigError(
                f'SelfTeacher: `student` must be given as a config, got a built {type(student).__name__}. The teacher '
                'is built from it, with another backbone.'
            )
        self.features.resolve(student, 'SelfTeacher: `features`')
        place = 'neck' if getattr(student, 'with_neck', False) else 'backbone'
        if self.features.module != place:
            raise ConfigError(
                f'SelfTeacher: `features` must be what the heads of {type(student).__name__} read, got '
                f"{str(self.features)!r}. Write features='{place}[*]'."
            )
        self._config = copy.deepcopy(dict(config))

    def _end(self) -> str:
        """Where the neck must end, so that every level lies on the way to the head."""
        head = self._config.get('decode_head')
        if isinstance(head, (list, tuple)):
            head = head[-1]
        index = (head or {}).get('in_index', -1)
        last = index[-1] if isinstance(index, (list, tuple)) else index
        return 'fine' if last == 0 and not isinstance(index, (list, tuple)) else 'coarse'

    def _levels(self) -> list[int] | None:
        """Which levels the student's heads read; ``None``: all."""
        heads = self._config.get('decode_head')
        if heads is None:
            return None
        heads = heads if isinstance(heads, (list, tuple)) else [heads]
        read = [head.get('in_index', -1) for head in heads]
        return [level for one in read for level in (one if isinstance(one, (list, tuple)) else [one])]

    def _build(self, widths: list[Any]) -> BaseModule:
        """The twin, with weights of its own."""
        config = {key: value for key, value in self._config.items() if key not in DROPPED}
        config['backbone'] = {'type': 'mmstructkd.GivenFeatures'}
        neck = {'type': 'mmstructkd.FusionNeck' if self.beside else 'mmstructkd.RefinementNeck', **self.neck}
        if neck['type'] == 'mmstructkd.FusionNeck':
            neck.setdefault('levels', self._levels())
        if neck['type'] == 'mmstructkd.RefinementNeck':
            neck.setdefault('end', self._end())
        config['neck'] = {**neck, 'in_channels': widths}
        # Built for its errors, which name the argument; the twin builds its own.
        build_part(type(self).__name__, 'neck', config['neck'], example='dict(layers=2)')
        twin = MODELS.build(config)
        twin.init_weights()
        return twin

    def _adopt(self, trained: nn.Module) -> None:
        self.network = trained

    def _seen(self, records: Records | None) -> list[Any]:
        """What the twin reads: a map a level, or for each level those of both networks."""
        sides = [(records or {})[tap] for tap in (*self.reads, *self.beside)]
        if self.detach:
            sides = [[tensor.detach() for tensor in side] for side in sides]
        if not self.beside:
            return list(sides[0])
        if len(sides[0]) != len(sides[1]):
            raise TapError(
                f'SelfTeacher: `also` must give as many maps as `features`, got {len(sides[1])} at '
                f'{str(self.beside[0])!r} and {len(sides[0])} at {str(self.features)!r}.'
            )
        return [list(level) for level in zip(*sides, strict=True)]

    def _give(self, features: Sequence[Any] | None) -> None:
        """Show what it reads to the twin."""
        assert self.network is not None
        backbone = self.network.backbone
        assert isinstance(backbone, GivenFeatures)
        backbone.give(features)

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> Capture:
        """Build the twin for the widths of the student's features, and run it in eval."""
        taps = tuple(taps)
        for argument, tap in zip(('features', 'also'), (self.features, *self.beside), strict=False):
            maps = (student or {})[tap]
            if any(feature.dim() != 4 for feature in maps):
                raise ShapeError(
                    f'SelfTeacher: `{argument}` must be maps (B, C, H, W), got {[tuple(f.shape) for f in maps]} at '
                    f'{str(tap)!r}. A backbone of tokens has maps behind its neck.'
                )
        features = self._seen(student)
        if self.trained is None:
            widths = [[m.shape[1] for m in level] if self.beside else level.shape[1] for level in features]
            self.trained = self._build(widths)
            self._adopt(self.trained)
        self._check_taps(taps)
        self._give(features)
        try:
            return self._try(inputs, data_samples, taps)
        finally:
            self._give(None)

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
        """Run the twin on the student's features of this step."""
        self._give(self._seen(student))
        try:
            return super().observe(inputs, data_samples, taps, student=student, regions=regions, labelled=labelled)
        finally:
            self._give(None)

    def provenance(self) -> dict[str, Any]:
        """What it reads: all else is in the student's config."""
        also = {'also': str(self.beside[0])} if self.beside else {}
        return {'type': type(self).__name__, 'features': str(self.features), **also}
