"""Makes up for a validation that a run was stopped before, where the training depends on it."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmstructkd.hooks.student_checkpoint import KEY
from mmstructkd.registry import HOOKS

__all__ = ['DueValidationHook']


@HOOKS.register_module()
class DueValidationHook(Hook):
    """Validates first where a run is resumed from a checkpoint whose validation it never saw.

    A checkpoint is written before the validation of its iteration, and mmengine
    does not validate when it resumes: the run would go on without that score.
    Where ``EarlyStoppingHook`` or a schedule such as ``ReduceOnPlateauLR``
    follows the scores, it would not be the same run.
    """

    # Behind all others: they have prepared what a validation needs.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._missed = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """See whether the checkpoint is of before its validation.

        Args:
            runner: the runner.
            checkpoint: what was read.
        """
        state = checkpoint.get(KEY, {})
        within_epoch = (
            isinstance(runner.train_loop, EpochBasedTrainLoop) and state.get('data', {}).get('batches', 0) > 0
        )
        self._missed = bool(runner._resume) and not state.get('validation', {'done': True})['done'] and not within_epoch

    def before_train(self, runner: Runner) -> None:
        """Validate, where that was due.

        Args:
            runner: the runner.
        """
        missed, self._missed = self._missed, False
        if missed and _is_due(runner) and _follows_scores(runner):
            runner.logger.info('Validate first: the run was stopped before the validation of its checkpoint was over.')
            runner.val_loop.run()


def _is_due(runner: Runner) -> bool:
    """Whether the training loop validates at the point that it has reached."""
    loop = runner.train_loop
    if runner.val_loop is None:
        return False
    by_epoch = isinstance(loop, EpochBasedTrainLoop)
    done, last = (loop.epoch, loop.max_epochs) if by_epoch else (loop.iter, loop.max_iters)
    loop._decide_current_val_interval()
    return done >= max(loop.val_begin, 1) and (done % loop.val_interval == 0 or done == last)


def _follows_scores(runner: Runner) -> bool:
    """Whether a hook or a schedule goes by the scores of validations."""
    schedulers: Any = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = [scheduler for several in schedulers.values() for scheduler in several]
    return any(getattr(scheduler, 'need_val_args', False) for scheduler in schedulers) or any(
        isinstance(hook, EarlyStoppingHook) for hook in runner.hooks
    )
