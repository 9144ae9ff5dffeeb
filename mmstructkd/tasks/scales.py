"""How large pipelines of training and of validation show an image, as their configs say it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ['scale_notes']

#: Two factors are the same where they differ by less than this part.
TOLERANCE = 0.05


def _resizes(node: Any) -> Iterator[Mapping[str, Any]]:
    """Steps that resize, in a dataset with datasets inside and transforms inside of others."""
    if isinstance(node, Mapping):
        if 'Resize' in str(node.get('type')):
            yield node
        for key in ('dataset', 'pipeline', 'transforms', 'transform'):
            yield from _resizes(node.get(key))
    elif isinstance(node, (list, tuple)):
        for one in node:
            yield from _resizes(one)


def _scale(config: Mapping[str, Any], loader: str) -> float | tuple[float, ...] | None:
    """Factor (1 without a resize) or pair of sides that a loader resizes to; ``None``: its config does not say one."""
    steps = list(_resizes((config.get(loader) or {}).get('dataset')))
    if not steps:
        return 1.0
    if len(steps) > 1:
        return None
    factor, sides = steps[0].get('scale_factor'), steps[0].get('scale')
    if isinstance(factor, (int, float)):
        return float(factor)
    if isinstance(sides, (list, tuple)) and len(sides) == 2 and all(isinstance(side, (int, float)) for side in sides):
        return tuple(sorted(map(float, sides)))
    return None


def scale_notes(config: Mapping[str, Any], student_scale: float) -> list[str]:
    """Say where the student is validated at another scale than it trains at.

    Args:
        config: of the run.
        student_scale: factor by which the distiller resizes the student's images.

    Returns:
        A line for each of validation and test whose pipeline shows images otherwise;
        nothing where the student trains on what is loaded (a factor of 1).
    """
    if student_scale == 1:
        return []
    notes = []
    trains = _scale(config, 'train_dataloader')
    for loader in ('val_dataloader', 'test_dataloader'):
        if not config.get(loader):
            continue
        shown = _scale(config, loader)
        if trains is None or shown is None or isinstance(trains, float) != isinstance(shown, float):
            notes.append(
                f'student_scale={student_scale:g}: whether {loader} shows images at that scale cannot be read from '
                'its pipeline. See that it resizes as training does, times that factor.'
            )
            continue
        before, after = ((value,) if isinstance(value, float) else value for value in (trains, shown))
        wanted = tuple(side * student_scale for side in before)
        if not all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(after, wanted, strict=True)):
            found, ought = (' x '.join(f'{side:g}' for side in sides) for sides in (after, wanted))
            key = 'scale_factor' if isinstance(trains, float) else 'scale'
            notes.append(
                f'student_scale={student_scale:g}: {loader} shows images at {found}, the student trains at {ought}. '
                f"Resize in its pipeline, {key}={ought.replace(' x ', ', ')}, so that the exported student's config "
                'holds.'
            )
    return notes
