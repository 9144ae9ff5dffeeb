"""The last guard: no checkpoint is written that is not finite."""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor

from mmstructkd.distillers.step_record import not_finite
from mmstructkd.registry import HOOKS

__all__ = ['FiniteCheckpointHook']

PARTS = ('state_dict', 'ema_state_dict', 'optimizer', 'mmstructkd')
AVERAGED = 'module.'
SHOWN = 5


@HOOKS.register_module()
class FiniteCheckpointHook(Hook):
    """Refuses to write a checkpoint with a tensor that is not finite.

    Weights and buffers of the student, their average, what the terms train, and
    the optimisers' state. Buffers that were not finite when the run began (a
    mask of minus infinity) may stay as they were. What was saved before is kept:
    old checkpoints are removed only after a new one is written.
    """

    priority = 'LOWEST'  # EMA and the student's hook put their parts in before

    def __init__(self) -> None:
        self._constants: dict[str, Tensor] = {}

    def before_run(self, runner: Runner) -> None:
        """Remember which buffers are infinite on purpose, before a checkpoint is loaded.

        Args:
            runner: the runner.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        network = getattr(model, 'student', model)
        self._constants = {
            name: buffer.detach().cpu().clone()
            for name, buffer in network.named_buffers()
            if buffer.is_floating_point() and not bool(buffer.isfinite().all())
        }

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at every tensor.

        Args:
            runner: the runner.
            checkpoint: what is about to be written.

        Raises:
            FloatingPointError: a tensor is not finite.
        """
        bad = {
            f'{part}{place}': tensor
            for part in PARTS
            for place, tensor in not_finite(checkpoint.get(part)).items()
            if not self._constant(place, tensor)
        }
        if not bad:
            return
        shown = ', '.join(f'{n} ({"nan" if t.isnan().any() else "inf"})' for n, t in list(bad.items())[:SHOWN])
        more = f' and {len(bad) - SHOWN} more' if len(bad) > SHOWN else ''
        raise FloatingPointError(
            f'FiniteCheckpointHook: a checkpoint must hold finite tensors only, got after iteration '
            f'{checkpoint["meta"].get("iter")} {len(bad)} that are not: {shown}{more}. It is not written; the last '
            f'good one in {runner.work_dir} stays. Resume from it with a lower learning rate, or with clip_grad.'
        )

    def _constant(self, place: str, tensor: Tensor) -> bool:
        """Whether a tensor is a buffer that was like this from the start."""
        name = place.strip('[]\'"').removeprefix(AVERAGED)
        start = self._constants.get(name)
        return start is not None and torch.equal(torch.nan_to_num(start), torch.nan_to_num(tensor.detach().cpu()))
