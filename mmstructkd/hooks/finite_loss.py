"""Stops at the first loss that is not finite, before anything is saved."""

from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmstructkd.registry import HOOKS

__all__ = ['FiniteLossHook']


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Raises at a NaN or infinite loss, with the iteration, its name and all losses.

    Runs before checkpoints are written, so the last checkpoint is from before.
    It reads no more from the device than mmengine's own logging does.
    """

    priority = 'VERY_HIGH'

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Check the losses of the step.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
            outputs: the step's log values by name.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        losses = {name: float(torch.as_tensor(v).detach()) for name, v in (outputs or {}).items() if 'loss' in name}
        bad = [name for name, value in losses.items() if not math.isfinite(value) and name != 'loss']
        if not bad and math.isfinite(losses.get('loss', 0.0)):
            return
        others = ', '.join(f'{name} {value:.4g}' for name, value in losses.items() if name not in bad)
        terms = [name for name in bad if name.startswith('loss_kd_')]
        way_out = (
            f'Lower the learning rate, or switch the term off with loss_weight=0: {", ".join(terms)}.'
            if terms
            else 'Lower the learning rate, or look at the labels of this batch.'
        )
        raise FloatingPointError(
            f'iteration {runner.iter + 1}: {", ".join(f"{name} is {losses[name]}" for name in bad or ["loss"])} '
            f'({others}). {way_out}'
        )
