"""Train configs one after the other, each from the student that the one before has left.

For stages that need an optimiser or schedule of their own; where only terms, the
weight of the task or what is frozen change, ``stages=`` of one config does it in
one run. Each stage is a run of ``tools/train.py`` on a config as it stands: its
teacher, its checkpoint and its schedule are that config's own. Two things are
filled in, where the config does not say them itself:

- ``load_from``: the last checkpoint of the stage before;
- ``model.training_state_from``: the same, for connectors and critics of terms that
  both stages have, where both are distilled.

A config that says one of them keeps it, and that is printed. Stage k runs in
``WORK_DIR/k_NAME``. Called again, finished stages are left alone and a stage that
was stopped is resumed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from mmstructkd.checkpoints import ON_COMMAND_LINE, read_checkpoint, trusts
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.hooks.student_checkpoint import KEY
from mmstructkd.resuming import checkpoint_to_resume
from mmstructkd.running import one_line_errors, read_config
from mmstructkd.teachers.loading import student_config

ROOT = Path(__file__).resolve().parents[1]
OWNER = 'train_stages'


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Train configs one after the other, each from the student before.')
    parser.add_argument('configs', nargs='+', help='configs of the stages, in their order')
    parser.add_argument('--work-dir', default='work_dirs/stages', help='folder of all stages (default: %(default)s)')
    parser.add_argument('--amp', action='store_true', help='as for tools/train.py, in each stage')
    parser.add_argument('--trust-checkpoint', action='store_true', help='as for tools/train.py, in each stage')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, help='overrides of each stage, key=value', default=None
    )
    args = parser.parse_args(argv)
    args.overrides = _given(sys.argv[1:] if argv is None else argv)
    return args


def _given(argv: Sequence[str]) -> list[str]:
    """The overrides as they were written."""
    if '--cfg-options' not in argv:
        return []
    rest = list(argv)[list(argv).index('--cfg-options') + 1 :]
    return rest[: next((place for place, text in enumerate(rest) if text.startswith('--')), len(rest))]


def length_of(cfg: Config) -> int:
    """Iterations or epochs of a training, whichever its loop counts."""
    train = cfg.get('train_cfg') or {}
    length = train.get('max_iters') or train.get('max_epochs')
    if not length:
        raise ConfigError(f'{OWNER}: `train_cfg` must say max_iters or max_epochs, got {dict(train)}.')
    return int(length)


def is_finished(content: Mapping[str, Any], cfg: Config) -> bool:
    """Whether a checkpoint is the last one of a config's training."""
    by_epoch = not (cfg.train_cfg.get('max_iters'))
    return int(content['meta']['epoch' if by_epoch else 'iter']) >= length_of(cfg)


def additions(cfg: Config, previous: str | None, state: Mapping[str, Any]) -> list[str]:
    """What a stage is told beside its config.

    Args:
        cfg: its config.
        previous: the last checkpoint of the stage before; ``None``: there is no such stage.
        state: what that file holds.

    Returns:
        Overrides, ``key=value``.
    """
    if previous is None:
        return []
    found = []
    if cfg.get('load_from') is None:
        found.append(f'load_from={previous}')
    else:
        print(f'{OWNER}: the config says load_from={cfg.load_from!r} itself, which is kept.')
    if KEY not in state or student_config(cfg) is cfg:
        return found
    if cfg.model.get('training_state_from') is None:
        found.append(f'model.training_state_from={previous}')
    else:
        print(f'{OWNER}: the config says training_state_from={cfg.model.training_state_from!r} itself, which is kept.')
    return found


def train(args: argparse.Namespace) -> list[str]:
    """Run the stages.

    Args:
        args: the command line.

    Returns:
        The last checkpoint of each.

    Raises:
        ConfigError: a config cannot be read; all are, before the first is trained.
        CheckpointError: a stage has left no checkpoint of its end.
        CalledProcessError: a stage has failed.
    """
    configs = [read_config(path, args.cfg_options, OWNER) for path in args.configs]
    for cfg in configs:
        length_of(cfg)
    flags = [flag for flag in ('amp', 'trust_checkpoint') if getattr(args, flag)]
    files: list[str] = []
    state: Mapping[str, Any] = {}
    for number, (path, cfg) in enumerate(zip(args.configs, configs, strict=True), start=1):
        folder = Path(args.work_dir, f'{number}_{Path(path).stem}')
        trust = trusts(cfg, args.trust_checkpoint)
        there = checkpoint_to_resume(folder) if folder.is_dir() else None
        content = None if there is None else read_checkpoint(there, trust=trust, how=ON_COMMAND_LINE)
        if there is None or content is None or not is_finished(content, cfg):
            command = [sys.executable, str(ROOT / 'tools' / 'train.py'), path, '--work-dir', str(folder)]
            command += [f'--{flag.replace("_", "-")}' for flag in flags] + (['--resume', there] if there else [])
            # What is resumed has begun from there already.
            options = args.overrides + (additions(cfg, files[-1] if files else None, state) if there is None else [])
            command += ['--cfg-options', *options] if options else []
            print(f'{OWNER}: stage {number} of {len(configs)}: {path}', flush=True)
            subprocess.run(command, check=True)
            there = checkpoint_to_resume(folder)
            content = {} if there is None else read_checkpoint(there, trust=trust, how=ON_COMMAND_LINE)
        if there is None or not content or not is_finished(content, cfg):
            raise CheckpointError(
                f'{OWNER}: stage {number} must leave a checkpoint of its end in {str(folder)!r}, got '
                f'{there or "none"}. Set the interval of its CheckpointHook.'
            )
        files.append(str(there))
        state = content
    print(f'{OWNER}: all {len(files)} stages are done, the last in {files[-1]}')
    return files


def main() -> None:
    """Train."""
    try:
        train(parse_args())
    except subprocess.CalledProcessError as err:
        sys.exit(err.returncode)  # it has said itself what went wrong


if __name__ == '__main__':
    with one_line_errors():
        main()
