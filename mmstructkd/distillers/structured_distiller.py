"""The distiller: a student trained by its task and by terms between it and a teacher."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn

from mmstructkd.distillers.fitting import fit_terms, no_gradient
from mmstructkd.distillers.probing import (
    as_one_process,
    check_probe_size,
)
from mmstructkd.distillers.stages import Stage, compile_terms, freeze_statistics, parse_stages, stage_at
from mmstructkd.distillers.step_record import Fault, StepRecord, explain
from mmstructkd.distillers.training_state import carry_terms, restore, state_of
from mmstructkd.errors import ConfigError, TapError, check_finite_number, shown
from mmstructkd.functional.core.sharing import sharing
from mmstructkd.optim import for_distiller
from mmstructkd.registry import HOOKS, MODELS, build_part
from mmstructkd.resuming import prepare_to_resume
from mmstructkd.streams import LABELLED, StreamBatch, StreamSet, TrainingBatch
from mmstructkd.structures import Targets
from mmstructkd.taps import (
    Capture,
    Gates,
    Observation,
    RegionRecorder,
    Tap,
    in_features,
    pair_stages,
    read_gates,
    recorded_points,
    tapped_forward,
    with_points,
)
from mmstructkd.tasks.batches import training_info
from mmstructkd.tasks.resizing import check_student_scale, scale_images
from mmstructkd.tasks.targets import (
    branches_of,
    collect_targets,
    task_of,
)
from mmstructkd.teachers import TeacherGroup, TeacherSource
from mmstructkd.teachers.building import build_source
from mmstructkd.teachers.trained import scale_losses
from mmstructkd.terms import Term, WeightSchedule, parse_terms
from mmstructkd.terms.reading import TERM_KEYS

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
        stages: parts of the training by iterations, a list of dicts: ``end`` (all but
            the last), ``terms`` that count (default: all), ``task_weight`` (times that
            of the distiller), and ``freeze``, modules of the student that stay as they
            are: no update, no decay, no share in the norm that is clipped, BatchNorm in
            eval. The gradient still passes through them.
        training_state_from: checkpoint of a distilled run whose connectors and critics
            this run begins with, for terms of the same name and shape.
        gates: modules of the student behind which no gradient passes: what lies between
            two of them learns from the terms that are tapped there, and the task trains
            what lies behind the last. A tap at a gate sees what comes before it.
        student_scale: factor, at most 1, by which the images are resized for the
            student in training, while the teacher sees them as they come and labels
            keep their size (the form of UVA-Net, arXiv:1904.04449). The student's own
            pipelines for validation and test must resize likewise: what is saved is
            a plain student for small images. Levels are matched as if both saw the
            same size.

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
        stages: Sequence[dict] | None = None,
        training_state_from: str | None = None,
        gates: Sequence[str] = (),
        student_scale: float = 1.0,
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
        self.streams = StreamSet(streams)
        self.data_preprocessor = self.streams.wrap_preprocessor(student.data_preprocessor)
        if training_state_from is not None and (not isinstance(training_state_from, str) or not training_state_from):
            raise ConfigError(
                'StructuredDistiller: `training_state_from` must be the path of a checkpoint, got '
                f'{shown(training_state_from)}.'
            )
        self.training_state_from = training_state_from
        self.student_scale = check_student_scale('StructuredDistiller', student_scale, task_of(self.student))
        with random_state_kept():
            self.terms = parse_terms(terms)
            self._check_student_taps()
            self.stages = parse_stages(stages, self.terms, self.student)
            compile_terms(self.stages, self.terms)
            self.gates = read_gates('StructuredDistiller', gates, self.student)
            self.stage: Stage | None = stage_at(self.stages, 0)
            self._stages = pair_stages((t.name, t.student_taps, t.teacher_taps) for t in self.terms.values())
            for term in self.terms.values():
                term.branches = branches_of(self.student)
            self._teacher = self._build_teacher(teacher, teachers)
            self._teacher.attach(self.student, self_config)
            self.streams.check_terms(self.terms.values(), self._teacher)
            with as_one_process(), training_info():
                self._clone = fit_terms(self.student, self._teacher, self.terms, probe_size, self.gates)
        # What trains beside the student, or is kept from step to step: owned as the terms are.
        self.companion = self._teacher.trained if self._teacher.trained is not None else nn.Module()
        self.register_state_dict_post_hook(_keep_student_only)

    def _for_student(self, inputs: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
        """What the student sees of a batch, and what is known of it: maps of labels keep their size."""
        if self.student_scale == 1:
            return inputs, targets
        images = scale_images(inputs, self.student_scale)
        return images, replace(targets, images=images, input_size=(images.shape[-2], images.shape[-1]))

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

    def _check_student_taps(self) -> None:
        """Resolve the student's taps before anything expensive is done."""
        for term in self.terms.values():
            for tap in term.student_taps:
                tap.resolve(self.student, f'term {term.name!r}: `student`')

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
        self._teacher.begin(self.student)
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
        labelled = [term for term in active if LABELLED in term.on]
        losses, seen = self.observe(inputs, data_samples, labelled)
        for term in active:
            for tap in term.student_taps:
                if tap in seen.capture.cut:
                    raise TapError(no_gradient(term, tap, seen.capture))
        if torch.is_grad_enabled():
            self.last_step = StepRecord.of(inputs, data_samples, labelled, seen)
        losses = scale_losses(losses, self.task_weight * self.task_factor)
        if self._teacher.is_trained:
            losses.update(self._teacher.objectives(seen.student, seen.targets))
        scores = self.score(seen)
        size = (inputs.shape[-2], inputs.shape[-1])
        whole = seen.targets if self.student_scale == 1 else replace(seen.targets, images=inputs, input_size=size)
        batch = TrainingBatch(inputs, data_samples, whole, others, self.step, seen.student)
        trained = (self.student, self.companion)
        scores.update(self.streams.score(self._run_student, self._teacher, self.terms.values(), batch, trained))
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
        if asked or self._active:  # on a stream a teacher may look at what the student made of this batch
            student_taps += [tap for tap in self._teacher.reads if tap not in student_taps]
        targets = collect_targets(self.student, inputs, data_samples) if asked or self.streams else Targets()
        images, known = self._for_student(inputs, targets)
        with (
            RegionRecorder(self.student, student_taps, self._stages)
            if on_regions
            else contextlib.nullcontext() as recorder,
            recorded_points(self.student) if on_points else contextlib.nullcontext([]) as points,
            Gates(self.student, self.gates),
            Capture(self.student, student_taps, clone=self._clone) as capture,
        ):
            losses = self.student(images, data_samples, mode='loss')
        regions = None if recorder is None else recorder.regions
        if on_points:
            regions = with_points(regions, points)
        if asked and late:
            teacher = self._teacher.observe(
                inputs, data_samples, teacher_taps, student=capture.records, regions=regions
            )
        return losses, Observation(capture, teacher, known, regions)

    def _run_student(self, batch: StreamBatch, taps: Sequence[Tap]) -> tuple[Capture, Targets]:
        """Run the student on the batch of a stream, without the losses of the task.

        Args:
            batch: what the stream made.
            taps: taps of the student.

        Returns:
            What was captured, and what is known of the batch as the student sees it.
        """
        images, known = self._for_student(batch.inputs, batch.targets)
        route = 'features' if all(map(in_features, taps)) else 'tensor'
        with Gates(self.student, self.gates):
            capture = tapped_forward(self.student, images, batch.data_samples, taps, clone=self._clone, route=route)
        return capture, known

    def set_progress(self, step: int, last: int) -> None:
        """Follow the training: the weight of the task, and what the teacher does by the number of the step.

        Args:
            step: iterations done so far.
            last: iterations of the training.
        """
        self.step = step
        self.task_factor = self.task_schedule.factor(step, last)
        stage = stage_at(self.stages, step)
        if stage is not None:
            self.task_factor *= stage.task_weight
            if stage is not self.stage:
                self.stage = stage
                self.train(self.training)  # what was frozen goes back to the student's own modes
        self._teacher.set_progress(step, last)

    def train(self, mode: bool = True) -> StructuredDistiller:
        """Set the mode; statistics of what the stage freezes stay as they are."""
        super().train(mode)
        if mode and self.stage is not None:
            freeze_statistics(self.student, self.stage.freeze)
        return self

    def frozen_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that the stage keeps as they are.

        Their ``requires_grad`` stays: processes that share gradients have been told what to wait for.

        Yields:
            Each of them; one that lies in two frozen modules twice.
        """
        for name in () if self.stage is None else self.stage.freeze:
            yield from self.student.get_submodule(name).parameters()

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
        return state_of(self.terms, self.companion, self._teacher)

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`training_state`.

        Args:
            state: from a checkpoint of the same distiller.

        Raises:
            CheckpointError: the terms or the teacher are others.
        """
        restore(state, self.terms, self.companion, self._teacher)

    def carry_training_state(self, cfg: Mapping[str, Any]) -> list[str]:
        """Begin with what the terms of another training have learned, from ``training_state_from``.

        Args:
            cfg: config of the run, which may allow a file that needs more than weights.

        Returns:
            Names of the terms that have taken theirs.

        Raises:
            CheckpointError: the file cannot be read or is of no distilled run, or a term of the same name has other
                parts.
        """
        path = self.training_state_from
        return [] if path is None else carry_terms(path, self.terms, cfg)

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
        for name in (*RUNNER_HOOKS, *(('StageHook',) if self.stages else ()), *self._teacher.hooks):
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
