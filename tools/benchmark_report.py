"""What ``benchmark.py`` measured, as tables, targets, charts and a page of the documentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import benchmark_kinds as kinds
import matplotlib.pyplot as plt
from benchmark_measure import spread
from benchmark_pairs import BARE, MMRAZOR, OURS, STUDENT

from mmstructkd.evaluation.tables import markdown_table
from mmstructkd.files import write_whole

__all__ = ['draw', 'ratio', 'targets', 'text', 'write_page']

BEGIN, END = '<!-- benchmark: begin -->', '<!-- benchmark: end -->'
#: What is reached on a 2-core CPU with AMX: words, pair, arm, the arm it is divided by, at most.
RATIOS = (
    ('CWD, fp32, over student + bare teacher forward', 'pspnet_cwd', OURS, BARE, 1.03),
    ('CWD, fp32, over mmrazor', 'pspnet_cwd', OURS, MMRAZOR, 0.97),
    ('CWD, bf16 teacher, over mmrazor', 'pspnet_cwd', 'bf16', MMRAZOR, 0.68),
    ('StructKD (PI, PA, HO), bf16 teacher, over student alone', 'pspnet_structkd', 'bf16', STUDENT, 1.6),
    ('RetinaNet FPN terms, fp32, over mmrazor', 'retinanet_cwd', OURS, MMRAZOR, 0.80),
    ('CWD, cached teacher, over student alone', 'pspnet_cwd', 'cached', STUDENT, 1.10),
)
#: Loss, size, what is compared, at most.
LOSSES = (
    ('PA at 8192 nodes over the dense graph, time', 'pairwise_affinity_loss', 8192, 'median', 0.1),
    ('PA at 8192 nodes over the dense graph, extra memory', 'pairwise_affinity_loss', 8192, 'extra_bytes', 0.05),
    ('ICSD at 150 classes over loops, time', 'interclass_similarity_loss', 150, 'median', 0.02),
)


def ratio(timed: dict[str, Any], name: str, base: str) -> dict[str, Any]:
    """How long an arm takes over another, turn by turn: both met the same moods of the machine.

    Args:
        timed: what was measured, by arm.
        name: the arm.
        base: what it is divided by.

    Returns:
        Median and quartiles of the ratios.
    """
    return spread([one / two for one, two in zip(timed[name]['runs'], timed[base]['runs'], strict=True)])


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare with what is aimed at on a CPU, as far as it was measured.

    Args:
        results: of one run.

    Returns:
        For each target what it is, the limit, the ratio and whether it is met.
    """
    found: list[dict[str, Any]] = []
    if results['quick'] or results['environment']['cuda']:
        return found
    for words, pair, arm, base, limit in RATIOS:
        for entry in results.get('pairs', ()):
            timed = entry['arms']
            if entry['pair'] == pair and entry['precision'] == 'fp32' and arm in timed and base in timed:
                found.append(_target(words, limit, ratio(timed, arm, base)))
    for words, name, size, key, limit in LOSSES:
        for entry in results.get('losses', ()):
            if entry['loss'] == name and entry['size'] == size:
                if key == 'median':
                    over = ratio(entry, 'ours', 'plain')
                else:
                    over = spread([entry['ours'][key] / entry['plain'][key]])
                found.append(_target(words, limit, over))
    return found


def _target(words: str, limit: float, over: dict[str, Any]) -> dict[str, Any]:
    return dict(
        what=words,
        limit=limit,
        ratio=over['median'],
        low=over['low'],
        high=over['high'],
        met=over['median'] <= limit,
    )


def _seconds(value: float) -> str:
    return f'{value:.3f}' if value >= 0.1 else f'{value * 1000:.2f} ms'


def _mebibytes(value: float) -> str:
    return f'{value / 2**20:.1f}' if value < 100 * 2**20 else f'{value / 2**20:.0f}'


def _over(timed: dict[str, Any], name: str, base: str) -> str:
    return f'{ratio(timed, name, base)["median"]:.2f}' if base in timed else '-'


def _pair(entry: dict[str, Any]) -> str:
    """The table of a pair."""
    timed = entry['arms']
    rows = []
    for name, arm in timed.items():
        rows.append(
            (
                name,
                _seconds(arm['median']),
                f'{_seconds(arm["low"])} to {_seconds(arm["high"])}',
                _seconds(arm['teacher']['median']) if 'teacher' in arm else '-',
                *(_over(timed, name, base) for base in (STUDENT, BARE, MMRAZOR)),
                _mebibytes(arm['held_bytes'] + arm['extra_bytes']),
            )
        )
    columns = (
        'arm',
        'seconds a step',
        'quartiles',
        'teacher',
        'over student alone',
        'over student + teacher',
        'over mmrazor',
        'peak MiB',
    )
    height, width = entry['size']
    head = f'{entry["title"]}: {entry["batch_size"]} images of {height}x{width}, {entry["precision"]}'
    notes = [f'{arm}: {reason}.' for arm, reason in entry['skipped'].items()]
    if 'terms' in entry:
        terms = entry['terms']['median']
        share = 100 * terms / timed[OURS]['median']
        notes.insert(0, f'The terms take {_seconds(terms)}, {share:.1f} % of the step of {OURS}.')
    return '\n\n'.join([f'**{head}**', markdown_table([columns, *rows], aligned=False), *notes])


def _memory(ours: dict[str, Any], plain: dict[str, Any]) -> tuple[str, str, str]:
    """Both memories and their ratio, where they were counted."""
    if 'extra_bytes' not in ours:
        return '-', '-', '-'
    one, two = ours['extra_bytes'], plain['extra_bytes']
    return _mebibytes(one), _mebibytes(two), f'{one / max(two, 1):.3f}'


def _losses(results: dict[str, Any]) -> str:
    """The table of losses."""
    rows = []
    for entry in results['losses']:
        ours, plain = entry['ours'], entry['plain']
        rows.append(
            (
                f'`{entry["loss"]}`',
                f'{entry["size"]} {entry["unit"]}',
                _seconds(ours['median']),
                _seconds(plain['median']),
                f'{ratio(entry, "ours", "plain")["median"]:.3f}',
                *_memory(ours, plain),
                f'{entry["gradient_differs"]:.0e}',
            )
        )
    columns = (
        'loss',
        'size',
        'seconds',
        'plain',
        'ratio',
        'extra MiB',
        'plain',
        'ratio',
        'gradients differ by',
    )
    return markdown_table([columns, *rows], aligned=False)


def _gradients(found: dict[str, Any]) -> str:
    """The table of what options change."""
    height, width = found['size']
    terms = list(next(iter(found['options'].values())))
    rows = [(name, *(f'{change[term]:.1e}' for term in terms)) for name, change in found['options'].items()]
    head = f'{found["config"]}: first batch, {found["images"]} images of {height}x{width}, at the first step'
    return f'**{head}**\n\n' + markdown_table([('option', *terms), *rows], aligned=False)


def _checks(found: Sequence[dict[str, Any]]) -> str:
    """The table of what looking for NaN adds."""
    rows = []
    for entry in found:
        over, (height, width) = entry['ratio'], entry['size']
        rows.append(
            (
                f'{entry["title"]}: {entry["batch_size"]} images of {height}x{width}, {entry["precision"]}',
                f'{entry["parameters"] / 1e6:.1f} M',
                _seconds(entry['step']['median']),
                _seconds(entry['check']['median']),
                f'{over["median"]:.4f}',
                f'{over["low"]:.4f} to {over["high"]:.4f}',
            )
        )
    heads = ('step', 'trained', 'seconds', 'check', 'with over without', 'quartiles')
    return markdown_table([heads, *rows], aligned=False)


def _kinds(entry: dict[str, Any]) -> str:
    """The table of what a step costs with each kind of teacher, for one task."""
    height, width = entry['size']
    title = f'{entry["task"]}: {entry["batch_size"]} images of {height}x{width}, {entry["precision"]}'
    heads = ('kind', 'trained', 'seconds a step', 'over the student alone', 'quartiles')
    return f'{title}\n\n' + markdown_table([heads, *kinds.rows(entry)], aligned=False)


def text(results: dict[str, Any]) -> str:
    """All tables of one run, in Markdown.

    Args:
        results: of one run.

    Returns:
        The text.
    """
    info = results['environment']
    versions = ', '.join(
        f'{name} {info[name]}'
        for name in ('torch', 'cuda', 'mmengine', 'mmcv', 'mmseg', 'mmdet', 'mmrazor')
        if info.get(name)
    )
    parts = [f'{info["device"]}, {info["cores"]} cores, {info["threads"]} threads; {versions}. `{results["command"]}`']
    if results['kind'] == 'gradients':
        parts.append(_gradients(results['gradients']))
    elif results['kind'] == 'losses':
        parts.append(_losses(results))
    elif results['kind'] == 'check':
        parts.append(_checks(results['checks']))
    elif results['kind'] == 'kinds':
        parts += [_kinds(entry) for entry in results['kinds']]
    else:
        parts += [_pair(entry) for entry in results['pairs']]
    if results['targets']:
        rows = [
            (
                t['what'],
                f'{t["limit"]:g}',
                f'{t["ratio"]:.3f}',
                f'{t["low"]:.3f} to {t["high"]:.3f}',
                'met' if t['met'] else '**not met**',
            )
            for t in results['targets']
        ]
        parts.append(markdown_table([('target', 'at most', 'measured', 'quartiles', ''), *rows], aligned=False))
    return '\n\n'.join(parts) + '\n'


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw bars of the pairs and of what options change, or lines of the losses over their sizes.

    Args:
        results: of one run.
        path: of the picture.
    """
    if results['kind'] == 'losses':
        _draw_losses(results, path)
        return
    if results['kind'] == 'gradients':
        _draw_gradients(results['gradients'], path)
        return
    if results['kind'] == 'check':
        _draw_checks(results['checks'], path)
        return
    if results['kind'] == 'kinds':
        _draw_kinds(results['kinds'], path)
        return
    entries = results['pairs']
    height = sum(len(entry['arms']) for entry in entries) * 0.3 + len(entries) * 0.8
    ratios = [max(len(entry['arms']), 1) for entry in entries]
    figure, axes = plt.subplots(
        len(entries), 1, figsize=(9, max(height, 2)), squeeze=False, layout='constrained', height_ratios=ratios
    )
    for axis, entry in zip(axes[:, 0], entries, strict=True):
        timed = entry['arms']
        base = STUDENT if STUDENT in timed else next(iter(timed))
        names = list(timed)[::-1]
        over = [ratio(timed, name, base) for name in names]
        middle = [r['median'] for r in over]
        below, above = [r['median'] - r['low'] for r in over], [r['high'] - r['median'] for r in over]
        colors = [
            '#888888' if name in (STUDENT, BARE) else '#c44e52' if name == MMRAZOR else '#4c72b0' for name in names
        ]
        axis.barh(names, middle, xerr=[below, above], color=colors, capsize=2)
        axis.set_title(f'{entry["title"]}, {entry["precision"]}', fontsize=9)
        axis.axvline(1, color='black', linewidth=0.5)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel('seconds a step over the student alone (median, quartiles)')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_gradients(found: dict[str, Any], path: Path) -> None:
    """A bar for each option and term, on a logarithmic scale."""
    options = list(found['options'])[::-1]
    terms = list(found['options'][options[0]])
    figure, axis = plt.subplots(figsize=(8, 0.4 * len(options) + 1), layout='constrained')
    for place, term in enumerate(terms):
        heights = [index + place / (len(terms) + 1) for index in range(len(options))]
        axis.barh(heights, [found['options'][o][term] for o in options], 1 / (len(terms) + 1), label=term, align='edge')
    axis.set_yticks([index + 0.4 for index in range(len(options))], options)
    axis.set_xscale('log')
    axis.set_xlabel("change of the student's gradient, relative")
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_checks(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar for each pair: what the check adds, in percent of the step without it."""
    names = [f'{entry["title"]}, {entry["precision"]}' for entry in found]
    over = [[100 * (entry['ratio'][key] - 1) for key in ('median', 'low', 'high')] for entry in found]
    figure, axis = plt.subplots(figsize=(8, 0.5 * len(names) + 1), layout='constrained')
    spreads = [[m - low for m, low, _ in over], [high - m for m, _, high in over]]
    axis.barh(names, [m for m, _, _ in over], xerr=spreads, color='#4c72b0', capsize=2)
    axis.set_xlabel('percent of a step (median, quartiles)')
    axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_kinds(found: Sequence[dict[str, Any]], path: Path) -> None:
    """A bar for each kind of teacher, one panel a task."""
    heights = [len(entry['kinds']) for entry in found]
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(8, 0.3 * sum(heights) + len(found)),
        squeeze=False,
        layout='constrained',
        height_ratios=heights,
    )
    for axis, entry in zip(axes[:, 0], found, strict=True):
        over = {name: kind['ratio'] for name, kind in reversed(entry['kinds'].items())}
        spreads = [[r['median'] - r['low'] for r in over.values()], [r['high'] - r['median'] for r in over.values()]]
        axis.barh(list(over), [r['median'] for r in over.values()], xerr=spreads, color='#4c72b0', capsize=2)
        axis.axvline(1, color='black', linewidth=0.5)
        axis.set_title(f'{entry["task"]}, {entry["precision"]}', fontsize=9)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel('seconds a step over the student alone (median, quartiles)')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_losses(results: dict[str, Any], path: Path) -> None:
    """Time and extra memory over the size, one column a loss."""
    names = list(dict.fromkeys(entry['loss'] for entry in results['losses']))
    figure, axes = plt.subplots(len(names), 2, figsize=(8, 2 * len(names)), squeeze=False, layout='constrained')
    for row, name in zip(axes, names, strict=True):
        entries = [entry for entry in results['losses'] if entry['loss'] == name]
        sizes = [entry['size'] for entry in entries]
        for axis, key, scale, label in zip(row, ('median', 'extra_bytes'), (1, 2**20), ('s', 'MiB'), strict=True):
            for kind, color in (('ours', '#4c72b0'), ('plain', '#c44e52')):
                axis.plot(
                    sizes,
                    [entry[kind].get(key, float('nan')) / scale for entry in entries],
                    'o-',
                    color=color,
                    label=kind,
                )
            axis.set_xscale('log', base=2)
            axis.set_yscale('log')
            axis.set_ylabel(label, fontsize=8)
            axis.set_xlabel(entries[0]['unit'], fontsize=8)
            axis.set_title(name, fontsize=8)
            axis.tick_params(labelsize=7)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_page(page: Path, runs: Sequence[dict[str, Any]]) -> None:
    """Write the tables of some runs between the marks of a page.

    Args:
        page: the page; what stands outside the marks stays.
        runs: what was measured.

    Raises:
        ValueError: the page has no marks.
    """
    old = page.read_text(encoding='utf-8')
    if BEGIN not in old or END not in old:
        raise ValueError(f'benchmark: {str(page)!r} must have the lines {BEGIN} and {END}, got none.')
    parts = []
    for run in runs:
        what = {
            'pairs': 'A step',
            'losses': 'Each loss alone',
            'gradients': 'What the options change',
            'check': 'What looking for NaN adds',
            'kinds': 'A step with each kind of teacher',
        }[run['kind']]
        parts.append(f'## {what}: {run["environment"]["device"]}\n\n{text(run)}')
    before, rest = old.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    write_whole(page, f'{before}{BEGIN}\n\n' + '\n'.join(parts) + f'\n{END}{after}')
