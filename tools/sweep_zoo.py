"""Distil zoo configs for one step each, and write down what works.

Each config runs in a process of its own, with random weights, nothing
downloaded, a time and a memory limit:

1. a plain training step on a synthetic batch;
2. the same step distilled, with the same architecture as teacher, tapped where
   its kind is usually tapped.

Results go to a JSON file after each config; what stands there is not run again,
so that a sweep can be interrupted, and ``--rerun failed`` repeats only what did
not work. The table is printed at the end, and ``--table`` writes it as Markdown.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import importlib
import importlib.util
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmstructkd.evaluation.tables import markdown_table
from mmstructkd.files import write_whole

SCOPES = ('mmseg', 'mmdet')
RESULT = 'SWEEP '
#: Sizes below that of training at which a step is tried first; one that the network takes is enough.
SMALL = {'seg': ((64, 128), (128, 256)), 'depth': ((64, 128), (128, 256)), 'det': ((128, 192), (256, 320))}
MIDDLE = ((320, 320), (512, 512))
BATCH = 2

#: Words of a config's name, from light to heavy: the first that occurs decides.
WEIGHTS = (
    (r'x101|r101|r152|hrnetv2p?[-_]w(40|48)|[-_](xl|xlarge|huge|l|large|x)[-_]|s101|r2-101|(?<!x)b[4-7][-_]|12gf', 60),
    (r'[-_](b|base|m|medium)[-_]|w32|(?<!x)b3[-_]|8\.0gf|6\.4gf', 30),
    (r'r50|r2-50|s50|swin-s|[-_](s|small)[-_]|d53|dla34', 20),
    (r'r18|r34|mobilenet|[-_](t|tiny|nano|n)[-_]|w18|b0[-_]|400mf|regnetx-400|hr18', 5),
)
EXTRAS = ('ms|mstrain', 'lsj', 'amp', 'dconv|dcn|mdconv', 'iter', 'caffe', 'semi', 'tta', 'cityscapes|lvis|voc')


# --- which configs -------------------------------------------------------------------------------------------


def config_root(scope: str) -> Path:
    """Folder of the configs that come with mmseg or mmdet."""
    spec = importlib.util.find_spec(scope)
    if spec is None or spec.origin is None:
        raise SystemExit(f'sweep_zoo: {scope} must be installed.')
    return Path(spec.origin).parent / '.mim' / 'configs'


def weight_of(name: str) -> tuple[int, int, str]:
    """How heavy a config is by its name, to try the cheap ones first."""
    padded = f'-{name}-'
    weight = next((value for pattern, value in WEIGHTS if re.search(pattern, padded)), 15)
    return (weight + 2 * sum(bool(re.search(extra, name)) for extra in EXTRAS), len(name), name)


def choose(scope: str, most: int, folders: Sequence[str] = ()) -> list[list[str]]:
    """The lightest configs of each folder that train a model, as ``scope::folder/name.py``.

    Args:
        scope: ``'mmseg'`` or ``'mmdet'``.
        most: how many of a folder.
        folders: only these; empty: all.

    Returns:
        The configs of each folder, the lightest first.
    """
    root = config_root(scope)
    chosen = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and path.name != '_base_'):
        if folders and folder.name not in folders:
            continue
        found = []
        for path in sorted(folder.glob('*.py'), key=lambda path: weight_of(path.stem)):
            if len(found) == most:
                break
            if _trains_a_model(path):
                found.append(f'{scope}::{folder.name}/{path.name}')
        chosen.append(found or [f'{scope}::{folder.name}/'])
    return chosen


def _trains_a_model(path: Path) -> bool:
    """Whether a config has a model and data to train it with."""
    from mmengine.config import Config

    try:
        cfg = Config.fromfile(path)
    except Exception as err:  # whatever a config of the zoo runs into: it is no candidate, another one of its folder is
        print(f'{path.parent.name}/{path.name} cannot be read: {first_line(err)}', file=sys.stderr)
        return False
    return cfg.get('model') is not None and cfg.get('train_dataloader') is not None


# --- one config, in a process of its own -----------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """An exception in one line, with the place in the networks' code where it left."""
    text = (str(error).strip().splitlines() or [''])[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if '/mm' in frame.filename]
    place = ''
    if frames and type(error).__module__.split('.')[0] != 'mmstructkd':
        place = f' ({Path(frames[-1].filename).name}:{frames[-1].lineno})'
    return f'{type(error).__name__}: {text[:300]}{place}'


def taps_of(network: Any) -> list[dict[str, Any]]:
    """Where a network of its kind is tapped: the places to try, in order, as configs of a term.

    Segmentors at their classifier; detectors at all levels of the neck; what
    has neither at its backbone.
    """
    names = dict(network.named_modules())
    pairwise = {'type': 'mmstructkd.PairwiseAffinityLoss', 'loss_weight': 10.0, 'max_side': 16}
    channel = {'type': 'mmstructkd.ChannelwiseKLLoss', 'loss_weight': 1.0}
    found: list[dict[str, Any]] = []
    head = getattr(network, 'decode_head', None)
    if head is not None:
        prefix = f'decode_head.{len(head) - 1}' if hasattr(head, '__len__') else 'decode_head'
        first = 'decode_head.0' if hasattr(head, '__len__') else 'decode_head'
        for start in dict.fromkeys((prefix, first)):
            if names.get(f'{start}.pixel_decoder') is not None:  # its classes are those of queries, not of pixels
                found.append({'tap': f'{start}.pixel_decoder[0]', 'loss': channel})
            for name in ('conv_seg', 'cls_seg', 'fc_seg'):
                if names.get(f'{start}.{name}') is not None:
                    found.append({'tap': f'{start}.{name}', 'loss': {'type': 'mmstructkd.PixelwiseKLLoss'}})
    if getattr(network, 'neck', None) is not None:
        found.append({'tap': 'neck[*]', 'loss': channel})
        found.append({'tap': 'neck', 'loss': channel})
    found.append({'tap': 'backbone[*]', 'loss': channel})
    found.append({'tap': 'backbone', 'loss': pairwise})
    return found


def _prepared(reference: str) -> Any:
    """Read a config as ``scope::folder/name.py`` or a path."""
    from mmengine.config import Config

    from mmstructkd import compat

    compat.install()
    path = reference
    if '::' in reference:
        scope, _, inner = reference.partition('::')
        path = str(config_root(scope) / inner)
    cfg = Config.fromfile(path)
    named = cfg.get('model', {}).get('teacher_config')
    if '::' in reference and isinstance(named, str) and not Path(named).exists():
        # mmdet's own distilling detectors name their teacher from the root of its repository
        cfg.model.teacher_config = str(config_root(scope) / named.removeprefix('configs/'))
    return cfg


def _step(model: Any, batch: Mapping[str, Any], cfg: Any) -> dict[str, float]:
    """Forward, backward and one update; returns the losses."""
    import torch

    from mmstructkd.tasks.batches import training_info

    with training_info(cfg):
        total, logs = model.parse_losses(model(**batch, mode='loss'))
    total.backward()
    if not bool(torch.isfinite(total)):
        raise FloatingPointError(f'the loss is {float(total.detach())}')
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            raise FloatingPointError('a gradient is not finite')
    torch.optim.SGD(parameters, lr=1e-4).step()
    return {name: float(value.detach()) for name, value in logs.items() if 'loss' in name}


def _sized(cfg: Any, size: tuple[int, int]) -> Any:
    """The model's config with its images at a size."""
    model = copy.deepcopy(cfg.model)
    for holder in (model, model.get('student', {})):
        preprocessor = holder.get('data_preprocessor')
        for part in (preprocessor, *((preprocessor or {}).get('batch_augments') or ())):
            if part is not None and part.get('size') is not None:
                part['size'] = size
    return model


def _plain(cfg: Any, report: dict[str, Any]) -> tuple[int, int]:
    """Build the network and train it one step; returns the size that worked."""
    from mmengine.model import BaseModel
    from mmengine.registry import MODELS

    from mmstructkd.tasks.batches import fixed_size, input_size, needs_of, synthetic_batch
    from mmstructkd.tasks.targets import task_of

    begin = time.monotonic()
    network: BaseModel = MODELS.build(copy.deepcopy(cfg.model))
    try:
        network.init_weights()
    except AttributeError as err:  # some initialisers exist only where there are weights to read
        report['init'] = first_line(err)
    network.train()
    report['model'] = type(network).__name__
    report['parameters'] = sum(parameter.numel() for parameter in network.parameters())
    report['build_s'] = round(time.monotonic() - begin, 1)
    whole = input_size(cfg, network)
    tries = [*SMALL[task_of(network)], fixed_size(network) or whole, *MIDDLE]
    sizes = [*sorted({size for size in tries if math.prod(size) < math.prod(whole)}, key=math.prod), whole]
    needs = needs_of(network, cfg)
    preprocessor = network.data_preprocessor
    for place, size in enumerate(sizes):
        try:
            for part in (preprocessor, *(getattr(preprocessor, 'batch_augments', None) or ())):
                if getattr(part, 'size', None) is not None:
                    part.size = size
            batch = synthetic_batch(network, size, BATCH, needs=needs)
            begin = time.monotonic()
            report['losses'] = _step(network, batch, cfg)
        except Exception as err:  # the network may need a larger image; the last size decides
            network.zero_grad(set_to_none=True)
            report['plain'] = first_line(err)
            report['trace'] = traceback.format_exc()[-3000:]
            if place == len(sizes) - 1:
                raise
        else:
            report.pop('trace', None)
            report['plain'] = 'ok'
            report['plain_s'] = round(time.monotonic() - begin, 1)
            report['size'] = list(size)
            return size
    raise AssertionError('unreachable: there is always a size')


def _distilled(cfg: Any, size: tuple[int, int], report: dict[str, Any], taps: Sequence[str]) -> None:
    """Distil the network from one of its own kind for one step."""
    from mmengine.registry import MODELS

    from mmstructkd.compat import without_pretrained
    from mmstructkd.errors import TapError
    from mmstructkd.tasks.batches import needs_of, synthetic_batch

    model = _sized(cfg, size)
    network = MODELS.build(copy.deepcopy(model))
    candidates = taps_of(network)
    if taps:
        candidates = [{'tap': tap, 'loss': {'type': 'mmstructkd.PairwiseAffinityLoss', 'max_side': 16}} for tap in taps]
    del network
    for place, term in enumerate(candidates):
        report['tap'] = term['tap']
        config = {
            'type': 'mmstructkd.StructuredDistiller',
            'student': model,
            'teacher': {'config': {'model': model, 'default_scope': cfg.get('default_scope')}, 'allow_random': True},
            'terms': {'probe': term},
        }
        begin = time.monotonic()
        try:
            with without_pretrained():
                distiller = MODELS.build(config)
                if 'init' not in report:
                    distiller.init_weights()
            distiller.train()
            report['distiller_build_s'] = round(time.monotonic() - begin, 1)
            batch = synthetic_batch(distiller, size, BATCH, needs=needs_of(distiller.student, cfg))
            begin = time.monotonic()
            losses = _step(distiller, batch, cfg)
            report['levels'] = [
                f'{level.student_tap} {"x".join(map(str, level.student))}' for level in distiller.terms['probe'].levels
            ]
            value = losses['loss_kd_probe']
            if value == 0:
                raise FloatingPointError('the term is 0')
        except TapError as err:  # a neck of one map has no levels, and not every head has a classifier
            report['distilled'] = first_line(err)
            report['trace'] = traceback.format_exc()[-3000:]
            report.setdefault('tried', []).append([term['tap'], report['distilled']])
            if place == len(candidates) - 1:
                raise
        else:
            report.pop('trace', None)
            report['distilled'] = 'ok'
            report['distilled_s'] = round(time.monotonic() - begin, 1)
            report['value'] = value
            return


def run_one(reference: str, taps: Sequence[str], plain_only: bool = False) -> dict[str, Any]:
    """Try one config in this process.

    Args:
        reference: path of a config, or ``scope::folder/name.py``.
        taps: of the term; empty: chosen by :func:`taps_of`.
        plain_only: leave the distilled step out.

    Returns:
        The report, plain values.
    """
    import torch
    from mmengine.logging import MMLogger
    from mmengine.registry import init_default_scope

    torch.set_num_threads(1)
    torch.manual_seed(0)
    report: dict[str, Any] = {'config': reference}
    stage = 'plain'
    try:
        if reference.endswith('/'):
            raise FileNotFoundError('no config of this folder that trains a model can be read here')
        cfg = _prepared(reference)
        MMLogger.get_instance('sweep_zoo', logger_name='mmengine', log_level='ERROR')
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        import mmstructkd.distillers  # noqa: F401  registers what the configs below name
        from mmstructkd.compat import without_pretrained
        from mmstructkd.teachers.loading import drop_pretrained

        drop_pretrained(cfg.model)
        with without_pretrained():
            size = _plain(cfg, report)
        stage = 'distilled'
        if not plain_only:
            _distilled(cfg, size, report, taps)
    except Exception as err:  # each kind of failure is a result
        report[stage] = first_line(err)
        report.setdefault('trace', traceback.format_exc()[-3000:])
    report['peak_gb'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return report


# --- many configs, one after another -----------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    """One thread, and no way out: a network that would download something fails at once."""
    names = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')
    nowhere = dict.fromkeys(('http_proxy', 'https_proxy', 'HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9')
    hubs = {'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_OFFLINE': '1', 'CUDA_VISIBLE_DEVICES': ''}
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get('PYTHONPATH')])])
    return {**os.environ, **dict.fromkeys(names, '1'), **nowhere, **hubs, 'PYTHONPATH': path}


def run_apart(
    reference: str, taps: Sequence[str], seconds: float, memory_gb: float, *, plain_only: bool = False, nice: int = 10
) -> dict[str, Any]:
    """Try one config in a process of its own.

    Args:
        reference: path of a config, or ``scope::folder/name.py``.
        taps: of the term; empty: chosen by its kind.
        seconds: time limit.
        memory_gb: limit of the memory it may ask for.
        plain_only: leave the distilled step out.
        nice: priority, 0 (as any) to 19 (only what nobody else wants).

    Returns:
        The report.
    """
    command = [sys.executable, str(Path(__file__).resolve()), '--one', reference, '--taps', *taps]
    command += ['--plain-only'] if plain_only else []

    def limit() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        most = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as at, Path(at, 'out').open('w+') as out, Path(at, 'err').open('w+') as errors:
        process = subprocess.Popen(
            command, stdout=out, stderr=errors, env=_environment(), preexec_fn=limit, start_new_session=True, cwd=at
        )
        try:
            process.wait(seconds)
            end = None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = f'no result after {seconds:g} s'
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith(RESULT)]
        report = json.loads(lines[-1][len(RESULT) :]) if lines else {'config': reference}
        if not lines:
            tail = errors.read().strip().splitlines()
            report['plain'] = end or f'ended with {process.returncode}: {tail[-1][:200] if tail else ""}'
    report['seconds'] = round(time.monotonic() - begin, 1)
    return report


def works(report: Mapping[str, Any]) -> bool:
    """Whether a config's plain step and its distilled one work."""
    return report.get('plain') == report.get('distilled') == 'ok'


def left(references: Iterable[str], done: Mapping[str, Mapping[str, Any]], rerun: str) -> list[str]:
    """Configs that are still to be run.

    Args:
        references: all of them.
        done: reports by config.
        rerun: ``'none'``, ``'failed'`` (distilled, though the plain step works),
            ``'plain'`` (whatever is not right) or ``'all'``.

    Returns:
        Those to run, in order.
    """

    def wanted(reference: str) -> bool:
        report = done.get(reference)
        if report is None or rerun == 'all':
            return True
        if rerun == 'failed':
            return report.get('plain') == 'ok' and report.get('distilled') != 'ok'
        return rerun == 'plain' and not works(report)

    return [reference for reference in references if wanted(reference)]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Reports by config, of a file that may not be there yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(path: Path, done: Mapping[str, Any]) -> None:
    """Write the reports, whole or not at all."""
    write_whole(path, json.dumps(done, indent=1, sort_keys=True))


# --- the table -------------------------------------------------------------------------------------------------


PAGE = """# One step of each zoo

`python tools/sweep_zoo.py --table docs/results/zoo.md`, with {versions}, on a CPU: the lightest config of each
folder of both zoos that trains here, from random weights, nothing downloaded, two images of noise with labels of
the kind that the config's pipeline loads, as small as the network takes them. First a plain training step; then the
same step distilled from a teacher of the same architecture with other random weights. A step counts if every loss
and gradient is finite and the term is above 0. That a network *learns* from its teacher is for [other
pages](camvid.md).

Segmentors are tapped at their classifier, or at the pixel decoder of those that classify queries; detectors at all
levels of their neck; the rest at all stages of the backbone.

"""


def outcome(report: Mapping[str, Any]) -> str:
    """What a row says about a config."""
    if report.get('plain') != 'ok':
        return f'not tried: {report.get("plain", "no result")}'
    return str(report.get('distilled', 'no result'))


def summary(done: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int, int, int]]:
    """By zoo: folders, those of which a config trains plainly, those of which all that do distil."""
    folders: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for reference, report in done.items():
        zoo, _, rest = reference.rpartition('::')
        folders.setdefault((zoo or 'own', rest.rpartition('/')[0] if zoo else reference), []).append(report)
    counts: dict[str, Counter] = {}
    for (zoo, _), reports in folders.items():
        trained = [report for report in reports if report.get('plain') == 'ok']
        counts.setdefault(zoo, Counter()).update(
            all=1, plain=bool(trained), distilled=bool(trained) and all(map(works, trained))
        )
    return [(zoo, count['all'], count['plain'], count['distilled']) for zoo, count in sorted(counts.items())]


def table(done: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the reports as Markdown.

    Args:
        done: reports by config.

    Returns:
        The counts, a row for each config that trains, a row for each that does
        not.
    """
    heads = ('zoo', 'folders', 'a plain step works', 'so does a distilled one')
    trained = {key: report for key, report in sorted(done.items()) if report.get('plain') == 'ok'}
    rows: list[tuple[Any, ...]] = [('config', 'network', 'input', 'tap', 'distilled')]
    for reference, report in trained.items():
        tap = f'`{report["tap"]}`' if report.get('tap') else '-'
        size = 'x'.join(map(str, report.get('size', ()))) or '-'
        rows.append((f'`{reference}`', report.get('model', '-'), size, tap, outcome(report)))
    parts = [markdown_table([heads, *summary(done)], aligned=False), markdown_table(rows, aligned=False)]
    others = {key: report for key, report in sorted(done.items()) if key not in trained}
    if others:
        reasons = [(f'`{key}`', report.get('plain', 'no result')) for key, report in others.items()]
        parts.append('Not tried, because a plain step does not work:')
        parts.append(markdown_table([('config', 'why'), *reasons], aligned=False))
    return '\n\n'.join(parts) + '\n'


def _versions() -> str:
    """What the steps ran on."""
    import torch

    named = {}
    for package in ('mmengine', 'mmcv', *SCOPES):
        named[package] = importlib.import_module(package).__version__
    return ', '.join(f'{name} {version}' for name, version in {**named, 'torch': torch.__version__}.items())


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Distil zoo configs for one step each.')
    parser.add_argument('configs', nargs='*', help="paths, or 'mmseg::folder/name.py'")
    parser.add_argument('--scope', choices=SCOPES, nargs='*', default=None, help='whole zoos, the lightest of a folder')
    parser.add_argument('--folders', nargs='*', default=(), help='only these folders of the zoos')
    parser.add_argument('--each', type=int, default=1, help='configs of a folder that train')
    parser.add_argument('--tries', type=int, default=3, help='configs to try for one that trains')
    parser.add_argument('--taps', nargs='*', default=(), help='taps of the term instead of those of the kind')
    parser.add_argument('--plain-only', action='store_true', help='only see which networks train at all')
    parser.add_argument('--results', type=Path, default=Path('work_dirs/zoo/results.json'), help='where results go')
    parser.add_argument('--rerun', choices=('none', 'failed', 'plain', 'all'), default='none')
    parser.add_argument('--jobs', type=int, default=1, help='configs at the same time')
    parser.add_argument('--seconds', type=float, default=600, help='time limit of a config')
    parser.add_argument('--memory', type=float, default=12, help='memory limit of a config in GB')
    parser.add_argument('--nice', type=int, default=10, help='priority of the processes, 0 to 19 (lowest)')
    parser.add_argument('--table', type=Path, help='also write the results as Markdown')
    parser.add_argument('--list', action='store_true', help='only print the configs')
    parser.add_argument('--one', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.each, args.tries, args.jobs) < 1 or min(args.seconds, args.memory) <= 0:
        parser.error('--each, --tries, --jobs, --seconds and --memory must be above 0')
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Sweep.

    Args:
        argv: arguments; ``None``: the command line's.

    Returns:
        0 where every config whose plain step works can be distilled.
    """
    args = parse_args(argv)
    if args.one:
        report = run_one(args.one, args.taps, args.plain_only)
        print(RESULT + json.dumps(report), flush=True)
        return 0
    groups = [[config] for config in args.configs]
    for scope in args.scope if args.scope is not None else (() if groups else SCOPES):
        groups += choose(scope, args.each * args.tries, args.folders)
    groups.sort(key=lambda group: weight_of(Path(group[0]).stem))
    if args.list:
        print('\n'.join(' '.join(group) for group in groups))
        return 0
    done, lock = read_results(args.results), threading.Lock()
    repeat = set(left(list(done), done, args.rerun))

    def sweep(group: Sequence[str]) -> None:
        """Run configs of a group until enough of them train."""
        trained = 0
        for reference in group:
            if trained == args.each:
                break
            if reference not in done or reference in repeat:
                options = {'plain_only': args.plain_only, 'nice': args.nice}
                report = run_apart(reference, args.taps, args.seconds, args.memory, **options)
                with lock:
                    done[reference] = report
                    write_results(args.results, done)
                    print(f'{reference}: {outcome(report)} [{report["seconds"]} s]', flush=True)
            trained += done[reference].get('plain') == 'ok'

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(sweep, groups))
    shown = {reference: done[reference] for group in groups for reference in group if reference in done}
    print(table(shown))
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.table, PAGE.format(versions=_versions()) + table(done))
    return 0 if all(works(report) or report.get('plain') != 'ok' for report in done.values()) else 1


if __name__ == '__main__':
    sys.exit(main())
