"""Train any mmseg or mmdet config, distilled or plain.

The script ``mim train mmstructkd`` starts. It differs from mmseg's own in two
points: :mod:`mmstructkd.compat` runs before a config is read (``mmseg::`` bases
on every line, processes without a GPU), and ``--amp`` works on a CPU as well.
"""

from __future__ import annotations

import argparse
import os
import os.path as osp

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmstructkd import compat


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
        '--cfg-options',
        nargs='+',
        action=DictAction,
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
    """Replace the optimiser wrapper of ``cfg`` by its mixed-precision twin."""
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    if torch.cuda.is_available():
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise ValueError(f'train.py: `--amp` must replace an OptimWrapper, got {kind!r}. Set amp in the config.')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    else:
        cfg.optim_wrapper.type = 'mmstructkd.AutocastOptimWrapper'


def main() -> None:
    """Build the runner of a config and train."""
    args = parse_args()
    compat.install()
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    if args.amp:
        use_amp(cfg)
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    compat.prepare_cpu_distributed(cfg, args.launcher)
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    runner.train()


if __name__ == '__main__':
    main()
