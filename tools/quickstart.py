r"""Distil a small network on rendered scenes, from nothing to a table and a picture in minutes.

Trains a teacher, a student alone and a distilled student with ``tools/train.py``
and the configs of ``configs/scenes/``, as one would by hand. Writes into
``--out`` (default ``work_dirs/quickstart``, for other tasks than segmentation
``work_dirs/quickstart_TASK``):

- ``table.md``, ``results.json``: what is printed at the end, and the numbers behind it
- ``picture.png``: image, truth, teacher, student alone, distilled student
- ``distilled_student.pth``: the plain student, which mmseg or mmdet loads with the student's config
- one folder with log and checkpoint per training

A training that finished with the same config, seed, teacher and code is not repeated;
``--fresh`` repeats all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, init_default_scope
from torch import nn

from mmstructkd import compat
from mmstructkd.evaluation.cost import latency, multiply_adds, parameter_count
from mmstructkd.evaluation.metrics import Metric
from mmstructkd.evaluation.tables import markdown_table
from mmstructkd.evaluation.training import Training, TrainingError, train
from mmstructkd.files import write_whole
from mmstructkd.teachers.loading import load_student
from mmstructkd.visualization import choose_looks, draw_samples

ROOT = Path(__file__).resolve().parents[1]
OWNER = 'quickstart'
TEACHER, ALONE, DISTILLED = 'teacher', 'student alone', 'distilled student'


@dataclass(frozen=True)
class Task:
    """What the quickstart does for a task.

    Attributes:
        configs: file in ``configs/scenes`` of each row of the table, in its order.
        metrics: what is shown; the first one decides.
        units: what the metrics are, in words.
        out: default folder for all results.
    """

    configs: dict[str, str]
    metrics: tuple[Metric, ...]
    units: str
    out: str

    @property
    def primary(self) -> Metric:
        """The metric that decides."""
        return self.metrics[0]


TASKS = {
    'segmentation': Task(
        configs={
            TEACHER: 'upernet_r18-w32_800_scenes-128x128.py',
            ALONE: 'upernet_r18-w8_300_scenes-128x128.py',
            DISTILLED: 'cwd_upernet_r18-w32_upernet_r18-w8_300_scenes-128x128.py',
        },
        metrics=(Metric('mIoU', 'mIoU'),),
        units='mIoU: per cent',
        out='quickstart',
    ),
    'depth': Task(
        configs={
            TEACHER: 'depth_r18-w32_500_scenes-128x128.py',
            ALONE: 'depth_r18-w8_300_scenes-128x128.py',
            DISTILLED: 'structkd_depth_r18-w32_depth_r18-w8_300_scenes-128x128.py',
        },
        metrics=(
            Metric('abs_rel', 'abs rel', digits=3, higher_is_better=False),
            Metric('rmse', 'RMSE', higher_is_better=False),
            Metric('d1', 'delta1', factor=100.0),
        ),
        units='abs rel: error as a share of the depth, lower is better; RMSE: metres, lower is better; '
        'delta1: per cent of pixels off by a factor below 1.25',
        out='quickstart_depth',
    ),
    'detection': Task(
        configs={
            TEACHER: 'gfl_r18-w32_500_scenes-128x128.py',
            ALONE: 'gfl_r18-w8_300_scenes-128x128.py',
            DISTILLED: 'structkd_gfl_r18-w32_gfl_r18-w8_300_scenes-128x128.py',
        },
        # CocoMetric logs nothing for a detector that finds nothing
        metrics=(
            Metric('coco/bbox_mAP', 'mAP', factor=100.0, if_missing=0.0),
            Metric('coco/bbox_mAP_50', 'mAP50', factor=100.0, if_missing=0.0),
        ),
        units="mAP: COCO's, per cent, the mean over overlaps from 0.5 to 0.95; mAP50: at 0.5",
        out='quickstart_detection',
    ),
}
ROWS = 4  # of the picture: the first scenes of the validation split, whatever they show


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Teacher, student alone and distilled student on rendered scenes.')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='students are trained once per seed')
    parser.add_argument('--task', default='segmentation', help=', '.join(TASKS))
    parser.add_argument('--out', type=Path, help='folder for all results')
    parser.add_argument('--fresh', action='store_true', help='train again what has been trained')
    args = parser.parse_args(argv)
    if args.task not in TASKS:
        parser.error(f'`--task` must be one of {sorted(TASKS)}, got {args.task!r}.')
    if args.out is None:
        args.out = ROOT / 'work_dirs' / TASKS[args.task].out
    if min(args.seeds) < 0 or max(args.seeds) >= 2**32 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f'`--seeds` must be different numbers from 0 to 2**32 - 1, got {args.seeds}.')
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'`--out` must be a folder, got {str(args.out)!r}, which is a file.')
    return args


# --- table ---------------------------------------------------------------------------------------------------


def make_table(
    task: Task, trainings: Sequence[Training], sizes: Mapping[str, tuple[int, int]], seconds: Mapping[str, float]
) -> str:
    """Lay the results out as Markdown.

    Args:
        task: whose metrics are shown.
        trainings: all of them.
        sizes: parameters and multiply-adds of each row.
        seconds: latency of each row.

    Returns:
        The table, without a line break at its end.
    """
    heads = [metric.title for metric in task.metrics]
    rows = [['', *heads, 'parameters', 'multiply-adds', 'latency', 'seconds a step']]
    for name in task.configs:
        own = [training for training in trainings if training.name == name]
        rows.append(
            [
                name,
                *(metric.text([training.metrics[metric.key] for training in own]) for metric in task.metrics),
                f'{sizes[name][0] / 1e6:.3f} M',
                f'{sizes[name][1] / 1e9:.3f} G',
                f'{seconds[name] * 1e3:.1f} ms',
                f'{statistics.median(training.step_seconds for training in own):.3f}',
            ]
        )
    return markdown_table(rows)


def verdict(task: Task, trainings: Sequence[Training]) -> str:
    """Say what the teacher's help was worth, seed by seed; a gain is an improvement, whatever the direction."""
    metric = task.primary
    alone, distilled = (
        {training.seed: training.metrics[metric.key] for training in trainings if training.name == name}
        for name in (ALONE, DISTILLED)
    )
    gains = [metric.gain(distilled[seed], alone[seed]) for seed in alone]
    if metric.higher_is_better:
        words = f'The distilled student has {metric.text(gains)} points of {metric.title} more than the student alone'
    else:
        words = f'The {metric.title} of the distilled student is lower than that of the student alone by '
        words += metric.text(gains)
    if len(gains) > 1:
        each = ', '.join(metric.text([gain], signed=True) for gain in gains)
        return f'{words} (seed by seed: {each}).'
    return f'{words} (one seed; --seeds 0 1 2 shows how much of it is chance).'


# --- picture and checkpoint ----------------------------------------------------------------------------------


def draw(path: Path, cfg: Config, networks: Mapping[str, nn.Module]) -> None:
    """Write the picture.

    Args:
        path: file to write.
        cfg: any of the configs, for the validation scenes.
        networks: by the title of their column.
    """
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    samples = [dataset[index] for index in range(ROWS)]
    looks = choose_looks(dataset.metainfo, samples, list(networks.values()))
    if not cv2.imwrite(str(path), draw_samples(samples, networks, looks)):
        raise OSError(f'{OWNER}: cannot write {path}.')


def export(config: Path, training: Training, target: Path, log: Path) -> None:
    """Write the plain student with ``tools/export_student.py``, which verifies it.

    Args:
        config: the distilling config.
        training: the distilled training.
        target: the checkpoint to write.
        log: for what the tool prints.

    Raises:
        TrainingError: it failed.
    """
    tool = str(ROOT / 'tools' / 'export_student.py')
    command = [sys.executable, tool, str(config), training.checkpoint, '--out', str(target)]
    with log.open('w') as output:
        failed = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if failed:
        raise TrainingError(
            f'{log.read_text(errors="replace")}\n{OWNER}: the export failed (see above); its log: {log}'
        )


# --- all of it -----------------------------------------------------------------------------------------------


def train_all(args: argparse.Namespace, task: Task, configs: Mapping[str, Path]) -> list[Training]:
    """Train the teacher once, and both students for each seed."""
    stages = 1 + 2 * len(args.seeds)
    width = max(len(name) for name in configs) + len(f', seed {max(args.seeds)}')

    def stage(name: str, number: int, seed: int | None) -> str:
        words = name if seed is None or len(args.seeds) == 1 else f'{name}, seed {seed}'
        return f'[{number}/{stages}] {words.ljust(width)}'

    def run(name: str, number: int, seed: int | None, **kwargs: Any) -> Training:
        folder = args.out / (name.replace(' ', '_') + ('' if seed is None else f'_seed{seed}'))
        how = dict(name=name, metrics=task.metrics, seed=seed or 0, stage=stage(name, number, seed), fresh=args.fresh)
        return train(ROOT / 'tools' / 'train.py', configs[name], folder, **how, **kwargs)

    teacher = run(TEACHER, 1, None)
    trainings = [teacher]
    for index, seed in enumerate(args.seeds):
        trainings.append(run(ALONE, 2 + 2 * index, seed))
        trainings.append(run(DISTILLED, 3 + 2 * index, seed, teacher=teacher))
    return trainings


def report(args: argparse.Namespace, task: Task, configs: Mapping[str, Path], trainings: Sequence[Training]) -> None:
    """Export, measure, draw, print."""
    out: Path = args.out
    first = {name: next(training for training in trainings if training.name == name) for name in configs}
    student = out / 'distilled_student.pth'
    export(configs[DISTILLED], first[DISTILLED], student, out / 'export.log')
    cfg = Config.fromfile(configs[ALONE])
    with contextlib.redirect_stdout(io.StringIO()):  # mmseg and mmdet print, while imported, what they do without
        init_default_scope(cfg.default_scope)
        sources = {TEACHER: first[TEACHER].checkpoint, ALONE: first[ALONE].checkpoint, DISTILLED: str(student)}
        networks = {
            # the student's own config loads the distilled one
            name: load_student(Config.fromfile(configs[ALONE if name == DISTILLED else name]), path, owner=OWNER)
            for name, path in sources.items()
        }
        size = tuple(cfg.val_dataloader.dataset.size)
        sizes = {name: (parameter_count(network), multiply_adds(network, size)) for name, network in networks.items()}
        seconds = dict(zip(networks, latency(list(networks.values()), size), strict=True))
        metric = task.primary
        titles = [f'{name}\n{metric.title} {metric.text([first[name].metrics[metric.key]])}' for name in networks]
        draw(out / 'picture.png', cfg, dict(zip(titles, networks.values(), strict=True)))

    height, width = size
    text = '\n\n'.join(
        (
            make_table(task, trainings, sizes, seconds),
            f'{task.units}; {cfg.val_dataloader.dataset.num_scenes} validation scenes'
            + ('' if len(args.seeds) < 2 else f', mean and standard deviation over seeds {args.seeds}')
            + f'. Multiply-adds and latency: one image of {height}x{width}; latency: median in float32 on the CPU, '
            f'{torch.get_num_threads()} thread(s). Seconds a step: training, batch '
            f"{cfg.train_dataloader.batch_size}; the distilled student's has the teacher in it.",
            verdict(task, trainings),
        )
    )
    write_whole(out / 'table.md', text + '\n')
    numbers = [
        {**asdict(training), 'latency_seconds': seconds[training.name], 'parameters': sizes[training.name][0]}
        | {'multiply_adds': sizes[training.name][1]}
        for training in trainings
    ]
    write_whole(out / 'results.json', json.dumps(numbers, indent=1) + '\n')
    print(f'\n{text}\n')
    for what, path in (('table', 'table.md'), ('picture', 'picture.png'), ('distilled student', student.name)):
        print(f'{what.ljust(18)} {os.path.relpath(out / path)}')
    print(f'{"its config".ljust(18)} {os.path.relpath(configs[ALONE])}')


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure and print.

    Args:
        argv: arguments; ``None``: the command line's.

    Returns:
        Exit code.
    """
    args = parse_args(argv)
    compat.install()
    MMLogger.get_instance(OWNER, logger_name='mmengine', log_level='ERROR')
    begun = time.monotonic()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    task = TASKS[args.task]
    configs = {name: ROOT / 'configs' / 'scenes' / file for name, file in task.configs.items()}
    print(f'Logs and checkpoints: {os.path.relpath(args.out)}', flush=True)
    try:
        trainings = train_all(args, task, configs)
        report(args, task, configs, trainings)
    except KeyboardInterrupt:
        print(f'\n{OWNER}: interrupted; what has finished is kept.', file=sys.stderr)
        return 130
    except TrainingError as err:
        print(err, file=sys.stderr)
        return 1
    print(f'{"took".ljust(18)} {time.monotonic() - begun:.0f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
