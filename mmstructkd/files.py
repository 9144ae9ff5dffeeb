"""Writing a file whole: under its name stands the old content or the new one, never half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ['whole_file', 'write_whole']


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, synced: bool = False) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; it is renamed when all went well, and removed when not.

    The folder is made where it is absent. A link stays a link: what it points to
    is replaced. The mode of the file is kept; that of a new one is as usual.

    Args:
        path: the final name.
        synced: wait until the content is on the disk before renaming, so that a
            machine that goes down leaves no empty file either.

    Yields:
        The name to write to, an empty file.

    Raises:
        OSError: the file or its folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f'.{target.name}.', suffix='.part', dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        if synced:
            with part.open('rb') as stream:
                os.fsync(stream.fileno())
        part.chmod(target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a small file whole, see :func:`whole_file`.

    Args:
        path: its name.
        content: text (written as UTF-8) or bytes.
    """
    with whole_file(path) as part:
        part.write_bytes(content.encode('utf-8') if isinstance(content, str) else content)


def _umask() -> int:
    """Return the mask of new files: mkstemp makes them for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
