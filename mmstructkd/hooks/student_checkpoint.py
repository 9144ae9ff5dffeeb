"""Makes checkpoints the plain student's, with what training needs beside it, and resumes from them exactly."""

from __future__ import annotations

import enum
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmstructkd.distillers.plain_config import plain_config
from mmstructkd.registry import HOOKS
from mmstructkd.resuming import advance_training_data, reseed_workers
from mmstructkd.stream_states import Point, random_states, restore_random_states

__all__ = ['KEY', 'StudentCheckpointHook', 'plain_values']

#: Where, in a checkpoint, everything lies that only training needs.
KEY = 'mmstructkd'
#: Settings of a dataloader that decide what its workers draw.
SETTINGS = ('num_workers', 'batch_size')


def plain_values(value: Any, *, keep_unknown: bool = False) -> Any:
    """Return nested values as those that a checkpoint may hold: what is read back without running code.

    Args:
        value: anything.
        keep_unknown: leave other objects as they are, instead of taking their text.

    Returns:
        Paths as text, numbers of numpy and of enumerations as Python's, arrays
        of objects as lists; tensors, numeric arrays and plain values themselves.
    """
    if isinstance(value, enum.Enum):
        return plain_values(value.value, keep_unknown=keep_unknown)
    if value is None or isinstance(value, (bool, torch.Tensor, torch.Size)):
        return value
    for kind in (int, float, str, bytes):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, np.generic):
        return plain_values(value.item(), keep_unknown=keep_unknown)
    if isinstance(value, np.ndarray):
        return value if value.dtype.kind in 'biufSU' else plain_values(value.tolist(), keep_unknown=keep_unknown)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, OrderedDict) and hasattr(value, '_metadata'):
        return value  # the state of a module
    if isinstance(value, Mapping):
        kind = OrderedDict if isinstance(value, OrderedDict) else dict
        return kind(
            (plain_values(key, keep_unknown=keep_unknown), plain_values(item, keep_unknown=keep_unknown))
            for key, item in value.items()
        )
    for kinds, kind in ((tuple, tuple), ((set, frozenset), set), (Sequence, list)):
        if isinstance(value, kinds):
            return kind(plain_values(item, keep_unknown=keep_unknown) for item in value)
    return value if keep_unknown else str(value)


@HOOKS.register_module()
class StudentCheckpointHook(Hook):
    """Saves the student as plain mmseg or mmdet would, and resumes exactly.

    ``state_dict`` and ``ema_state_dict`` have the student's keys already (the
    distiller sees to that); ``meta['cfg']`` becomes the student's own config, which
    needs this package only where the student does.
    Connectors, critics and the teacher's provenance lie under the key
    ``mmstructkd`` of the same file, with what else an exact continuation needs:

    - the random streams of every process, and of each of its data workers as
      they were behind the last batch that was used;
    - how far the data had come, within an epoch too. A resumed run takes the
      next batch at once: nothing is loaded again, except where a step of the
      pipeline remembers images (``CachedMosaic``);
    - gradients accumulated so far, where a window of ``accumulative_counts``
      is open (one process; with several mmengine says that they are lost).

    Validation leaves the random streams as it found them, and what is saved
    inside it (``save_best``) holds those from before. What ``EarlyStoppingHook``
    has counted is kept, which mmengine forgets.

    A run resumed with other numbers of processes, workers or images a batch
    goes on behind as many batches as before, with the random streams that its
    seed gives, and says so.
    """

    priority = 'NORMAL'

    def __init__(self) -> None:
        self._meta_config: str | None = None
        # Inside a validation: the random streams from before it, and its scores once they are known.
        self._before_val: dict[str, Any] | None = None
        self._scores: dict[str, Any] | None = None
        self._validated: int | None = None
        self._gathered: list[dict[str, Any]] | None = None
        # What a resumed run still has to put in place.
        self._saved: dict[str, Any] | None = None
        self._own: dict[str, Any] | None = None
        self._restore_at_epoch = False
        # The epoch that is running, and the iteration with which it began.
        self._epoch, self._epoch_begin = 0, 0

    @staticmethod
    def _model(runner: Runner) -> Any:
        """The distiller, unwrapped."""
        return runner.model.module if is_model_wrapper(runner.model) else runner.model

    # --- saving

    def before_checkpoint(self, runner: Runner) -> None:
        """Collect what each process has drawn; called in all of them, before the first one writes.

        Args:
            runner: the runner.
        """
        own = self._streams(runner)
        self._gathered = all_gather_object(own) if get_world_size() > 1 else [own]

    def _streams(self, runner: Runner) -> dict[str, Any]:
        """The random streams of this process and its workers."""
        if self._own is not None:
            return self._own
        follower = getattr(runner.train_dataloader, 'follower', None)
        return {
            'random': random_states() if self._before_val is None else self._before_val,
            'workers': [] if follower is None else follower.workers,
            'turn': 0 if follower is None else follower.turn,
            'restarted': False if follower is None else follower.restarted,
        }

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put what training needs beside the student.

        Args:
            runner: the runner.
            checkpoint: what is about to be written.
        """
        if self._meta_config is None:
            self._meta_config = plain_config(runner.cfg).pretty_text
        information = (checkpoint.get('message_hub') or {}).get('runtime_info') or {}
        if 'cfg' in information:  # mmengine's inferencers look here first
            information['cfg'] = self._meta_config
        meta = checkpoint['meta']
        if self._before_val is not None:
            # FlexibleRunner counts the iteration that is over once more.
            meta.update(epoch=runner.epoch, iter=runner.iter)
        state = self._model(runner).training_state()
        processes = self._gathered or [self._streams(runner)]
        checkpoint['meta'] = plain_values({**meta, 'cfg': self._meta_config})
        checkpoint[KEY] = {
            **{key: value if key == 'terms' else plain_values(value) for key, value in state.items()},
            'config': meta['cfg'],
            'random': processes[0]['random'],
            'processes': processes,
            'data': {**_loading(runner.train_dataloader), 'batches': self._batches(runner, meta)},
            'validation': {
                'done': self._scores is not None or self._validated == meta['iter'],
                # EarlyStoppingHook runs behind CheckpointHook: what is saved in between has not been counted.
                'uncounted': plain_values(self._scores),
                'counts': [[hook.wait_count, plain_values(hook.best_score)] for hook in _stoppers(runner)],
            },
        }
        if 'optimizer' in checkpoint:
            gradients = self._accumulated(runner)
            if gradients:
                checkpoint[KEY]['gradients'] = gradients
        for key in ('message_hub', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = plain_values(checkpoint[key], keep_unknown=True)
        for part in _groups(checkpoint.get('optimizer', {})):
            part['param_groups'] = plain_values(part['param_groups'], keep_unknown=True)

    def _batches(self, runner: Runner, meta: Mapping[str, Any]) -> int:
        """How many batches of the pass through the data are behind a checkpoint."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            return meta['iter'] - self._epoch_begin if meta['epoch'] == self._epoch else 0
        return meta['iter']

    def _accumulated(self, runner: Runner) -> dict[str, torch.Tensor]:
        """The gradients of an open window of accumulation."""
        wrapper = runner.optim_wrapper
        if getattr(wrapper, '_accumulative_counts', 1) == 1 or wrapper.should_update() or get_world_size() > 1:
            return {}
        parameters = self._model(runner).named_parameters()
        return {name: p.grad.detach().cpu() for name, p in parameters if p.grad is not None}

    # --- resuming

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Restore it where the run is resumed.

        Args:
            runner: the runner.
            checkpoint: what was read.
        """
        if not runner._resume:
            return
        if 'optimizer' not in checkpoint:
            runner.logger.warning(
                'The resumed checkpoint holds no state of the optimiser (the best one is saved without): momentum and '
                'schedules start anew.'
            )
        if KEY not in checkpoint:
            runner.logger.warning(
                'The resumed checkpoint is of a plain run: connectors and critics start anew. '
                'load_from= starts a distilled run from a plain student.'
            )
            return
        self._saved = checkpoint[KEY]
        self._model(runner).load_training_state(self._saved)
        gradients = self._saved.get('gradients')
        if gradients and get_world_size() == 1:
            for name, parameter in self._model(runner).named_parameters():
                if name in gradients:
                    parameter.grad = gradients[name].to(parameter.device, copy=True)
            runner.optim_wrapper.gradients_kept = True

    def before_train(self, runner: Runner) -> None:
        """See that nothing is frozen that has no weights yet; let the data go on where they stopped.

        Args:
            runner: the runner.

        Raises:
            ConfigError: see :meth:`mmstructkd.models.ResidualBackbone.check_weights`.
        """
        for module in self._model(runner).student.modules():
            if hasattr(module, 'check_weights'):
                module.check_weights()
        self._carry(runner)
        self._epoch, self._epoch_begin = runner.epoch, runner.iter
        if self._saved is None:
            return
        saved, self._saved = self._saved, None
        loop, loader = runner.train_loop, runner.train_dataloader
        self._take_streams(runner, saved)
        data = saved.get('data', {})
        self._count_scores(runner, saved.get('validation', {}))
        reseed_workers(loader, runner.seed)
        _set_seed(loader, data.get('seed'))
        by_iter = isinstance(loop, IterBasedTrainLoop)
        batches = data.get('batches', loop.iter if by_iter else 0)
        self._epoch_begin -= batches
        # A file of before these were kept tells the streams of the process alone.
        placed = hasattr(loader, 'continue_at') and ('data' in saved or not loader.num_workers)
        if getattr(loop, 'fast_forward_on_resume', False) or not isinstance(
            loop, (EpochBasedTrainLoop, IterBasedTrainLoop)
        ):
            self._restore_at_epoch = True
        elif by_iter and (not placed or _remembers(loader.dataset)):
            advance_training_data(loop, lambda iterator: self._reload(runner, iterator, batches))
        elif by_iter:
            loader.continue_at(self._point(loader, batches, next_pass=_next_pass(loop), arrived=self._arrive))
            advance_training_data(loop, lambda iterator: None)
        else:
            self._enter_epoch(runner, batches if placed else 0)
            if _remembers(loader.dataset) or (batches and not placed):
                runner.logger.warning(
                    'The data of the resumed run cannot go on exactly: a step of the pipeline keeps images of before, '
                    'or the dataloader is of a kind of its own.'
                )

    def _carry(self, runner: Runner) -> None:
        """Let a new run begin with the connectors and critics of the one before."""
        model = self._model(runner)
        if model.training_state_from is None or runner.iter > 0:
            return
        taken = model.carry_training_state(runner.cfg)
        runner.logger.info(
            f'{model.training_state_from}: what it trained of {", ".join(taken) or "no term"} is taken over.'
        )

    @staticmethod
    def _count_scores(runner: Runner, saved: dict[str, Any]) -> None:
        """Let hooks that stop a training know of the scores so far; mmengine does not save them."""
        for hook, (waited, best) in zip(_stoppers(runner), saved.get('counts', ()), strict=False):
            hook.wait_count, hook.best_score = waited, best
            if saved['uncounted'] is not None:
                hook.after_val_epoch(runner, saved['uncounted'])

    def _take_streams(self, runner: Runner, saved: dict[str, Any]) -> None:
        """Find what this process had drawn, and say so where there is no such process."""
        processes = saved.get('processes') or [{'random': saved['random'], 'workers': []}]
        before, now = saved.get('data', {}), _loading(runner.train_dataloader)
        changed = [
            f'{name} {before[name]} -> {now[name]}' for name in SETTINGS if before.get(name, now[name]) != now[name]
        ]
        if len(processes) == get_world_size():
            self._own = processes[get_rank()]
        else:
            changed.insert(0, f'processes {len(processes)} -> {get_world_size()}')
        if changed:
            runner.logger.warning(
                f'The run is resumed with other settings ({", ".join(changed)}): it goes on behind as many batches as '
                'before, but not as it would have. Random streams without a counterpart begin as the seed gives them.'
            )

    def _point(self, loader: DataLoader, batches: int, **calls: Any) -> Point:
        """Where the loader goes on, with the workers of before where there are as many."""
        workers = (self._own or {}).get('workers', ())
        if not self._own or len(workers) != loader.num_workers:
            return Point(batches, **calls)
        return Point(batches, workers, self._own['turn'], self._own['restarted'], **calls)

    def _enter_epoch(self, runner: Runner, batches: int) -> None:
        """Begin an epoch where it was left, which may be at its beginning."""
        loop, loader = runner.train_loop, runner.train_dataloader
        if batches:
            run_iter = loop.run_iter
            # The loop counts what its dataloader gives.
            loop.run_iter = lambda idx, data_batch: run_iter(idx + batches, data_batch)
            loader.continue_at(self._point(loader, batches, arrived=self._arrive))
            return
        if getattr(loader, 'persistent_workers', False) and hasattr(loader, 'continue_at'):
            # Running workers begin an epoch without a random number, and the first of them makes its first batch.
            point = self._point(loader, 0, arrived=self._arrive)
            point.turn = 0
            loader.continue_at(point)
        else:
            self._restore_at_epoch = True

    def _reload(self, runner: Runner, iterator: Any, batches: int) -> None:
        """Load everything again, for what cannot be told otherwise."""
        runner.logger.info(f'Load {batches} batches again: what the next ones look like depends on them.')
        for _ in range(batches):
            next(iterator)
        self._arrive()

    def _arrive(self) -> None:
        """Give the random streams back, just before the next batch is loaded."""
        if self._own is not None:
            restore_random_states(self._own['random'])
        self._own = None
        self._restore_at_epoch = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Forget what was collected for the checkpoint of the iteration before.

        Args:
            runner: the runner.
            batch_idx: unused.
            data_batch: unused.
        """
        self._gathered = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Give the random streams back where an epoch begins with them.

        Args:
            runner: the runner.
        """
        if self._restore_at_epoch:
            self._arrive()
        if runner.epoch != self._epoch:
            self._epoch, self._epoch_begin = runner.epoch, runner.iter

    def after_train_epoch(self, runner: Runner) -> None:
        """Count batches from 0 again.

        Args:
            runner: the runner.
        """
        vars(runner.train_loop).pop('run_iter', None)

    # --- validation

    def before_val(self, runner: Runner) -> None:
        """Remember the random streams.

        Args:
            runner: the runner.
        """
        self._before_val = random_states()

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Note the scores, before a checkpoint is saved for them.

        Args:
            runner: the runner.
            metrics: the scores.
        """
        self._scores = dict(metrics or {})

    def after_val(self, runner: Runner) -> None:
        """Give them back: a run resumed from before a validation must not differ.

        Args:
            runner: the runner.
        """
        if self._before_val is not None:
            restore_random_states(self._before_val)
        self._before_val = self._scores = None
        self._validated = runner.iter


def _stoppers(runner: Runner) -> list[EarlyStoppingHook]:
    return [hook for hook in runner.hooks if isinstance(hook, EarlyStoppingHook)]


def _loading(loader: Any) -> dict[str, Any]:
    """The settings that decide which numbers a loader's workers draw."""
    size = getattr(loader, 'batch_size', None)
    return {
        'num_workers': getattr(loader, 'num_workers', 0),
        'batch_size': getattr(getattr(loader, 'batch_sampler', None), 'batch_size', None) if size is None else size,
        'seed': next((sampler.seed for sampler in _seeded_samplers(loader)), None),
    }


def _seeded_samplers(loader: Any) -> list[Any]:
    """The samplers of a loader that have a seed of their own."""
    batch_sampler = getattr(loader, 'batch_sampler', None)
    samplers = (getattr(loader, 'sampler', None), batch_sampler, getattr(batch_sampler, 'sampler', None))
    return [s for s in samplers if isinstance(getattr(s, 'seed', None), (int, np.integer))]


def _set_seed(loader: Any, seed: int | None) -> None:
    """Let a loader that was not iterated yet draw from another seed.

    mmengine builds it before it reads the checkpoint: without ``randomness.seed``
    the order of the data would be another one.
    """
    for sampler in _seeded_samplers(loader):
        if seed is not None:
            sampler.seed = int(seed)


def _groups(state: Any) -> list[dict]:
    """The parts of an optimiser's state that have parameter groups."""
    if not isinstance(state, dict):
        return []
    found = [state] if 'param_groups' in state else []
    return found + [part for value in state.get('parts', ()) for part in _groups(value)]


def _remembers(dataset: Any) -> bool:
    """Whether a step of a dataset's pipeline keeps images for later ones, as ``CachedMosaic`` does."""
    inner = [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]
    return _step_remembers(getattr(dataset, 'pipeline', None)) or any(
        _remembers(one) for one in inner if one is not None
    )


def _step_remembers(step: Any) -> bool:
    steps = step if isinstance(step, (list, tuple)) else getattr(step, 'transforms', ())
    return hasattr(step, 'results_cache') or any(map(_step_remembers, steps or ()))


def _next_pass(loop: IterBasedTrainLoop) -> Callable[[], None]:
    """What mmengine does where an iteration-based loop comes to the end of its data."""
    iterator, loader = loop.dataloader_iterator, loop.dataloader

    def begin() -> None:
        iterator._epoch += 1
        for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(iterator._epoch)
                return

    return begin
