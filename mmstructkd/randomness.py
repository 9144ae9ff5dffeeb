"""A random stream of the teacher's own, apart from the one that the student draws from.

Needs torch and numpy alone; every layer may use it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ['Draws', 'own_stream']

# Apart from the small seeds that configs set, so that the teacher's numbers are not the student's.
_BASE, _STRIDE, _SEEDS = 0x7EAC4E5, 0x9E3779B1, 2**32


@dataclass
class Draws:
    """What happened in a block of :func:`own_stream`.

    Attributes:
        any: whether a random number was drawn; known after a block that was watched.
    """

    any: bool = False


def _generators(device: torch.device) -> list[torch.Generator]:
    """The default generators of the CPU and of a device; those of other devices are left alone."""
    found = [torch.default_generator]
    if device.type not in ('cpu', 'meta'):
        # every kind of device whose streams are numbered has them under this name
        of_kind = getattr(torch.get_device_module(device), 'default_generators', ())
        place = device.index or 0
        if device.index is None and len(of_kind) > 1:
            place = torch.get_device_module(device).current_device()
        found += of_kind[place : place + 1]
    return found


def _same_numpy(first: tuple, second: tuple) -> bool:
    """Whether two states of numpy's global stream are equal."""
    return bool(np.array_equal(first[1], second[1])) and first[2:] == second[2:]


@contextlib.contextmanager
def own_stream(device: torch.device, step: int = 0, *, watch: bool = False) -> Iterator[Draws]:
    """Draw from a stream that begins anew, and leave the global ones as they are.

    Inside the block torch's streams of the CPU and of ``device``, numpy's and
    Python's are seeded by ``step`` alone: what is drawn is the same for the same
    step, in this run and in a resumed one. Afterwards each stands where it stood.
    Generators keep their state on the host, so that no device is waited for.

    Args:
        device: where the network runs.
        step: which stream.
        watch: find out whether anything was drawn.

    Yields:
        What is known about the block when it has ended.
    """
    generators = _generators(device)
    states, of_numpy, of_python = [one.get_state() for one in generators], np.random.get_state(), random.getstate()
    seed = (_BASE + step * _STRIDE) % _SEEDS
    for generator in generators:
        generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    begun = [one.get_state() for one in generators] if watch else []
    numpy_begun, python_begun = (np.random.get_state(), random.getstate()) if watch else ((), ())
    draws = Draws()
    try:
        yield draws
        if watch:
            draws.any = (
                any(not torch.equal(one.get_state(), state) for one, state in zip(generators, begun, strict=True))
                or not _same_numpy(np.random.get_state(), numpy_begun)
                or random.getstate() != python_begun
            )
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
