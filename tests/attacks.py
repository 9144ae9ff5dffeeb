"""Checkpoints that run code when they are read carelessly: each makes a file, the canary."""

from __future__ import annotations

import functools
import io
import os
import pickle
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ['FORMATS', 'PAYLOADS', 'PLACES', 'attack']


class Reduced:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call

    def __call__(self) -> None:
        """Be callable, so that what it becomes can be called in its turn."""


class Built:
    """Pickles as an object whose state is set by a call."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __reduce__(self) -> tuple:
        return dict, (), None, None, iter([('x', self.inner)])


def _shell(canary: Path) -> str:
    return f'touch {canary}'


def _python(canary: Path) -> str:
    return f'__import__("pathlib").Path({str(canary)!r}).touch()'


#: What runs, by name; and the name under which a refusal must mention it.
PAYLOADS: dict[str, tuple[Callable[[Path], Any], str]] = {
    'os.system': (lambda canary: Reduced(os.system, _shell(canary)), 'system'),
    'subprocess': (lambda canary: Reduced(subprocess.check_call, ['touch', str(canary)]), 'check_call'),
    'eval': (lambda canary: Reduced(eval, _python(canary)), 'eval'),
    'exec': (lambda canary: Reduced(exec, _python(canary)), 'exec'),
    'getattr': (lambda canary: Reduced(Reduced(getattr, Path, 'touch'), canary), 'pathlib.Path'),
    'partial': (lambda canary: Reduced(functools.partial(os.system, _shell(canary))), 'partial'),
    'mknod': (lambda canary: Built(Reduced(os.mknod, str(canary))), 'mknod'),
}

#: Where in a checkpoint of mmengine it lies.
PLACES = ['meta', 'optimizer', 'message_hub', 'ema_state_dict', 'state_dict', 'param_schedulers']


def _new(content: dict, path: Path) -> None:
    torch.save(content, path)


def _old(content: dict, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _protocol(content: dict, path: Path) -> None:
    torch.save(content, path, pickle_protocol=4)


def _pickle(content: dict, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def _tar(content: dict, path: Path) -> None:
    """The format of torch before 0.1.10."""
    parts = {'storages': content, 'tensors': content, 'pickle': content}
    with tarfile.open(path, 'w', format=tarfile.PAX_FORMAT) as archive:
        for name, part in parts.items():
            text = pickle.dumps(part, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))


#: How the file is written.
FORMATS: dict[str, Callable[[dict, Path], None]] = {
    'zip': _new,
    'legacy': _old,
    'protocol 4': _protocol,
    'pickle': _pickle,
    'tar': _tar,
}


def attack(
    path: Path,
    canary: Path,
    payload: str = 'os.system',
    place: str = 'meta',
    form: str = 'zip',
    content: dict | None = None,
) -> Path:
    """Write such a checkpoint.

    Args:
        path: file to write.
        canary: file that appears where the code runs.
        payload: of :data:`PAYLOADS`.
        place: of :data:`PLACES`.
        form: of :data:`FORMATS`.
        content: the rest of the checkpoint.

    Returns:
        ``path``.
    """
    whole = dict(content or {'state_dict': {'w': torch.zeros(1)}, 'meta': {'epoch': 0, 'iter': 1}})
    part = whole.get(place)
    whole[place] = (
        {**part, 'x': PAYLOADS[payload][0](canary)} if isinstance(part, dict) else PAYLOADS[payload][0](canary)
    )
    FORMATS[form](whole, path)
    return path
