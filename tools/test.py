"""Test a checkpoint: of a distilled run, of a plain one, with either config.

The script ``mim test mmstructkd`` starts. A distilling config is reduced to its
student first, so no teacher is needed here.
"""

from __future__ import annotations

import argparse
import os
import os.path as osp

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmstructkd import compat
from mmstructkd.distillers import student_config


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Test a checkpoint with a config of mmseg or mmdet.')
    parser.add_argument('config', help='path of the config: the distilling one or the plain one')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint')
    parser.add_argument('--checkpoint', dest='checkpoint_option', help='checkpoint, as an option (mim passes it so)')
    parser.add_argument('--work-dir', help='folder for logs and metrics')
    parser.add_argument('--out', help='folder for the predictions in the format of the benchmark, offline evaluation')
    parser.add_argument('--show-dir', help='folder for drawn predictions')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides, key=value')
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='read checkpoints that need more than weights; may run code'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    args.checkpoint = args.checkpoint or args.checkpoint_option
    if args.checkpoint is None:
        parser.error('a checkpoint is needed: test.py CONFIG CHECKPOINT')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def main() -> None:
    """Build the runner of the student and test."""
    args = parse_args()
    compat.install()
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    cfg = student_config(cfg)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs', osp.splitext(osp.basename(args.config))[0])
    cfg.load_from = args.checkpoint
    if args.show_dir is not None:
        cfg.default_hooks.visualization.draw = True
        cfg.visualizer.save_dir = args.show_dir
    if args.out is not None:
        cfg.test_evaluator.output_dir = args.out
        cfg.test_evaluator.keep_results = True
    compat.prepare_cpu_distributed(cfg, args.launcher)
    runner = Runner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    runner.test()


if __name__ == '__main__':
    main()
