r"""Time what distilling adds to a student's step, and each loss alone.

One process, all arms from the same weights on the same batch of noise, taken in
turn (A B C A B C ...), with a warm-up; medians, quartiles and ratios:

- ``student alone``; ``student + teacher forward``: what the arithmetic costs
- ``mmstructkd``; with each option of the teacher; with all of them; cached
- ``mmrazor``, where it is installed (see the head of ``benchmark_mmrazor.py``)

::

    python tools/benchmark.py --out work_dirs/benchmark               # pairs of networks
    python tools/benchmark.py --losses --out work_dirs/benchmark      # each loss alone
    python tools/benchmark.py --gradients CONFIG                      # what the options change
    python tools/benchmark.py --kinds seg --out work_dirs/benchmark   # a step with each kind of teacher
    python tools/benchmark.py --check --out work_dirs/benchmark       # what looking for NaN adds to a step
    python tools/benchmark.py --report docs/benchmarks.md work_dirs/benchmark/*.json

A step is forward, backward and update in float32, without data loading; with
``--precision amp`` the student's forward runs under bf16 autocast. On CUDA both
are timed, by events, unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault('KINETO_LOG_LEVEL', '9')  # the profiler's chatter, before torch is there

import benchmark_check as check
import benchmark_gradients as gradients
import benchmark_kinds as kinds
import benchmark_losses as losses
import benchmark_measure as measure
import benchmark_pairs as arms
import benchmark_report as report
import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger

from mmstructkd import compat
from mmstructkd.errors import ConfigError
from mmstructkd.files import write_whole


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(arms.pairs())
    parser.add_argument('--losses', action='store_true', help='each loss alone against a plain implementation')
    parser.add_argument(
        '--gradients', metavar='CONFIG', help="what the teacher's options change in the gradients of this config"
    )
    parser.add_argument('--check', action='store_true', help='what looking for NaN before each update adds to a step')
    parser.add_argument(
        '--kinds', nargs='+', choices=list(kinds.TASKS), help='a step with each kind of teacher of these tasks'
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='with --gradients: overrides, key=value')
    parser.add_argument('--pairs', nargs='+', choices=names, default=names, help='default: all')
    parser.add_argument('--arms', nargs='+', choices=arms.ARMS, default=list(arms.ARMS), help='default: all')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='with --losses or --kinds: these')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu')
    parser.add_argument('--precision', nargs='+', choices=['fp32', 'amp'], help='default: fp32; on cuda both')
    parser.add_argument('--batch-size', type=int, help="images a step (default: the pair's)")
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), help="of the images (default: the pair's)")
    parser.add_argument('--rounds', type=int, default=15, help='turns that count')
    parser.add_argument('--warmup', type=int, default=3, help='turns before')
    parser.add_argument('--threads', type=int, help="of torch on the CPU (default: torch's own choice)")
    parser.add_argument('--quick', action='store_true', help='networks of a few channels: does it run?')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder for JSON and charts')
    parser.add_argument(
        '--report', nargs='+', type=Path, metavar='FILE', help='write JSON files (all but the first) into a page'
    )
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.warmup < 0:
        parser.error('--rounds must be above 0, and --warmup 0 or more')
    if args.report is not None and len(args.report) < 2:
        parser.error('--report takes the page and at least one JSON file')
    if args.losses and not set(args.only or ()) <= set(losses.CASES):
        parser.error(f'--only must name losses of {list(losses.CASES)}, got {args.only}')
    args.precision = args.precision or (['fp32', 'amp'] if args.device == 'cuda' else ['fp32'])
    return args


def time_pair(name: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time all arms of a pair.

    Args:
        name: of the pair.
        precision: ``'fp32'`` or ``'amp'``.
        args: the command line.

    Returns:
        What is written to JSON.
    """
    pair = arms.pairs(args.quick)[name]()
    size = tuple(args.size) if args.size else pair.size
    batch_size = args.batch_size or pair.batch_size
    out: dict[str, Any] = dict(
        pair=name, title=pair.title, precision=precision, size=size, batch_size=batch_size, arms={}, skipped={}
    )
    wanted = [arm for arm in args.arms if not (args.quick and arm in arms.COMPILED)]
    with arms.workshop(pair, args.device, precision == 'amp', batch_size, size) as shop:
        built: dict[str, arms.Arm] = {}
        for arm in wanted:
            made = shop.build(arm)
            if isinstance(made, str):
                out['skipped'][arm] = made
                print(f'{name}: no arm {arm!r}: {made}')
                continue
            built[arm] = made
            begin = time.perf_counter()
            torch.manual_seed(1)  # the same dropout in each
            first = {k: float(v.detach()) for k, v in made.step().items()}
            print(f'{name}, {precision}: {arm!r} built, first step {time.perf_counter() - begin:.1f} s', flush=True)
            out['arms'][arm] = dict(losses=first)
        turns = measure.in_turn(
            {arm: made.seconds for arm, made in built.items()},
            rounds=args.rounds,
            warmup=args.warmup,
            label=f'{name}, {precision}',
        )
        asking = {arm: made.teacher_seconds for arm, made in built.items() if made.ask is not None}
        asked = measure.in_turn(asking, rounds=args.rounds, warmup=1)
        for arm, made in built.items():
            out['arms'][arm].update(measure.spread(turns[arm]))
            if arm in asked:
                out['arms'][arm]['teacher'] = measure.spread(asked[arm])
            made.count = 0  # a step with the teacher
            if arm == arms.OURS:
                out['terms'] = measure.spread([made.term_seconds() for _ in range(args.warmup + args.rounds)])
            out['arms'][arm].update(
                held_bytes=made.held_bytes(), extra_bytes=measure.extra_memory(made.step, args.device)
            )
            if arm in arms.COMPILED and made.teacher is not None and not made.teacher.compiled:
                out['skipped'][arm] = 'torch.compile does not work here: timed without'
    return out


def save(results: dict[str, Any], out: Path) -> Path:
    """Write what was measured so far, and the chart.

    Args:
        results: of this run.
        out: the folder.

    Returns:
        The path of both files, without the ending.
    """
    stem = out / f'{results["kind"]}_{results["environment"]["device_type"]}'
    results['targets'] = report.targets(results)
    write_whole(stem.with_suffix('.json'), json.dumps(results, indent=1))
    report.draw(results, stem.with_suffix('.png'))
    return stem


def main(argv: Sequence[str] | None = None) -> int:
    """Run."""
    args = parse_args(argv)
    compat.install()
    MMLogger.get_instance('benchmark', logger_name='mmengine', log_level='ERROR')
    if args.report is not None:
        page, *files = args.report
        report.write_page(page, [json.loads(file.read_text(encoding='utf-8')) for file in files])
        print(f'written: {page}')
        return 0
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise ConfigError("benchmark: `--device` must be one that this machine has, got 'cuda'. Use cpu.")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    asked = dict(gradients=args.gradients, losses=args.losses, check=args.check, kinds=args.kinds)
    kind = next((name for name, value in asked.items() if value), 'pairs')
    results: dict[str, Any] = dict(kind=kind, quick=args.quick)
    results['command'] = shlex.join(['python', 'tools/benchmark.py', *(sys.argv[1:] if argv is None else argv)])
    results['environment'] = measure.environment(args.device)
    if args.gradients:
        results['gradients'] = gradients.measure(
            args.gradients, args.cfg_options, args.device, leave_out=arms.COMPILED if args.quick else ()
        )
        stem = save(results, args.out)
    elif args.losses:
        results['losses'] = []
        for name in args.only or losses.CASES:
            sizes = losses.CASES[name].sizes
            for size in sizes[:1] if args.quick else sizes:
                found = losses.measure(name, size, device=args.device, rounds=args.rounds, warmup=args.warmup)
                results['losses'].append(found)
                print(f'{name} at {size}', flush=True)
        stem = save(results, args.out)
    elif args.kinds:
        results['kinds'] = []
        for precision in args.precision:
            for task in args.kinds:
                found = kinds.measure(
                    task,
                    kinds.check_kinds(task, args.only),
                    device=args.device,
                    amp=precision == 'amp',
                    batch_size=args.batch_size or 2,
                    size=tuple(args.size or (128, 128)),
                    rounds=args.rounds,
                    warmup=args.warmup,
                )
                results['kinds'].append(found)
        stem = save(results, args.out)
    elif args.check:
        results['checks'] = []
        for precision in args.precision:
            for name in args.pairs:
                pair = arms.pairs(args.quick)[name]()
                found = check.measure(
                    name,
                    pair,
                    device=args.device,
                    amp=precision == 'amp',
                    batch_size=args.batch_size or pair.batch_size,
                    size=tuple(args.size) if args.size else pair.size,
                    rounds=args.rounds,
                    warmup=args.warmup,
                )
                results['checks'].append(found)
                print(f'{name}, {precision}: {found["ratio"]["median"]:.4f}', flush=True)
        stem = save(results, args.out)
    else:
        results['pairs'] = []
        for precision in args.precision:
            for name in args.pairs:
                results['pairs'].append(time_pair(name, precision, args))
                results['environment'] = measure.environment(args.device)  # more packages are there now
                stem = save(results, args.out)
    print()
    print(report.text(results))
    print(f'written: {stem}.json, {stem}.png')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except ConfigError as err:
        sys.exit(f'{type(err).__name__}: {err}')
