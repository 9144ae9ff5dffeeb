"""The cheat sheet: nothing registered is missing, and it says what the docstrings say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / 'docs' / 'methods.md'


def load():
    spec = importlib.util.spec_from_file_location('make_method_table', ROOT / 'tools' / 'make_method_table.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = load()
LOSSES = tool.losses()


def test_page_is_what_the_script_writes(capsys):
    assert tool.main(['--check']) == 0, capsys.readouterr().err


@pytest.mark.parametrize('kind', LOSSES, ids=lambda kind: kind.__name__)
def test_every_registered_loss_is_on_the_page_and_says_what_a_reader_needs(kind):
    text = PAGE.read_text(encoding='utf-8')
    name = kind.__name__
    assert f'| [`{name}`](#{name.lower()}) |' in text
    section = text.split(f'### {name}\n')[1].split('\n### ')[0].split('\n## ')[0]
    assert '```math' in section, 'a formula, in the docstring of the loss or of the function it calls'
    assert kind.tasks, 'tasks'
    assert set(kind.tasks) <= set(tool.TASKS)
    for fact in ('Transfers', 'Tasks', 'Cost', 'Default weight'):
        assert f'- **{fact}:** ' in section
    assert tool.default_weight(kind) is not None


@pytest.mark.parametrize('package', list(tool.PARTS))
def test_every_registered_part_is_on_the_page(package):
    text = PAGE.read_text(encoding='utf-8')
    for kind in tool.registered(package):
        assert f'\n| `{kind.__name__}` | ' in text


def test_a_page_that_lags_behind_is_refused_and_rewritten(tmp_path, capsys):
    page = tmp_path / 'methods.md'
    assert tool.main(['--check', '--out', str(page)]) == 1
    assert not page.exists()
    assert tool.main(['--out', str(page)]) == 0
    assert tool.main(['--check', '--out', str(page)]) == 0
    page.write_text(page.read_text(encoding='utf-8').replace('Transfers', 'Transfer', 1), encoding='utf-8')
    capsys.readouterr()
    assert tool.main(['--check', '--out', str(page)]) == 1
    assert 'is not what the docstrings say. Run: python tools/make_method_table.py' in capsys.readouterr().err


def test_a_docstring_is_sorted_by_what_its_sentences_say():
    notes = tool.read(
        r"""Distance of a and b. It is short.

        .. math::
            L = a
                - b

        and, in another form,

        .. math:: L = b

        Some Method (arXiv:1234.56789). Differs from the authors' code: no root, e.g. none of a.
        Theirs has one. It is wrong there. See :func:`~mmstructkd.functional.x.some_loss` for the formula.

        The gradient reaches ``student`` only. The value does not change when a is scaled. P is a set.

        ======  =======  =========
        name    default  ``'code'``
        ======  =======  =========
        weight  1        --
        ======  =======  =========

        Args:
            student: of any weight 3.
            teacher: the value does not change.

                More of it.

        The default weight 1 is ours. Tap features:

        .. code-block:: python

            dict(tap='a',
                 loss='b')

        Widths may differ.

        Returns:
            Scalar. Time and memory O(N).

        Raises:
            ShapeError: never.
        """
    )
    assert notes.summary == 'Distance of a and b.'
    assert notes.formulas == [('', 'L = a - b'), ('and, in another form,', 'L = b')]
    assert notes.functions == ['some_loss']
    assert notes.code == ["dict(tap='a',\n     loss='b')"]
    assert notes.tables == [[['name', 'default', "``'code'``"], ['weight', '1', '--']]]
    assert notes.sentences == {
        'text': [
            'It is short.',
            'Some Method (arXiv:1234.56789).',
            'Theirs has one.',
            'It is wrong there.',
            'P is a set.',
            'Widths may differ.',
        ],
        'difference': ["Differs from the authors' code: no root, e.g. none of a."],
        'nothing new': [
            'See :func:`~mmstructkd.functional.x.some_loss` for the formula.',
            'The gradient reaches ``student`` only.',
        ],
        'invariance': ['The value does not change when a is scaled.'],
        'weight': ['The default weight 1 is ours.'],
        'tap': ['Tap features:'],
        'cost': ['Time and memory O(N).'],
    }
    assert sorted(notes.sections) == ['Args', 'Raises', 'Returns']
    assert tool.read(None) == tool.Notes()


def test_a_sentence_that_points_back_follows_the_one_before():
    assert tool.subject('It counts padding.') == 'text'
    assert tool.subject('It counts padding.', 'difference') == 'difference'
    assert tool.subject("``mode='sum'`` does not.", 'weight') == 'weight'
    assert tool.subject("``mode='sum'`` does not.", 'cost') == 'text'
    assert tool.subject('Widths may differ.', 'difference') == 'text'
    assert tool.subject('Its time and memory are O(N).', 'difference') == 'cost'


def test_sentences_end_at_full_stops_only():
    text = 'Chen et al. (CVPR 2016) do so, i.e. so.\nThe rest is 0.5 of it. ``code`` counts! :math:`x` too? yes.'
    assert tool.split_sentences(text) == [
        'Chen et al. (CVPR 2016) do so, i.e. so.',
        'The rest is 0.5 of it.',
        '``code`` counts!',
        ':math:`x` too? yes.',
    ]


def test_roles_become_markdown():
    text = 'See :func:`~a.b.c_loss`, :class:`D` and ``e``: :math:`\\lambda` (arXiv:1903.04197).'
    want = 'See `c_loss`, `D` and `e`: $\\lambda$ ([arXiv:1903.04197](https://arxiv.org/abs/1903.04197)).'
    assert tool.markdown(text) == want
    assert tool.table([['a', 'b'], ['x|y', 'z']]) == ['| a | b |', '| --- | --- |', '| x\\|y | z |']
