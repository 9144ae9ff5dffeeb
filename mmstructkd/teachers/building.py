"""Builds teachers from a config, with the argument named where one cannot be built.

Two options of the config are no business of a teacher's own class: ``every`` makes a
:class:`~mmstructkd.teachers.paced.PacedTeacher` around it, ``cache`` a
:class:`~mmstructkd.teachers.cached.CachedTeacher` around that. A batch then goes
straight down: distiller, cached teacher, paced teacher, the teacher itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmstructkd.errors import ConfigError, shown
from mmstructkd.registry import build_part
from mmstructkd.teachers.base import TeacherSource
from mmstructkd.teachers.cache import TeacherCache
from mmstructkd.teachers.cached import CachedTeacher
from mmstructkd.teachers.paced import PacedTeacher, check_every

__all__ = ['build_source']

FROZEN = 'mmstructkd.FrozenTeacher'


def build_source(config: Any, name: str | None = None) -> TeacherSource:
    """Build one teacher, with the wrappers that its config asks for.

    Args:
        config: its arguments; ``type`` defaults to ``FrozenTeacher``. Of every type:
            ``every``, to ask it at every k-th iteration only, with all terms
            weighted k times then and silent in between; ``cache``, to keep its
            outputs on disk for pipelines that repeat: arguments of a
            :class:`~mmstructkd.teachers.cache.TeacherCache` (``folder``, ...).
            A built teacher is returned as it is.
        name: its name among several.

    Returns:
        The teacher.

    Raises:
        ConfigError: not a dict, an unknown type, arguments that it does not take, or
            ``every`` or ``cache`` for a teacher with which they have no meaning.
    """
    argument = 'teacher' if name is None else f'teachers.{name}'
    if isinstance(config, TeacherSource):
        return config
    if not isinstance(config, Mapping):
        raise ConfigError(
            f'StructuredDistiller: `{argument}` must be a dict, got {shown(config)}. '
            "Write teacher=dict(config='mmseg::...', checkpoint='...')."
        )
    own = {'type': FROZEN, **config}
    every, cache = own.pop('every', 1), own.pop('cache', None)
    kind = own['type']
    owner = kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', str(kind))
    try:
        # Before the network is built, which takes long.
        check_every(owner, every)
        store = None if cache is None else TeacherCache.from_config(cache)
    except ConfigError as err:
        raise _unbuilt(argument, err) from err
    source = build_part(
        'StructuredDistiller',
        argument,
        own,
        what='teacher',
        example="dict(config='mmseg::...', checkpoint='...')",
        known=TeacherSource,
    )
    if not isinstance(source, TeacherSource):
        raise ConfigError(
            f'StructuredDistiller: `{argument}` must be a source of tensors, got {type(source).__name__}. '
            'Leave `type` out: the network goes into teacher=dict(config=...).'
        )
    try:
        if every > 1:
            source = PacedTeacher(source, every)
        return source if store is None else CachedTeacher(source, store)
    except ConfigError as err:
        raise _unbuilt(argument, err) from err


def _unbuilt(argument: str, err: ConfigError) -> ConfigError:
    """The same error with the argument of the distiller named."""
    return ConfigError(f'StructuredDistiller: `{argument}` cannot be built. {err}')
