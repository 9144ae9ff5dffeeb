r"""Distil a small segmentor on rendered scenes, from nothing to a table and a picture in minutes.

Trains a teacher, a student alone and a distilled student with ``tools/train.py``
and the configs of ``configs/scenes/``, as one would by hand. Writes into
``--out`` (default ``work_dirs/quickstart``):

- ``table.md``, ``results.json``: what is printed at the end, and the numbers behind it
- ``picture.png``: image, truth, teacher, student alone, distilled student
- ``distilled_student.pth``: the plain student, which mmseg loads with the student's config
- one folder with log and checkpoint per training

A training that finished with the same config, seed, teacher and code is not repeated;
``--fresh`` repeats all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import init_default_scope
from mmseg.registry import DATASETS
from torch import Tensor

from mmstructkd import compat
from mmstructkd.distillers.loading import build_network, file_hash, load_weights, student_config
from mmstructkd.visualization import side_by_side

ROOT = Path(__file__).resolve().parents[1]
OWNER = 'quickstart'
TEACHER, ALONE, DISTILLED = 'teacher', 'student alone', 'distilled student'
#: Configs of a task, in the order of the table.
CONFIGS = {
    'segmentation': {
        TEACHER: 'upernet_r18-w32_800_scenes-128x128.py',
        ALONE: 'upernet_r18-w8_300_scenes-128x128.py',
        DISTILLED: 'cwd_upernet_r18-w32_upernet_r18-w8_300_scenes-128x128.py',
    }
}
METRIC = 'mIoU'
ROWS = 4  # of the picture: the first scenes of the validation split, whatever they show
SECONDS_BETWEEN_LINES = 15  # where the progress cannot be drawn over


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        name: its row in the table.
        seed: of initial weights, data order and dropout.
        metric: mIoU on the validation scenes, in per cent.
        step_seconds: median seconds of a step.
        wall_seconds: of the whole process, start and validation included.
        cpu_seconds: the same in CPU time, all its processes together.
        checkpoint: its last one.
        key: hash of what went into it.
    """

    name: str
    seed: int
    metric: float
    step_seconds: float
    wall_seconds: float
    cpu_seconds: float
    checkpoint: str
    key: str


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Teacher, student alone and distilled student on rendered scenes.')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='students are trained once per seed')
    parser.add_argument('--task', default='segmentation', help='segmentation, the only one so far')
    parser.add_argument('--out', type=Path, default=ROOT / 'work_dirs' / 'quickstart', help='folder for all results')
    parser.add_argument('--fresh', action='store_true', help='train again what has been trained')
    args = parser.parse_args(argv)
    if args.task not in CONFIGS:
        parser.error(f'`--task` must be one of {sorted(CONFIGS)}, got {args.task!r}. The others are not there yet.')
    if min(args.seeds) < 0 or max(args.seeds) >= 2**32 or len(set(args.seeds)) < len(args.seeds):
        parser.error(f'`--seeds` must be different numbers from 0 to 2**32 - 1, got {args.seeds}.')
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'`--out` must be a folder, got {str(args.out)!r}, which is a file.')
    return args


# --- training ------------------------------------------------------------------------------------------------


class Progress:
    """One line per stage: drawn over in a terminal, repeated now and then in a log."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.live = sys.stdout.isatty()
        self.due = 0.0

    def show(self, state: str) -> None:
        """Show how far the stage is.

        Args:
            state: a few words.
        """
        if self.live:
            print(f'\r\033[K{self.stage}  {state}', end='', flush=True)
        elif time.monotonic() >= self.due:
            print(f'{self.stage}  {state}', flush=True)
            self.due = time.monotonic() + SECONDS_BETWEEN_LINES

    def close(self, state: str) -> None:
        """Show the outcome of the stage.

        Args:
            state: a few words.
        """
        print(('\r\033[K' if self.live else '') + f'{self.stage}  {state}', flush=True)


def read_scalars(folder: Path) -> list[dict[str, Any]]:
    """Return what a run of mmengine has logged so far; a line that is being written is left out."""
    entries = []
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            try:
                entries.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return entries


def training_key(config: Path, seed: int, teacher: Training | None) -> str:
    """Hash what a training depends on: config, seed, teacher, and the package that runs it."""
    digest = hashlib.sha256(Config.fromfile(config).pretty_text.encode())
    digest.update(f'{seed} {None if teacher is None else file_hash(teacher.checkpoint)} {torch.__version__}'.encode())
    for source in sorted((ROOT / 'mmstructkd').rglob('*.py')):
        if teacher is not None or source.parent.name in ('datasets', 'optim'):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def finished(folder: Path, key: str) -> Training | None:
    """Return the training that lies in a folder, if it is the one that is wanted."""
    try:
        training = Training(**json.loads((folder / 'done.json').read_text()))
    except (OSError, TypeError, json.JSONDecodeError):
        return None
    return training if training.key == key and Path(training.checkpoint).is_file() else None


def train(
    name: str, config: Path, folder: Path, *, seed: int, stage: str, fresh: bool, teacher: Training | None = None
) -> Training:
    """Run ``tools/train.py`` and show how far it is.

    Args:
        name: row in the table.
        config: path of the config.
        folder: for log and checkpoints; emptied first.
        seed: of the training.
        stage: how the stage is called in the progress.
        fresh: train although it is there already.
        teacher: who helps, for a distilling config.

    Returns:
        The finished training.

    Raises:
        SystemExit: it failed; the end of its log is shown.
    """
    key = training_key(config, seed, teacher)
    progress = Progress(stage)
    done = None if fresh else finished(folder, key)
    if done is not None:
        progress.close(f'is there already: {METRIC} {done.metric:.2f}')
        return done
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = [f'randomness.seed={seed}', 'default_hooks.logger.interval=20']
    if teacher is not None:
        options.append(f'model.teacher.checkpoint={teacher.checkpoint}')
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--work-dir', str(folder)]
    total = Config.fromfile(config).train_cfg.max_iters
    log = folder / 'output.log'
    begun, cpu_before = time.monotonic(), cpu_seconds()
    with log.open('w') as output:
        process = subprocess.Popen(
            [*command, '--cfg-options', *options], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            while process.poll() is None:
                progress.show(how_far(read_scalars(folder), total, time.monotonic() - begun))
                time.sleep(0.5)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-25:])
        progress.close('FAILED')
        raise SystemExit(f'{tail}\n{OWNER}: the training of the {name} failed (see above); its log: {log}')
    entries = read_scalars(folder)
    training = Training(
        name=name,
        seed=seed,
        metric=[entry[METRIC] for entry in entries if METRIC in entry][-1],
        step_seconds=statistics.median(entry['time'] for entry in entries if 'loss' in entry and 'time' in entry),
        wall_seconds=time.monotonic() - begun,
        cpu_seconds=cpu_seconds() - cpu_before,
        checkpoint=str(folder / f'iter_{total}.pth'),
        key=key,
    )
    (folder / 'done.json').write_text(json.dumps(asdict(training), indent=1))
    progress.close(f'{METRIC} {training.metric:.2f}, {training.wall_seconds:.0f} s')
    return training


def cpu_seconds() -> float:
    """CPU time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def how_far(entries: Sequence[dict[str, Any]], total: int, elapsed: float) -> str:
    """Put the state of a training into words."""
    steps = [entry for entry in entries if 'loss' in entry and 'iter' in entry]
    if not steps:
        return f'starting ({elapsed:.0f} s)'
    last = steps[-1]
    words = f'{last["iter"]:>4}/{total}  loss {last["loss"]:.3f}  {last["time"]:.3f} s a step'
    return f'{words}  {elapsed:.0f} s' if last['iter'] < total else f'{words}  validating ({elapsed:.0f} s)'


# --- measuring -----------------------------------------------------------------------------------------------


def load(config: Path, checkpoint: str | Path) -> BaseModel:
    """Build the plain network of a config and load its weights, every key matched."""
    cfg = student_config(Config.fromfile(config))
    network = build_network({'model': cfg.model, 'default_scope': cfg.default_scope}, OWNER)
    load_weights(network, str(checkpoint), owner=OWNER)
    return network.eval()


def complexity(network: BaseModel, size: tuple[int, int]) -> tuple[int, int]:
    """Count parameters, and multiply-adds for one image of ``size``."""
    found = get_model_complexity_info(network, input_shape=(3, *size), show_table=False, show_arch=False)
    return sum(p.numel() for p in network.parameters()), int(found['flops'])


def latency(networks: Sequence[BaseModel], size: tuple[int, int], *, repeats: int = 40) -> list[float]:
    """Median seconds of a forward pass for one image, float32, on the CPU.

    Args:
        networks: are measured in turns, so that a busy moment hits all alike.
        size: (h, w) of the image.
        repeats: passes per network, after three that do not count.

    Returns:
        Seconds, one for each network.
    """
    image = torch.zeros(1, 3, *size)
    times: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for _ in range(3 + repeats):
            for network, spent in zip(networks, times, strict=True):
                begun = time.perf_counter()
                network(image, mode='tensor')
                spent.append(time.perf_counter() - begun)
    return [statistics.median(spent[3:]) for spent in times]


def spread(values: Sequence[float]) -> str:
    """Write a mean, with the sample's standard deviation where there are several."""
    mean = f'{statistics.mean(values):.2f}'
    return mean if len(values) < 2 else f'{mean} ± {statistics.stdev(values):.2f}'


def make_table(trainings: Sequence[Training], sizes: dict[str, tuple[int, int]], seconds: dict[str, float]) -> str:
    """Lay the results out as Markdown.

    Args:
        trainings: all of them.
        sizes: parameters and multiply-adds of each row.
        seconds: latency of each row.

    Returns:
        The table, without a line break at its end.
    """
    rows = [('', METRIC, 'parameters', 'multiply-adds', 'latency', 'seconds a step')]
    for name in (TEACHER, ALONE, DISTILLED):
        own = [training for training in trainings if training.name == name]
        rows.append(
            (
                name,
                spread([training.metric for training in own]),
                f'{sizes[name][0] / 1e6:.3f} M',
                f'{sizes[name][1] / 1e9:.3f} G',
                f'{seconds[name] * 1e3:.1f} ms',
                f'{statistics.median(training.step_seconds for training in own):.3f}',
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |' for row in rows
    ]
    lines.insert(1, '| ' + ' | '.join('-' * width for width in widths) + ' |')
    return '\n'.join(lines)


def verdict(trainings: Sequence[Training]) -> str:
    """Say what the teacher's help was worth, seed by seed."""
    alone, distilled = (
        {training.seed: training.metric for training in trainings if training.name == name}
        for name in (ALONE, DISTILLED)
    )
    gains = [distilled[seed] - alone[seed] for seed in alone]
    words = f'The distilled student has {spread(gains)} points of {METRIC} more than the student alone'
    if len(gains) > 1:
        each = ', '.join(f'{gain:+.2f}' for gain in gains)
        return f'{words} (seed by seed: {each}).'
    return f'{words} (one seed; --seeds 0 1 2 shows how much of it is chance).'


# --- picture and checkpoint ----------------------------------------------------------------------------------


def predict(network: BaseModel, sample: dict[str, Any]) -> Tensor:
    """Label the pixels of one image, shape (H, W)."""
    with torch.inference_mode():
        result = network.test_step({'inputs': [sample['inputs']], 'data_samples': [sample['data_samples']]})
    return result[0].pred_sem_seg.data[0].cpu()


def draw(path: Path, cfg: Config, networks: dict[str, BaseModel], metrics: dict[str, float]) -> None:
    """Write the picture.

    Args:
        path: file to write.
        cfg: any of the configs, for the validation scenes.
        networks: by their row in the table.
        metrics: mIoU of each, for the titles.
    """
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    rows = []
    for index in range(ROWS):
        sample = dataset[index]
        image = sample['inputs'].permute(1, 2, 0).numpy()
        truth = sample['data_samples'].gt_sem_seg.data[0].numpy()
        rows.append([image, truth, *(predict(network, sample).numpy() for network in networks.values())])
    picture = side_by_side(
        rows,
        titles=['image', 'truth', *(f'{name}\n{METRIC} {metrics[name]:.1f}' for name in networks)],
        classes=dataset.metainfo['classes'],
        palette=dataset.metainfo['palette'],
        enlarge=2,
    )
    if not cv2.imwrite(str(path), picture):
        raise OSError(f'{OWNER}: cannot write {path}.')


def export(config: Path, training: Training, target: Path, log: Path) -> None:
    """Write the plain student with ``tools/export_student.py``, which verifies it.

    Args:
        config: the distilling config.
        training: the distilled training.
        target: the checkpoint to write.
        log: for what the tool prints.

    Raises:
        SystemExit: it failed.
    """
    tool = str(ROOT / 'tools' / 'export_student.py')
    command = [sys.executable, tool, str(config), training.checkpoint, '--out', str(target)]
    with log.open('w') as output:
        failed = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    if failed:
        raise SystemExit(f'{log.read_text(errors="replace")}\n{OWNER}: the export failed (see above); its log: {log}')


# --- all of it -----------------------------------------------------------------------------------------------


def train_all(args: argparse.Namespace, configs: dict[str, Path]) -> list[Training]:
    """Train the teacher once, and both students for each seed."""
    stages = 1 + 2 * len(args.seeds)
    width = max(len(name) for name in configs) + len(f', seed {max(args.seeds)}')

    def stage(name: str, number: int, seed: int | None) -> str:
        words = name if seed is None or len(args.seeds) == 1 else f'{name}, seed {seed}'
        return f'[{number}/{stages}] {words.ljust(width)}'

    def run(name: str, number: int, seed: int | None, **kwargs: Any) -> Training:
        folder = args.out / (name.replace(' ', '_') + ('' if seed is None else f'_seed{seed}'))
        how = dict(seed=seed or 0, stage=stage(name, number, seed), fresh=args.fresh)
        return train(name, configs[name], folder, **how, **kwargs)

    teacher = run(TEACHER, 1, None)
    trainings = [teacher]
    for index, seed in enumerate(args.seeds):
        trainings.append(run(ALONE, 2 + 2 * index, seed))
        trainings.append(run(DISTILLED, 3 + 2 * index, seed, teacher=teacher))
    return trainings


def report(args: argparse.Namespace, configs: dict[str, Path], trainings: Sequence[Training]) -> None:
    """Export, measure, draw, print."""
    out: Path = args.out
    first = {name: next(training for training in trainings if training.name == name) for name in configs}
    student = out / 'distilled_student.pth'
    export(configs[DISTILLED], first[DISTILLED], student, out / 'export.log')
    cfg = Config.fromfile(configs[ALONE])
    with contextlib.redirect_stdout(io.StringIO()):  # mmseg and mmdet print, while imported, what they do without
        init_default_scope(cfg.default_scope)
        networks = {
            TEACHER: load(configs[TEACHER], first[TEACHER].checkpoint),
            ALONE: load(configs[ALONE], first[ALONE].checkpoint),
            DISTILLED: load(configs[ALONE], student),  # the student's own config loads it
        }
        size = tuple(cfg.val_dataloader.dataset.size)
        sizes = {name: complexity(network, size) for name, network in networks.items()}
        seconds = dict(zip(networks, latency(list(networks.values()), size), strict=True))
        draw(out / 'picture.png', cfg, networks, {name: training.metric for name, training in first.items()})

    height, width = size
    text = '\n\n'.join(
        (
            make_table(trainings, sizes, seconds),
            f'mIoU: per cent, {cfg.val_dataloader.dataset.num_scenes} validation scenes'
            + ('' if len(args.seeds) < 2 else f', mean and standard deviation over seeds {args.seeds}')
            + f'. Multiply-adds and latency: one image of {height}x{width}; latency: median in float32 on the CPU, '
            f'{torch.get_num_threads()} thread(s). Seconds a step: training, batch '
            f"{cfg.train_dataloader.batch_size}; the distilled student's has the teacher in it.",
            verdict(trainings),
        )
    )
    (out / 'table.md').write_text(text + '\n')
    numbers = [
        {**asdict(training), 'latency_seconds': seconds[training.name], 'parameters': sizes[training.name][0]}
        | {'multiply_adds': sizes[training.name][1]}
        for training in trainings
    ]
    (out / 'results.json').write_text(json.dumps(numbers, indent=1) + '\n')
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
    configs = {name: ROOT / 'configs' / 'scenes' / file for name, file in CONFIGS[args.task].items()}
    print(f'Logs and checkpoints: {os.path.relpath(args.out)}', flush=True)
    try:
        trainings = train_all(args, configs)
        report(args, configs, trainings)
    except KeyboardInterrupt:
        print(f'\n{OWNER}: interrupted; what has finished is kept.', file=sys.stderr)
        return 130
    print(f'{"took".ljust(18)} {time.monotonic() - begun:.0f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
