"""Sets the weight of each term for the coming iteration, and tells its modules how far the training is."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from mmstructkd.distillers.class_names import check_classes, names_of_dataset
from mmstructkd.errors import ConfigError
from mmstructkd.registry import HOOKS

__all__ = ['TermScheduleHook']


@HOOKS.register_module()
class TermScheduleHook(Hook):
    """Evaluates each term's schedule before each iteration.

    The factor is a function of ``runner.iter`` and ``runner.epoch`` alone, so a
    resumed run goes on with the right one. The same holds for modules of the
    terms that have a method ``set_progress(step, last)`` (temperatures): it is
    called with the iterations done and those of the whole training, or with
    epochs where the module's ``by_epoch`` is true.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._followers: list[Any] | None = None

    def before_train(self, runner: Runner) -> None:
        """Look for modules that follow the training and for terms that never count; compare the names of classes.

        Args:
            runner: the runner.

        Raises:
            ConfigError: the factor of a term is 0 throughout this training, it
                counts epochs in a loop that has none, or the teacher has the student's classes in another order.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for name, term in model.terms.items():
            _check_epochs(name, term, runner)
            _check_schedule(name, term, runner, model.teacher)
        if any(getattr(term, 'by_class', False) for term in model.terms.values()):
            dataset = getattr(runner.train_dataloader, 'dataset', None)
            check_classes(model.terms.values(), names_of_dataset(dataset), model.teacher)
        self._followers = [module for module in model.terms.modules() if hasattr(module, 'set_progress')]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Write the factors, and tell the modules.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.set_progress(runner.iter, runner.max_iters)
        asked = [(term, model.teacher.interval_factor(runner.iter, term.teacher_taps)) for term in model.terms.values()]
        # The teacher's own terms have the student in the teacher's place, which is always there.
        asked += [(term, 1.0) for term in model.teacher.terms.values()]
        for term, factor in asked:
            term.interval_factor = factor
            by_epoch = term.schedule.by_epoch
            step, last = (runner.epoch, runner.max_epochs) if by_epoch else (runner.iter, runner.max_iters)
            term.factor = term.schedule.factor(step, last)
        if self._followers is None:
            self.before_train(runner)
        for module in self._followers or ():
            if getattr(module, 'by_epoch', False):
                module.set_progress(runner.epoch, runner.max_epochs)
            else:
                module.set_progress(runner.iter, runner.max_iters)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Tell the teacher that the student has been updated.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
            outputs: unused.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        model.teacher.after_step(model.student)


def _check_epochs(name: str, term: Any, runner: Runner) -> None:
    """Refuse to count epochs in a loop that has none: what follows them would stand still, which nobody would see."""
    if not isinstance(getattr(runner, 'train_loop', None), IterBasedTrainLoop):
        return
    followers = [module for module in term.modules() if hasattr(module, 'set_progress')]
    for follower in (term.schedule, *followers):
        if getattr(follower, 'by_epoch', False):
            raise ConfigError(
                f'term {name!r}: `by_epoch` of {type(follower).__name__} must be False in an IterBasedTrainLoop, which '
                'counts no epochs, got True. Give iterations.'
            )


def _check_schedule(name: str, term: Any, runner: Runner, teacher: Any) -> None:
    """Refuse a schedule by which the term teaches nothing, which nobody would see."""
    schedule = term.schedule
    unit, last = ('epoch', runner.max_epochs) if schedule.by_epoch else ('iteration', runner.max_iters)
    active = (step for step in range(last) if schedule.factor(step, last) > 0)
    if not schedule.by_epoch:
        active = (step for step in active if teacher.interval_factor(step, term.teacher_taps) > 0)
    if last < 1 or next(active, None) is not None:
        return
    owner = f'term {name!r}: `schedule`'
    if schedule.begin >= last:
        way_out = 'Begin earlier, train longer, or remove the term.'
        if schedule.by_epoch and runner.max_iters > 1 and last == 1:
            way_out = 'This loop counts one epoch: set by_epoch=False and give iterations.'
        raise ConfigError(
            f'{owner} must begin before the training ends, got begin={schedule.begin} in a training of {last} '
            f'{unit}{"s" if last > 1 else ""}. {way_out}'
        )
    raise ConfigError(
        f'{owner} must be above 0 at some {unit} of the {last} of this training at which the teacher is asked, got '
        f'{schedule}. Raise its factors or widen its window; loss_weight=0 switches a term off.'
    )
