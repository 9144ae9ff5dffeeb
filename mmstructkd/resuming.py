"""Resuming a run exactly: from which checkpoint, and where its training data go on."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmstructkd.checkpoints import local_checkpoint
from mmstructkd.errors import CheckpointError
from mmstructkd.stream_states import track_loader

__all__ = ['advance_training_data', 'checkpoint_to_resume', 'prepare_to_resume', 'reseed_workers']


def checkpoint_to_resume(work_dir: str | os.PathLike, load_from: str | os.PathLike | None = None) -> str | None:
    """Return the checkpoint from which a run is resumed.

    mmengine opens whatever ``last_checkpoint`` says, an empty name included,
    and begins anew where that file is absent, over the checkpoints of before.

    Args:
        work_dir: folder of the run.
        load_from: the checkpoint that was asked for; ``None``: the latest of
            the folder.

    Returns:
        Its path or address; ``None`` where the folder has no checkpoint yet.

    Raises:
        CheckpointError: the file is not there; ``last_checkpoint`` is empty or
            names something else than a file; or it is absent beside checkpoints.
    """
    if load_from is not None:
        name = os.fspath(load_from)
        return name if '://' in name else local_checkpoint(name)
    folder = Path(work_dir)
    record = folder / 'last_checkpoint'
    there = sorted(
        (path for path in folder.glob('*.pth') if re.fullmatch(r'(iter|epoch)_\d+', path.stem)),
        key=lambda path: path.stat().st_mtime,
    )
    way_out = (
        f'The newest one there is {there[-1].name}: resume with --resume {there[-1]} (resume=True, load_from=...).'
        if there
        else 'There is none to resume from; without --resume the training begins anew.'
    )
    if not record.exists():
        if there:
            raise CheckpointError(
                f'checkpoint_to_resume: {str(folder)!r} must have a file `last_checkpoint`, '
                f'got checkpoints without it. {way_out} Another work-dir begins anew.'
            )
        return None
    try:
        name = record.read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError) as err:
        name, problem = '', f'one that cannot be read ({type(err).__name__})'
    else:
        problem = f'{name[:200]!r}, which is not there' if name else 'an empty one'
    # os.path, unlike pathlib, takes any text for a name.
    if os.path.isdir(name):  # noqa: PTH112
        problem = f'the folder {name!r}'
    elif name and ('://' in name or os.path.isfile(name)):  # noqa: PTH113
        return name
    raise CheckpointError(f'checkpoint_to_resume: {str(record)!r} must name a checkpoint, got {problem}. {way_out}')


def prepare_to_resume(runner: Any) -> None:
    """Let a run be resumed exactly: look for its checkpoint, and let the training data know where they stand.

    Args:
        runner: a runner that has built no loop yet. Where it is to resume the
            latest checkpoint and there is none yet, it begins anew and says so;
            mmengine says then that it resumed.

    Raises:
        CheckpointError: see :func:`checkpoint_to_resume`.
    """
    if runner._resume:
        asked = runner._resume if isinstance(runner._resume, str) else runner._load_from
        if checkpoint_to_resume(runner.work_dir, asked) is None:
            runner.logger.warning(f'There is no checkpoint in {runner.work_dir!r} to resume from: the training begins.')
            runner._resume = False
    build, deferred = runner.build_dataloader, bool(runner._resume)

    def build_dataloader(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        loader = build(dataloader, *args, **kwargs)
        return track_loader(loader, deferred=deferred) if dataloader is runner._train_dataloader else loader

    runner.build_dataloader = build_dataloader


class _Advanced:
    """The iterator of an ``IterBasedTrainLoop`` that is brought to its place in another way than mmengine's.

    Args:
        batches: mmengine's own iterator.
        steps: how many batches the loop leaves out.
        advance: gets ``batches`` and brings it there.
    """

    def __init__(self, batches: Any, steps: int, advance: Callable[[Any], None]) -> None:
        self._batches, self._advance = batches, advance
        # The onedl line calls `skip_iter`; the openmmlab line takes that many batches and drops them.
        self._left = 0 if hasattr(batches, 'skip_iter') else steps
        self._steps = self._left

    def __iter__(self) -> _Advanced:
        return self

    def __next__(self) -> Any:
        if not self._left:
            return next(self._batches)
        if self._left == self._steps:
            self._advance(self._batches)
        self._left -= 1
        return None

    def skip_iter(self, num_iters: int) -> None:
        """Bring it there, on the onedl line."""
        self._advance(self._batches)


def advance_training_data(loop: Any, advance: Callable[[Any], None]) -> None:
    """Go on with the data of a resumed iteration-based loop in another way than mmengine's.

    mmengine takes and drops all batches of before (openmmlab line), or leaves
    out their indices, so that workers draw other random numbers (onedl line).

    Args:
        loop: an ``IterBasedTrainLoop`` that was resumed and not run yet.
        advance: gets the iterator and brings it to where the run goes on.
    """
    loop.dataloader_iterator = _Advanced(loop.dataloader_iterator, loop.iter, advance)


def reseed_workers(loader: Any, seed: int | None) -> None:
    """Let the workers of a loader be seeded from another seed.

    mmengine builds the dataloader before it reads the checkpoint's seed.

    Args:
        loader: a ``DataLoader`` that mmengine built.
        seed: the runner's seed.
    """
    seeding = getattr(loader, 'worker_init_fn', None)
    if isinstance(seeding, functools.partial) and 'seed' in seeding.keywords and seed is not None:
        loader.worker_init_fn = functools.partial(seeding.func, *seeding.args, **{**seeding.keywords, 'seed': seed})
