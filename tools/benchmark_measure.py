"""Times and memory for ``benchmark.py``: arms in turn, medians and spread, peaks."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ['environment', 'extra_memory', 'in_turn', 'seconds', 'spread']


def seconds(run: Callable[[], Any], device: str) -> float:
    """Time of a call; on CUDA between two events on the device.

    Args:
        run: what is timed.
        device: ``'cpu'`` or ``'cuda'``.
    """
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def spread(times: list[float]) -> dict[str, Any]:
    """Median and quartiles.

    Args:
        times: one a turn.

    Returns:
        ``median``, ``low``, ``high`` and the ``runs`` themselves.
    """
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method='inclusive')
    else:
        low = high = times[0]
    return dict(median=statistics.median(times), low=low, high=high, runs=times)


def in_turn(
    arms: Mapping[str, Callable[[], float]], *, rounds: int, warmup: int, label: str = ''
) -> dict[str, list[float]]:
    """Time all arms A B C A B C ..., so that what the machine does besides hits all alike.

    Args:
        arms: what runs a turn and returns its seconds.
        rounds: turns that count.
        warmup: turns before that do not.
        label: what the lines about the progress begin with; without it there are none.

    Returns:
        Seconds of each turn by arm.
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(warmup + rounds):
        if label:
            print(f'{label}: turn {number + 1} of {warmup + rounds}', flush=True)
        for name, run in arms.items():
            gc.collect()
            gc.disable()
            try:
                took = run()
            finally:
                gc.enable()
            if number >= warmup:
                found[name].append(took)
    return found


def extra_memory(step: Callable[[], Any], device: str) -> int:
    """Most bytes that torch holds at a time during a step, beyond those it held before.

    Args:
        step: what is run.
        device: ``'cpu'`` (by the profiler's record of each allocation) or ``'cuda'``.

    Returns:
        The bytes.
    """
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profile.profiler.kineto_results.events()
        if event.name() == '[memory]'
    ]
    held = most = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        most = max(most, held)
    return most


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    info: dict[str, Any] = dict(
        device_type=device,
        device=torch.cuda.get_device_name() if device == 'cuda' else _processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda if device == 'cuda' else None,
    )
    for package in ('mmengine', 'mmcv', 'mmseg', 'mmdet', 'mmrazor'):
        if package in sys.modules:
            info[package] = str(getattr(sys.modules[package], '__version__', '?'))
    return info


def _processor() -> str:
    """Name of the CPU, and whether it multiplies bf16 matrices."""
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            lines = file.read().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(':', 1) for line in lines if ':' in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    amx = 'amx_bf16' in fields.get('flags', '').split()
    return fields.get('model name', platform.machine()) + (' (AMX)' if amx else '')
