r"""Train several configs over the same seeds, one after another, and print mean and spread.

Example::

    python tools/compare.py --seeds 0 1 2 --work-dir work_dirs/camvid_small \
        --arm alone=configs/camvid_small/fcn_r18-d8-w16_600_camvid-180x240.py \
        --arm cwd=configs/camvid_small/cwd_pspnet_r18-d8-w32_fcn_r18-d8-w16_600_camvid-180x240.py

Each run is ``tools/train.py CONFIG`` with ``randomness.seed`` set, in a process of
its own; one that has finished is not run again, one that was interrupted is resumed.
All arms of a seed see the same data order, initial weights and dropout.

Several metrics, the first one seed by seed; average precision in per cent::

    --metric abs_rel rmse d1
    --metric coco/bbox_mAP coco/bbox_mAP_50 --percent
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmstructkd.evaluation.metrics import Metric, mean_and_std
from mmstructkd.evaluation.scalars import last_values, read_scalars, step_seconds
from mmstructkd.evaluation.tables import markdown_table
from mmstructkd.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 'step_seconds'

#: What is known of the runs: arm, seed, key of a metric or :data:`SECONDS`.
Results = Mapping[str, Mapping[int, Mapping[str, float]]]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Compare configs over seeds.')
    parser.add_argument('--arm', action='append', required=True, metavar='NAME=CONFIG', help='an arm; may be repeated')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, required=True, help='one folder per arm and seed is made in it')
    parser.add_argument(
        '--metric', nargs='+', default=['mIoU'], metavar='NAME', help='in the log; the first is shown seed by seed'
    )
    parser.add_argument(
        '--percent', nargs='*', metavar='NAME', help='metrics that are shares and shown in per cent; no name: all'
    )
    parser.add_argument('--cfg-options', nargs='+', default=[], help='overrides for every run, key=value')
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='hand it to each run: read checkpoints that need more than weights; may run code',
    )
    parser.add_argument('--out', type=Path, help='also write the table (Markdown) and the numbers (JSON) here')
    args = parser.parse_args()
    args.arms = dict(arm.split('=', 1) for arm in args.arm)
    percent = args.metric if args.percent == [] else args.percent or []
    unknown = sorted(set(percent) - set(args.metric))
    if unknown:
        parser.error(f'`--percent` must name metrics of --metric {args.metric}, got {unknown}.')
    args.metrics = [Metric(name, name, factor=100.0 if name in percent else 1.0) for name in args.metric]
    return args


def read_run(folder: Path, metrics: Sequence[Metric]) -> dict[str, float]:
    """Return the last values of the metrics, as they are shown, and the median seconds of a step.

    Args:
        folder: of the run, all its sessions in it.
        metrics: what is wanted.

    Returns:
        Numbers by the metric's key and :data:`SECONDS`.

    Raises:
        SystemExit: something is not in the log.
    """
    entries = read_scalars(folder)
    values = last_values(entries, [metric.key for metric in metrics]) | {SECONDS: step_seconds(entries)}
    missing = [key for key, value in values.items() if value is None]
    if missing:
        known = sorted({key for entry in entries if 'loss' not in entry for key in entry})
        raise SystemExit(f'compare.py: no {", ".join(map(repr, missing))} in the logs of {folder}, only {known}')
    factors = {metric.key: metric.factor for metric in metrics}
    return {key: value * factors.get(key, 1.0) for key, value in values.items()}


def train(config: str, folder: Path, seed: int, options: list[str], *, trust: bool = False) -> None:
    """Run one training to its end, unless it has been."""
    done = folder / 'done'
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), config, '--work-dir', str(folder), '--resume']
    command += ['--trust-checkpoint'] * trust
    command += ['--cfg-options', f'randomness.seed={seed}', *options]
    with (folder / 'stdout.log').open('a') as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise SystemExit(f'compare.py: {config} with seed {seed} failed, see {folder / "stdout.log"}')
    done.touch()


def digits(results: Results, metric: Metric) -> int:
    """Decimals that tell values apart: two, or three where all of them are below 10, as shares and metres are."""
    largest = max(abs(run[metric.key]) for runs in results.values() for run in runs.values())
    return 2 if largest >= 10 else 3


def table(results: Results, seeds: Sequence[int], metrics: Sequence[Metric]) -> str:
    """Format the results as Markdown.

    The first metric seed by seed; mean, standard deviation, and the mean of the
    differences to the first arm within a seed. With several metrics each has a
    column with mean and deviation, and one with those of its differences.

    Args:
        results: of all arms; the first is the one that the others are compared with.
        seeds: in the order of the columns.
        metrics: the first one seed by seed.

    Returns:
        The table.
    """
    first = next(iter(results.values()))
    primary = metrics[0]
    heads = ['arm', *(f'seed {seed}' for seed in seeds)]
    if len(metrics) == 1:
        heads += [f'mean {primary.title}', 'std', 'paired difference']
    else:
        heads[1:] = [f'{primary.title} {head}' for head in heads[1:]]
        heads += [head for metric in metrics for head in (metric.title, 'paired difference')]
    heads.append('s a step')
    rows = [heads]
    for name, runs in results.items():
        cells = [name, *(f'{runs[seed][primary.key]:.{digits(results, primary)}f}' for seed in seeds)]
        for metric in metrics:
            places = digits(results, metric)
            values = [runs[seed][metric.key] for seed in seeds]
            deltas = [runs[seed][metric.key] - first[seed][metric.key] for seed in seeds]
            if len(metrics) == 1:
                spread = statistics.stdev(values) if len(values) > 1 else float('nan')
                cells += [f'{statistics.mean(values):.{places}f}', f'{spread:.{places}f}']
                cells.append(f'{statistics.mean(deltas):+.{places}f}')
            else:
                cells.append(mean_and_std(values, places))
                cells.append(mean_and_std(deltas, places, signed=True) if runs is not first else '')
        cells.append(f'{statistics.median(runs[seed][SECONDS] for seed in seeds):.2f}')
        rows.append(cells)
    return markdown_table(rows, aligned=False)


def main() -> None:
    """Train what is missing and print the table."""
    args = parse_args()
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in args.arms}
    for seed in args.seeds:
        for name, config in args.arms.items():
            folder = args.work_dir / f'{name}_seed{seed}'
            train(config, folder, seed, args.cfg_options, trust=args.trust_checkpoint)
            run = results[name][seed] = read_run(folder, args.metrics)
            words = ', '.join(
                f'{metric.title} {run[metric.key]:.{digits(results, metric)}f}' for metric in args.metrics
            )
            print(f'{name} seed {seed}: {words}, {run[SECONDS]:.2f} s a step', flush=True)
    text = table(results, args.seeds, args.metrics)
    print('\n' + text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out.with_suffix('.md'), text + '\n')
        write_whole(args.out.with_suffix('.json'), json.dumps(results, indent=1))


if __name__ == '__main__':
    main()
