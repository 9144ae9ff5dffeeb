r"""Draw what checkpoints say about validation images: image, truth, and a column for each of them.

Example::

    python tools/draw.py \
        configs/scenes/upernet_r18-w8_300_scenes-128x128.py work_dirs/quickstart/student_alone_seed0/iter_300.pth \
        configs/scenes/upernet_r18-w8_300_scenes-128x128.py work_dirs/quickstart/distilled_student.pth \
        --out picture.png

Segmentors, depth estimators and detectors, one task at a time. The images are
those of the first config's validation dataset; of a distilling config the student
is drawn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, init_default_scope

from mmstructkd import compat
from mmstructkd.checkpoints import trusts
from mmstructkd.errors import CheckpointError, ConfigError, ShapeError
from mmstructkd.teachers.loading import load_student
from mmstructkd.visualization import choose_looks, draw_samples

OWNER = 'draw'
LETTERS = 30  # of a line of a title


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Draw predictions side by side.')
    parser.add_argument('networks', nargs='+', metavar='CONFIG CHECKPOINT', help='a config and its checkpoint; again')
    parser.add_argument('--out', type=Path, required=True, help='the picture to write, .png or .jpg')
    parser.add_argument('--samples', type=int, default=4, help='how many images, spread evenly over the dataset')
    parser.add_argument('--titles', nargs='+', help='one for each config (default: its name)')
    parser.add_argument('--width', type=int, default=256, help='pixels of a tile')
    parser.add_argument('--score-threshold', type=float, default=0.3, help='boxes with a lower score are left out')
    parser.add_argument(
        '--depth-range',
        type=float,
        nargs=2,
        metavar=('NEAR', 'FAR'),
        help='metres at both ends of the colours (default: what the truth of these images has)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides for every config, key=value')
    parser.add_argument(
        '--trust-checkpoint', action='store_true', help='read checkpoints that need more than weights; may run code'
    )
    args = parser.parse_args(argv)
    if len(args.networks) % 2:
        parser.error(f'each config must have its checkpoint, got {len(args.networks)} paths.')
    args.pairs = list(zip(args.networks[::2], args.networks[1::2], strict=True))
    if args.titles is not None and len(args.titles) != len(args.pairs):
        parser.error(f'`--titles` must have one for each of {len(args.pairs)} configs, got {len(args.titles)}.')
    for option in ('samples', 'width'):
        if getattr(args, option) < 1:
            parser.error(f'`--{option}` must be at least 1, got {getattr(args, option)}.')
    if not math.isfinite(args.score_threshold):
        parser.error(f'`--score-threshold` must be a finite number, got {args.score_threshold}.')
    if args.out.suffix.lower() not in ('.png', '.jpg', '.jpeg'):
        parser.error(f'`--out` must end in .png or .jpg, got {str(args.out)!r}.')
    return args


def spread_evenly(count: int, total: int) -> list[int]:
    """Pick ``count`` numbers below ``total``, the first one 0; all of them if there are fewer."""
    count = min(count, total)
    return [index * total // count for index in range(count)]


def title_of(config: str) -> str:
    """Break the name of a config into lines at its underscores."""
    lines = ['']
    for part in Path(config).stem.split('_'):
        if lines[-1] and len(lines[-1]) + 1 + len(part) > LETTERS:
            lines.append(part)
        else:
            lines[-1] = f'{lines[-1]}_{part}' if lines[-1] else part
    return '\n'.join(lines)


def read_config(path: str, options: dict | None) -> Config:
    """Read a config and apply the overrides."""
    try:
        cfg = Config.fromfile(path)
    except OSError as err:
        raise ConfigError(f'{OWNER}: `config` must be a readable config, got {path!r} ({err}).') from err
    if options is not None:
        cfg.merge_from_dict(options)
    return cfg


def draw(args: argparse.Namespace) -> None:
    """Load, predict, paint and write.

    Args:
        args: the command line.

    Raises:
        ConfigError: a config cannot be read, has no validation images, or the
            networks differ in task.
        CheckpointError: a checkpoint does not fit its config.
    """
    configs = [read_config(config, args.cfg_options) for config, _ in args.pairs]
    source = configs[0]
    if source.get('val_dataloader') is None:
        raise ConfigError(f'{OWNER}: the first config must define `val_dataloader`, got none.')
    titles = args.titles or [title_of(config) for config, _ in args.pairs]
    if len(set(titles)) < len(titles):
        titles = [f'{title} ({number})' for number, title in enumerate(titles, start=1)]
    networks = {}
    for title, cfg, (_, checkpoint) in zip(titles, configs, args.pairs, strict=True):
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        networks[title] = load_student(
            cfg, checkpoint, owner=OWNER, trust_checkpoint=trusts(cfg, args.trust_checkpoint)
        )
    init_default_scope(source.get('default_scope', 'mmengine'))
    try:
        dataset = DATASETS.build(source.val_dataloader.dataset)
    except OSError as err:
        raise ConfigError(f'{OWNER}: the validation images must be there, got {type(err).__name__}: {err}.') from err
    samples = [dataset[index] for index in spread_evenly(args.samples, len(dataset))]
    looks = choose_looks(
        dataset.metainfo,
        samples,
        list(networks.values()),
        depth_range=None if args.depth_range is None else tuple(args.depth_range),
        width=args.width,
        score_threshold=args.score_threshold,
    )
    picture = draw_samples(samples, networks, looks)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(args.out), picture):
        raise ConfigError(f'{OWNER}: `--out` must be a file that can be written, got {str(args.out)!r}.')
    print(f'{args.out}: {len(samples)} of {len(dataset)} validation images, {picture.shape[1]}x{picture.shape[0]}')


def main(argv: Sequence[str] | None = None) -> int:
    """Draw.

    Args:
        argv: arguments; ``None``: the command line's.

    Returns:
        Exit code.
    """
    args = parse_args(argv)
    compat.install()
    MMLogger.get_instance(OWNER, logger_name='mmengine', log_level='ERROR')
    try:
        draw(args)
    except (CheckpointError, ConfigError, ShapeError) as err:
        print(f'{type(err).__name__}: {err}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
