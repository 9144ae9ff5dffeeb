"""Tables of Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

__all__ = ['markdown_table']


def markdown_table(rows: Sequence[Sequence[Any]], *, aligned: bool = True) -> str:
    """Lay cells out as a table of Markdown.

    Args:
        rows: the first is the head; all of one length. A line break in a cell
            becomes a space, and a bar is escaped.
        aligned: pad the cells, so that the source can be read as a table too.

    Returns:
        The table, without a line break at its end.

    Raises:
        ValueError: rows of different lengths.

    Example:
        >>> print(markdown_table([('', 'mIoU'), ('teacher', 54)]))
        |         | mIoU |
        | ------- | ---- |
        | teacher | 54   |
    """
    cells = [[re.sub(r'\s*\n\s*', ' ', str(cell)).replace('|', r'\|') for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) if aligned else 0 for column in columns]
    rule = ['-' * width if aligned else '---' for width in widths]
    lines = [
        '| ' + ' | '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + ' |'
        for row in (cells[0], rule, *cells[1:])
    ]
    return '\n'.join(lines)
