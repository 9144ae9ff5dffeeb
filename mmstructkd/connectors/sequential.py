"""Connectors one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from mmstructkd.connectors.base import Connector, build_connector, check_widths, width_of
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.registry import MODELS, look_up

__all__ = ['SequentialConnector']


@MODELS.register_module()
class SequentialConnector(Connector):
    """Apply several connectors in turn, to all levels of a term.

    A connector of one level is built once for each, a joint one once for all.
    Widths are passed along: a connector that changes the width leads to the
    teacher's, unless its config has an ``out_channels`` of its own; one that
    keeps it hands it on. This is what ``connector=[dict(...), dict(...)]`` in a
    term makes.

    Args:
        in_channels: widths of the student, one a level.
        out_channels: widths of the teacher, likewise.
        connectors: configs of connectors, at least one.

    Raises:
        ConfigError: there is no connector, or one cannot be built.
        ShapeError: the number of levels is not that of the widths.

    Example:
        >>> import torch
        >>> connector = SequentialConnector([3], [5], connectors=[
        ...     dict(type='mmstructkd.ConvConnector'), dict(type='mmstructkd.PoolConnector', kernel_size=2)])
        >>> (student,), (teacher,) = connector([torch.zeros(1, 3, 4, 4)], [torch.zeros(1, 5, 4, 4)])
        >>> student.shape, teacher.shape
        (torch.Size([1, 5, 2, 2]), torch.Size([1, 5, 2, 2]))
    """

    joint = True

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int], connectors: Sequence[Any]) -> None:
        super().__init__()
        owner = type(self).__name__
        if not isinstance(connectors, (list, tuple)) or not connectors:
            raise ConfigError(
                f'{owner}: `connectors` must be a list of at least one config, got {connectors!r}. '
                "Example: [dict(type='mmstructkd.ConvConnector')]."
            )
        check_widths(owner, 'in_channels', in_channels)
        check_widths(owner, 'out_channels', out_channels)
        self.levels = (len(in_channels), len(out_channels))
        self.in_channels = list(in_channels)
        self.steps = nn.ModuleList()
        widths_s, widths_t = list(in_channels), list(out_channels)
        for place, config in enumerate(connectors):
            step = self._build(owner, f'connectors[{place}]', config, widths_s, widths_t)
            self.steps.append(step)
            part = cast(Connector, step[0] if isinstance(step, nn.ModuleList) else step)
            if isinstance(part, nn.Module) and getattr(part, 'joint', False):
                # A mix of layers leaves one layer of the teacher for each of the student.
                widths_t = widths_t[: len(widths_s)]
            if not getattr(part, 'keeps_width', False):
                own = config.get('out_channels')
                widths_s = widths_t[: len(widths_s)] if own is None else self._per_level(own, len(widths_s))
        self.widths = tuple(widths_s)
        self.needs_teacher = any(getattr(part, 'needs_teacher', False) for part in self._parts())
        self.needs_input_size = any(getattr(part, 'needs_input_size', False) for part in self._parts())
        self.input_size: tuple[int, int] | None = None

    @staticmethod
    def _per_level(width: Any, levels: int) -> list[int]:
        return list(width) if isinstance(width, (list, tuple)) else [width] * levels

    @staticmethod
    def _build(owner: str, argument: str, config: Any, widths_s: list[int], widths_t: list[int]) -> nn.Module:
        """Build one step: a joint connector, or a list of one connector a level."""
        kind = config.get('type') if isinstance(config, Mapping) else None
        cls = look_up(MODELS, kind) if isinstance(kind, str) else kind
        if cls is None or getattr(cls, 'joint', False):
            return build_connector(owner, config, widths_s, widths_t, argument)
        if len(widths_s) != len(widths_t):
            # Layers that a later mix brings together are all of one width.
            if len(set(widths_t)) != 1:
                raise ConfigError(
                    f'{owner}: `connectors` must begin with one that matches {len(widths_s)} layers of the student '
                    f'with {len(widths_t)} of the teacher (`in_channels` and `out_channels`), got {kind!r}. '
                    'Put it behind.'
                )
            widths_t = widths_t[:1] * len(widths_s)
        return nn.ModuleList(
            build_connector(owner, config, [width_s], [width_t], argument)
            for width_s, width_t in zip(widths_s, widths_t, strict=True)
        )

    def _parts(self) -> list[nn.Module]:
        """All connectors of all steps."""
        return [p for step in self.steps for p in (step if isinstance(step, nn.ModuleList) else [step])]

    def attach(self, network: nn.Module) -> None:
        """Hand the teacher's network to the connectors that need it.

        Args:
            network: the teacher's network.
        """
        for part in self._parts():
            if getattr(part, 'needs_teacher', False):
                cast(Any, part).attach(network)

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the last connector gives."""
        if (len(students), len(teachers)) != self.levels:
            raise ShapeError(
                f'{type(self).__name__}: there must be {self.levels[0]} tensors of the student and {self.levels[1]} '
                'of the teacher, as `in_channels` and `out_channels` have widths, '
                f'got {len(students)} and {len(teachers)}.'
            )
        if [width_of(student) for student in students] != self.in_channels:
            raise ShapeError(
                f'{type(self).__name__}: `in_channels` must be the widths of the student, '
                f'{[width_of(student) for student in students]}, got {self.in_channels}. Leave it out of the config.'
            )
        for step in self.steps:
            if isinstance(step, nn.ModuleList):
                if len(step) != len(students):
                    raise ShapeError(
                        f'{type(self).__name__}: {type(step[0]).__name__} must come before what changes the number of '
                        f'levels, got {len(students)} levels for {len(step)} widths.'
                    )
                students = [part(student) for part, student in zip(step, students, strict=True)]
                continue
            if getattr(step, 'needs_input_size', False):
                cast(Any, step).input_size = self.input_size
            students, teachers = step(students, teachers)
        return students, teachers
