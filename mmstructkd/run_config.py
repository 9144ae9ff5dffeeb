"""The config of the run whose model is built now, and configs that hold paths."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import os
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

__all__ = ['config_at_hand', 'current_config', 'paths_as_text']

_CONFIG: contextvars.ContextVar[Any] = contextvars.ContextVar('config', default=None)


def current_config() -> Any:
    """Return the config of the run whose model is built now; ``None`` outside of that."""
    return _CONFIG.get()


@contextlib.contextmanager
def config_at_hand(cfg: Any) -> Iterator[None]:
    """Let a model that is built meanwhile see the whole config.

    Args:
        cfg: the config.

    Yields:
        Nothing.
    """
    token = _CONFIG.set(cfg)
    try:
        yield
    finally:
        _CONFIG.reset(token)


def paths_as_text(config: Any) -> Any:
    """Return a config in which every ``pathlib.Path`` is its text.

    Args:
        config: a config, or a part of one.

    Returns:
        The same object where there is none in it, else a copy.
    """
    holder = config._cfg_dict if isinstance(config, Config) else config
    if not _holds_path(holder):
        return config
    twin = copy.deepcopy(config)
    _replace_paths(twin._cfg_dict if isinstance(twin, Config) else twin)
    return twin


def _holds_path(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_path, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_path, value))
    return isinstance(value, os.PathLike)


def _replace_paths(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            value[key] = _replace_paths(value[key])
    elif isinstance(value, list):
        value[:] = map(_replace_paths, value)
    elif type(value) is tuple:
        value = tuple(map(_replace_paths, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value
