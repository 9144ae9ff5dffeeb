"""Initial weights of a loss's own modules that do not disturb the run's random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mmstructkd.errors import check_seed

__all__ = ['check_seed', 'seeded']


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
