"""Reads what runs of mmengine log."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ['last_values', 'read_scalars', 'step_seconds']


def read_scalars(folder: Path) -> list[dict[str, Any]]:
    """Return what all sessions of a run have logged so far, in order.

    Args:
        folder: work directory of the run.

    Returns:
        One dict for each line; the rest of a file from a line on that is being
        written, or was when the run was killed, is left out.
    """
    entries = []
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in log.read_text(errors='replace').splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(entry, dict):  # the first digits of a line that is none yet
                break
            entries.append(entry)
    return entries


def last_values(entries: Sequence[Mapping[str, Any]], keys: Iterable[str]) -> dict[str, float | None]:
    """Return the last value of each key; ``None`` where it was never logged."""
    return {key: next((entry[key] for entry in reversed(entries) if key in entry), None) for key in keys}


def step_seconds(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median seconds of a training step, data included; ``None`` before the first."""
    times = [entry['time'] for entry in entries if 'loss' in entry and 'time' in entry]
    return statistics.median(times) if times else None
