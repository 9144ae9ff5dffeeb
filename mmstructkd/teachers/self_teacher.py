"""The student's own features, refined, teach it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.models.given_features import GivenFeatures
from mmstructkd.registry import MODELS, build_part
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Regions, Tap
from mmstructkd.teachers.base import Records
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
        task_weight: factor of the twin's task loss.
        task_schedule: config of a :class:`WeightSchedule` for that factor.
        detach: keep the twin's gradient away from the student.

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
        detach: bool = False,
    ) -> None:
        super().__init__(task_weight, task_schedule)
        if not isinstance(detach, bool):
            raise ConfigError(f'SelfTeacher: `detach` must be True or False, got {detach!r}.')
        self.features = Tap.parse(features, 'SelfTeacher: `features`')
        self.reads = (self.features,)
        self.detach = detach
        self.neck = dict(neck or {})
        self._config: dict[str, Any] = {}

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Take the student's config.

        Args:
            student: the student.
            config: its config.
        """
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

    def _build(self, widths: list[int]) -> BaseModule:
        """The twin, with weights of its own."""
        config = {key: value for key, value in self._config.items() if key not in DROPPED}
        config['backbone'] = {'type': 'mmstructkd.GivenFeatures'}
        neck = {'type': 'mmstructkd.RefinementNeck', **self.neck}
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

    def _give(self, features: Sequence[Tensor] | None) -> None:
        """Show the student's features to the twin."""
        assert self.network is not None
        backbone = self.network.backbone
        assert isinstance(backbone, GivenFeatures)
        backbone.give([f.detach() for f in features] if self.detach and features is not None else features)

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
        features = (student or {})[self.features]
        if any(feature.dim() != 4 for feature in features):
            raise ShapeError(
                f'SelfTeacher: `features` must be maps (B, C, H, W), got {[tuple(f.shape) for f in features]} at '
                f'{str(self.features)!r}. A backbone of tokens has maps behind its neck.'
            )
        if self.trained is None:
            self.trained = self._build([feature.shape[1] for feature in features])
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
        self._give((student or {})[self.features])
        try:
            return super().observe(inputs, data_samples, taps, student=student, regions=regions, labelled=labelled)
        finally:
            self._give(None)

    def provenance(self) -> dict[str, Any]:
        """What it reads: all else is in the student's config."""
        return {'type': type(self).__name__, 'features': str(self.features)}
