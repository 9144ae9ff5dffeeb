"""Trainings in processes of their own: shown while they run, and not repeated once they have finished."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

import mmstructkd
from mmstructkd.evaluation.metrics import Metric
from mmstructkd.evaluation.scalars import last_values, read_scalars, step_seconds
from mmstructkd.files import write_whole
from mmstructkd.teachers.loading import file_hash

__all__ = ['Progress', 'Training', 'TrainingError', 'progress_text', 'train', 'training_key']

SECONDS_BETWEEN_LINES = 15  # where the progress cannot be drawn over
LAST_LINES = 25  # of the log of a training that failed
#: Folders of the package that a training without a teacher depends on.
PLAIN = ('datasets', 'models', 'optim')


class TrainingError(RuntimeError):
    """A training that failed, or gave no metric."""


@dataclass(frozen=True)
class Training:
    """A finished training.

    Attributes:
        name: what it is called.
        seed: of initial weights, data order and dropout.
        metrics: of the last validation, by the key of the log, in the unit that is shown.
        step_seconds: median seconds of a step.
        wall_seconds: of the whole process, start and validation included.
        cpu_seconds: the same in CPU time, all its processes together.
        checkpoint: its last one.
        key: hash of what went into it.
    """

    name: str
    seed: int
    metrics: dict[str, float]
    step_seconds: float
    wall_seconds: float
    cpu_seconds: float
    checkpoint: str
    key: str


class Progress:
    """One line per stage: drawn over in a terminal, repeated now and then in a log.

    Args:
        stage: how the line begins.
    """

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


def training_key(config: Path, seed: int, teacher: Training | None) -> str:
    """Hash what a training depends on: config, seed, teacher, and the parts of the package that run in it.

    Args:
        config: path of the config.
        seed: of the training.
        teacher: who helps, for a distilling config.

    Returns:
        SHA-256, hexadecimal.
    """
    digest = hashlib.sha256(Config.fromfile(config).pretty_text.encode())
    digest.update(f'{seed} {None if teacher is None else file_hash(teacher.checkpoint)} {torch.__version__}'.encode())
    for source in sorted(Path(mmstructkd.__file__).parent.rglob('*.py')):
        if teacher is not None or source.parent.name in PLAIN:
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _finished(folder: Path, key: str) -> Training | None:
    """Return the training that lies in a folder, if it is the one that is wanted."""
    try:
        training = Training(**json.loads((folder / 'done.json').read_text()))
    except (OSError, TypeError, json.JSONDecodeError):
        return None
    return training if training.key == key and Path(training.checkpoint).is_file() else None


def train(
    tool: Path,
    config: Path,
    folder: Path,
    *,
    name: str,
    metrics: Sequence[Metric],
    seed: int,
    stage: str,
    fresh: bool = False,
    teacher: Training | None = None,
) -> Training:
    """Run a training to its end and show how far it is, unless it has been run.

    Args:
        tool: path of ``tools/train.py``.
        config: path of the config.
        folder: for log and checkpoints; emptied first.
        name: what the training is called.
        metrics: taken from the last validation; the first one is shown.
        seed: of the training.
        stage: how its line of progress begins.
        fresh: train although it is there already.
        teacher: who helps, for a distilling config.

    Returns:
        The finished training.

    Raises:
        TrainingError: it failed, with the end of its log; or it logged no metric.
    """
    key = training_key(config, seed, teacher)
    progress = Progress(stage)
    done = None if fresh else _finished(folder, key)
    if done is not None:
        progress.close(f'is there already: {_outcome(done, metrics)}')
        return done
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = [f'randomness.seed={seed}', 'default_hooks.logger.interval=20']
    if teacher is not None:
        options.append(f'model.teacher.checkpoint={teacher.checkpoint}')
    command = [sys.executable, str(tool), str(config), '--work-dir', str(folder), '--cfg-options', *options]
    total = Config.fromfile(config).train_cfg.max_iters
    log = folder / 'output.log'
    begun, cpu_before = time.monotonic(), _cpu_seconds()
    with log.open('w') as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None:
                progress.show(progress_text(read_scalars(folder), total, time.monotonic() - begun))
                time.sleep(0.5)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-LAST_LINES:])
        progress.close('FAILED')
        raise TrainingError(f'{tail}\ntrain: the training of the {name} failed (see above); its log: {log}')
    entries = read_scalars(folder)
    training = Training(
        name=name,
        seed=seed,
        metrics=_shown(entries, metrics, log),
        step_seconds=step_seconds(entries) or float('nan'),
        wall_seconds=time.monotonic() - begun,
        cpu_seconds=_cpu_seconds() - cpu_before,
        checkpoint=str(folder / f'iter_{total}.pth'),
        key=key,
    )
    write_whole(folder / 'done.json', json.dumps(asdict(training), indent=1))
    progress.close(f'{_outcome(training, metrics)}, {training.wall_seconds:.0f} s')
    return training


def _outcome(training: Training, metrics: Sequence[Metric]) -> str:
    """Name the first metric and its value."""
    return f'{metrics[0].title} {metrics[0].text([training.metrics[metrics[0].key]])}'


def _shown(entries: Sequence[Mapping[str, Any]], metrics: Sequence[Metric], log: Path) -> dict[str, float]:
    """Take the metrics of the last validation, in the unit that is shown."""
    found = last_values(entries, [metric.key for metric in metrics])
    shown = {}
    for metric in metrics:
        value = found[metric.key]
        if value is None:
            value = metric.if_missing
        if value is None:
            raise TrainingError(f'train: the validation must log {metric.key!r}, got none. Its log: {log}')
        shown[metric.key] = value * metric.factor
    return shown


def _cpu_seconds() -> float:
    """CPU time of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def progress_text(entries: Sequence[Mapping[str, Any]], total: int, elapsed: float) -> str:
    """Put the state of a training into words.

    Args:
        entries: what it has logged.
        total: iterations.
        elapsed: seconds since it was started.

    Returns:
        A few words.
    """
    steps = [entry for entry in entries if 'loss' in entry and 'iter' in entry]
    if not steps:
        return f'starting ({elapsed:.0f} s)'
    last = steps[-1]
    words = f'{last["iter"]:>4}/{total}  loss {last["loss"]:.3f}  {last["time"]:.3f} s a step'
    return f'{words}  {elapsed:.0f} s' if last['iter'] < total else f'{words}  validating ({elapsed:.0f} s)'
