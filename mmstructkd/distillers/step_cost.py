"""What the teacher adds to a training step: time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmstructkd.distillers.structured_distiller import StructuredDistiller
from mmstructkd.distillers.trial import fresh_batch, stream_batches, terms_silenced
from mmstructkd.errors import check_count
from mmstructkd.tasks.batches import training_info

__all__ = ['CostReport', 'measure_cost']


@dataclass(frozen=True)
class CostReport:
    """What the teacher adds to a step. Times are medians, in seconds.

    Attributes:
        runs: number of runs behind each median, after one to warm up.
        student_step: forward and backward of the student alone.
        distilled_step: forward and backward of the whole distiller.
        teacher_forward: the teacher up to its deepest tap.
        teacher_parameters: number of parameters; ``None`` for a source without
            a network.
        teacher_bytes: parameters and buffers.
        student_peak: most memory allocated on the device during a step of the
            student alone, without what teacher and terms hold, in bytes;
            ``None`` where it is not measured (CPU).
        distilled_peak: most memory during a distilled step, all included.
    """

    runs: int
    student_step: float
    distilled_step: float
    teacher_forward: float
    teacher_parameters: int | None
    teacher_bytes: int | None
    student_peak: int | None
    distilled_peak: int | None


def _bytes(tensors: Any) -> int:
    """Memory of tensors, in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_cost(distiller: StructuredDistiller, batch: Mapping[str, Any], *, runs: int = 3) -> CostReport:
    """Time a step of the student alone, a distilled step and the teacher, in turn.

    A step is forward and backward, without the optimiser and the data.

    Args:
        distiller: in training mode.
        batch: ``inputs`` and ``data_samples``, preprocessed.
        runs: how often each is run, after once to warm up.

    Returns:
        The medians.

    Raises:
        ConfigError: ``runs`` is no integer above 0.
    """
    check_count('measure_cost', 'runs', runs)
    with training_info():
        times, peaks = _run_in_turn(distiller, batch, runs)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}

    network = getattr(distiller.teacher, 'network', None)
    held = None if network is None else _bytes([*network.parameters(), *network.buffers()])
    aside = (held or 0) + _bytes([*distiller.terms.parameters(), *distiller.terms.buffers()])
    return CostReport(
        runs=runs,
        student_step=medians['student'],
        distilled_step=medians['distilled'],
        teacher_forward=medians['teacher'],
        teacher_parameters=None if network is None else sum(p.numel() for p in network.parameters()),
        teacher_bytes=held,
        student_peak=peaks['student'] - aside if peaks else None,
        distilled_peak=peaks['distilled'] if peaks else None,
    )


def _run_in_turn(
    distiller: StructuredDistiller, batch: Mapping[str, Any], runs: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each run, and on CUDA the most memory."""
    on_cuda = batch['inputs'].is_cuda
    active = [term for term in distiller.terms.values() if term.active]
    teacher_taps = [tap for term in active for tap in term.teacher_taps]
    seen = distiller.observe(*fresh_batch(batch), active)[1]
    cut = [term for term in active if any(tap in seen.capture.cut for tap in term.student_taps)]
    regions = seen.regions
    read = {tap: [tensor.detach() for tensor in seen.student[tap]] for tap in distiller.teacher.reads}
    del seen

    def student(inputs: Tensor, samples: Any) -> None:
        distiller.student.parse_losses(distiller.student(inputs, samples, mode='loss'))[0].backward()

    def distilled(inputs: Tensor, samples: Any) -> None:
        losses = distiller(inputs, samples, mode='loss', **stream_batches(distiller, batch))
        distiller.parse_losses(losses)[0].backward()

    def teacher(inputs: Tensor, samples: Any) -> None:
        if teacher_taps:
            distiller.teacher.observe(inputs, samples, teacher_taps, student=read, regions=regions)

    works: dict[str, Callable[[Tensor, Any], None]] = {'student': student, 'distilled': distilled, 'teacher': teacher}
    times: dict[str, list[float]] = {name: [] for name in works}
    peaks: dict[str, int] = dict.fromkeys(works, 0)
    with terms_silenced(cut):
        for _ in range(runs + 1):
            for name, work in works.items():
                distiller.zero_grad(set_to_none=True)
                inputs, samples = fresh_batch(batch)
                if on_cuda:
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                begin = time.perf_counter()
                work(inputs, samples)
                if on_cuda:
                    torch.cuda.synchronize()
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
                times[name].append(time.perf_counter() - begin)
    distiller.zero_grad(set_to_none=True)
    return times, peaks if on_cuda else {}
