"""Makes checkpoints the plain student's, with what training needs beside it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from mmstructkd.distillers.plain_config import plain_config
from mmstructkd.registry import HOOKS

__all__ = ['StudentCheckpointHook']

KEY = 'mmstructkd'


def random_states() -> dict[str, Any]:
    """The global random streams of this process, as plain values and tensors."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        'numpy': [kind, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        'python': [version, list(words), gauss],
    }


def set_torch_states(states: dict[str, Any]) -> None:
    """Restore torch's streams from :func:`random_states`."""
    torch.set_rng_state(states['torch'].cpu())
    if states['cuda'] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states['cuda']])


def set_host_states(states: dict[str, Any]) -> None:
    """Restore numpy's and Python's streams from :func:`random_states`."""
    kind, keys, position, has_gauss, cached = states['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, words, gauss = states['python']
    random.setstate((version, tuple(words), gauss))


@HOOKS.register_module()
class StudentCheckpointHook(Hook):
    """Saves the student as plain mmseg or mmdet would, and resumes exactly.

    ``state_dict`` and ``ema_state_dict`` have the student's keys already (the
    distiller sees to that); ``meta['cfg']`` becomes the student's own config, which
    needs this package only where the student does.
    Connectors, critics, random states and the teacher's provenance lie under
    the key ``mmstructkd`` of the same file.

    A resumed run goes through the same data: where mmengine would skip batches
    without loading them (onedl line), they are loaded, so that augmentations
    are drawn as in the uninterrupted run; ``train_cfg=dict(
    fast_forward_on_resume=True)`` keeps the quick way. Validation leaves the
    random streams as it found them.
    """

    priority = 'NORMAL'

    def __init__(self) -> None:
        self._pending: dict[str, Any] | None = None
        self._before_val: dict[str, Any] | None = None
        self._meta_config: str | None = None

    @staticmethod
    def _model(runner: Runner) -> Any:
        """The distiller, unwrapped."""
        return runner.model.module if is_model_wrapper(runner.model) else runner.model

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put what training needs beside the student.

        Args:
            runner: the runner.
            checkpoint: what is about to be written.
        """
        if self._meta_config is None:
            self._meta_config = plain_config(runner.cfg).pretty_text
        checkpoint['meta']['cfg'] = self._meta_config
        information = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
        if 'cfg' in information:  # mmengine's inferencers look here first
            information['cfg'] = self._meta_config
        checkpoint[KEY] = {
            **self._model(runner).training_state(),
            'config': runner.cfg.pretty_text,
            'random': random_states(),
        }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore it where the run is resumed.

        Args:
            runner: the runner.
            checkpoint: what was read.
        """
        if not runner._resume:
            return
        if KEY not in checkpoint:
            runner.logger.warning(
                'The resumed checkpoint is of a plain run: connectors and critics start anew. '
                'load_from= starts a distilled run from a plain student.'
            )
            return
        self._model(runner).load_training_state(checkpoint[KEY])
        self._pending = checkpoint[KEY]['random']

    def before_train_epoch(self, runner: Runner) -> None:
        """Bring the data to where the resumed run stood.

        Args:
            runner: the runner.
        """
        if self._pending is None:
            return
        loop = runner.train_loop
        if not isinstance(loop, IterBasedTrainLoop):
            set_host_states(self._pending)
            set_torch_states(self._pending)
            self._pending = None
        elif getattr(loop, 'fast_forward_on_resume', None) is False:
            runner.logger.info(f'Reload {loop.iter} batches, so that augmentations go on where they stopped.')
            for _ in range(loop.iter):
                next(loop.dataloader_iterator)
            loop.fast_forward_on_resume = True

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Restore torch's stream once the data have caught up.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
        """
        if self._pending is not None:
            set_torch_states(self._pending)
            self._pending = None

    def before_val(self, runner: Runner) -> None:
        """Remember the random streams.

        Args:
            runner: the runner.
        """
        self._before_val = random_states()

    def after_val(self, runner: Runner) -> None:
        """Give them back: a run resumed from before a validation must not differ.

        Args:
            runner: the runner.
        """
        if self._before_val is not None:
            set_host_states(self._before_val)
            set_torch_states(self._before_val)
            self._before_val = None
