"""What a step costs with each kind of teacher: the configs of ``configs/teachers``, beside the student alone."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_measure import in_turn, seconds, spread
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from torch import nn

from mmstructkd.compat import without_pretrained
from mmstructkd.errors import ConfigError
from mmstructkd.optim import for_distiller
from mmstructkd.registry import MODELS
from mmstructkd.tasks.batches import synthetic_batch

__all__ = ['ALONE', 'known_kinds', 'measure']

FOLDER = Path(__file__).resolve().parents[1] / 'configs' / 'teachers'
ALONE = 'student alone'
#: What the file names of one task's students end with, and the student by itself.
TASKS = {
    'seg': ('_upernet-r18-w8_300_scenes-128x128', 'upernet_r18-w8_300_scenes-128x128.py'),
    'depth': ('_depth-r18-w8_300_scenes-128x128', 'depth_r18-w8_300_scenes-128x128.py'),
    'det': ('_gfl-r18-w8_300_scenes-128x128', 'gfl_r18-w8_300_scenes-128x128.py'),
}
#: Terms count in the middle of a training: each schedule has begun by then.
PROGRESS = (299, 300)


def known_kinds(task: str) -> list[str]:
    """Names of the configs of a task, without the student's part."""
    ending = TASKS[task][0]
    return sorted(path.stem.removesuffix(ending) for path in FOLDER.glob(f'*{ending}.py'))


def measure(
    task: str,
    kinds: Sequence[str],
    *,
    device: str,
    amp: bool,
    batch_size: int,
    size: tuple[int, int],
    rounds: int,
    warmup: int,
) -> dict[str, Any]:
    """Time a step with each kind in turn.

    A step is forward, backward and update, with the batches of streams; teachers are
    as their configs build them, with random weights where a checkpoint is named, since
    a step costs the same with any. Terms count as at the last step of the training.

    Args:
        task: ``'seg'``, ``'depth'`` or ``'det'``.
        kinds: names of configs, see :func:`known_kinds`.
        device: ``'cpu'`` or ``'cuda'``.
        amp: run under bf16 autocast.
        batch_size: number of images.
        size: (h, w) of the images.
        rounds: turns that count.
        warmup: turns before that do not.

    Returns:
        By kind the spread of the seconds and of their ratio to the student alone's of
        the same turn, and the parameters that train.
    """
    ending, alone = TASKS[task]
    paths = {ALONE: FOLDER.parent / 'scenes' / alone, **{kind: FOLDER / f'{kind}{ending}.py' for kind in kinds}}
    runs: dict[str, Callable[[], float]] = {}
    trained: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, path in paths.items():
            model = _build(Config.fromfile(path), Path(folder)).to(device)
            trained[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            runs[name] = _step(model, device=device, amp=amp, batch_size=batch_size, size=size)
            runs[name]()
            print(f'{task}: {name!r} built', flush=True)
        times = in_turn(runs, rounds=rounds, warmup=warmup, label=task)
    found = {}
    for name, taken in times.items():
        ratios = [took / base for took, base in zip(taken, times[ALONE], strict=True)]
        found[name] = dict(seconds=spread(taken), ratio=spread(ratios), parameters=trained[name])
    precision = 'amp' if amp else 'fp32'
    return dict(task=task, kinds=found, precision=precision, size=list(size), batch_size=batch_size)


def _build(cfg: Config, folder: Path) -> nn.Module:
    """Build what a config trains, with random weights in place of checkpoints."""
    init_default_scope(cfg.default_scope)
    model = cfg.model
    for teacher in (model.get('teachers') or {'': model.get('teacher') or {}}).values():
        if 'checkpoint' in teacher:
            teacher.update(checkpoint=None, allow_random=True)
        for stop in teacher.get('route', ()):
            stop['checkpoint'] = _random_weights(teacher['config'], folder)
    model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    with without_pretrained():
        built = MODELS.build(model)
        built.init_weights()
    return built.train()


def _random_weights(config: str, folder: Path) -> str:
    """A checkpoint of a network as it is initialised, for teachers that cannot do without."""
    path = folder / f'{Path(config).stem}.pth'
    if not path.exists():
        torch.save(MODELS.build(Config.fromfile(config).model).state_dict(), path)
    return str(path)


def _step(model: nn.Module, *, device: str, amp: bool, batch_size: int, size: tuple[int, int]) -> Callable[[], float]:
    """What runs a step of a network or a distiller and returns its seconds."""
    settings = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=1e-4, momentum=0.9))
    distils = hasattr(model, 'terms')
    wrapper = build_optim_wrapper(model, for_distiller(settings, model) if distils else settings)
    batch = synthetic_batch(model, size, batch_size)
    if distils:
        for number, name in enumerate(model.streams.reading):
            batch[name] = synthetic_batch(model, size, batch_size, seed=number + 1)
        model.set_progress(*PROGRESS)
        for term in model.terms.values():
            term.factor = term.schedule.factor(*PROGRESS)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16) if amp else contextlib.nullcontext():
            total, _ = model.parse_losses(model(**batch, mode='loss'))
        wrapper.update_params(total)
        if distils:
            model.teacher.after_step(model.student)

    return lambda: seconds(step, device)


def check_kinds(task: str, kinds: Sequence[str] | None) -> list[str]:
    """The kinds that were asked for; all where none was.

    Raises:
        ConfigError: one has no config of this task.
    """
    known = known_kinds(task)
    unknown = sorted(set(kinds or ()) - set(known))
    if unknown:
        raise ConfigError(f'benchmark: `--only` must name kinds of {known}, got {unknown}.')
    return list(kinds or known)


def rows(entry: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of one task: kind, trained parameters, seconds, ratio and its quartiles."""
    found = []
    for name, kind in entry['kinds'].items():
        over = kind['ratio']
        found.append(
            (
                name,
                f'{kind["parameters"] / 1e6:.2f} M',
                f'{kind["seconds"]["median"]:.3f} s',
                f'{over["median"]:.2f}',
                f'{over["low"]:.2f} to {over["high"]:.2f}',
            )
        )
    return found
