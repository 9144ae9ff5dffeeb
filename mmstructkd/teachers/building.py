"""Builds teachers from a config, with the argument named where one cannot be built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmstructkd.errors import ConfigError, shown
from mmstructkd.registry import build_part
from mmstructkd.teachers.base import TeacherSource

__all__ = ['build_source']


def build_source(config: Any, name: str | None = None) -> TeacherSource:
    """Build one teacher.

    Args:
        config: its arguments; ``type`` defaults to ``FrozenTeacher``. A built one is returned.
        name: its name among several.

    Returns:
        The teacher.

    Raises:
        ConfigError: not a dict, an unknown type, or arguments that it does not take.
    """
    argument = 'teacher' if name is None else f'teachers.{name}'
    if isinstance(config, TeacherSource):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f'StructuredDistiller: `{argument}` must be a dict, got {shown(config)}. '
            "Write teacher=dict(config='mmseg::...', checkpoint='...')."
        )
    source = build_part(
        'StructuredDistiller',
        argument,
        {'type': 'mmstructkd.FrozenTeacher', **config},
        what='teacher',
        example="dict(config='mmseg::...', checkpoint='...')",
        known=TeacherSource,
    )
    if not isinstance(source, TeacherSource):
        raise ConfigError(
            f'StructuredDistiller: `{argument}` must be a source of tensors, got {type(source).__name__}. '
            'Leave `type` out: the network goes into teacher=dict(config=...).'
        )
    return source
