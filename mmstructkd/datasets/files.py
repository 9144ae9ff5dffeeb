"""What the datasets of files say where a folder, an ending or a list is not right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.fileio import exists

from mmstructkd.errors import ConfigError, shown

__all__ = ['check_first_label', 'check_prefix', 'check_suffix', 'reading']


def check_suffix(owner: str, argument: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is the ending of file names."""
    if not isinstance(value, str) or not value:
        raise ConfigError(
            f"{owner}: `{argument}` must be the ending of file names, got {shown(value)}. Example: '.png'."
        )


def check_prefix(owner: str, prefix: Any, keys: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` unless ``prefix`` has a folder for each key, and nothing else."""
    good = isinstance(prefix, Mapping) and set(prefix) == set(keys)
    if not good or not all(isinstance(folder, str) for folder in prefix.values()):
        raise ConfigError(f'{owner}: `data_prefix` must give the folders {keys}, got {shown(prefix)}.')


@contextlib.contextmanager
def reading(owner: str, argument: str, value: Any) -> Iterator[None]:
    """Tell a file or folder that cannot be read with the argument that names it.

    Args:
        owner: who reads, for the message.
        argument: name of the argument.
        value: what it is.

    Yields:
        Nothing.

    Raises:
        ConfigError: something cannot be read.
    """
    try:
        yield
    except OSError as err:
        raise ConfigError(
            f'{owner}: `{argument}` must name what can be read, got {shown(value)} ({err}). Is data_root right?'
        ) from err


def check_first_label(owner: str, argument: str, value: Any, path: str, backend_args: dict | None) -> None:
    """Raise :class:`ConfigError` unless the first image has a label: a wrong ending shows here, not in a worker."""
    if not exists(path, backend_args=backend_args):
        raise ConfigError(
            f'{owner}: `{argument}` and `data_prefix` must give a file for each image, got {shown(value)}: '
            f'there is no {path!r}.'
        )
