"""Write docs/methods.md, the cheat sheet of losses and connectors, from the registry and the docstrings.

Nothing is written twice: formula, invariances, cost and the differences between
a paper and its code are taken from where they are stated, sentence by sentence.
``--check`` writes nothing and fails where the file is not what would be written.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mmstructkd.functional as functional
from mmstructkd.evaluation.tables import markdown_table
from mmstructkd.files import write_whole
from mmstructkd.losses import DistillLoss
from mmstructkd.registry import MODELS

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'docs' / 'methods.md'
COMMAND = 'python tools/make_method_table.py'

TASKS = {'seg': 'segmentation', 'depth': 'depth', 'det': 'detection'}

HEADER = re.compile(r'(Args|Arguments|Attributes|Example|Examples|Note|Raises|Returns|Shape|Yields):$')
RULE = re.compile(r'=+( +=+)+$')
# A sentence ends with a full stop before a capital, code or a formula; not behind an abbreviation.
END = re.compile(r'(?<!e\.g\.)(?<!i\.e\.)(?<! al\.)(?<! cf\.)(?<=[.!?])\s+(?=[A-Z`:\'"$])')

#: What a sentence is about, by its words; the first that fits. What fits none explains the formula.
ABOUT = {
    'counts': r'\(``where=',
    'nothing new': r'^The gradient reaches ``student``( only)?(, once.*|, and ``temperature`` where that is a tensor)?'
    r'\.$|\bfor (the|its|their) (formula|parts)\b',
    'processes': r'^With several processes\b',
    'cost': r'\bO\(|\b[Tt]ime and memory\b|\bCosts? [a-z]',
    'invariance': r'\b(does|do) not change\b|\binvarian',
    'tap': r'^Taps? |^Needs |^For [a-z ]+: tap ',
    'weight': r'\bweights?\b[^.]*\d|\d[^.]*\bweights?\b|(?i:\b(default|published) weight)|\bloss_weight\b'
    r'|\bweight of\b',
    'difference': r'(?i:\bdiffers\b|\bdeparts\b|\bauthors\b|\breleased code\b|\bofficial\b|\bpaper\b|\bpublish'
    r"|\b(that|their|this|whose|its) code\b|\bre-implement)|^``'(code|paper|released_code)'``",
}
FOLLOWS = re.compile(r'^(It|Its|That|This|These|Those|They|Both|Here|There|Then)\b|^``\w+=')


@dataclass
class Notes:
    """A docstring, sorted.

    Attributes:
        summary: its first sentence.
        formulas: its ``.. math::`` blocks, each on one line, with the words that lead to it (mostly none).
        sentences: what it says before and between the sections, by subject.
        tables: simple tables, as rows of cells.
        code: its ``.. code-block::`` blocks.
        sections: text of ``Args``, ``Returns`` and the like.
        functions: last names of the functions that it refers to.
    """

    summary: str = ''
    formulas: list[tuple[str, str]] = field(default_factory=list)
    sentences: dict[str, list[str]] = field(default_factory=dict)
    tables: list[list[list[str]]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)


def split_sentences(text: str) -> list[str]:
    """Split running text into sentences, line breaks gone."""
    return [s.strip() for s in END.split(' '.join(text.split())) if s.strip()]


def subject(sentence: str, before: str = 'text', about: Mapping[str, str] = ABOUT) -> str:
    """Say what a sentence is about.

    Args:
        sentence: the sentence.
        before: what the one before it in the paragraph is about.
        about: what it may be about.

    Returns:
        A key of ``about``, or ``'text'``.
    """
    found = next((name for name, words in about.items() if re.search(words, sentence)), 'text')
    # "It has no margin." belongs to the sentence that says who has none.
    if found == 'text' and before in ('difference', 'weight') and FOLLOWS.match(sentence):
        return before
    return found


def read_table(block: str) -> list[list[str]]:
    """Read a simple table of reStructuredText into rows of cells, the head first."""
    lines = block.split('\n')
    columns = [match.span() for match in re.finditer('=+', lines[0])]
    starts = [start for start, _ in columns]
    ends = [*starts[1:], None]
    rows = [line for line in lines if not RULE.match(line.strip())]
    return [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in rows]


def read(docstring: str | None, about: Mapping[str, str] = ABOUT) -> Notes:
    """Sort a docstring of the style of this project.

    Args:
        docstring: the text; ``None``: nothing.
        about: what a sentence may be about.

    Returns:
        Its parts.
    """
    notes = Notes()
    blocks = [b for b in re.split(r'\n\s*\n', inspect.cleandoc(docstring or '')) if b.strip()]
    section, lead, in_code = None, '', False
    for number, block in enumerate(blocks):
        first = block.split('\n')[0]
        header = HEADER.match(first)
        if header:
            section = header[1]
            notes.sections[section] = inspect.cleandoc('\n' + '\n'.join(block.split('\n')[1:]))
            continue
        if in_code and first.startswith(' '):
            notes.code.append(inspect.cleandoc('\n' + block))
            continue
        in_code = first.startswith('.. code-block::')
        if section is not None and first.startswith(' '):
            notes.sections[section] += '\n\n' + inspect.cleandoc('\n' + block)
            continue
        section = None
        notes.functions += re.findall(r':func:`~?(?:[\w.]*\.)?(\w+)`', block)
        if first.startswith('.. math::'):
            notes.formulas.append((lead, ' '.join(block.removeprefix('.. math::').split())))
            lead = ''
        elif RULE.match(first.strip()):
            notes.tables.append(read_table(block))
        elif first.startswith('.. '):
            continue
        else:
            sentences = split_sentences(block)
            if number == 0:
                notes.summary, *sentences = sentences
            elif sentences[-1].endswith(','):
                lead = sentences.pop()
            topic = 'text'
            for sentence in sentences:
                topic = subject(sentence, topic, about)
                notes.sentences.setdefault(topic, []).append(sentence)
    for sentence in split_sentences(notes.sections.get('Returns', '').replace(':', ': ')):
        if subject(sentence) == 'cost':
            notes.sentences.setdefault('cost', []).append(sentence)
    return notes


def markdown(text: str) -> str:
    """Turn the roles of a docstring into Markdown, arXiv numbers into links."""
    text = re.sub(r':math:`([^`]*)`', r'$\1$', text)
    text = re.sub(r':\w+:`~?(?:[\w.]*\.)?(\w+)`', r'`\1`', text)
    text = text.replace('``', '`')
    return re.sub(r'(?<!\[)arXiv:(\d{4}\.\d{4,5})', r'[arXiv:\1](https://arxiv.org/abs/\1)', text)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay rows out as a Markdown table, the head first."""
    return markdown_table(rows, aligned=False).splitlines()


def registered(package: str) -> list[type]:
    """List the registered classes of a package of mmstructkd, by name."""
    MODELS.import_from_location()
    found = {
        name: kind
        for name, kind in MODELS.module_dict.items()
        if isinstance(kind, type) and kind.__module__.startswith(f'mmstructkd.{package}.')
    }
    return [found[name] for name in sorted(found)]


def losses() -> list[type[DistillLoss]]:
    """List the registered losses, by name."""
    return [kind for kind in registered('losses') if issubclass(kind, DistillLoss)]


def functions_of(kind: type, notes: Notes) -> dict[str, Notes]:
    """The functions that a loss calls: that of its own stem, and those its docstring names."""
    names = [kind.__module__.rpartition('.')[2] + '_loss', *notes.functions]
    found = {name: getattr(functional, name, None) for name in dict.fromkeys(names)}
    # Only a loss has a weight of its own; what a function says of weights is about its formula or its source.
    about = {name: words for name, words in ABOUT.items() if name != 'weight'}
    return {name: read(inspect.getdoc(f), about) for name, f in found.items() if inspect.isfunction(f)}


def default_weight(kind: type[DistillLoss]) -> float | None:
    """The weight of a loss that is built with no more than it needs; ``None`` if that is not to be found."""
    try:
        return kind().loss_weight
    except (TypeError, ValueError):
        # One that needs an argument: its signature, or the table of its presets.
        default = inspect.signature(kind).parameters['loss_weight'].default
        rows = [row for rows in read(inspect.getdoc(kind)).tables for row in rows if row[0] == 'loss_weight']
        cell = rows[0][1] if rows else ''
        number = default if isinstance(default, (int, float)) else cell
        return float(number) if re.fullmatch(r'[\d.e+-]+', str(number)) else None


def unique(sentences: Iterable[str]) -> list[str]:
    """Drop repeated sentences and begin each with a capital."""
    return list(dict.fromkeys(s[0].upper() + s[1:] for s in sentences))


def collect(every: Mapping[str, Notes], *subjects: str, label: bool = False) -> str:
    """Join what several docstrings say about some subjects.

    Args:
        every: docstrings, by the name of their function; ``''``: the loss.
        *subjects: keys of ``ABOUT``, or ``'text'``.
        label: begin what is a function's with its name.

    Returns:
        Running text; nothing is said twice.
    """
    said: list[str] = []
    parts = []
    for name, notes in every.items():
        new = [s for s in unique(s for key in subjects for s in notes.sentences.get(key, [])) if s not in said]
        said += new
        if new:
            parts.append((f'``{name}``: ' if label and name else '') + ' '.join(new))
    return ' '.join(parts)


def tasks_of(kind: type) -> str:
    """Name the tasks of a loss."""
    return ', '.join(TASKS.get(task, task) for task in getattr(kind, 'tasks', ()))


def weight_of(kind: type[DistillLoss]) -> str:
    """Print the default weight of a loss."""
    weight = default_weight(kind)
    return 'none' if weight is None else f'{weight:g}'


def formula_lines(notes: Notes) -> list[str]:
    """Print the formulas of a docstring.

    Fences, not dollars: Markdown would read the backslashes between those first.
    """
    lines = []
    for lead, formula in notes.formulas:
        lines += [markdown(lead), ''] if lead else []
        lines += ['```math', formula, '```', '']
    return lines


def loss_section(kind: type[DistillLoss]) -> list[str]:
    """Describe one loss.

    Args:
        kind: its class.

    Returns:
        Lines of Markdown.
    """
    notes = read(inspect.getdoc(kind))
    called = functions_of(kind, notes)
    shown = {name: part for name, part in called.items() if part.formulas and name.endswith('_loss')}
    several = len(shown) + bool(notes.formulas) > 1
    everything = {'': notes, **called}
    lines = [f'### {kind.__name__}', '', markdown(notes.summary), '']
    lines += formula_lines(notes)
    own = collect({'': notes}, 'text') if notes.formulas or not shown else ''
    lines += [markdown(own), ''] if own else []
    for name, part in shown.items():
        lines += [f'`F.{name}`:', ''] if several else []
        lines += formula_lines(part)
        explained = collect({name: part}, 'text')
        lines += [markdown(explained), ''] if explained else []
    for code in notes.code:
        lines += ['```python', code, '```', '']
    for rows in notes.tables:
        lines += [*table([[markdown(cell) for cell in row] for row in rows]), '']
    facts = {
        'Transfers': getattr(kind, 'transfers', ''),
        'Tasks': tasks_of(kind),
        'Tap': collect({'': notes}, 'tap'),
        'Counts': collect({'': notes}, 'counts'),
        'Does not change': collect(everything, 'invariance', label=several),
        'Distributed': collect({'': notes}, 'processes'),
        'Cost': collect(everything, 'cost', label=several),
        'Default weight': ' '.join([f'{weight_of(kind)}.', collect({'': notes}, 'weight')]).strip(),
        'Paper and code': collect({**shown, '': notes}, 'difference', label=several),
        'Function': ', '.join(f'`F.{name}`' for name in called),
        'Source': getattr(kind, 'paper', ''),
    }
    lines += [f'- **{name}:** {markdown(value)}' for name, value in facts.items() if value]
    return [*lines, '']


#: Packages of registered parts beside the losses, and what each is for.
PARTS = {
    'connectors': 'What stands between a tapped tensor and the loss: `connector=dict(...)` in a term, or a list '
    'of them, one after the other. Without any, a loss that needs equal widths gets a `ConvConnector` where they '
    'differ. The widths are those that the probe found.',
    'temperatures': 'What a loss that softens scores may have as its `temperature=dict(...)` instead of a number.',
    'memories': 'What a loss that compares with earlier batches keeps of them.',
    'critics': 'What judges whole maps for `HolisticLoss`, its `critic=dict(...)`.',
}


def part_table(package: str) -> list[str]:
    """Tabulate the registered classes of a package: name, what it does, source."""
    kinds = registered(package)
    rows = [['name', 'what it does', 'source']]
    for kind in kinds:
        summary = markdown(read(inspect.getdoc(kind)).summary)
        rows.append([f'`{kind.__name__}`', summary, markdown(getattr(kind, 'paper', ''))])
    if package == 'connectors':
        works_on = [
            'both networks, all levels' if getattr(k, 'joint', False) else 'the student, each level' for k in kinds
        ]
        rows = [[*row[:2], cell, row[2]] for row, cell in zip(rows, ['works on', *works_on], strict=True)]
    return table(rows)


def page() -> str:
    """Return the cheat sheet.

    Returns:
        Markdown.
    """
    kinds = losses()
    overview = [['loss', 'transfers', 'tasks', 'default weight', 'source']]
    for kind in kinds:
        name = kind.__name__
        overview.append(
            [
                f'[`{name}`](#{name.lower()})',
                getattr(kind, 'transfers', ''),
                tasks_of(kind),
                weight_of(kind),
                markdown(getattr(kind, 'paper', '')),
            ]
        )
    lines = [
        '# Methods',
        '',
        f'Made from the docstrings by `{COMMAND}`: edit those, not this page. A config writes each name with',
        "its scope, `type='mmstructkd.ChannelwiseKLLoss'`. `F` is `mmstructkd.functional`.",
        '',
        'Shorthand: B images, C channels or classes, D features, H x W the grid, N = H W its positions; superscripts s',
        'and t are student and teacher. Losses are means over what counts (labelled, inside the image) unless stated.',
        '',
        '## Overview',
        '',
        *table(overview),
        '',
        '## Losses',
        '',
    ]
    for kind in kinds:
        lines += loss_section(kind)
    for package, purpose in PARTS.items():
        if registered(package):
            lines += [f'## {package.capitalize()}', '', purpose, '', *part_table(package), '']
    return '\n'.join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description='Write the cheat sheet of losses and connectors.')
    parser.add_argument('--out', type=Path, default=OUT, help='the file (default: docs/methods.md)')
    parser.add_argument('--check', action='store_true', help='write nothing; fail where the file is not up to date')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the page; return the exit code."""
    args: Any = parse_args(argv)
    text = page()
    there = args.out.read_text(encoding='utf-8') if args.out.is_file() else ''
    if not args.check:
        write_whole(args.out, text)
        print(f'{args.out}: {"as it was" if text == there else "written"}, {len(losses())} losses.')
        return 0
    if text == there:
        return 0
    print(f'{args.out} is not what the docstrings say. Run: {COMMAND}', file=sys.stderr)
    return 1


if __name__ == '__main__':
    raise SystemExit(main())
