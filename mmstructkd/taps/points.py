"""The points that a point head samples in training: recorded in one network, scored again by another.

Shape shorthand: B images, P points, each (x, y) in [0, 1] of the image.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import TapError
from mmstructkd.taps.regions import Regions
from mmstructkd.taps.tap import Tap

__all__ = ['Sampled', 'in_point_head', 'recorded_points', 'replayed_points', 'with_points']

SAMPLER = 'get_points_train'


@dataclass(frozen=True, eq=False)
class Sampled(Regions):
    """Regions, and points.

    Attributes:
        points: for each point head what it sampled in one forward pass, shape (B, P, 2).
    """

    points: list[Tensor] = field(default_factory=list)


def with_points(regions: Regions | None, points: list[Tensor]) -> Sampled:
    """Put points beside regions.

    Args:
        regions: what a RoI head pooled; ``None``: there is none.
        points: what the point heads sampled.

    Returns:
        Both.
    """
    known = {} if regions is None else {f.name: getattr(regions, f.name) for f in dataclasses.fields(Regions)}
    return Sampled(**known, points=points)


def _point_heads(network: nn.Module) -> dict[str, nn.Module]:
    """Heads that score points of their own choice, by name."""
    return {name: module for name, module in network.named_modules() if callable(getattr(module, SAMPLER, None))}


def in_point_head(network: nn.Module, tap: Tap) -> bool:
    """Whether a tap lies in a head that scores points of its own choice."""
    return any(tap.module == name or tap.module.startswith(f'{name}.') for name in _point_heads(network))


@contextlib.contextmanager
def _sampling(network: nn.Module, samplers: Sequence[Any]) -> Iterator[None]:
    """Let the point heads sample by other functions for a while."""
    heads = list(_point_heads(network).values())
    try:
        for head, sampler in zip(heads, samplers, strict=True):
            head.__dict__[SAMPLER] = sampler
        yield
    finally:
        for head in heads:
            head.__dict__.pop(SAMPLER, None)


@contextlib.contextmanager
def recorded_points(network: nn.Module) -> Iterator[list[Tensor]]:
    """Note what the point heads of a network sample.

    Args:
        network: any network.

    Yields:
        A list that fills with points (B, P, 2), in the order of the heads' calls.
    """
    points: list[Tensor] = []

    def noting(sample: Any) -> Any:
        def sampler(*args: Any, **kwargs: Any) -> Tensor:
            found = sample(*args, **kwargs)
            points.append(found.detach())
            return found

        return sampler

    samplers = [noting(getattr(head, SAMPLER)) for head in _point_heads(network).values()]
    with _sampling(network, samplers):
        yield points


@contextlib.contextmanager
def replayed_points(network: nn.Module, points: Sequence[Tensor]) -> Iterator[None]:
    """Let the point heads of a network score given points.

    Args:
        network: a network with as many point heads as the one that chose them.
        points: in the order of the heads; none: they choose for themselves.

    Yields:
        Nothing.

    Raises:
        TapError: another number of point heads.
    """
    if not points:
        yield
        return
    heads = len(_point_heads(network))
    if heads != len(points):
        raise TapError(
            f'{type(network).__name__}: the teacher must have as many point heads as the student, got {heads} and '
            f'{len(points)}. Tap the head before them.'
        )
    left = iter(points)
    with _sampling(network, [lambda *args, **kwargs: next(left)] * heads):
        yield
