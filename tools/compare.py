r"""Train several configs over the same seeds, one after another, and print mean and spread.

Example::

    python tools/compare.py --seeds 0 1 2 --work-dir work_dirs/camvid_small \
        --arm alone=configs/camvid_small/fcn_r18-d8-w16_600_camvid-180x240.py \
        --arm cwd=configs/camvid_small/cwd_pspnet_r18-d8-w32_fcn_r18-d8-w16_600_camvid-180x240.py

Each run is ``tools/train.py CONFIG`` with ``randomness.seed`` set, in a process of
its own; one that has finished is not run again, one that was interrupted is resumed.
All arms of a seed see the same data order, initial weights and dropout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Compare configs over seeds.')
    parser.add_argument('--arm', action='append', required=True, metavar='NAME=CONFIG', help='an arm; may be repeated')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--work-dir', type=Path, required=True, help='one folder per arm and seed is made in it')
    parser.add_argument('--metric', default='mIoU', help='name of the metric in the log')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='overrides for every run, key=value')
    parser.add_argument('--out', type=Path, help='also write the table (Markdown) and the numbers (JSON) here')
    args = parser.parse_args()
    args.arms = dict(arm.split('=', 1) for arm in args.arm)
    return args


def read_log(folder: Path, metric: str) -> tuple[float | None, float | None]:
    """Return the last value of the metric and the median seconds of a step, over all sessions of a run."""
    value, times = None, []
    for log in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            value = entry.get(metric, value)
            if 'loss' in entry and 'time' in entry:
                times.append(entry['time'])
    return value, statistics.median(times) if times else None


def train(config: str, folder: Path, seed: int, options: list[str]) -> None:
    """Run one training to its end, unless it has been."""
    done = folder / 'done'
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), config, '--work-dir', str(folder), '--resume']
    command += ['--cfg-options', f'randomness.seed={seed}', *options]
    with (folder / 'stdout.log').open('a') as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        raise SystemExit(f'compare.py: {config} with seed {seed} failed, see {folder / "stdout.log"}')
    done.touch()


def table(results: dict[str, dict[int, tuple[float, float]]], seeds: list[int], metric: str) -> str:
    """Format the results as Markdown: each seed, mean, standard deviation, difference to the first arm."""
    lines = [
        f'| arm | {" | ".join(f"seed {s}" for s in seeds)} | mean {metric} | std | paired difference | s a step |',
        '| --- |' + ' --- |' * (len(seeds) + 4),
    ]
    first = next(iter(results.values()))
    for name, runs in results.items():
        values = [runs[s][0] for s in seeds]
        deltas = [runs[s][0] - first[s][0] for s in seeds]
        spread = statistics.stdev(values) if len(values) > 1 else float('nan')
        seconds = statistics.median(runs[s][1] for s in seeds)
        lines.append(
            f'| {name} | {" | ".join(f"{v:.2f}" for v in values)} | {statistics.mean(values):.2f} | {spread:.2f} '
            f'| {statistics.mean(deltas):+.2f} | {seconds:.2f} |'
        )
    return '\n'.join(lines)


def main() -> None:
    """Train what is missing and print the table."""
    args = parse_args()
    results: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in args.arms}
    for seed in args.seeds:
        for name, config in args.arms.items():
            folder = args.work_dir / f'{name}_seed{seed}'
            train(config, folder, seed, args.cfg_options)
            value, seconds = read_log(folder, args.metric)
            if value is None or seconds is None:
                raise SystemExit(f'compare.py: no {args.metric!r} in the logs of {folder}')
            results[name][seed] = (value, seconds)
            print(f'{name} seed {seed}: {args.metric} {value:.2f}, {seconds:.2f} s a step', flush=True)
    text = table(results, args.seeds, args.metric)
    print('\n' + text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.with_suffix('.md').write_text(text + '\n')
        args.out.with_suffix('.json').write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    main()
