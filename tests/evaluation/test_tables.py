"""Tables of Markdown: aligned for those who read the source, or short."""

from __future__ import annotations

import pytest

from mmstructkd.evaluation.tables import markdown_table


def test_table_is_aligned():
    lines = markdown_table([['', 'abs rel'], ['student alone', '0.1']]).splitlines()
    assert lines == ['|               | abs rel |', '| ------------- | ------- |', '| student alone | 0.1     |']


def test_table_is_short_where_it_need_not_be_aligned():
    lines = markdown_table([['a', 'longer'], ['cell', 1]], aligned=False).splitlines()
    assert lines == ['| a | longer |', '| --- | --- |', '| cell | 1 |']


@pytest.mark.parametrize(
    ('cell', 'shown'), [('a|b', r'a\|b'), ('one\n  two', 'one two'), (0.5, '0.5'), (None, 'None'), ('a  b', 'a  b')]
)
def test_cells_stay_cells(cell: object, shown: str) -> None:
    assert markdown_table([['h'], [cell]], aligned=False).splitlines()[2] == f'| {shown} |'


@pytest.mark.parametrize('aligned', [True, False])
def test_rows_of_unequal_length_are_refused(aligned: bool) -> None:
    with pytest.raises(ValueError, match='shorter'):
        markdown_table([['', 'a'], ['b']], aligned=aligned)
