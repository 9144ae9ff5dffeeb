"""Initial weights of a loss's own modules that do not disturb the run's random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mmstructkd.errors import ConfigError

__all__ = ['check_seed', 'seeded']


def check_seed(owner: str, seed: int | None) -> None:
    """Raise :class:`~mmstructkd.errors.ConfigError` unless ``seed`` is ``None`` or an integer of at least 0."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
        raise ConfigError(f'{owner}: `seed` must be an integer of at least 0 or None, got {seed!r}.')


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the CPU's generator inside, and put it back afterwards.

    Args:
        seed: ``None``: one number of the global generator is drawn for it.
    """
    value = int(torch.randint(2**31 - 1, ())) if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: `torch.manual_seed` would reseed the accelerators too.
        torch.default_generator.manual_seed(value)
        yield
