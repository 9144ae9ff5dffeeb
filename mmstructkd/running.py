"""What ``tools/train.py`` and ``tools/test.py`` share: read a config, build its runner, end with one line."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from mmstructkd import compat
from mmstructkd.errors import CheckpointError, ConfigError, ShapeError, suggest

__all__ = ['Overrides', 'build_runner', 'choose_work_dir', 'one_line_errors', 'read_config']

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
    return compat.paths_as_text(cfg)


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
        launcher: see :func:`mmstructkd.compat.prepare_cpu_distributed`.

    Returns:
        A ``Runner``, or what ``runner_type`` names.

    Raises:
        ConfigError: ``runner_type`` names nothing.
    """
    cfg.launcher = launcher
    compat.prepare_cpu_distributed(cfg, launcher)
    kind = cfg.get('runner_type')
    if kind is None:
        return Runner.from_cfg(cfg)
    if isinstance(kind, str) and RUNNERS.get(kind) is None:
        raise ConfigError(
            f'build_runner: `runner_type` must name a runner, got {kind!r}. '
            f'{suggest(kind, ["Runner", "FlexibleRunner"])}'
        )
    return RUNNERS.build(cfg)
