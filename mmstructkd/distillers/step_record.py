"""What a training step worked on, kept until the step is known to be sound, and who is to blame where it is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ['Fault', 'StepRecord', 'describe_not_finite', 'explain', 'not_finite']

# Squares of what is larger overflow in float32, so that finite values of this size end in infinite losses.
LARGEST = 1e18
SHOWN = 3


@dataclass(frozen=True)
class Fault:
    """Why a step cannot be taken.

    Attributes:
        what: which number is not finite, with the others beside it.
        side: ``'images'``, ``'teacher'``, ``'student'``, ``'labels'``,
            ``'connector'``, ``'critic'``, ``'term'`` or ``'loss'``; empty where
            this process cannot tell.
        cause: where it came from.
        way_out: what to do about it.
        evidence: 2 where this process found the cause, 1 where a number of its own
            is not finite, 0 where it only has what all share: of several processes
            those with the most are heard.
    """

    what: str
    side: str = ''
    cause: str = ''
    way_out: str = ''
    evidence: int = 0

    def __str__(self) -> str:
        return ' '.join(part for part in (f'{self.what}.', self.cause, self.way_out) if part)


@dataclass
class StepRecord:
    """References to what one forward pass saw. Nothing is copied, and no graph is held.

    Attributes:
        images: the preprocessed input.
        samples: the data samples.
        tensors: by active term the tapped tensors of student and teacher, by tap.
        losses: what was logged, the sum as ``'loss'``.
    """

    images: Any
    samples: Sequence[Any] | None
    tensors: dict[str, dict[str, dict[str, list[Tensor]]]] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Any, samples: Sequence[Any] | None, terms: Iterable[Any], seen: Any) -> StepRecord:
        """Note what a batch showed.

        Args:
            images: the preprocessed input.
            samples: the data samples.
            terms: the active terms.
            seen: the observation of both networks.
        """
        record = cls(images, samples)
        for term in terms:
            sides = (('student', term.student_taps, seen.student), ('teacher', term.teacher_taps, seen.teacher))
            record.tensors[term.name] = {
                side: {str(tap): [tensor.detach() for tensor in records.get(tap, ())] for tap in taps}
                for side, taps, records in sides
            }
        return record


def describe_not_finite(tensor: Tensor) -> str:
    """What is wrong with a tensor: ``'nan'``, ``'inf'``, the size of what is too large; ``''``: nothing."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return ''
    values = tensor.detach()
    if values.isnan().any():
        return 'nan'
    peak = float(values.abs().max())
    return 'inf' if peak == float('inf') else f'{peak:.0e}' if peak > LARGEST else ''


def not_finite(content: Any, path: str = '') -> dict[str, Tensor]:
    """Find the tensors of a nested structure that are not finite.

    Args:
        content: dicts, lists and tuples of tensors and whatever else.
        path: where it lies, for the names.

    Returns:
        The tensors by their place, e.g. ``"['state_dict']['conv.weight']"``.
    """
    if isinstance(content, Tensor):
        known = content.is_floating_point() or content.is_complex()
        values = content.coalesce().values() if known and content.is_sparse else content
        return {path: content} if known and not bool(values.isfinite().all()) else {}
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, Mapping):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    return {name: found for key, inner in items for name, found in not_finite(inner, f'{path}[{key!r}]').items()}


def explain(
    model: nn.Module,
    record: StepRecord | None,
    *,
    gradients: Mapping[str, str] | None = None,
    buffers: Mapping[str, str] | None = None,
    culprits: Sequence[str] = (),
) -> Fault:
    """Tell what is not finite in a step, and who brought it in.

    Args:
        model: the distiller.
        record: of the step; ``None``: nothing was noted.
        gradients: parameters whose gradient is not finite, each with
            what is wrong with it.
        buffers: the same for running statistics and the like.
        culprits: losses that are known to make such gradients.

    Returns:
        The fault, as far as this process can see it.
    """
    losses = {} if record is None else {k: float(v) for k, v in record.losses.items() if 'loss' in k}
    bad = [name for name, value in losses.items() if abs(value) == float('inf') or value != value]
    apart = [name for name in bad if name != 'loss']
    bad = apart or bad
    others = ', '.join(f'{name} {value:.4g}' for name, value in losses.items() if name not in bad)
    if bad:
        what = ', '.join(f'{name} is {losses[name]}' for name in bad) + f' ({others})'
    elif gradients:
        what = f'the gradient of {_listed(gradients)} is not finite, the losses are ({others})'
    elif buffers:
        what = f'{_listed(buffers)} in the running statistics, while losses and gradients are finite ({others})'
    else:
        return Fault('')
    if record is None:
        return Fault(what)
    fault = _brought_in(model, record) or _own(model, record, bad, gradients or {}, buffers or {}, culprits)
    return dataclasses.replace(fault, what=what)


def _brought_in(model: nn.Module, record: StepRecord) -> Fault | None:
    """Blame images, teacher or student where their tensors are not finite."""
    images = {name: reason for name, image in _images(record) if (reason := describe_not_finite(image))}
    if images:
        return Fault('', 'images', f'Side: images. {_listed(images)}.', 'Look at these files and at the pipeline.', 2)
    teacher, student = (_tapped(record, side) for side in ('teacher', 'student'))
    weights = {
        name: reason for name, weight in model.student.named_parameters() if (reason := describe_not_finite(weight))
    }  # buffers moved with the forward pass: they show what happened, not why
    faults = []
    if teacher:
        faults.append(
            Fault(
                '',
                'teacher',
                f'Side: teacher. {teacher}.',
                "Check the teacher's checkpoint, its input normalisation and its `dtype`.",
            )
        )
    if weights:
        faults.append(
            Fault(
                '',
                'student',
                f'Side: student. Its weights are not sound: {_listed(weights)}.',
                'Start from a sound checkpoint, with a lower learning rate or with clip_grad.',
            )
        )
    elif student:
        faults.append(
            Fault('', 'student', f'Side: student. {student}.', 'Lower the learning rate, or clip gradients: clip_grad.')
        )
    if not faults:
        return None
    sides, causes, ways = (list(parts) for parts in zip(*[(f.side, f.cause, f.way_out) for f in faults], strict=True))
    return Fault('', ' and '.join(sides), ' '.join(causes), ' '.join(ways), 2)


def _own(
    model: nn.Module,
    record: StepRecord,
    bad: Sequence[str],
    gradients: Mapping[str, str],
    buffers: Mapping[str, str],
    culprits: Sequence[str],
) -> Fault:
    """Blame the terms' own modules, the labels or a loss where both networks are sound."""
    for name, term in model.terms.items():
        weights = {key: reason for key, weight in term.named_parameters() if (reason := describe_not_finite(weight))}
        if weights and name in record.tensors:
            side = part_of(next(iter(weights)))
            return Fault(
                '',
                side,
                f'Side: {side} of term {name!r}. Its weights are not sound: {_listed(weights)}.',
                f'Lower its learning rate: the `optimizer` of the term {name!r}, else that of the student.'
                if side == 'critic'
                else 'Lower the learning rate, or clip gradients: clip_grad.',
                2,
            )
    labels = {name: reason for name, label in _labels(record) if (reason := describe_not_finite(label))}
    moved = gradients or buffers
    if not bad and moved and all(name.startswith("term '") for name in moved):
        where = next(iter(moved))
        return Fault(
            '',
            part_of(where),
            f'Side: {part_of(where)} of {where.partition(":")[0]}. All tensors that the terms use are finite.',
            'Lower the learning rate, or clip gradients: clip_grad.',
            0 if gradients else 1,
        )
    terms = _terms_of([*bad, *culprits], record)
    if labels and (bad or gradients):
        return Fault('', 'labels', f'Side: labels. {_listed(labels)}.', 'Look at these files and at the pipeline.', 2)
    if terms:
        named = ', '.join(repr(name) for name in terms)
        return Fault(
            '',
            'loss',
            f'Side: loss. Student, teacher and labels of term {named} are finite, what is computed from them is not.',
            f'Lower the learning rate, or switch the term off with loss_weight=0: {named}.',
            1,
        )
    own = f' Its own loss: {", ".join(culprits or bad)}.' if culprits or bad else ''
    return Fault(
        '',
        'student',
        f'Side: student.{own} All tensors that the terms use are finite.',
        'Lower the learning rate, or look at the labels of this batch.',
        1 if bad or not gradients else 0,
    )


def part_of(name: str) -> str:
    """Which part of a term a parameter belongs to: ``'connector'``, ``'critic'``, or else ``'term'``."""
    words = name.replace(':', '.').replace(' ', '.').split('.')
    return 'connector' if 'connectors' in words else 'critic' if 'critic' in words else 'term'


def _terms_of(losses: Sequence[str], record: StepRecord) -> list[str]:
    """Active terms to which log keys belong, where all of them belong to terms."""
    found = []
    for key in losses:
        rest = key.removeprefix('loss_kd_')
        owners = [name for name in record.tensors if rest == name or rest.startswith(f'{name}_')]
        if rest == key or not owners:
            return []
        found.append(max(owners, key=len))
    return list(dict.fromkeys(found))


def _listed(reasons: Mapping[str, str]) -> str:
    """Write names with what ails them, the first few."""
    shown = [f'{name} ({what})' for name, what in list(reasons.items())[:SHOWN]]
    more = f' and {len(reasons) - SHOWN} more' if len(reasons) > SHOWN else ''
    return ', '.join(shown) + more


def _tapped(record: StepRecord, side: str) -> str:
    """Name the tapped tensors of a network that are not sound."""
    found: dict[str, str] = {}
    for term, sides in record.tensors.items():
        for tap, tensors in sides[side].items():
            for tensor in tensors:
                what = describe_not_finite(tensor)
                if what:
                    found.setdefault(f'term {term!r}: {tap!r} of the {side}', what)
    return _listed(found)


def _images(record: StepRecord) -> Iterator[tuple[str, Tensor]]:
    """Name each image of the batch."""
    for place, image in enumerate(record.images if isinstance(record.images, (Tensor, list, tuple)) else ()):
        if isinstance(image, Tensor):
            yield _file(record.samples, place), image


def _labels(record: StepRecord) -> Iterator[tuple[str, Tensor]]:
    """Name the tensors of the truth of each image."""
    for place, sample in enumerate(record.samples or ()):
        for name, value in _entries(sample):
            if name.startswith('gt_'):
                for tensor in _tensors(value):
                    yield f'{name} of {_file(record.samples, place)}', tensor


def _entries(value: Any) -> list[tuple[str, Any]]:
    """Fields of a data element of mmengine."""
    return list(value.items()) if hasattr(value, 'items') and hasattr(value, 'metainfo') else []


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors of a field, boxes that mmdet wraps among them."""
    value = getattr(value, 'tensor', value)
    if isinstance(value, Tensor):
        yield value
    for _, inner in _entries(value):
        yield from _tensors(inner)


def _file(samples: Sequence[Any] | None, place: int) -> str:
    """Path of an image, or its number."""
    sample = samples[place] if samples is not None and place < len(samples) else None
    return str(getattr(sample, 'img_path', None) or f'image {place} of the batch')
