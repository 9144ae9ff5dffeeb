"""Builds the streams of a distiller, with the name told where one cannot be built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmstructkd.errors import ConfigError, shown
from mmstructkd.registry import build_part
from mmstructkd.streams.base import Stream

__all__ = ['LABELLED', 'build_streams']

#: The batch that the task is trained on; the stream of a term that names none.
LABELLED = 'labelled'
TAKEN = (LABELLED, 'inputs', 'data_samples', 'mode')


def build_streams(config: Any) -> dict[str, Stream]:
    """Build streams.

    Args:
        config: a config of each by name; ``None``: there is none.

    Returns:
        The streams by name.

    Raises:
        ConfigError: not a dict, a name that is taken, or a stream that cannot be built.
    """
    owner = 'StructuredDistiller'
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise ConfigError(f'{owner}: `streams` must be a dict of streams by name, got {shown(config)}.')
    streams: dict[str, Stream] = {}
    for name, settings in config.items():
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
            raise ConfigError(
                f'{owner}: a name in `streams` must be an identifier and none of {TAKEN}, got {name!r}. Rename it.'
            )
        example = "dict(type='mmstructkd.DataStream')"
        made = build_part(owner, f'streams.{name}', settings, what='stream', example=example, known=Stream)
        if not isinstance(made, Stream):
            raise ConfigError(f'{owner}: `streams.{name}` must be a stream, got {type(made).__name__}.')
        streams[name] = made
    return streams
