"""Probes both networks of a distiller and fits its terms to what they show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.distillers.probing import (
    Probe,
    explain_cut,
    no_size_works,
    on_device,
    probe_devices,
    probe_sizes,
    probe_student,
)
from mmstructkd.errors import ConfigError
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, ForwardFailed, Tap, in_point_head
from mmstructkd.tasks.targets import head_of, num_classes_of, probe_targets, task_of
from mmstructkd.teachers import TeacherSource
from mmstructkd.terms import ProbedNetworks, Term, fit_to_probe

__all__ = ['fit_terms', 'known_of', 'no_gradient']


def fit_terms(
    student: nn.Module,
    teacher: TeacherSource,
    terms: Mapping[str, Term],
    size: tuple[int, int] | None,
    gates: Sequence[str] = (),
) -> frozenset[Tap]:
    """Run both networks once and let each term build what depends on sizes.

    Args:
        student: the student.
        teacher: source of the teacher's tensors, attached to the student.
        terms: the terms by name; changed in place.
        size: (h, w) of the image of noise; ``None``: what the networks say.
        gates: modules of the student behind which no gradient passes.

    Returns:
        Taps whose tensors the student changes in place, and which must be cloned.

    Raises:
        ConfigError: a term cannot be built, or two log under one key.
        TapError: a tap is not there, or shows nothing at any size.
    """
    for term in terms.values():
        for tap in term.teacher_taps:
            teacher.resolve(tap, f'term {term.name!r}: `teacher`')
    teacher.listen([tap for term in terms.values() for tap in term.teacher_taps])
    for term in terms.values():
        term.on_points = any(in_point_head(student, tap) for tap in term.student_taps)
    seen, observed = _try_sizes(
        student, teacher, terms, gates, [size] if size else probe_sizes([student, teacher.network]), bool(size)
    )
    capture, regions = seen.capture, seen.regions
    clone = frozenset(capture.changed_in_place())
    for term in terms.values():
        for tap in term.student_taps:
            if tap in capture.cut and term.loss.loss_weight > 0:
                print_log(
                    f'As the student stands now training would stop: {no_gradient(term, tap, capture)}',
                    'current',
                    level=30,
                )
    known = known_of(student, seen.inputs)
    for term in terms.values():
        network, tap = teacher.part_of(term.teacher_taps[0])
        probed = ProbedNetworks(
            student=capture.records,
            teacher=observed.records,
            classes=(_num_classes(student), teacher.num_classes(term.teacher_taps[0])),
            targets=known,
            regions=regions,
            student_network=student,
            teacher_network=network,
            # A random teacher agrees with no ground truth, and is asked for none.
            teacher_learned=teacher.has_learned(term.teacher_taps[0]),
            teacher_tap=tap,
        )
        fit_to_probe(term, probed)
        for level in term.levels:
            print_log(
                f'term {term.name!r}: student {level.student_tap} {level.student}, '
                f'teacher {level.teacher_tap} {level.teacher}, connector: {level.connector}',
                'current',
            )
    owners: dict[str, str] = {}
    for term in terms.values():
        for key in term.log_keys:
            if key in owners:
                raise ConfigError(
                    f'term {term.name!r}: its losses must have names of their own, got {key!r}, which term '
                    f'{owners[key]!r} logs as well. Rename one of the two.'
                )
            owners[key] = term.name
    return clone


def _try_sizes(
    student: nn.Module,
    teacher: TeacherSource,
    terms: Mapping[str, Term],
    gates: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    given: bool,
) -> tuple[Probe, Capture]:
    """Probe both networks at the first size at which both run.

    What fails behind the taps at each size (a loss on noise, an operator
    that the device lacks) is no matter, if the taps are passed alike at two
    sizes: then it was not a level that was too small.
    """
    owners = dict.fromkeys(teacher.reads, 'the teacher')
    owners.update({tap: f'term {term.name!r}' for term in terms.values() for tap in term.student_taps})
    teacher_taps = [tap for term in terms.values() for tap in term.teacher_taps]
    failures: list[tuple[str, tuple[int, int], ForwardFailed]] = []
    partial: tuple[Probe, Capture] | None = None
    for device in probe_devices(student):
        with _moved(student, teacher, device):
            for size in sizes:
                role = 'student'
                try:
                    seen = probe_student(student, list(owners), size, owners, gates)
                    role = 'teacher'
                    more: dict[str, Any] = {'regions': seen.regions} if seen.chosen else {}
                    more.update(student=seen.capture.records, targets=known_of(student, seen.inputs))
                    observed = teacher.probe(seen.inputs, seen.samples, teacher_taps, **more)
                except ForwardFailed as err:
                    failures.append((role, size, err))
                    continue
                if device is not None:
                    seen, observed = seen.to('cpu'), on_device(observed, 'cpu')
                if not (seen.capture.partial or getattr(observed, 'partial', False)):
                    return seen, observed
                passes = [seen.capture.passes, observed.passes]
                if partial is not None and passes == [partial[0].capture.passes, partial[1].passes]:
                    return partial
                partial = seen, observed
    if partial is not None:
        return partial
    raise no_size_works(failures, given) from failures[0][2]


@contextlib.contextmanager
def _moved(student: nn.Module, teacher: TeacherSource, device: str | None) -> Iterator[None]:
    """Have both networks on another device for a while; ``None``: leave them where they are."""
    if device is None:
        yield
        return
    home = next(student.parameters()).device
    student.to(device)
    teacher.move(lambda tensor: tensor.to(device))
    try:
        yield
    finally:
        student.to(home)
        teacher.move(lambda tensor: tensor.to(home))


def known_of(student: nn.Module, inputs: Tensor) -> Targets:
    """What batches of the student's task know, for a probed input."""
    return probe_targets(task_of(student), 1, _num_classes(student), tuple(inputs.shape[-2:]))


def no_gradient(term: Term, tap: Tap, capture: Capture) -> str:
    """Say that a term teaches nothing, and why."""
    return (
        f'term {term.name!r}: `student` must name a module that a gradient leaves in training, got '
        f'{str(tap)!r}, {explain_cut(capture.cut[tap], tap)}.'
    )


def _num_classes(network: nn.Module | None) -> int | None:
    """Number of classes of a network's head, where it has one."""
    return None if network is None else num_classes_of(head_of(network))
