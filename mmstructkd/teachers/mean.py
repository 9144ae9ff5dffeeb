"""The weighted mean of other teachers, as a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import ConfigError, TapError, check_finite_number, check_one_of, suggest
from mmstructkd.functional.core.score_fusion import CONFIDENCES, FUSED, fuse_scores
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import Regions, Tap
from mmstructkd.teachers.base import ProbedTensors, Records, TeacherSource

__all__ = ['TeacherMean']


@MODELS.register_module()
class TeacherMean(TeacherSource):
    """A member of a group that shows the mean of what other members show.

    A tap of it is asked of each of the others under the same name:
    ``teachers=dict(big=..., wide=..., both=dict(type='mmstructkd.TeacherMean',
    of=dict(big=0.7, wide=0.3)))`` and ``tap=dict(student='decode_head.conv_seg',
    teacher='both.decode_head.conv_seg')``. With ``confidence`` each pixel weighs a
    teacher by how sure it is there. See
    :func:`~mmstructkd.functional.core.score_fusion.fuse_scores` for the formula.

    Args:
        of: weight of each member by name, at least two of them.
        confidence: ``None``, or how sure a teacher is: ``'maximum'``,
            ``'margin'`` or ``'entropy'``; for class scores.
        sharpness: exponent of the confidence.
        mean_of: ``'scores'`` or ``'probabilities'``.

    Raises:
        ConfigError: a member or an argument cannot be used.
    """

    def __init__(
        self,
        of: Mapping[str, float],
        confidence: str | None = None,
        sharpness: float = 1.0,
        mean_of: str = 'scores',
    ) -> None:
        owner = type(self).__name__
        if not isinstance(of, Mapping) or len(of) < 2:
            raise ConfigError(
                f'{owner}: `of` must give a weight to at least two teachers, got {of!r}. '
                'Write of=dict(big=0.7, wide=0.3).'
            )
        for name, weight in of.items():
            check_finite_number(owner, f'of[{name!r}]', weight, minimum=0)
        if not sum(of.values()) > 0:
            raise ConfigError(f'{owner}: `of` must give some teacher a weight above 0, got {dict(of)}.')
        if confidence is not None:
            check_one_of(owner, 'confidence', confidence, CONFIDENCES)
        check_finite_number(owner, 'sharpness', sharpness, minimum=0)
        check_one_of(owner, 'mean_of', mean_of, FUSED)
        self.weights = {str(name): float(weight) for name, weight in of.items()}
        self.confidence, self.sharpness, self.mean_of = confidence, float(sharpness), mean_of
        self._members: Mapping[str, TeacherSource] = {}

    def join(self, name: str, members: Mapping[str, TeacherSource]) -> None:
        """Learn which teachers there are.

        Args:
            name: its own name in the group.
            members: all of the group.

        Raises:
            ConfigError: one it names is missing, or is a mean itself.
        """
        owner = f'{type(self).__name__} {name!r}'
        for other in self.weights:
            if other not in members or other == name:
                raise ConfigError(
                    f'{owner}: `of` must name other teachers of the group, got {other!r}. '
                    f'{suggest(other, [key for key in members if key != name])}'
                )
            if isinstance(members[other], TeacherMean):
                raise ConfigError(f'{owner}: `of` must not name another mean, got {other!r}. Name its teachers.')
        self._members = members

    @property
    def network(self) -> nn.Module | None:
        """That of the first teacher: what a tap names in all of them."""
        first = next(iter(self.weights))
        return self._members[first].network if first in self._members else None

    def mean(self, taps: Sequence[Tap], shown: Mapping[str, Records]) -> dict[Tap, list[Tensor]]:
        """Average what the others have shown.

        Args:
            taps: its own.
            shown: by member its tensors.

        Returns:
            The means, without graph.
        """
        found: dict[Tap, list[Tensor]] = {}
        for tap in taps:
            sides = [shown[name][tap] for name in self.weights]
            if len({len(side) for side in sides}) > 1:
                raise TapError(
                    f'{type(self).__name__}: {str(tap)!r} must give as many tensors in each teacher, got '
                    f'{dict(zip(self.weights, map(len, sides), strict=True))}.'
                )
            found[tap] = [
                fuse_scores(
                    list(level),
                    weights=list(self.weights.values()),
                    confidence=self.confidence,
                    sharpness=self.sharpness,
                    of=self.mean_of,
                )
                for level in zip(*sides, strict=True)
            ]
        return found

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Check that it stands in a group."""
        if not self._members:
            raise ConfigError(
                f'{type(self).__name__}: it must be one of several `teachers`, got no others. '
                'Write teachers=dict(a=..., b=..., mean=dict(type=...)).'
            )

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> ProbedTensors:
        """The group calls :meth:`mean` instead."""
        raise ConfigError(f'{type(self).__name__}: it must be asked through its group, got a call of its own.')

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
        """The group calls :meth:`mean` instead."""
        return self.probe(inputs, data_samples, taps).records

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Nothing: the others hold the networks."""

    def num_classes(self, tap: Tap) -> int | None:
        """That of the first teacher."""
        return self._members[next(iter(self.weights))].num_classes(replace(tap))

    def repeatable(self) -> str:
        """No: it runs nothing."""
        return 'It runs no network of its own: give `cache` to the teachers that it names in `of`.'

    def cannot_rest(self) -> str:
        """Why not: its teachers do."""
        return 'It runs no network of its own: give `every` to the teachers that it names in `of`.'

    def provenance(self) -> dict[str, Any]:
        """Its weights."""
        return {'type': type(self).__name__, 'of': dict(self.weights), 'confidence': self.confidence}
