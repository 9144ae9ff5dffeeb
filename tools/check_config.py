"""Check a distilling config before training: taps, shapes, losses, gradients, cost.

Builds the config as training does and runs it on one batch; no parameter is
updated and nothing is written. The exit code is 0 if all is well. A mistake in
the config ends it with one line and exit code 1; so do the problems it finds
(a loss that is not finite, a term that no gradient leaves), below the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmstructkd import compat
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.distillers.preflight import (
    CostReport,
    Trial,
    build_distiller,
    measure_cost,
    peak_factor,
    try_batch,
)
from mmstructkd.errors import CheckpointError, ConfigError, ShapeError, TapError
from mmstructkd.tasks.batches import input_size, needs_of, real_batch, synthetic_batch, training_info
from mmstructkd.tasks.scales import scale_notes

PLAIN_WIDTH = 180  # of the tables in a file or a pipe: wide enough for the taps of a pyramid


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Check a distilling config on one batch, before training.')
    parser.add_argument('config', help='path of the config')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides, key=value')
    parser.add_argument('--device', choices=['cpu', 'cuda'], help='where to run (default: cuda where there is one)')
    parser.add_argument('--synthetic', action='store_true', help='a batch of noise, where the data are not at hand')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), help='size of the synthetic images')
    parser.add_argument('--batch-size', type=int, help="images in the batch (default: the config's)")
    parser.add_argument('--runs', type=int, default=3, help='runs behind each median time; 0 measures no cost')
    parser.add_argument(
        '--random-init', action='store_true', help='do not load (and download) what the student would start from'
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='read what the student starts from (load_from, init_cfg) though it needs more than weights; may run code',
    )
    args = parser.parse_args(argv)
    if args.size is not None and not args.synthetic:
        parser.error('--size is for --synthetic: real images have the size that the pipeline gives them')
    for name in ('size', 'batch_size'):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f'--{name.replace("_", "-")} must be above 0')
    if args.runs < 0:
        parser.error('--runs must be 0 or more')
    return args


def check(args: argparse.Namespace, console: Console) -> bool:
    """Build, try, measure and print.

    Args:
        args: the command line.
        console: where to print.

    Returns:
        Whether all is well.
    """
    compat.install()
    MMLogger.get_instance('check_config', logger_name='mmengine', log_level='WARNING')
    try:
        cfg = Config.fromfile(args.config)
    except OSError as err:
        raise ConfigError(f'check_config: `config` must be a readable config, got {args.config!r} ({err}).') from err
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.trust_checkpoint:
        cfg.trust_checkpoint = True
    device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if device == 'cuda' and not torch.cuda.is_available():
        raise ConfigError("check_config: `--device` must be one that this machine has, got 'cuda'. Use cpu.")

    distiller = build_distiller(cfg, random_init=args.random_init).to(device)
    if args.synthetic:
        size = tuple(args.size) if args.size else input_size(cfg, distiller)
        if args.size and getattr(distiller.data_preprocessor, 'size', None) is not None:
            distiller.data_preprocessor.size = size  # which it would pad to otherwise
        images = args.batch_size or (cfg.get('train_dataloader') or {}).get('batch_size') or 2
        batch = synthetic_batch(distiller, size, images, needs=needs_of(distiller.student, cfg))
    else:
        batch = real_batch(cfg, distiller, batch_size=args.batch_size)
    factors = {name: peak_factor(term, cfg) for name, term in distiller.terms.items()}
    for name, term in distiller.terms.items():
        term.factor = factors[name][1]

    with training_info(cfg):
        trial = try_batch(distiller, batch, factors)
        cost = measure_cost(distiller, batch, runs=args.runs) if args.runs else None
    print_head(console, args, distiller, trial, device)
    print_taps(console, trial)
    print_losses(console, trial)
    print_parameters(console, trial)
    if cost is not None:
        print_cost(console, cost)
    for note in (*trial.notes, *scale_notes(cfg, distiller.student_scale)):
        say(console, f'note  {note}')
    for problem in trial.problems:
        say(console, f'PROBLEM  {problem}')
    say(console, 'All is well.' if not trial.problems else f'{len(trial.problems)} problem(s), see above.')
    return not trial.problems


# --- printing ------------------------------------------------------------------------------------------------


def say(console: Console, text: str = '') -> None:
    """Print a line as it is: a tap's brackets are no markup."""
    console.print(Text(text), soft_wrap=True)


def table(
    console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[str] = ()
) -> None:
    """Print a table; the columns in ``numbers`` are aligned to the right."""
    say(console, title)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        grid.add_column(Text(column), justify='right' if column in numbers else 'left', overflow='fold')
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    console.print(grid)
    say(console)


def shape(sizes: Sequence[int]) -> str:
    """Write a shape as 2x64x32x32."""
    return 'x'.join(map(str, sizes))


def stride(value: tuple[float, float] | None) -> str:
    """Write a stride, once where it is the same both ways."""
    if value is None:
        return '-'
    return f'{value[0]:.3g}' if value[0] == value[1] else f'{value[0]:.3g}x{value[1]:.3g}'


def number(value: float | None, form: str = '.4g') -> str:
    """Write a number, or - for none."""
    return '-' if value is None else format(value, form)


def mebibytes(value: int | None) -> str:
    """Write bytes in MiB."""
    return '-' if value is None else f'{value / 2**20:.1f} MiB'


def print_head(
    console: Console, args: argparse.Namespace, distiller: StructuredDistiller, trial: Trial, device: str
) -> None:
    """Print what is checked."""
    origin = distiller.teacher.provenance()
    network = getattr(distiller.teacher, 'network', None)
    parameters = sum(p.numel() for p in distiller.student.parameters())
    say(console, f'config    {args.config}')
    say(console, f'student   {type(distiller.student).__name__}, {parameters / 1e6:.3f} M parameters')
    weights = f'{origin.get("checkpoint")} (sha256 {str(origin.get("sha256"))[:12]})'
    if origin.get('checkpoint') is None:
        weights = 'random weights'
    say(console, f'teacher   {type(network or distiller.teacher).__name__} of {origin.get("config")}, {weights}')
    source = 'noise' if args.synthetic else 'first of the train dataloader'
    say(console, f'batch     {trial.images} images of {shape(trial.size)} (HxW), {source}, on {device}')
    say(console)


def print_taps(console: Console, trial: Trial) -> None:
    """Print what each term sees."""
    rows = [
        (
            term.name,
            level.student_tap,
            shape(level.student),
            stride(level.student_stride),
            level.teacher_tap,
            shape(level.teacher),
            stride(level.teacher_stride),
            level.connector,
        )
        for term in trial.terms
        for level in term.levels
    ]
    columns = ('term', 'student tap', 'shape', 'stride', 'teacher tap', 'shape', 'stride', 'connector')
    table(console, 'Taps (shape BxCxHxW; stride: input size / map size)', columns, rows)


def print_losses(console: Console, trial: Trial) -> None:
    """Print each term's loss, and its gradient against the task's."""
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for term in trial.terms:
        parts = ' '.join(f'{name} {value:.4g}' for name, value in term.objectives.items()) or '-'
        head = (term.name, term.loss, number(term.raw), number(term.weight), number(term.weighted), parts)
        for index, level in enumerate(term.levels):
            first = head if index == 0 else ('',) * len(head)
            share = '-' if level.share is None else f'{100 * level.share:.1f} %'
            rows.append((*first, level.student_tap, number(level.term_gradient), number(level.task_gradient), share))
        if term.start_factor != term.factor:
            notes.append(
                f'{term.name}: its schedule starts at a factor of {term.start_factor:g}; the weight shown '
                f'is at its largest, {term.factor:g}.'
            )
    numbers = ('raw', 'weight', 'weighted', 'of the term', 'of the task', 'share')
    columns = ('term', 'loss', *numbers[:3], 'own objective', 'gradient at', *numbers[3:])
    title = 'Losses, and norms of their gradients at the student tap (share = term / (term + task)), at the first step'
    table(console, title, columns, rows, numbers)
    parts = ', '.join(f'{name} {value:.4g}' for name, value in trial.task_losses.items())
    say(console, f'task loss {trial.task_loss:.4g} ({parts})')
    for note in notes:
        say(console, note)
    say(console)


def print_parameters(console: Console, trial: Trial) -> None:
    """Print which trained parameters the summed loss does not move."""
    counts = sum(map(len, trial.without_gradient.values()))
    say(console, f'trained parameters without a gradient of the summed loss: {counts or "none"}')
    _print_names(console, trial.without_gradient)
    counts = sum(map(len, trial.zero_gradient.values()))
    if counts:
        say(console, f'trained parameters with a gradient of exactly zero: {counts}')
        say(console, '  (usual behind a factor initialised with 0, and for a term that is off)')
        _print_names(console, trial.zero_gradient, limit=3)
    say(console)


def _print_names(console: Console, names: Mapping[str, list[str]], limit: int | None = None) -> None:
    """List parameters by owner."""
    for owner, listed in names.items():
        shown = listed if limit is None else listed[:limit]
        more = len(listed) - len(shown)
        say(console, f'  {owner}: ' + ', '.join(shown) + (f' and {more} more' if more else ''))


def print_cost(console: Console, cost: CostReport) -> None:
    """Print what the teacher adds."""
    added = cost.distilled_step - cost.student_step
    more = None
    if cost.student_peak is not None and cost.distilled_peak is not None:
        more = cost.distilled_peak - cost.student_peak
    rows = [
        ('student alone, forward + backward', f'{cost.student_step:.4f} s', mebibytes(cost.student_peak)),
        ('distilled, forward + backward', f'{cost.distilled_step:.4f} s', mebibytes(cost.distilled_peak)),
        ('added by distilling', f'{added:.4f} s ({added / cost.student_step:+.0%})', mebibytes(more)),
        ('teacher forward, to its deepest tap', f'{cost.teacher_forward:.4f} s', ''),
    ]
    title = f'Cost of a step (medians of {cost.runs} after one to warm up, without optimiser and data)'
    table(console, title, ('', 'time', 'peak memory'), rows, ('time', 'peak memory'))
    if more is None:
        say(console, 'peak memory is not measured on a CPU')
    if cost.teacher_parameters is not None:
        millions = cost.teacher_parameters / 1e6
        say(console, f'the teacher has {millions:.3f} M parameters and holds {mebibytes(cost.teacher_bytes)}')
    say(console)


def main(argv: Sequence[str] | None = None) -> int:
    """Check a config.

    Args:
        argv: arguments; ``None``: the command line's.

    Returns:
        Exit code.
    """
    args = parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH)
    try:
        return 0 if check(args, console) else 1
    except (ConfigError, TapError, ShapeError, CheckpointError) as err:
        print(f'{type(err).__name__}: {err}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
