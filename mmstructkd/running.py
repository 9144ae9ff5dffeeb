"""What ``tools/train.py`` and ``tools/test.py`` share: read a config, build its runner, end with one line."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from mmstructkd import compat
from mmstructkd.errors import CheckpointError, ConfigError, ShapeError, suggest
from mmstructkd.run_config import paths_as_text

__all__ = ['Overrides', 'build_runner', 'choose_work_dir', 'one_line_errors', 'prepare_cpu_distributed', 'read_config']

#: What ends a tool with one line: mistakes in a config, a file or the data, which a traceback does not explain.
EXPLAINED = (ConfigError, ShapeError, CheckpointError, FloatingPointError)
# What mm packages read of a config besides the arguments of a runner.
READ_TOO = {
    'activation_checkpointing',
    'trust_checkpoint',
    'auto_scale_lr',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'launcher',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with exit code 1 and one line where an error explains itself; others keep their traceback.

    Yields:
        Nothing.
    """
    try:
        yield
    except EXPLAINED as err:
        sys.exit(f'{type(err).__name__}: {err}')


class Overrides(DictAction):
    """mmengine's ``key=value`` action; something else is an error of usage instead of a traceback."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Read the pairs."""
        for text in values:
            key, equals, _ = text.partition('=')
            if not equals or not key:
                parser.error(f'{option_string} must be followed by key=value, got {text!r}')
        super().__call__(parser, namespace, values, option_string)


def read_config(path: str, overrides: dict[str, Any] | None, owner: str) -> Config:
    """Read a config with ``mmseg::`` or ``mmdet::`` bases on every line, and override some of its keys.

    Args:
        path: of the config.
        overrides: value by dotted key.
        owner: who asks, for the message.

    Returns:
        The config, with text in place of every ``pathlib.Path``.

    Raises:
        ConfigError: there is no such file, it cannot be read, or a key to be
            overridden cannot be, or is none that anything reads.
    """
    compat.install()
    file = Path(path)
    if not file.is_file():
        beside = [p.name for p in file.parent.glob('*.py')] if file.parent.is_dir() else []
        raise ConfigError(f'{owner}: `config` must be a file, got {path!r}. {suggest(file.name, beside)}'.rstrip())
    try:
        cfg = Config.fromfile(path)
    except Exception as err:
        # A config is a program: what goes wrong in it is the user's to mend, whatever it raises.
        raise ConfigError(
            f'{owner}: `config` must be a readable config, got {path!r} ({type(err).__name__}: {_first_line(err)}).'
        ) from err
    known = {*cfg, *inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters, *READ_TOO}
    for key in overrides or ():
        name = key.split('.')[0]
        if name not in known:
            raise ConfigError(
                f'{owner}: `--cfg-options` must name keys that the config has or a runner reads, got {key!r}. '
                f'{suggest(name, known)}'
            )
    try:
        cfg.merge_from_dict(overrides or {})
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as err:
        raise ConfigError(
            f'{owner}: `--cfg-options` must fit the config, got {overrides!r} ({_first_line(err)}).'
        ) from err
    return paths_as_text(cfg)


def _first_line(err: Exception) -> str:
    return (str(err).strip().splitlines() or [''])[0]


def choose_work_dir(cfg: Config, work_dir: str | None, config: str) -> None:
    """Set the folder of a run: the one asked for, the config's, or one named after the config.

    Args:
        cfg: changed in place.
        work_dir: the one asked for.
        config: path of the config.
    """
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs', Path(config).stem))


def build_runner(cfg: Config, launcher: str) -> Any:
    """Build the runner of a config, also for several processes without a GPU.

    Args:
        cfg: the config.
        launcher: see :func:`prepare_cpu_distributed`.

    Returns:
        A ``Runner``, or what ``runner_type`` names.

    Raises:
        ConfigError: ``runner_type`` names nothing.
    """
    cfg.launcher = launcher
    prepare_cpu_distributed(cfg, launcher)
    kind = cfg.get('runner_type')
    if kind is None:
        return Runner.from_cfg(cfg)
    if isinstance(kind, str) and RUNNERS.get(kind) is None:
        raise ConfigError(
            f'build_runner: `runner_type` must name a runner, got {kind!r}. '
            f'{suggest(kind, ["Runner", "FlexibleRunner"])}'
        )
    return RUNNERS.build(cfg)


def prepare_cpu_distributed(cfg: Config, launcher: str) -> None:
    """Make several processes without any accelerator work through Runner.

    mmengine selects a CUDA device while it starts the processes, and hands
    ``device_ids`` to ``DistributedDataParallel``, which a module on the CPU
    refuses. So the gloo group is made here, before the Runner, and the wrapper
    gets ``device_ids=None``; its other settings stay those of mmengine.
    Nothing happens with one process, or where there is an accelerator.

    Args:
        cfg: the config, changed in place.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Raises:
        ConfigError: the launcher is not ``'pytorch'``, or it did not set its
            environment variables.
    """
    if launcher == 'none' or get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise ConfigError(
            f"prepare_cpu_distributed: `launcher` must be 'pytorch' where there is no GPU, got {launcher!r}. "
            'Start the processes with torchrun.'
        )
    absent = [
        name for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ
    ]
    if absent:
        raise ConfigError(
            f"prepare_cpu_distributed: `launcher` 'pytorch' must come with {', '.join(absent)} in the environment, "
            'got none. Start with `torchrun --nproc_per_node=2 tools/train.py CONFIG --launcher pytorch`.'
        )
    if not is_distributed():
        torch.distributed.init_process_group('gloo')
    flexible = cfg.get('runner_type') == 'FlexibleRunner'
    settings = cfg.get('strategy') or {}
    wrapper = dict((settings.get('model_wrapper') if flexible else cfg.get('model_wrapper_cfg')) or {})
    if not wrapper:
        # What mmengine passes when it is given no config of the wrapper; DDP's own defaults differ.
        wrapper = {
            'type': 'MMDistributedDataParallel',
            'broadcast_buffers': False,
            'find_unused_parameters': cfg.get('find_unused_parameters', False),
        }
    wrapper.setdefault('device_ids', None)
    if flexible:
        cfg.strategy = {'type': 'DDPStrategy', **settings, 'model_wrapper': wrapper}
    else:
        cfg.model_wrapper_cfg = wrapper
