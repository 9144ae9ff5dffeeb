"""Tapped tensors of single images in files: whole or absent, packed, bounded, without pickle.

A file holds a line of JSON (what it is, how its arrays are stored, a checksum of
that and of the arrays) and the bytes of the arrays. What a file says of itself
is checked before it is believed.
"""

from __future__ import annotations

import contextlib
import json
import math
import stat
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

from mmstructkd.errors import ConfigError, is_count
from mmstructkd.files import write_whole

__all__ = ['PackedTensor', 'TapStore', 'pack_tensor', 'unpack_tensor']

MAGIC = b'mmstructkd tap 2\n'
DTYPES = {'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
_RAW = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
_INDEX = {'uint8': torch.uint8, 'int16': torch.int16, 'int32': torch.int32}
_RAW.update(_INDEX)
_DIMS = 8  # no tapped tensor has more axes
_LARGEST = 60000.0  # below fp16's largest number, with room for rounding
_ABANDONED = 24 * 3600.0  # seconds after which half a file is nobody's


@dataclass(frozen=True)
class PackedTensor:
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that :func:`unpack_tensor` gives."""
        stored = tuple(self.arrays[0].shape)
        return (stored[0], self.classes, *stored[2:]) if self.classes else stored

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which values are stored."""
        return self.arrays[0].dtype

    @property
    def topk(self) -> int | None:
        """How many scores are kept at each position; ``None``: all."""
        return self.arrays[0].shape[1] if self.classes else None

    def check(self) -> None:
        """Find out whether :func:`unpack_tensor` can be trusted with this.

        Raises:
            ValueError: it was not made by :func:`pack_tensor`.
        """
        values, *others = self.arrays
        if not (math.isfinite(self.scale) and self.scale >= 1 and math.frexp(self.scale)[0] == 0.5):
            raise ValueError('scale')
        if values.dtype not in DTYPES.values() or values.dim() < 2 or values.shape[0] != 1:
            raise ValueError('values')
        if not self.classes:
            if others:
                raise ValueError('arrays')
            return
        places, rest = others
        if places.dtype not in _INDEX.values() or places.shape != values.shape or rest.dtype != values.dtype:
            raise ValueError('arrays')
        if not values.shape[1] < self.classes or rest.shape != (1, 1, *values.shape[2:]):
            raise ValueError('classes')
        if int(places.min()) < 0 or int(places.max()) >= self.classes:
            raise ValueError('places')


def pack_tensor(tensor: Tensor, dtype: str, topk: int | None = None) -> PackedTensor:
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
        index = torch.uint8 if classes <= 2**8 else torch.int16 if classes <= 2**15 else torch.int32
        return PackedTensor((cast[0], places.to(index), cast[1]), scale, classes)
    return PackedTensor((cast[0],), scale)


def unpack_tensor(stored: PackedTensor, device: torch.device) -> Tensor:
    """Bring what is stored back, to float32 on a device.

    Args:
        stored: from :func:`pack_tensor` or a file.
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


def _pack(tensors: Sequence[PackedTensor], about: Mapping[str, Any]) -> bytes:
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
    head = {'about': dict(about), 'tensors': described, 'bytes': len(body)}
    head = json.loads(json.dumps(head, default=str))  # as it will be read
    return MAGIC + json.dumps({**head, 'checksum': _checksum(head, body)}).encode() + b'\n' + body


def _checksum(head: Mapping[str, Any], body: bytes | bytearray) -> int:
    """Of all that a file holds, the checksum apart."""
    return zlib.crc32(body, zlib.crc32(json.dumps(head).encode()))


def _whole(value: Any, least: int) -> int:
    """A whole number of a file's head."""
    if not is_count(value) or value < least:
        raise ValueError(value)
    return value


def _unpack(content: bytearray) -> list[PackedTensor]:
    """The tensors of a file; an exception where it is not whole, or no file of this kind."""
    if not content.startswith(MAGIC):
        raise ValueError('no such file')
    end = content.index(b'\n', len(MAGIC))
    head = json.loads(content[len(MAGIC) : end])
    body = content[end + 1 :]
    stated = head.pop('checksum')
    if len(body) != head['bytes'] or _checksum(head, body) != stated:
        raise ValueError('not whole')
    tensors, start = [], 0
    for entry in head['tensors']:
        classes, scale = _whole(entry['classes'], 0), entry['scale']
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise ValueError(scale)
        if len(entry['arrays']) != (3 if classes else 1):
            raise ValueError('arrays')
        arrays = []
        for name, shape in entry['arrays']:
            if len(shape) > _DIMS:
                raise ValueError('shape')
            # of Python's numbers, which do not overflow
            size = math.prod(_whole(side, 1) for side in shape) * _RAW[name].itemsize
            if size > len(body) - start:
                raise ValueError('shape')
            raw = torch.frombuffer(body, dtype=torch.uint8, count=size, offset=start)
            arrays.append(raw.clone().view(_RAW[name]).view(shape))
            start += size
        tensors.append(PackedTensor(tuple(arrays), float(scale), classes))
        tensors[-1].check()
    if start != len(body) or not tensors:
        raise ValueError('bytes')
    return tensors


class TapStore:
    """A folder of such files, for any number of processes.

    A file is written beside its name and renamed when it is whole; one that was
    damaged later is found by its checksum and counts as absent, and so does one
    whose checksum is right and whose content :func:`pack_tensor` never made. When the folder
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

    def read(self, key: str) -> list[PackedTensor] | None:
        """Return the tensors of a key; ``None`` where there is no whole file.

        Args:
            key: hexadecimal.

        Returns:
            The tensors, on the CPU.
        """
        path = self.path(key)
        try:
            state = path.stat()
            if not stat.S_ISREG(state.st_mode) or state.st_size > self.limit:
                return None  # not written here
            content = bytearray(path.read_bytes())
        except OSError:
            return None
        try:
            return _unpack(content)
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError):
            # whatever JSON may say in place of what was written
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def write(self, key: str, tensors: Sequence[PackedTensor], about: Mapping[str, Any]) -> bool:
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
        try:
            write_whole(self.path(key), content)
        except OSError as err:
            self._stop(f'{type(err).__name__}: {err}')
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
