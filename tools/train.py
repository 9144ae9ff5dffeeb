"""Train any mmseg or mmdet config, distilled or plain.

The script ``mim train mmstructkd`` starts. It takes what mmseg's and mmdet's
own take, and differs in this: :mod:`mmstructkd.compat` runs before a config is
read (``mmseg::`` bases on every line, processes without a GPU), ``--amp`` works
on a CPU as well, and mistakes end in one line.
"""

from __future__ import annotations

import argparse
import os

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from mmstructkd.errors import ConfigError, check_positive
from mmstructkd.resuming import checkpoint_to_resume
from mmstructkd.running import Overrides, build_runner, choose_work_dir, one_line_errors, read_config

OWNER = 'train.py'
# The optimiser wrappers that `--amp` knows how to replace, by the last part of their names.
REPLACEABLE = ('OptimWrapper', 'AmpOptimWrapper', 'AutocastOptimWrapper')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Train a config of mmseg or mmdet, distilled or plain.')
    parser.add_argument('config', help='path of the config')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG_NAME)')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from the latest checkpoint of the work-dir, or from the one given',
    )
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision (bf16 on a CPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale all learning rates, a critic's included, from auto_scale_lr.base_batch_size to the real batch size",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=Overrides,
        help='overrides, key=value, e.g. model.terms.pairwise.loss.loss_weight=5',
    )
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='read checkpoints that need more than weights; may run code'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torch.distributed.launch passes --local-rank or --local_rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def use_amp(cfg: Config) -> None:
    """Replace the optimiser wrapper of a config by its mixed-precision twin; its other settings stay.

    Args:
        cfg: changed in place.

    Raises:
        ConfigError: there is no optimiser wrapper, or one of another kind.
    """
    settings = cfg.get('optim_wrapper')
    if not isinstance(settings, dict) or 'optimizer' not in settings:
        raise ConfigError(
            f'{OWNER}: `--amp` must have an optim_wrapper with an optimizer to work on, got {settings!r}. '
            'Set mixed precision in the config.'
        )
    kind = settings.get('type', 'OptimWrapper')
    name = (kind if isinstance(kind, str) else kind.__name__).split('.')[-1]
    if name not in REPLACEABLE:
        raise ConfigError(
            f'{OWNER}: `--amp` must replace one of {REPLACEABLE}, got optim_wrapper.type={kind!r}. '
            'Set mixed precision in the config.'
        )
    if name == 'AutocastOptimWrapper' or (name == 'AmpOptimWrapper' and torch.cuda.is_available()):
        print_log(f'--amp changes nothing: the config has {name} already.', level=30)
        return
    if torch.cuda.is_available():
        settings['type'] = 'AmpOptimWrapper'
        settings.setdefault('loss_scale', 'dynamic')
        return
    settings['type'] = 'mmstructkd.AutocastOptimWrapper'
    # bf16 has float32's range: nothing is scaled.
    for key in ('loss_scale', 'use_fsdp'):
        settings.pop(key, None)
    dtype = settings.pop('dtype', None)
    if dtype not in (None, 'bfloat16', torch.bfloat16):
        print_log(f'--amp on a CPU trains with bfloat16, not with {dtype}.', level=30)


def scale_learning_rates(cfg: Config) -> None:
    """Let mmengine scale the learning rates linearly with the batch size, as mmdet's own script does.

    Args:
        cfg: changed in place.

    Raises:
        ConfigError: the config does not say for which batch size its rates are.
    """
    settings = cfg.get('auto_scale_lr')
    if not isinstance(settings, dict) or 'base_batch_size' not in settings:
        raise ConfigError(
            f'{OWNER}: `--auto-scale-lr` must find auto_scale_lr.base_batch_size in the config, got {settings!r}. '
            'Say for how many images a step its learning rates are: auto_scale_lr=dict(base_batch_size=16).'
        )
    check_positive(OWNER, 'auto_scale_lr.base_batch_size', settings['base_batch_size'])
    settings['enable'] = True


def set_resume(cfg: Config, resume: str | None) -> None:
    """Find the checkpoint to resume from, before anything is built.

    Args:
        cfg: changed in place: where there is no checkpoint yet, nothing is resumed.
        resume: ``'auto'``, a checkpoint, or ``None``: as the config says.

    Raises:
        CheckpointError: see :func:`mmstructkd.resuming.checkpoint_to_resume`.
    """
    if resume is not None:
        cfg.resume, cfg.load_from = True, None if resume == 'auto' else resume
    if cfg.get('resume') is not True:
        return
    found = checkpoint_to_resume(cfg.work_dir, cfg.get('load_from'))
    if found is None:
        print_log(f'There is no checkpoint in {cfg.work_dir!r} to resume from: the training begins.', level=30)
        cfg.resume = False


def main() -> None:
    """Build the runner of a config and train."""
    args = parse_args()
    cfg = read_config(args.config, args.cfg_options, OWNER)
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    choose_work_dir(cfg, args.work_dir, args.config)
    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        scale_learning_rates(cfg)
    set_resume(cfg, args.resume)
    build_runner(cfg, args.launcher).train()


if __name__ == '__main__':
    with one_line_errors():
        main()
