"""Test a checkpoint: of a distilled run, of a plain one, with either config.

The script ``mim test mmstructkd`` starts; it takes what mmseg's and mmdet's own
take. A distilling config is reduced to its student first, so no teacher is
needed here.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults
from mmengine.logging import print_log
from mmengine.registry import METRICS

from mmstructkd.checkpoints import local_checkpoint
from mmstructkd.distillers import student_config
from mmstructkd.errors import ConfigError
from mmstructkd.running import Overrides, build_runner, choose_work_dir, one_line_errors, read_config

OWNER = 'test.py'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Test a checkpoint with a config of mmseg or mmdet.')
    parser.add_argument('config', help='path of the config: the distilling one or the plain one')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint')
    parser.add_argument('--checkpoint', dest='checkpoint_option', help='checkpoint, as an option (mim passes it so)')
    parser.add_argument('--work-dir', help='folder for logs and metrics')
    parser.add_argument(
        '--out',
        help='FILE.pkl: all predictions, pickled, for offline evaluation; FOLDER (segmentation, depth): the '
        'predictions in the format of the benchmark',
    )
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for drawn predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds that --show shows an image (default: 2)')
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation: the config's tta_model and tta_pipeline"
    )
    parser.add_argument('--cfg-options', nargs='+', action=Overrides, help='overrides, key=value')
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


def is_detection(cfg: Config) -> bool:
    """Whether a plain config is mmdet's."""
    return 'mmdet' in (cfg.get('default_scope'), cfg.model.get('_scope_'))


def draw(cfg: Config, args: argparse.Namespace) -> None:
    """Draw predictions, as the host's own script does.

    Args:
        cfg: changed in place.
        args: the command line.

    Raises:
        ConfigError: there is no hook that draws, no visualizer, or no display.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    detection = is_detection(cfg)
    if hook is None:
        kind = 'DetVisualizationHook' if detection else 'SegVisualizationHook'
        raise ConfigError(
            f'{OWNER}: `--show` and `--show-dir` must find a hook that draws, got no default_hooks.visualization. '
            f"Add default_hooks=dict(visualization=dict(type='{kind}'))."
        )
    hook.draw = True
    if not detection:
        # mmseg of the openmmlab line draws every 50th batch only; the onedl line and mmdet draw all.
        hook.setdefault('interval', 1)
    if args.show:
        check_display()
        hook.show, hook.wait_time = True, args.wait_time
    if not args.show_dir:
        return
    if detection:
        hook.test_out_dir = args.show_dir
    elif cfg.get('visualizer') is None:
        raise ConfigError(
            f'{OWNER}: `--show-dir` must find a visualizer that writes, got none in the config. '
            "Add visualizer=dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])."
        )
    else:
        cfg.visualizer.save_dir = args.show_dir


def check_display() -> None:
    """Raise a readable error where no window can be opened.

    Raises:
        ConfigError: matplotlib has no backend that opens windows here.
    """
    try:
        figure = plt.figure()
        backend = plt.get_backend()
        window = figure.canvas.required_interactive_framework
        plt.close(figure)
    except Exception as err:
        # Each toolkit has exceptions of its own for this.
        backend, window = f'{type(err).__name__}: {err}', None
    if window is None:
        raise ConfigError(
            f'{OWNER}: `--show` must have a display, got none that matplotlib can use ({backend}). '
            'Write the pictures with --show-dir FOLDER instead.'
        )


def innermost(dataset: Any) -> Iterator[Any]:
    """Yield the configs of the datasets that have the pipelines, inside wrappers and lists of datasets."""
    inner = [dataset['dataset']] if 'dataset' in dataset else list(dataset.get('datasets', ()))
    if not inner:
        yield dataset
    for one in inner:
        yield from innermost(one)


def augment(cfg: Config) -> None:
    """Test with several augmentations of each image.

    Args:
        cfg: changed in place.

    Raises:
        ConfigError: a segmentor's config has no ``tta_model`` or no
            ``tta_pipeline``. mmdet has defaults for both.
    """
    datasets = list(innermost(cfg.test_dataloader.dataset))
    absent = [key for key in ('tta_model', 'tta_pipeline') if cfg.get(key) is None]
    if absent and not is_detection(cfg):
        raise ConfigError(
            f'{OWNER}: `--tta` must find tta_model and tta_pipeline in the config, got no {" and no ".join(absent)}. '
            "Add tta_model=dict(type='SegTTAModel') and a tta_pipeline that ends in TestTimeAug, as in mmseg's "
            'configs/_base_/datasets.'
        )
    for key in absent:
        print_log(
            f"There is no {key} in the config: mmdet's default is taken (the image and its mirror image).", level=30
        )
    if 'tta_model' in absent:
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
    if 'tta_pipeline' in absent:
        *steps, pack = copy.deepcopy(datasets[0].pipeline)
        # What the metric reads of an image must come with it, and how it was mirrored.
        keys = pack.get('meta_keys', ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))
        pack.meta_keys = tuple(dict.fromkeys((*keys, 'flip', 'flip_direction')))
        mirrored = dict(
            type='TestTimeAug',
            transforms=[
                [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)],
                [pack],
            ],
        )
        cfg.tta_pipeline = [*steps, mirrored]
    for dataset in datasets:
        dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**{**cfg.tta_model, 'module': cfg.model})


def write_folder(cfg: Config, folder: str) -> None:
    """Let the metrics write the predictions in the format of their benchmark.

    Args:
        cfg: changed in place.
        folder: where.

    Raises:
        ConfigError: the config is a detector's, whose predictions go to one file.
    """
    if is_detection(cfg):
        raise ConfigError(
            f'{OWNER}: `--out` must end in .pkl or .pickle for a detector, got {folder!r}. Metrics write the format of '
            'their benchmark themselves: --cfg-options test_evaluator.format_only=True '
            'test_evaluator.outfile_prefix=FOLDER/PREFIX.'
        )
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, (list, tuple)) else [cfg.test_evaluator]
    for metric in metrics:
        metric.output_dir, metric.keep_results = folder, True


def dump(runner: Any, cfg: Config, path: str) -> None:
    """Let a runner pickle all predictions.

    Args:
        runner: changed in place.
        cfg: its config.
        path: where.
    """
    metric = (
        METRICS.build(dict(type='mmdet.DumpDetResults', out_file_path=path)) if is_detection(cfg) else DumpResults(path)
    )
    runner.test_evaluator.metrics.append(metric)


def main() -> None:
    """Build the runner of the student and test."""
    args = parse_args()
    cfg = student_config(read_config(args.config, args.cfg_options, OWNER))
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    absent = [key for key in ('test_dataloader', 'test_evaluator', 'test_cfg') if cfg.get(key) is None]
    if absent:
        raise ConfigError(
            f'{OWNER}: `config` must say how to test, got no {", ".join(absent)}. '
            'Add e.g. test_dataloader=val_dataloader, test_evaluator=val_evaluator, test_cfg=dict(type="TestLoop").'
        )
    choose_work_dir(cfg, args.work_dir, args.config)
    cfg.load_from = args.checkpoint if '://' in args.checkpoint else local_checkpoint(args.checkpoint)
    cfg.resume = False
    pickled = args.out is not None and args.out.endswith(('.pkl', '.pickle'))
    if args.out is not None and not pickled:
        write_folder(cfg, args.out)
    if args.show or args.show_dir:
        draw(cfg, args)
    plain = cfg.copy()
    if args.tta:
        augment(cfg)
    runner = build_runner(cfg, args.launcher)
    if pickled:
        dump(runner, plain, args.out)
    runner.test()


if __name__ == '__main__':
    with one_line_errors():
        main()
