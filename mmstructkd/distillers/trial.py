"""One training step of a distiller, looked at closely: shapes, losses, and gradients at the taps.

Shape shorthand: B images, C channels, (H, W) the padded input of the student.
No parameter is updated; running statistics move, and random numbers are drawn, as
in a few training steps.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mmstructkd.distillers.probing import explain_cut
from mmstructkd.distillers.structured_distiller import StructuredDistiller
from mmstructkd.errors import TapError
from mmstructkd.taps import Observation
from mmstructkd.tasks.batches import training_info
from mmstructkd.terms import Term

__all__ = [
    'LevelReport',
    'TermReport',
    'Trial',
    'fresh_batch',
    'gradient_share',
    'stream_batches',
    'terms_silenced',
    'try_batch',
]


@dataclass(frozen=True)
class LevelReport:
    """One pair of tapped tensors on a batch.

    Attributes:
        student_tap: the student's tap.
        teacher_tap: the teacher's.
        student: shape of the student's tensor.
        teacher: shape of the teacher's tensor, before connector and resize.
        student_stride: input size by map size, (vertical, horizontal); ``None``
            for a tensor that is no map.
        teacher_stride: the teacher's.
        connector: what stands between them.
        term_gradient: norm of the gradient of the weighted term with respect
            to the student's tensor; ``None`` where that needs no gradient.
        task_gradient: norm of the gradient of the task's losses there.
        cut: why no gradient leaves the tap, see
            :attr:`~mmstructkd.taps.Capture.cut`; ``None``: one does.
    """

    student_tap: str
    teacher_tap: str
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    student_stride: tuple[float, float] | None
    teacher_stride: tuple[float, float] | None
    connector: str
    term_gradient: float | None
    task_gradient: float | None
    cut: str | None = None

    @property
    def share(self) -> float | None:
        """The term's share of the gradient, see :func:`gradient_share`."""
        return gradient_share(self.term_gradient, self.task_gradient)


@dataclass(frozen=True)
class TermReport:
    """One term on a batch.

    Attributes:
        name: name of the term.
        loss: class of its loss.
        raw: the loss before its weight, mean over levels.
        loss_weight: its weight in the config.
        start_factor: factor of its schedule at the first iteration.
        factor: the largest factor that its schedule reaches; gradients and the
            weighted loss are taken with it.
        objectives: what the loss's own modules (a critic) optimise, weighted.
        levels: its pairs of tensors.
    """

    name: str
    loss: str
    raw: float
    loss_weight: float
    start_factor: float
    factor: float
    objectives: Mapping[str, float]
    levels: tuple[LevelReport, ...]

    @property
    def weight(self) -> float:
        """Factor between the raw and the weighted loss."""
        return self.loss_weight * self.factor

    @property
    def weighted(self) -> float:
        """The loss as it enters the sum."""
        return self.raw * self.weight


@dataclass(frozen=True)
class Trial:
    """What :func:`try_batch` saw.

    Attributes:
        images: number of images of the batch.
        size: (H, W) of the batch.
        task_losses: the student's own losses by name.
        task_loss: their sum.
        terms: one report for each term.
        without_gradient: trained parameters that the summed loss does not
            reach, by owner: ``'student'`` or ``"term '...'"``.
        zero_gradient: as above, reached by a gradient that is all zero.
        problems: what must be mended before training, in words.
        notes: what is worth knowing, in words.
    """

    images: int
    size: tuple[int, int]
    task_losses: Mapping[str, float]
    task_loss: float
    terms: tuple[TermReport, ...]
    without_gradient: Mapping[str, list[str]]
    zero_gradient: Mapping[str, list[str]]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


def gradient_share(term: float | None, task: float | None) -> float | None:
    r"""Share of a term in the gradient at its tap.

    .. math:: \frac{\lVert g_{term} \rVert}{\lVert g_{term} \rVert + \lVert g_{task} \rVert}

    Args:
        term: norm of the weighted term's gradient; ``None``: no gradient there.
        task: norm of the gradient of the task's losses.

    Returns:
        A number in [0, 1]; ``None`` where there is no gradient at all.

    Example:
        >>> gradient_share(1.0, 3.0)
        0.25
    """
    if term is None or task is None or term + task == 0:
        return None
    return term / (term + task)


def _number(value: Any) -> float:
    """Value of a scalar tensor."""
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _stride(size: tuple[int, int], shape: tuple[int, ...]) -> tuple[float, float] | None:
    """Input size by map size."""
    return (size[0] / shape[2], size[1] / shape[3]) if len(shape) == 4 else None


def _edge(tensor: Tensor, cloned: bool) -> Tensor | GradientEdge | None:
    """Where in the graph the network's own tensor is.

    A clone is recorded where the network goes on to change its tensor in
    place; the task's gradient passes the original, one step up from the clone.
    """
    if not tensor.requires_grad:
        return None
    if not cloned or tensor.grad_fn is None:
        return tensor
    return GradientEdge(*tensor.grad_fn.next_functions[0])


def _norms(value: Tensor, edges: Sequence[Tensor | GradientEdge | None]) -> list[float | None]:
    """Norm of the gradient of ``value`` at each edge; 0 where it does not depend on it."""
    known = [edge for edge in edges if edge is not None]
    gradients: list[Tensor | None] = [None] * len(known)
    if known and value.requires_grad:
        gradients = list(torch.autograd.grad(value, known, retain_graph=True, allow_unused=True))
    found = iter(gradients)
    norms: list[float | None] = []
    for edge in edges:
        if edge is None:
            norms.append(None)
            continue
        gradient = next(found)
        norms.append(0.0 if gradient is None else gradient.detach().double().norm().item())
    return norms


def _score_raw(term: Term, seen: Observation) -> dict[str, Tensor]:
    """Score a term with weight 1, whatever its schedule says."""
    weights, factor = [loss.loss_weight for loss in term.losses], term.factor
    try:
        term.factor = 1.0
        for loss in term.losses:
            loss.loss_weight = 1.0
        return term(seen.student, seen.teacher, seen.targets, seen.regions, all_parts=True)
    finally:
        term.factor = factor
        for loss, weight in zip(term.losses, weights, strict=True):
            loss.loss_weight = weight


def try_batch(
    distiller: StructuredDistiller, batch: Mapping[str, Any], factors: Mapping[str, tuple[float, float]] | None = None
) -> Trial:
    """Run one training step on a batch and report on it, without updating a parameter.

    The gradient norms are taken at the student's tapped tensor, before the
    connector, over the whole batch. On a term of several levels the gradient
    at one level includes what comes back through the deeper ones.

    Args:
        distiller: in training mode.
        batch: ``inputs`` and ``data_samples``, preprocessed.
        factors: for each term the first and the largest factor of its
            schedule; ``None``: both as they are now.

    Returns:
        The report.

    Raises:
        TapError: a tap is not reached in training.
        ShapeError: a loss cannot take these shapes.
    """
    with training_info():
        return _try_batch(distiller, batch, factors)


def fresh_batch(batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The inputs of a batch, and samples of its own for each run: some detectors change theirs."""
    return batch['inputs'], copy.deepcopy(batch['data_samples'])


def stream_batches(distiller: StructuredDistiller, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batches of streams that read data; where the batch has none (``--synthetic``), the labelled one again."""
    found: dict[str, Any] = {}
    for name in distiller.streams.reading:
        inputs, samples = fresh_batch(batch.get(name) or batch)
        found[name] = {'inputs': inputs, 'data_samples': samples}
    return found


def _try_batch(
    distiller: StructuredDistiller, batch: Mapping[str, Any], factors: Mapping[str, tuple[float, float]] | None
) -> Trial:
    """:func:`try_batch`, where the message hub knows what it knows in training."""
    inputs, samples = fresh_batch(batch)
    terms: list[Term] = list(distiller.terms.values())
    problems: list[str] = []
    notes: list[str] = []
    losses, seen = distiller.observe(inputs, samples, terms)
    capture, cloned = seen.capture, distiller._clone
    task, logged = distiller.student.parse_losses(losses)
    task_losses = {name: _number(value) for name, value in logged.items() if 'loss' in name and name != 'loss'}
    for tap in sorted(capture.changed_in_place() - cloned, key=str):
        problems.append(f'The student changes {str(tap)!r} in place in training: tap another module.')
    size = (int(inputs.shape[-2]), int(inputs.shape[-1]))

    reports = []
    for term in terms:
        start, factor = (term.factor, term.factor) if factors is None else factors[term.name]
        pairs = term.pairs(seen.student, seen.teacher)
        if len(pairs) != len(term.levels):
            raise TapError(
                f'term {term.name!r}: `tap` must be passed as often in training as in the probe '
                f'({len(term.levels)} times), got {len(pairs)}. Tap a module that runs alike in both.'
            )
        scored = _score_raw(term, seen)
        key = f'loss_kd_{term.name}'
        raw, weight = scored[key], term.loss.loss_weight * factor
        edges = [_edge(tensor, tap in cloned) for tap in term.student_taps for tensor in capture.records[tap]]
        cuts = [capture.cut.get(tap) for tap in term.student_taps for _ in capture.records[tap]]
        term_norms = [None if norm is None else norm * weight for norm in _norms(raw, edges)]
        task_norms = _norms(task, edges)
        levels = tuple(
            LevelReport(
                level.student_tap,
                level.teacher_tap,
                tuple(feat_s.shape),
                tuple(feat_t.shape),
                _stride(size, tuple(feat_s.shape)),
                _stride(size, tuple(feat_t.shape)),
                level.connector,
                term_norm,
                task_norm,
                cut if term_norm is None else None,
            )
            for level, (feat_s, feat_t), term_norm, task_norm, cut in zip(
                term.levels, pairs, term_norms, task_norms, cuts, strict=True
            )
        )
        objectives = {name[len(key) + 1 :]: _number(value) for name, value in scored.items() if name != key}
        report = TermReport(
            term.name,
            type(term.loss).__name__,
            _number(raw),
            term.loss.loss_weight,
            start,
            factor,
            objectives,
            levels,
        )
        found, aside = _findings(report)
        problems += found
        notes += aside
        if factors is not None and report.factor == 0 and report.loss_weight > 0:
            problems.append(
                f'term {term.name!r}: its schedule has the factor 0 during the whole training, although its weight is '
                f'{report.loss_weight:g}. Let it begin earlier, or leave the term out.'
            )
        if _says_nothing(report):
            problems.append(_why_nothing(term, report, pairs, seen))
        reports.append(report)
    task_loss = _number(task)
    if not math.isfinite(task_loss):
        problems.append(f'The loss of the task is {task_loss}.')
    del task, losses, seen, capture, pairs, scored, raw, edges  # the graph goes before the next step makes another

    with terms_silenced([term for term, report in zip(terms, reports, strict=True) if _is_cut(report)]):
        without, zero = _unreached(distiller, batch)
    return Trial(
        images=int(inputs.shape[0]),
        size=size,
        task_losses=task_losses,
        task_loss=task_loss,
        terms=tuple(reports),
        without_gradient=without,
        zero_gradient=zero,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def _is_cut(report: TermReport) -> bool:
    """Whether training would stop at this term, because no gradient leaves one of its taps."""
    return any(level.cut is not None for level in report.levels)


@contextlib.contextmanager
def terms_silenced(terms: Sequence[Term]) -> Iterator[None]:
    """Leave terms out for a while, so that the rest of the step can be looked at."""
    factors = [term.factor for term in terms]
    try:
        for term in terms:
            term.factor = 0.0
        yield
    finally:
        for term, factor in zip(terms, factors, strict=True):
            term.factor = factor


def _findings(report: TermReport) -> tuple[list[str], list[str]]:
    """What is wrong with a term, and what is worth knowing about it."""
    found, notes = [], []
    for part, value in {'': report.raw, **report.objectives}.items():
        if not math.isfinite(value):
            found.append(f'term {report.name!r}: the {part or "loss"} is {value}.')
    silent = []
    for level in report.levels:
        if level.cut is not None:
            verb = 'lies' if explain_cut(level.cut, level.student_tap).startswith('in') else 'gives'
            found.append(
                f'term {report.name!r}: {level.student_tap!r} {verb} {explain_cut(level.cut, level.student_tap)}.'
            )
        elif level.term_gradient is None:
            found.append(f'term {report.name!r}: no gradient leaves {level.student_tap!r}. Tap another module.')
        elif not math.isfinite(level.term_gradient):
            found.append(f'term {report.name!r}: its gradient at {level.student_tap!r} is {level.term_gradient}.')
        elif level.term_gradient == 0 and report.weight > 0 and report.raw != 0:
            silent.append(level)
    if silent and len(silent) == len(report.levels):
        names = ', '.join(repr(level.student_tap) for level in silent)
        found.append(f'term {report.name!r}: its gradient at {names} is zero, its loss is not.')
    elif silent:
        single = all(level.student[2:] == (1, 1) for level in silent)
        why = ', a map of one position, where there is nothing to compare' if single else ''
        names = ', '.join(repr(level.student_tap) for level in silent)
        notes.append(f'term {report.name!r}: its gradient at {names} is zero{why}; it teaches at the other levels.')
    return found, notes


def _says_nothing(report: TermReport) -> bool:
    """Whether a term that is switched on has the value 0 and no gradient."""
    return (
        report.loss_weight > 0
        and report.raw == 0
        and not any(report.objectives.values())
        and all(level.cut is None and not level.term_gradient for level in report.levels)
    )


def _why_nothing(term: Term, report: TermReport, pairs: Sequence[tuple[Tensor, Tensor]], seen: Observation) -> str:
    """Guess why a term has the value 0 and no gradient, the surest reasons first."""
    targets, maps = seen.targets, [level.student for level in report.levels]
    valid, boxes = targets.valid, targets.boxes
    same = all(s.shape == t.shape and torch.equal(s.detach(), t) for s, t in pairs)
    why = 'Nothing of this batch counts for it; look at its arguments and labels'
    if same:
        why = 'Student and teacher give the same tensors: they are one network with the same weights'
    elif valid is not None and not bool(valid.any()):
        why = 'No pixel of this batch counts: all are padding or have the label that is ignored'
    elif all(len(shape) in (2, 4) and shape[1] == 1 for shape in maps):
        why = (
            'Its tensors have one channel, and a softmax over one class is 1 everywhere; take a loss for binary scores'
        )
    elif all(len(shape) == 4 and shape[2:] == (1, 1) for shape in maps):
        why = 'Its maps have one position, and a softmax over it is 1; tap a larger map'
    elif boxes is not None and not any(len(found) for found in boxes):
        why = 'No image of this batch has a box; try another batch'
    return f'term {term.name!r}: its value and its gradient are 0 although its weight is {report.loss_weight:g}. {why}.'


def _summed_loss(model: BaseModel, batch: Mapping[str, Any]) -> Tensor:
    """The one sum that training differentiates."""
    inputs, samples = fresh_batch(batch)
    others = stream_batches(model, batch) if isinstance(model, StructuredDistiller) else {}
    return model.parse_losses(model(inputs, samples, mode='loss', **others))[0]


def _unreached(
    distiller: StructuredDistiller, batch: Mapping[str, Any]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Trained parameters without a gradient of the summed loss, and those with a zero one."""
    distiller.zero_grad(set_to_none=True)
    _summed_loss(distiller, batch).backward()
    without: dict[str, list[str]] = {}
    zero: dict[str, list[str]] = {}
    for name, parameter in distiller.named_parameters():
        if not parameter.requires_grad:
            continue
        place, _, rest = name.partition('.')
        if place == 'terms':
            term, _, rest = rest.partition('.')
            place = f'term {term!r}'
        if parameter.grad is None:
            without.setdefault(place, []).append(rest)
        elif not parameter.grad.any():
            zero.setdefault(place, []).append(rest)
    distiller.zero_grad(set_to_none=True)
    return without, zero
