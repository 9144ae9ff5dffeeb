"""Sets the weight of each term for the coming iteration."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from mmstructkd.registry import HOOKS

__all__ = ['TermScheduleHook']


@HOOKS.register_module()
class TermScheduleHook(Hook):
    """Evaluates each term's schedule before each iteration.

    The factor is a function of ``runner.iter`` and ``runner.epoch`` alone, so a
    resumed run goes on with the right one.
    """

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Write the factors.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for term in model.terms.values():
            by_epoch = term.schedule.by_epoch
            step, last = (runner.epoch, runner.max_epochs) if by_epoch else (runner.iter, runner.max_iters)
            term.factor = term.schedule.factor(step, last)
