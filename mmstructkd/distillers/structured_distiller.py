"""The distiller: a student trained by its task and by terms between it and a teacher."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmstructkd.compat import alone, prepare_to_resume
from mmstructkd.distillers.probing import (
    Probe,
    check_probe_size,
    explain_cut,
    no_way,
    on_device,
    probe_devices,
    probe_sizes,
    probe_student,
)
from mmstructkd.distillers.step_record import Fault, StepRecord, explain
from mmstructkd.errors import CheckpointError, ConfigError, TapError, check_finite_number, shown, suggest
from mmstructkd.functional.core.sharing import sharing
from mmstructkd.optim import for_distiller
from mmstructkd.registry import HOOKS, MODELS, build_part
from mmstructkd.streams import LABELLED, StreamBatch, StreamPreprocessor, build_streams
from mmstructkd.structures import Targets
from mmstructkd.taps import (
    Capture,
    ForwardFailed,
    RegionRecorder,
    Regions,
    Tap,
    in_features,
    in_point_head,
    pair_stages,
    recorded_points,
    tapped_forward,
    with_points,
)
from mmstructkd.tasks.batches import training_info
from mmstructkd.tasks.targets import (
    branches_of,
    collect_targets,
    head_of,
    num_classes_of,
    probe_targets,
    task_of,
)
from mmstructkd.teachers import TeacherGroup, TeacherSource
from mmstructkd.teachers.building import build_source
from mmstructkd.teachers.trained import scale_losses
from mmstructkd.terms.schedule import WeightSchedule
from mmstructkd.terms.term import KEYS as TERM_KEYS
from mmstructkd.terms.term import Term, parse_terms

__all__ = ['StructuredDistiller']

STUDENT = 'student.'
STUDENT_KEYS = (
    *('backbone', 'neck', 'decode_head', 'auxiliary_head', 'bbox_head', 'rpn_head', 'roi_head', 'mask_head'),
    *('train_cfg', 'test_cfg', 'pretrained', 'init_cfg'),
)
TEACHER_KEYS = ('config', 'checkpoint', 'allow_random', 'trust_checkpoint', 'cache', 'prefix')
RUNNER_HOOKS = (
    'TermScheduleHook',
    'StudentCheckpointHook',
    'DueValidationHook',
    'FiniteLossHook',
    'FiniteCheckpointHook',
)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global random streams as they were: the student draws what it draws alone."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)


@dataclass(frozen=True, eq=False)
class Observation:
    """What both networks showed of a batch.

    Attributes:
        capture: the student's records.
        teacher: the teacher's tensors by tap.
        targets: what the batch knows.
        regions: what the student's RoI head pooled, where it is tapped.
    """

    capture: Capture
    teacher: dict[Tap, list[Tensor]]
    targets: Targets
    regions: Regions | None

    @property
    def student(self) -> dict[Tap, list[Tensor]]:
        """The student's tensors by tap."""
        return self.capture.records


@MODELS.register_module()
class StructuredDistiller(BaseModel):
    """Trains a student of mmseg or mmdet with the help of a teacher.

    In training: the teacher's tapped tensors, then the student's own task
    losses (tapped on the way), then one loss per term, all summed and
    differentiated once. Everything else is the student, untouched:
    ``mode='predict'`` and ``mode='tensor'`` delegate, and ``state_dict()`` has
    the student's keys, without a prefix, and nothing but these.

    Both networks are probed once at construction with an image of noise, the
    student as training runs it, the teacher in eval, both no further than the
    taps need: taps are resolved and their shapes logged, connectors sized,
    losses tried. The image has the size that training uses as far as the
    networks say it (crop size, padding, position embeddings), shrunk to at most
    256x512 pixels where they run at that; else 96x192, or larger where they
    need it. The global random streams are left as a plain student would leave
    them.

    Args:
        student: config of the student, or the built model.
        teacher: arguments of a :class:`FrozenTeacher` (``config``,
            ``checkpoint``, ...), or of another source by its ``type``.
        teachers: several by name, in place of ``teacher``; see :class:`TeacherGroup`.
        terms: dict of terms by name, see :class:`Term`.
        data_preprocessor: used by a student that has none of its own.
        probe_size: (h, w) of that image; ``None``: as above.
        task_weight: factor of the student's own losses, at least 0. They are
            multiplied and never left out: weight decay and the statistics of
            BatchNorm act at 0 as well.
        task_schedule: config of a :class:`WeightSchedule` for that factor.
        streams: configs of other batches by name, for terms with ``on='<name>'``.

    Raises:
        ConfigError: a value cannot be used (terms, losses, teacher's classes).
        TapError: a tap names nothing or is not reached; the message has the
            nearest names.
        ShapeError: a loss cannot take the tapped shapes.
        CheckpointError: the teacher's checkpoint does not fit.
    """

    #: What configs give the distiller by mistake, and where it belongs.
    misplaced_arguments: ClassVar[dict[str, str]] = {
        **dict.fromkeys(STUDENT_KEYS, "It is the student's: begin `model` with _delete_=True, student=_base_.model."),
        **dict.fromkeys(TERM_KEYS, 'It belongs into a term: terms=dict(<name>=dict(tap=..., loss=...)).'),
        **dict.fromkeys(TEACHER_KEYS, "It is the teacher's: teacher=dict(config=..., checkpoint=...)."),
    }

    def __init__(
        self,
        student: dict | nn.Module,
        teacher: dict | TeacherSource | None = None,
        terms: dict | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        probe_size: tuple[int, int] | None = None,
        *,
        teachers: dict | None = None,
        task_weight: float = 1.0,
        task_schedule: dict | None = None,
        streams: dict | None = None,
    ) -> None:
        probe_size = check_probe_size(probe_size)
        check_finite_number('StructuredDistiller', 'task_weight', task_weight, minimum=0)
        self_config = None
        if isinstance(student, dict):
            student = ConfigDict(copy.deepcopy(student))  # some heads write into their config
            if data_preprocessor is not None:
                _check_preprocessor(data_preprocessor, student.get('_scope_'))
                student.setdefault('data_preprocessor', data_preprocessor)
            self_config = copy.deepcopy(student)
            student = build_part('StructuredDistiller', 'student', student, example='_base_.model', known=BaseModel)
        if not isinstance(student, BaseModel):
            raise ConfigError(
                f'StructuredDistiller: `student` must be a config or an mmengine model, got {type(student).__name__}. '
                'Write student=_base_.model.'
            )
        super().__init__(data_preprocessor=student.data_preprocessor)
        self.student = student
        self.last_step: StepRecord | None = None
        self.task_weight = float(task_weight)
        self.task_schedule = WeightSchedule.from_config(task_schedule, 'StructuredDistiller: `task_schedule`')
        self.task_factor = self.task_schedule.factor(0, 1)
        self.step = 0
        self.streams = build_streams(streams)
        if any(stream.reads_data for stream in self.streams.values()):
            names = [name for name, stream in self.streams.items() if stream.reads_data]
            self.data_preprocessor = StreamPreprocessor(student.data_preprocessor, names)
        with random_state_kept():
            self.terms = parse_terms(terms)
            self._check_student_taps()
            self._stages = pair_stages((t.name, t.student_taps, t.teacher_taps) for t in self.terms.values())
            for term in self.terms.values():
                term.branches = branches_of(self.student)
            self._teacher = self._build_teacher(teacher, teachers)
            self._teacher.attach(self.student, self_config)
            self._check_streams()
            with alone(), training_info():
                self._probe(probe_size)
        # What trains beside the student, or is kept from step to step: owned as the terms are.
        self.companion = self._teacher.trained if self._teacher.trained is not None else nn.Module()
        self.register_state_dict_post_hook(_keep_student_only)

    @staticmethod
    def _build_teacher(teacher: Any, teachers: Any) -> TeacherSource:
        """Build the source of the teacher's tensors: one, or several by name."""
        if (teacher is None) == (teachers is None):
            raise ConfigError(
                'StructuredDistiller: one of `teacher` and `teachers` must be given, got '
                f'{"neither" if teacher is None else "both"}. Write teacher=dict(config=..., checkpoint=...) for one, '
                'teachers=dict(big=dict(...), ema=dict(...)) for several.'
            )
        if teachers is None:
            return build_source(teacher)
        if not isinstance(teachers, dict):
            raise ConfigError(
                f'StructuredDistiller: `teachers` must be a dict of teachers by name, got {shown(teachers)}.'
            )
        return TeacherGroup(**teachers)

    def _check_streams(self) -> None:
        """Each term must run on streams that there are, and that know what it needs."""
        for term in self.terms.values():
            for name in term.on:
                if name == LABELLED:
                    continue
                if name not in self.streams:
                    raise ConfigError(
                        f'term {term.name!r}: `on` must name a stream of the distiller, got {name!r}. '
                        f'{suggest(name, [LABELLED, *self.streams])}'
                    )
                asking = [loss for loss in term.losses if loss.needs_labels or loss.where == 'labelled']
                if asking and not self.streams[name].labelled:
                    raise ConfigError(
                        f'term {term.name!r}: `on` must name a stream with labels for {type(asking[0]).__name__}, got '
                        f"{name!r}, which has none. Take on='labelled', or a loss (or where='inside') that needs none."
                    )
                if term.on_regions:
                    raise ConfigError(
                        f'term {term.name!r}: `on` must be {LABELLED!r} for taps in a RoI head, got {name!r}. Its '
                        'regions are chosen with the labels of the batch: tap the neck.'
                    )

    def _check_student_taps(self) -> None:
        """Resolve the student's taps before anything expensive is done."""
        for term in self.terms.values():
            for tap in term.student_taps:
                tap.resolve(self.student, f'term {term.name!r}: `student`')

    def _probe(self, size: tuple[int, int] | None) -> None:
        """Run both networks once and let each term build what depends on sizes."""
        for term in self.terms.values():
            for tap in term.teacher_taps:
                self._teacher.resolve(tap, f'term {term.name!r}: `teacher`')
        for term in self.terms.values():
            term.on_points = any(in_point_head(self.student, tap) for tap in term.student_taps)
        seen, observed = self._try_sizes(
            [size] if size else probe_sizes([self.student, self._teacher.network]), bool(size)
        )
        capture, regions = seen.capture, seen.regions
        self._clone = capture.changed_in_place()
        for term in self.terms.values():
            for tap in term.student_taps:
                if tap in capture.cut and term.loss.loss_weight > 0:
                    print_log(
                        f'As the student stands now training would stop: {_no_gradient(term, tap, capture)}',
                        'current',
                        level=30,
                    )
        known = self._known(seen.inputs)
        for term in self.terms.values():
            network, tap = self._teacher.part_of(term.teacher_taps[0])
            classes = (_num_classes(self.student), self._teacher.num_classes(term.teacher_taps[0]))
            # A random teacher agrees with no ground truth, and is asked for none.
            learned = self._teacher.has_learned(term.teacher_taps[0])
            term.bind(capture.records, observed.records, classes, known, regions, network, self.student, learned, tap)
            for level in term.levels:
                print_log(
                    f'term {term.name!r}: student {level.student_tap} {level.student}, '
                    f'teacher {level.teacher_tap} {level.teacher}, connector: {level.connector}',
                    'current',
                )
        owners: dict[str, str] = {}
        for term in self.terms.values():
            for key in term.log_keys:
                if key in owners:
                    raise ConfigError(
                        f'term {term.name!r}: its losses must have names of their own, got {key!r}, which term '
                        f'{owners[key]!r} logs as well. Rename one of the two.'
                    )
                owners[key] = term.name

    def _try_sizes(self, sizes: Sequence[tuple[int, int]], given: bool) -> tuple[Probe, Capture]:
        """Probe both networks at the first size at which both run.

        What fails behind the taps at each size (a loss on noise, an operator
        that the device lacks) is no matter, if the taps are passed alike at two
        sizes: then it was not a level that was too small.
        """
        owners = dict.fromkeys(self._teacher.reads, 'the teacher')
        owners.update({tap: f'term {term.name!r}' for term in self.terms.values() for tap in term.student_taps})
        teacher_taps = [tap for term in self.terms.values() for tap in term.teacher_taps]
        failures: list[tuple[str, tuple[int, int], ForwardFailed]] = []
        partial: tuple[Probe, Capture] | None = None
        for device in probe_devices(self.student):
            with self._moved(device):
                for size in sizes:
                    role = 'student'
                    try:
                        seen = probe_student(self.student, list(owners), size, owners)
                        role = 'teacher'
                        more: dict[str, Any] = {'regions': seen.regions} if seen.chosen else {}
                        more.update(student=seen.capture.records, targets=self._known(seen.inputs))
                        observed = self._teacher.probe(seen.inputs, seen.samples, teacher_taps, **more)
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
        raise no_way(failures, given) from failures[0][2]

    @contextlib.contextmanager
    def _moved(self, device: str | None) -> Iterator[None]:
        """Have both networks on another device for a while; ``None``: leave them where they are."""
        if device is None:
            yield
            return
        home = next(self.student.parameters()).device
        self.student.to(device)
        self._teacher.move(lambda tensor: tensor.to(device))
        try:
            yield
        finally:
            self.student.to(home)
            self._teacher.move(lambda tensor: tensor.to(home))

    @property
    def teacher(self) -> TeacherSource:
        """Source of the teacher's tensors. No submodule: the distiller does not own it."""
        return self._teacher

    def __getattr__(self, name: str) -> Any:
        """Answer for the student where the distiller has no such attribute.

        Hooks of mmseg and mmdet reach for parts of the model (``bbox_head``,
        ``decode_head``, ``dataset_meta``).
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'student' or name.startswith('__'):
                raise
            return getattr(super().__getattr__('student'), name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredDistiller:
        """Move the teacher along with ``.to()``, ``.cuda()`` and the like."""
        super()._apply(fn, recurse)
        for network in _hidden_networks(self.student):
            network._apply(fn)
        self._teacher.move(fn)
        for term in self.terms.values():
            term.attach(self._teacher.part_of(term.teacher_taps[0])[0])  # a move may have made a copy of it
        return self

    def init_weights(self) -> None:
        """Initialise the student as in plain training; the rest is initialised when built."""
        self.student.init_weights()
        self._is_init = True

    def forward(
        self, inputs: Tensor, data_samples: Sequence[Any] | None = None, mode: str = 'tensor', **others: Any
    ) -> dict[str, Tensor] | Any:
        """Train (``mode='loss'``), or be the student.

        Args:
            inputs: preprocessed images, shape (B, 3, H, W).
            data_samples: one per image.
            mode: ``'loss'``, ``'predict'`` or ``'tensor'``.
            **others: batches of streams that read data, by name.

        Returns:
            For ``'loss'`` the student's losses and, per term,
            ``loss_kd_<term>``; else what the student returns.

        Raises:
            TapError: a term counts and no gradient leaves its tap in the
                student, so that it could teach nothing but its own connector.
        """
        if mode != 'loss':
            return self.student(inputs, data_samples, mode=mode)
        active = self._active
        losses, seen = self.observe(inputs, data_samples, [term for term in active if LABELLED in term.on])
        for term in active:
            for tap in term.student_taps:
                if tap in seen.capture.cut:
                    raise TapError(_no_gradient(term, tap, seen.capture))
        if torch.is_grad_enabled():
            self.last_step = StepRecord.of(inputs, data_samples, [t for t in active if LABELLED in t.on], seen)
        losses = scale_losses(losses, self.task_weight * self.task_factor)
        if self._teacher.is_trained:
            losses.update(self._teacher.objectives(seen.student, seen.targets))
        scores = self.score(seen)
        scores.update(self._score_streams(inputs, data_samples, seen.targets, active, others))
        for name, scored in scores.items():
            clash = sorted(set(scored) & set(losses))
            if clash:
                raise ConfigError(
                    f'term {name!r}: its log keys must not be keys of the student, got {clash}. Rename the term.'
                )
            losses.update(scored)
        return losses

    def parse_losses(self, losses: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum the losses as mmengine does, and note them until the step is known to be sound.

        Args:
            losses: what :meth:`forward` returned.

        Returns:
            The sum, and what is logged.
        """
        total, logged = super().parse_losses(losses)
        if self.last_step is not None:
            self.last_step.losses = {name: value.detach() for name, value in logged.items()}
        return total, logged

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle without the batch of the last step."""
        return {**self.__dict__, 'last_step': None}

    def explain(self, **found: Any) -> Fault:
        """Tell what is wrong with the last training step, and who brought it in.

        Args:
            **found: what else is known, see
                :func:`~mmstructkd.distillers.step_record.explain`.

        Returns:
            The fault, as far as this process can see it.
        """
        return explain(self, self.last_step, **found)

    @property
    def _active(self) -> list[Term]:
        """The terms that count at this point of the training."""
        return [term for term in self.terms.values() if term.active]

    def score(self, seen: Observation) -> dict[str, dict[str, Tensor]]:
        """Compute the losses of all terms.

        Args:
            seen: what :meth:`observe` returned.

        Returns:
            By term its losses, by the key under which they are logged.
        """
        asked = [tap for term in self._active for tap in term.teacher_taps]
        # Terms of one tap share its softmax; for others it would only be kept longer.
        with sharing() if len(set(asked)) < len(asked) else contextlib.nullcontext():
            return {
                name: term(seen.student, seen.teacher, seen.targets, seen.regions)
                for name, term in self.terms.items()
                if LABELLED in term.on
            }

    def observe(
        self, inputs: Tensor, data_samples: Sequence[Any] | None, terms: Sequence[Term]
    ) -> tuple[dict[str, Tensor], Observation]:
        """Run both networks on a batch and listen at the taps of some terms.

        The teacher goes first, so that what it needs on the way is gone before
        the student's graph is there; but where a RoI or point head is tapped it
        goes second, since it looks at the regions or points that the student has
        chosen. Without terms it does not run.

        Args:
            inputs: preprocessed images, shape (B, 3, H, W).
            data_samples: one per image.
            terms: the terms that count.

        Returns:
            The student's own losses, and what the terms need.
        """
        on_regions = any(term.on_regions for term in terms)
        on_points = any(term.on_points for term in terms)
        teacher_taps = [tap for term in terms for tap in term.teacher_taps]
        teacher: dict[Tap, list[Tensor]] = {}
        asked = bool(terms) or self._teacher.is_trained
        late = on_regions or on_points or self._teacher.follows
        if asked and not late:
            teacher = self._teacher.observe(inputs, data_samples, teacher_taps)
        student_taps = [tap for term in terms for tap in term.student_taps]
        if asked:
            student_taps += [tap for tap in self._teacher.reads if tap not in student_taps]
        targets = collect_targets(self.student, inputs, data_samples) if asked or self.streams else Targets()
        with (
            RegionRecorder(self.student, student_taps, self._stages)
            if on_regions
            else contextlib.nullcontext() as recorder,
            recorded_points(self.student) if on_points else contextlib.nullcontext([]) as points,
            Capture(self.student, student_taps, clone=self._clone) as capture,
        ):
            losses = self.student(inputs, data_samples, mode='loss')
        regions = None if recorder is None else recorder.regions
        if on_points:
            regions = with_points(regions, points)
        if asked and late:
            teacher = self._teacher.observe(
                inputs, data_samples, teacher_taps, student=capture.records, regions=regions
            )
        return losses, Observation(capture, teacher, targets, regions)

    def _known(self, inputs: Tensor) -> Targets:
        """What batches of the task know, for a probed input."""
        return probe_targets(task_of(self.student), 1, _num_classes(self.student), tuple(inputs.shape[-2:]))

    def _score_streams(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        active: Sequence[Term],
        others: Mapping[str, Any],
    ) -> dict[str, dict[str, Tensor]]:
        """Compare both networks on each stream that a term asks for.

        Returns:
            By term and stream its losses, with the stream's name in the keys.
        """
        scores: dict[str, dict[str, Tensor]] = {}
        for name, stream in self.streams.items():
            terms = [term for term in self.terms.values() if name in term.on]
            asked = [term for term in terms if term in active]
            seen = Observation(Capture(self.student, ()), {}, targets, None)
            if asked:
                batch = stream.make(inputs, data_samples, targets, others.get(name) or {}, self.step)
                seen = self._observe_stream(batch, asked, frozen=stream.norm == 'frozen')
            for term in terms:
                if not asked or term in asked:
                    scored = term(seen.student, seen.teacher, seen.targets, None)
                    scores[f'{term.name} on {name}'] = {f'{key}_{name}': value for key, value in scored.items()}
                else:
                    scores[f'{term.name} on {name}'] = {f'loss_kd_{term.name}_{name}': term.silence()}
        return scores

    def _observe_stream(self, batch: StreamBatch, terms: Sequence[Term], *, frozen: bool) -> Observation:
        """Run both networks on a batch of a stream, without the losses of the task."""
        teacher_taps = [tap for term in terms for tap in term.teacher_taps]
        student_taps = list(dict.fromkeys([tap for term in terms for tap in term.student_taps]))
        student_taps += [tap for tap in self._teacher.reads if tap not in student_taps]
        norms = [m for m in self.student.modules() if frozen and m.training and isinstance(m, _BatchNorm)]
        for module in norms:
            module.training = False
        try:
            route = 'features' if all(map(in_features, student_taps)) else 'tensor'
            capture = tapped_forward(
                self.student, batch.inputs, batch.data_samples, student_taps, clone=self._clone, route=route
            )
        finally:
            for module in norms:
                module.training = True
        teacher = self._teacher.observe(
            batch.inputs, batch.data_samples, teacher_taps, student=capture.records, labelled=False
        )
        return Observation(capture, teacher, batch.targets, None)

    def set_progress(self, step: int, last: int) -> None:
        """Follow the training: the weight of the task, and what the teacher does by the number of the step.

        Args:
            step: iterations done so far.
            last: iterations of the training.
        """
        self.step = step
        self.task_factor = self.task_schedule.factor(step, last)
        self._teacher.set_progress(step, last)

    def auxiliary_parameters(self) -> tuple[list[nn.Parameter], list[tuple[dict, list[nn.Parameter]]]]:
        """Parameters that only training needs.

        Returns:
            Those that go with the student's optimiser settings, and a list of
            (optimiser config, parameters) for those with settings of their own.
        """
        own, taken = [], set()
        for term in self.terms.values():
            for loss in term.losses:
                params = [p for p in loss.parameters() if p.requires_grad]
                if loss.own_optimizer is not None and params:
                    own.append((loss.own_optimizer, params))
                    taken.update(params)
        shared = [p for p in self.terms.parameters() if p.requires_grad and p not in taken]
        for settings, params in self._teacher.parameter_groups():
            if settings is None:
                shared += params
            else:
                own.append((settings, params))
        return shared, own

    def training_state(self) -> dict[str, Any]:
        """What only training needs, for a checkpoint: connectors, critics, and who the teacher is."""
        return {
            'terms': self.terms.state_dict(),
            'companion': self.companion.state_dict(),
            'teacher': self._teacher.provenance(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`training_state`.

        Args:
            state: from a checkpoint of the same distiller.

        Raises:
            CheckpointError: the terms or the teacher are others.
        """
        try:
            self.terms.load_state_dict(state['terms'])
        except RuntimeError as err:
            raise CheckpointError(
                f'StructuredDistiller: the resumed checkpoint must hold the terms of the config, got others. {err} '
                'Start anew from its student with load_from=.'
            ) from err
        saved, now = _identity(state['teacher']), _identity(self._teacher.provenance())
        if saved != now:
            raise CheckpointError(
                f'StructuredDistiller: the teacher must be the one the checkpoint was trained with ({shown(saved)}), '
                f'got {shown(now)}. Give that one, or start anew from the student with load_from=.'
            )
        try:
            self.companion.load_state_dict(state.get('companion', {}))
        except RuntimeError as err:
            raise CheckpointError(
                f'StructuredDistiller: the resumed checkpoint must hold what the teacher trains, got another. {err} '
                'Start anew from its student with load_from=.'
            ) from err

    def prepare_runner(self, runner: Runner) -> None:
        """Ask the runner for what the promises need; called when its hooks are registered.

        Args:
            runner: the runner that was just given this model.

        Raises:
            ConfigError: ``compile`` is set, or ``optim_wrapper`` cannot serve a
                distiller.
            CheckpointError: the checkpoint to resume from is not there.
        """
        if runner.cfg.get('compile'):
            raise ConfigError(
                f'StructuredDistiller: `compile` must be off, got {runner.cfg.compile!r}. Taps are forward hooks that '
                'are set anew each step and end the teacher early, which torch.compile of train_step cannot trace.'
            )
        present = {type(hook).__name__ for hook in runner.hooks}
        for name in (*RUNNER_HOOKS, *self._teacher.hooks):
            if name not in present:
                runner.register_hook(HOOKS.build({'type': f'mmstructkd.{name}'}))
        prepare_to_resume(runner)
        if runner._train_loop is not None:
            runner.optim_wrapper = for_distiller(runner.optim_wrapper, self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the keys of a plain student; the terms keep what they have."""
        own = [key for key in state_dict if key.startswith(prefix)]
        for key in own:
            state_dict[prefix + STUDENT + key[len(prefix) :]] = state_dict.pop(key)
        for name, part in (('terms', self.terms), ('companion', self.companion)):
            for key, value in part.state_dict(prefix=f'{prefix}{name}.').items():
                state_dict[key] = value
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _identity(provenance: Any) -> Any:
    """What makes a teacher the same, wherever its files lie."""
    if isinstance(provenance, Mapping):
        left_out = ('checkpoint', 'config') if provenance.get('sha256') else ()
        return {key: _identity(value) for key, value in provenance.items() if key not in left_out}
    return [_identity(value) for value in provenance] if isinstance(provenance, (list, tuple)) else provenance


def _keep_student_only(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict) -> None:
    """Reduce the distiller's ``state_dict`` to the student's, under the student's own keys."""
    inner = prefix + STUDENT
    entries = [(key, state_dict.pop(key)) for key in list(state_dict) if key.startswith(prefix)]
    for key, value in entries:
        if key.startswith(inner):
            state_dict[prefix + key[len(inner) :]] = value
    metadata = getattr(state_dict, '_metadata', None)
    if metadata is not None:
        for key in [k for k in metadata if k.startswith(prefix) and k != prefix[:-1]]:
            value = metadata.pop(key)
            if key.startswith(inner):
                metadata[prefix + key[len(inner) :]] = value


def _hidden_networks(network: nn.Module) -> list[nn.Module]:
    """Networks that modules hold as plain attributes, as mmdet's own distillers hold their teacher.

    These move them in a ``.to()`` of their own, which a module that holds the
    student does not call.
    """
    return [one for module in network.modules() for one in vars(module).values() if isinstance(one, nn.Module)]


def _no_gradient(term: Term, tap: Tap, capture: Capture) -> str:
    """Say that a term teaches nothing, and why."""
    return (
        f'term {term.name!r}: `student` must name a module that a gradient leaves in training, got '
        f'{str(tap)!r}, {explain_cut(capture.cut[tap], tap)}.'
    )


def _check_preprocessor(config: Any, scope: str | None) -> None:
    """Build a data preprocessor once: one that the student's own takes the place of would be wrong in silence."""
    if isinstance(config, dict):
        settings = {'_scope_': scope, **config}
        made = build_part(
            'StructuredDistiller', 'data_preprocessor', settings, example="dict(type='SegDataPreProcessor')"
        )
        if not isinstance(made, BaseDataPreprocessor):
            raise ConfigError(
                f'StructuredDistiller: `data_preprocessor` must be a data preprocessor, got {type(made).__name__}.'
            )


def _num_classes(network: nn.Module | None) -> int | None:
    """Number of classes of a network's head, where it has one."""
    return None if network is None else num_classes_of(head_of(network))
