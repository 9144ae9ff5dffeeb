r"""Train a small student on CamVid with each loss alone, one after another, and tabulate what each gives and costs.

Example::

    python tools/compare_losses.py --teacher work_dirs/camvid_small/teacher/iter_2400.pth
    python tools/compare_losses.py --only ChannelwiseKLLoss DistLoss --iterations 600

A loss is taken from ``configs/_base_/distill`` with its tap and connector, at the
weight that it has by default. Every run is ``tools/train.py`` on a config written into
the work directory, in a process of its own. A finished run is not run again, one
that was interrupted starts where its last checkpoint is; one that fails is named at
the end, and the rest goes on. What stands behind ``MARK`` in the page is kept.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from mmstructkd import compat
from mmstructkd.evaluation.scalars import last_values, read_scalars, step_seconds
from mmstructkd.evaluation.tables import markdown_table
from mmstructkd.files import write_whole
from mmstructkd.losses import DistillLoss
from mmstructkd.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'camvid_small'
STUDENT = 'fcn_r18-d8-w16_600_camvid-180x240.py'
TEACHER = 'pspnet_r18-d8-w32_2400_camvid-180x240.py'
CHECKPOINT = Path('work_dirs/camvid_small/teacher/iter_2400.pth')
OUT = ROOT / 'docs' / 'results' / 'losses-camvid.md'
MARK = '<!-- tools/compare_losses.py writes what stands above this line. -->'
ALONE = 'student alone'
METRIC = 'mIoU'
CLASSES = 11

#: Where each loss is shipped: a file of ``configs/_base_/distill`` and a term in it.
SHIPPED = {
    'AttentionTransferLoss': ('at', 'attention'),
    'BinaryKLLoss': ('binary', 'pixel'),
    'CategorySimilarityLoss': ('dsd', 'category'),
    'ChannelwiseKLLoss': ('cwd', 'channel'),
    'CorrelationCongruenceLoss': ('cckd', 'correlation'),
    'CrossImageKLLoss': ('cirkd', 'batch'),
    'DecoupledKLLoss': ('dkd', 'pixel'),
    'DistLoss': ('dist', 'scores'),
    'FeatureMSELoss': ('fitnet', 'feature'),
    'HierarchicalContextLoss': ('reviewkd', 'review'),
    'HolisticLoss': ('structkd', 'holistic'),
    'InterclassSimilarityLoss': ('icsd', 'interclass'),
    'IntraClassVariationLoss': ('ifvd', 'variation'),
    'LocalStructureLoss': ('lsp', 'neighbours'),
    'MaskedGenerationLoss': ('mgd', 'generation'),
    'MemoryContrastLoss': ('cirkd', 'memory'),
    'PairwiseAffinityLoss': ('structkd', 'pairwise'),
    'PixelSimilarityLoss': ('dsd', 'attention'),
    'PixelwiseKLLoss': ('kd', 'pixel'),
    'PrototypeContrastLoss': ('mcl', 'contrast'),
    'RegionContrastLoss': ('crd', 'region'),
    'RelationalLoss': ('rkd', 'relation'),
    'SimilarityPreservingLoss': ('sp', 'similarity'),
    'StandardizedMSELoss': ('nfd', 'feature'),
    'WeightedSoftLabelLoss': ('wsl', 'pixel'),
    'ZipfLabelLoss': ('zipf', 'pixel'),
}
#: What the shipped taps are called in this student; its head has no bottleneck.
STUDENT_TAPS = {'decode_head.bottleneck': 'decode_head.convs'}


class Run(NamedTuple):
    """One training.

    Attributes:
        name: of the loss, or :data:`ALONE`.
        term: config of its one term; ``None`` for the student alone.
        weight: of the loss, as it is by default.
    """

    name: str
    term: dict[str, Any] | None = None
    weight: float | None = None

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.name.replace(' ', '_')

    @property
    def tap(self) -> str:
        """Where the loss is, for the table."""
        if self.term is None:
            return ''
        tap = self.term['tap']
        sides = [tap['student'], tap['teacher']] if isinstance(tap, dict) else [tap]
        return ' / '.join(side if isinstance(side, str) else ', '.join(side) for side in sides)


class Outcome(NamedTuple):
    """What a training gave.

    Attributes:
        run: which.
        miou: of the last validation, per cent.
        seconds: median of a step.
    """

    run: Run
    miou: float
    seconds: float


class Settings(NamedTuple):
    """What all runs share.

    Attributes:
        teacher: its checkpoint.
        iterations: of each training.
        batch: images of a step.
        seed: of initial weights, data order and dropout.
        work_dir: a folder for each run is made in it.
    """

    teacher: Path = CHECKPOINT
    iterations: int = 200
    batch: int = 4
    seed: int = 0
    work_dir: Path = Path('work_dirs/losses_camvid')


USUAL = Settings()


def losses() -> list[str]:
    """Name the registered losses that serve segmentation on the labelled batch; others need a stream of turned copies.

    Returns:
        Names, sorted.
    """
    MODELS.import_from_location()
    return sorted(
        name
        for name, kind in MODELS.module_dict.items()
        if isinstance(kind, type)
        and kind.__module__.startswith('mmstructkd.losses.')
        and issubclass(kind, DistillLoss)
        and 'seg' in kind.tasks
        and not kind.needs_views
    )


def mapped(tap: Any) -> Any:
    """Bring a shipped tap to this pair.

    Args:
        tap: as in a term.

    Returns:
        The tap, by side where the modules have different names.
    """
    student, teacher = (tap['student'], tap['teacher']) if isinstance(tap, dict) else (tap, tap)
    several = isinstance(student, (list, tuple))
    mine = [STUDENT_TAPS.get(name, name) for name in student] if several else STUDENT_TAPS.get(student, student)
    return mine if mine == teacher else dict(student=mine, teacher=teacher)


def run_of(name: str) -> Run:
    """Take a loss's term from the shipped configs.

    Args:
        name: a registered loss.

    Returns:
        Its run: the shipped settings, the default weight, taps and classes of this pair.

    Raises:
        SystemExit: nothing is shipped for this loss.
    """
    if name not in SHIPPED:
        raise SystemExit(f'compare_losses.py: `SHIPPED` must say where {name} is configured, got nothing for it.')
    stem, key = SHIPPED[name]
    terms = Config.fromfile(ROOT / 'configs' / '_base_' / 'distill' / f'{stem}.py')[f'{stem}_terms']
    term = terms[key].to_dict()
    loss = term['loss']
    if loss['type'].split('.')[-1] != name:
        raise SystemExit(f'compare_losses.py: `SHIPPED` must name a term with {name}, got {loss["type"]} in {stem}.py.')
    loss.pop('loss_weight', None)
    if 'num_classes' in loss:
        loss['num_classes'] = CLASSES
    weight = MODELS.build(dict(loss)).loss_weight
    return Run(name, {**term, 'tap': mapped(term['tap'])}, weight)


def write_config(run: Run, settings: Settings) -> Path:
    """Write the config of a run beside its folder, into which the runner writes what it made of it.

    Args:
        run: which.
        settings: what all share.

    Returns:
        Its path.

    Raises:
        SystemExit: there is one of other settings.
    """
    total = settings.iterations
    warm = min(50, total // 4)
    schedule = [dict(type='LinearLR', start_factor=0.1, begin=0, end=warm, by_epoch=False)] if warm else []
    schedule.append(dict(type='PolyLR', eta_min=0.0, power=0.9, begin=warm, end=total, by_epoch=False))
    lines = [
        f'_base_ = [{str(CONFIGS / STUDENT)!r}]',
        f'randomness = dict(seed={settings.seed})',
        f'train_dataloader = dict(batch_size={settings.batch})',
        f'train_cfg = dict(max_iters={total})',
        f'param_scheduler = {schedule!r}',
        f'default_hooks = dict(logger=dict(interval={min(10, total)}), checkpoint=dict(interval=100))',
    ]
    if run.term is not None:
        lines += [
            'model = dict(',
            "    _delete_=True, type='mmstructkd.StructuredDistiller', student=_base_.model,",
            f'    teacher=dict(config={str(CONFIGS / TEACHER)!r}, checkpoint={str(settings.teacher.resolve())!r}),',
            f'    terms=dict(loss={run.term!r}))',
        ]
    path = settings.work_dir / f'{run.folder}.py'
    text = '\n'.join(lines) + '\n'
    if path.is_file() and path.read_text(encoding='utf-8') != text:
        raise SystemExit(
            f'compare_losses.py: `--work-dir` must hold runs of the same settings, got others in {path}. '
            'Name another folder, or remove that file and the folder beside it.'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    return path


def train(run: Run, settings: Settings) -> bool:
    """Run one training to its end, unless it has been.

    Args:
        run: which.
        settings: what all share.

    Returns:
        Whether it ended well.
    """
    config = write_config(run, settings)
    folder = settings.work_dir / run.folder
    done = folder / 'done'
    if done.exists():
        return True
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config), '--work-dir', str(folder), '--resume']
    with (folder / 'stdout.log').open('a') as log:
        result = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        return False
    done.touch()
    return True


def outcome(run: Run, folder: Path) -> Outcome | None:
    """Read what a training gave.

    Args:
        run: which.
        folder: its folder.

    Returns:
        The numbers; ``None``: they are not in the log.
    """
    entries = read_scalars(folder)
    miou, seconds = last_values(entries, [METRIC])[METRIC], step_seconds(entries)
    return None if miou is None or seconds is None else Outcome(run, miou, seconds)


def table(outcomes: Sequence[Outcome]) -> str:
    """Tabulate the results, best first.

    Args:
        outcomes: of all runs, that of the student alone among them.

    Returns:
        Markdown.
    """
    (alone,) = [one for one in outcomes if one.run.term is None]
    heads = ['loss', 'weight', 'tap (student / teacher)', 'mIoU', 'difference', 's a step', 'ratio']
    rows = [heads]
    for one in sorted(outcomes, key=lambda one: (-one.miou, one.run.name)):
        name, weight, tap = one.run.name, '', ''
        difference, ratio = '', ''
        if one is not alone:
            name, weight, tap = f'`{name}`', f'{one.run.weight:g}', f'`{one.run.tap}`'
            difference, ratio = f'{one.miou - alone.miou:+.2f}', f'{one.seconds / alone.seconds:.2f}'
        rows.append([name, weight, tap, f'{one.miou:.2f}', difference, f'{one.seconds:.3f}', ratio])
    return markdown_table(rows, aligned=False)


def page(outcomes: Sequence[Outcome], settings: Settings, failed: Sequence[str] = ()) -> str:
    """Write the page around the table.

    Args:
        outcomes: of all runs that ended.
        settings: what all share.
        failed: names of those that did not.

    Returns:
        Markdown, with :data:`MARK` as its last line.
    """
    options = ''.join(
        f' {name} {value}'
        for name, value, usual in (
            ('--iterations', settings.iterations, USUAL.iterations),
            ('--batch', settings.batch, USUAL.batch),
            ('--seed', settings.seed, USUAL.seed),
        )
        if value != usual
    )
    missing = f'\nFailed: {", ".join(failed)}.\n' if failed else ''
    return f"""# Each loss alone, on CamVid

**One seed, {settings.iterations} iterations: differences of a few points are chance.** In [the study over three
seeds](camvid.md) the same method lay up to seven points apart. The table shows that every loss trains at its
default weight, roughly which way it pulls so early, and what a step costs. It is no ranking of methods: most
weights were published for schedules a hundred times as long, for other taps, and beside other terms.

Student: FCN on ResNet-18 at a quarter of the width, from scratch, {settings.batch} crops of 180x240 a step, seed
{settings.seed}: the same data order, initial weights and dropout in all runs. Teacher: PSPNet on ResNet-18 at half
the width. Both are those of the study, the schedule is shortened. mIoU in per cent on the 101 validation images
at 480x360. Settings, taps and connectors are those of `configs/_base_/distill`, the weights are the defaults of
the losses, which [the cheat sheet](../methods.md) explains. Seconds: the median over the log, data and optimiser
included, one run at a time on one machine; their ratio to the student alone says more than they do. The
teacher's forward is in all rows but that of the student alone.

{table(outcomes)}
{missing}
```bash
python tools/train.py configs/camvid_small/{TEACHER} \\
    --work-dir {CHECKPOINT.parent.as_posix()}
python tools/compare_losses.py{options}
```

{MARK}
"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Train a small student with each loss alone and tabulate the results.')
    parser.add_argument('--teacher', type=Path, default=USUAL.teacher, metavar='CHECKPOINT', help='of the teacher')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='these losses, and the student alone')
    parser.add_argument('--iterations', type=int, default=USUAL.iterations)
    parser.add_argument('--batch', type=int, default=USUAL.batch, help='images of a step')
    parser.add_argument('--seed', type=int, default=USUAL.seed)
    parser.add_argument('--work-dir', type=Path, default=USUAL.work_dir, help='a folder a run is made in it')
    parser.add_argument('--out', type=Path, help='the page (default, without --only: docs/results/losses-camvid.md)')
    args = parser.parse_args(argv)
    known = losses()
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        parser.error(f'`--only` must name registered losses that serve segmentation, got {unknown}. There are {known}.')
    if args.iterations < 1:
        parser.error(f'`--iterations` must be at least 1, got {args.iterations}.')
    if not args.teacher.is_file():
        parser.error(f'`--teacher` must be a file, got {str(args.teacher)!r}. Train it: configs/camvid_small/{TEACHER}')
    if args.out is None and args.only is None:
        args.out = OUT
    args.names = [name for name in known if args.only is None or name in args.only]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print and write the table; return the exit code."""
    compat.install()
    args: Any = parse_args(argv)
    settings = Settings(args.teacher, args.iterations, args.batch, args.seed, args.work_dir)
    runs = [Run(ALONE), *(run_of(name) for name in args.names)]
    outcomes: list[Outcome] = []
    failed: list[str] = []
    for number, run in enumerate(runs, 1):
        found = outcome(run, settings.work_dir / run.folder) if train(run, settings) else None
        stage = f'[{number}/{len(runs)}] {run.name}'
        if found is None:
            log = settings.work_dir / run.folder / 'stdout.log'
            print(f'{stage}: FAILED, see {os.path.relpath(log)}', flush=True)
            if run.term is None:
                return 1
            failed.append(run.name)
            continue
        outcomes.append(found)
        print(f'{stage}: {METRIC} {found.miou:.2f}, {found.seconds:.3f} s a step', flush=True)
    if args.out is not None:
        kept = args.out.read_text(encoding='utf-8').partition(f'{MARK}\n')[2] if args.out.is_file() else ''
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, page(outcomes, settings, failed) + kept)
    print('\n' + table(outcomes))
    if failed:
        print(f'\ncompare_losses.py: failed: {", ".join(failed)}', file=sys.stderr)
    return int(bool(failed))


if __name__ == '__main__':
    raise SystemExit(main())
