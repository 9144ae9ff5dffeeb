"""Tapped tensors of single images in files: whole or absent, narrow, bounded, without pickle.

A file holds a line of JSON (what it is, how its arrays are stored, a checksum)
and the bytes of the arrays.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_dist_info
from mmengine.logging import print_log
from torch import Tensor

from mmstructkd.errors import ConfigError

__all__ = ['Narrow', 'TapStore', 'narrow', 'widen']

MAGIC = b'mmstructkd tap 1\n'
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
_RAW = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
_RAW.update({'uint8': torch.uint8, 'int16': torch.int16})
_LARGEST = 60000.0  # below fp16's largest number, with room for rounding
_ABANDONED = 24 * 3600.0  # seconds after which half a file is nobody's


@dataclass(frozen=True)
class Narrow:
    """A tensor of one image as it is stored.

    Attributes:
        arrays: the values; for the largest scores their values, their classes,
            and one score for all other classes.
        scale: the values were divided by this power of two.
        classes: number of classes where only the largest scores are there, else 0.
    """

    arrays: tuple[Tensor, ...]
    scale: float = 1.0
    classes: int = 0


def narrow(tensor: Tensor, dtype: str, topk: int | None = None) -> Narrow:
    """Bring a tensor into the form in which it is stored.

    Args:
        tensor: of one image, (1, C, ...), floating point.
        dtype: ``'fp16'``, ``'bf16'`` or ``'fp32'``. Values beyond fp16's range
            are divided by a power of two, which loses nothing.
        topk: keep this many largest scores at each position. The others share
            what probability is left, so that those of the largest stay right.

    Returns:
        The narrow form, on the same device.
    """
    tensor = tensor.detach().float()
    kept: tuple[Tensor, ...] = (tensor,)
    classes = 0
    if topk is not None:
        classes = tensor.shape[1]
        values, places = tensor.topk(topk, dim=1)
        rest = tensor.scatter(1, places, -torch.inf).logsumexp(dim=1, keepdim=True)
        rest = rest - torch.tensor(float(classes - topk)).log().to(rest)
        kept = (values, rest)
    scale = 1.0
    if dtype == 'fp16':
        largest = float(torch.stack([part.abs().amax() for part in kept]).amax())
        while largest / scale > _LARGEST and scale < 2.0**127:
            scale *= 2.0
    cast = [(part / scale).to(DTYPES[dtype]) for part in kept]
    if classes:
        index = torch.uint8 if classes <= 256 else torch.int16
        return Narrow((cast[0], places.to(index), cast[1]), scale, classes)
    return Narrow((cast[0],), scale)


def widen(stored: Narrow, device: torch.device) -> Tensor:
    """Bring what is stored back, to float32 on a device.

    Args:
        stored: from :func:`narrow` or a file.
        device: where the tensor is wanted.

    Returns:
        The tensor: the same whether it went through a file or not.
    """
    arrays = [array.to(device, non_blocking=True) for array in stored.arrays]
    values = arrays[0].float() * stored.scale
    if not stored.classes:
        return values
    rest = (arrays[2].float() * stored.scale).repeat_interleave(stored.classes, dim=1)
    return rest.scatter(1, arrays[1].long(), values)


def _pack(tensors: Sequence[Narrow], about: Mapping[str, Any]) -> bytes:
    """The content of a file."""
    described, chunks = [], []
    for stored in tensors:
        arrays = []
        for array in stored.arrays:
            array = array.cpu().contiguous()
            arrays.append([str(array.dtype).removeprefix('torch.'), list(array.shape)])
            chunks.append(array.view(torch.uint8).numpy().tobytes())
        described.append({'scale': stored.scale, 'classes': stored.classes, 'arrays': arrays})
    body = b''.join(chunks)
    head = {'about': dict(about), 'tensors': described, 'bytes': len(body), 'checksum': zlib.crc32(body)}
    return MAGIC + json.dumps(head).encode() + b'\n' + body


def _unpack(content: bytearray) -> list[Narrow]:
    """The tensors of a file; an exception where it is not whole."""
    if not content.startswith(MAGIC):
        raise ValueError('no such file')
    end = content.index(b'\n', len(MAGIC))
    head = json.loads(content[len(MAGIC) : end])
    body = content[end + 1 :]
    if len(body) != head['bytes'] or zlib.crc32(body) != head['checksum']:
        raise ValueError('not whole')
    tensors, start = [], 0
    for entry in head['tensors']:
        arrays = []
        for name, shape in entry['arrays']:
            dtype, count = _RAW[name], torch.Size(shape).numel()
            size = count * dtype.itemsize
            raw = torch.frombuffer(body, dtype=torch.uint8, count=size, offset=start) if size else torch.empty(0)
            arrays.append(raw.clone().view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype))
            start += size
        tensors.append(Narrow(tuple(arrays), float(entry['scale']), int(entry['classes'])))
    return tensors


class TapStore:
    """A folder of such files, for any number of processes.

    A file is written beside its name and renamed when it is whole; one that was
    damaged later is found by its checksum and counts as absent. When the folder
    is full nothing more is written, and what is there stays: training passes
    through its samples in rounds, so that throwing out the oldest would throw
    out each file just before its turn.

    Args:
        folder: where; made if it is not there.
        max_gb: most gigabytes (1e9 bytes) that the files take. The processes of
            a distributed run share what is free when each begins to write.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str, max_gb: float) -> None:
        self.folder = Path(folder).expanduser()
        self.limit = int(max_gb * 1e9)
        self.full = False
        self._room: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as err:
            raise ConfigError(
                f'FrozenTeacher: `cache.folder` must be a folder that can be written to, got {folder!r} ({err}).'
            ) from err

    def path(self, key: str) -> Path:
        """Where the file of a key is."""
        return self.folder / key[:2] / f'{key}.tap'

    def read(self, key: str) -> list[Narrow] | None:
        """Return the tensors of a key; ``None`` where there is no whole file.

        Args:
            key: hexadecimal.

        Returns:
            The tensors, on the CPU.
        """
        path = self.path(key)
        try:
            content = bytearray(path.read_bytes())
        except OSError:
            return None
        try:
            return _unpack(content)
        except (ValueError, KeyError, TypeError, RuntimeError):
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write(self, key: str, tensors: Sequence[Narrow], about: Mapping[str, Any]) -> bool:
        """Keep the tensors of a key, if there is room.

        Args:
            key: hexadecimal.
            tensors: what is kept.
            about: plain values that say what it is, for who looks into the file.

        Returns:
            Whether they are kept.
        """
        if self.full:
            return False
        content = _pack(tensors, about)
        if not self._take(len(content)):
            return False
        path = self.path(key)
        part = None
        try:
            path.parent.mkdir(exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=key[:8], suffix='.part', dir=path.parent)
            with os.fdopen(handle, 'wb') as file:
                file.write(content)
            Path(part).replace(path)
        except OSError as err:
            self._stop(f'{type(err).__name__}: {err}')
            if part is not None:
                with contextlib.suppress(OSError):
                    Path(part).unlink()
            return False
        return True

    def size(self) -> int:
        """Bytes of all files; half ones that nobody writes any more are removed."""
        total = 0
        for path in self.folder.glob('??/*'):
            with contextlib.suppress(OSError):
                state = path.stat()
                if path.suffix == '.part' and time.time() - state.st_mtime > _ABANDONED:
                    path.unlink()
                elif path.suffix in ('.tap', '.part'):
                    total += state.st_size
        return total

    def _take(self, count: int) -> bool:
        """Whether as many bytes may be written by this process; they then count as written."""
        if self._room is None or self._room < count:
            # Each process may fill its share of what is free now: together they stay below the limit.
            self._room = (self.limit - self.size()) // get_dist_info()[1]
        if self._room < count:
            self._stop(f'{self.limit / 1e9:g} GB are used')
            return False
        self._room -= count
        return True

    def _stop(self, reason: str) -> None:
        self.full = True
        print_log(
            f'FrozenTeacher: the cache {str(self.folder)!r} takes no more ({reason}); what is in it stays in use.',
            'current',
            level=30,
        )
