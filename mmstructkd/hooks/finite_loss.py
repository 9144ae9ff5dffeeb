"""Stops at the first step that is not finite, before anything is saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmstructkd.optim import DistillStep
from mmstructkd.registry import HOOKS

__all__ = ['FiniteLossHook']


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Raises where a loss, a gradient or a running statistic is NaN or infinite.

    A distiller's optim wrapper (:class:`~mmstructkd.optim.DistillStep`) looks at
    each step before its update and, on a CPU, raises by itself. On an
    accelerator this hook reads what it found, together with the losses that
    mmengine logs, so that the host waits no more often than it did. All
    processes raise in the same iteration. Checkpoints are written later, so the
    last one is from before.

    In plain training, where there is no such wrapper, the losses are read.
    """

    priority = 'VERY_HIGH'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Check the step.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
            outputs: the step's log values by name.

        Raises:
            FloatingPointError: something is not finite; it says what, in which
                iteration and term, and on whose side.
        """
        if isinstance(runner.optim_wrapper, DistillStep):
            runner.optim_wrapper.check_last_step()
            return
        losses = {name: float(torch.as_tensor(v).detach()) for name, v in (outputs or {}).items() if 'loss' in name}
        bad = [name for name, value in losses.items() if not math.isfinite(value) and name != 'loss']
        if not bad and math.isfinite(losses.get('loss', 0.0)):
            return
        others = ', '.join(f'{name} {value:.4g}' for name, value in losses.items() if name not in bad)
        raise FloatingPointError(
            f'iteration {runner.iter + 1}: {", ".join(f"{name} is {losses[name]}" for name in bad or ["loss"])} '
            f'({others}). Lower the learning rate, or look at the labels of this batch.'
        )
