"""Token sequences of transformers to maps, and maps to token sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmstructkd.connectors.base import MAX_WIDTH, Connector, check_width, check_widths
from mmstructkd.errors import ConfigError, ShapeError, check_count, check_ndim
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.registry import MODELS

__all__ = ['MapToTokensConnector', 'TokensToMapConnector', 'grid_of']

_SIDES = ('student', 'teacher')


def grid_of(count: int, height: int, width: int, *, rounded: bool = True) -> tuple[int, int] | None:
    """Return the grid that ``count`` positions make over something of this aspect ratio.

    Of all ways to write ``count`` as rows times columns, the one whose ratio is
    nearest. Sizes are rounded on their way through a network, so each side may
    be off by one.

    Args:
        count: number of positions, at least 1.
        height: of what the grid covers (the input, another map), in its positions.
        width: likewise.
        rounded: these are rounded too; ``False``: a ratio that is meant exactly.

    Returns:
        (h, w), or ``None`` where no way is near the ratio.

    Example:
        >>> grid_of(128, 512, 1024), grid_of(129, 512, 1024)
        ((8, 16), None)
    """
    gaps = [
        (abs(math.log(rows * rows * width / (count * height))), rows)
        for rows in range(1, count + 1)
        if count % rows == 0
    ]
    gap, rows = min(gaps)
    columns = count // rows
    slack = 1 / rows + 1 / columns + (1 / height + 1 / width if rounded else 0)
    return (rows, columns) if gap <= slack else None


def _by_side(owner: str, argument: str, value: Any) -> dict[str, Any]:
    """Split an argument that may differ between the two networks."""
    if not isinstance(value, Mapping):
        return dict.fromkeys(_SIDES, value)
    if not value or not set(value) <= set(_SIDES):
        raise ConfigError(f"{owner}: `{argument}` must have the keys 'student' and 'teacher', got {list(value)}.")
    return {side: value.get(side) for side in _SIDES}


@MODELS.register_module()
class TokensToMapConnector(Connector):
    """Lay the tokens of a transformer out as a map, in whichever network has them.

    Stages of ViT and SegFormer, and of Swin (``'backbone.stages.2[0]'``), give
    sequences (B, N, C) in row order. They become maps (B, C, h, w); what is a
    map already passes. Then the usual connectors and losses follow:
    ``connector=[dict(type='mmstructkd.TokensToMapConnector'),
    dict(type='mmstructkd.ConvConnector')]``.

    The grid (h, w) is ``grid`` where that has N positions. Otherwise N is split
    after the aspect ratio of, in this order: the student's input (the term
    knows it), a map among the other tensors of the term, first the other
    network's of that level, ``grid``, a square.

    Args:
        in_channels: widths of the student, one a level; not used.
        out_channels: widths of the teacher, likewise.
        grid: (h, w), or ``dict(student=(h, w), teacher=(h, w))``. ``None``:
            found as above, which serves inputs of any size.
        extra_tokens: leading tokens that stand for no place (the class token,
            registers), dropped here; one number, or ``dict(student=...,
            teacher=...)``.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: a tensor is neither tokens nor a map, or N makes no grid.

    Example:
        >>> import torch
        >>> connector = TokensToMapConnector([3], [5], extra_tokens=1)
        >>> (student,), _ = connector([torch.zeros(2, 9, 3)], [torch.zeros(2, 5, 8, 16)])
        >>> student.shape
        torch.Size([2, 3, 2, 4])
    """

    joint = True
    keeps_width = True
    needs_input_size = True

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        grid: tuple[int, int] | Mapping[str, Any] | None = None,
        extra_tokens: int | Mapping[str, int] = 0,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_widths(owner, 'in_channels', in_channels)
        check_widths(owner, 'out_channels', out_channels)
        self.grid = _by_side(owner, 'grid', grid)
        for value in self.grid.values():
            if value is None:
                continue
            if not isinstance(value, (tuple, list)) or len(value) != 2:
                raise ConfigError(f'{owner}: `grid` must be two integers (h, w), got {value!r}.')
            for side in value:
                check_width(owner, 'grid', side)
        self.extra_tokens = {k: 0 if v is None else v for k, v in _by_side(owner, 'extra_tokens', extra_tokens).items()}
        for value in self.extra_tokens.values():
            check_count(owner, 'extra_tokens', value, 0, maximum=MAX_WIDTH)
        self.input_size: tuple[int, int] | None = None

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return maps, each (B, C, h, w) with the grid of its own network."""
        return (
            [self._as_map('student', s, [*teachers[i : i + 1], *teachers, *students]) for i, s in enumerate(students)],
            [self._as_map('teacher', t, [*students[i : i + 1], *students, *teachers]) for i, t in enumerate(teachers)],
        )

    def _places(self, side: str, tokens: Tensor) -> Tensor:
        """Drop the tokens that stand for no place."""
        extra = self.extra_tokens[side]
        if tokens.shape[1] <= extra:
            raise ShapeError(
                f'{type(self).__name__}: the {side} must have more than {extra} tokens (B, N, C), '
                f'got {tuple(tokens.shape)}. Lower `extra_tokens`.'
            )
        return tokens[:, extra:]

    def _as_map(self, side: str, tensor: Tensor, others: Sequence[Tensor]) -> Tensor:
        owner = type(self).__name__
        check_ndim(owner, side, tensor, (3, 4), '(B, N, C) or (B, C, H, W)')
        if tensor.dim() == 4:
            return tensor
        tokens = self._places(side, tensor)
        rows, columns = self._grid(side, tokens.shape[1], others)
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))

    def _grid(self, side: str, count: int, others: Sequence[Tensor]) -> tuple[int, int]:
        """The grid of ``count`` tokens of one network."""
        given = self.grid[side]
        if given is not None and given[0] * given[1] == count:
            return (given[0], given[1])
        maps = [(other.shape[2], other.shape[3]) for other in others if other.dim() == 4]
        seen = self.input_size or next(iter(maps), None)
        like = seen or given or (1, 1)
        grid = grid_of(count, *like, rounded=seen is not None)
        if grid is None:
            raise ShapeError(
                f'{type(self).__name__}: the tokens of the {side} must make a grid of about {like[0]} to {like[1]}, '
                f'got {count} after {self.extra_tokens[side]} extra ones. Set `extra_tokens` (1 where there is a '
                'class token), or `grid`.'
            )
        return grid

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'grid={self.grid}, extra_tokens={self.extra_tokens}'


@MODELS.register_module()
class MapToTokensConnector(TokensToMapConnector):
    """Lay maps out as token sequences (B, N, C), in row order, in both networks.

    For losses over sequences, and for pairs of which one is a transformer.
    Tokens pass, without those that stand for no place. Where the two networks
    have other grids, the teacher's map is resized to the student's (bilinear);
    the grid of tokens is found as in :class:`TokensToMapConnector`.

    Args:
        in_channels: widths of the student, one a level; not used.
        out_channels: widths of the teacher, likewise.
        grid: see :class:`TokensToMapConnector`.
        extra_tokens: likewise.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: a tensor is neither tokens nor a map, or N makes no grid.

    Example:
        >>> import torch
        >>> connector = MapToTokensConnector([3], [5])
        >>> (student,), (teacher,) = connector([torch.zeros(2, 3, 2, 4)], [torch.zeros(2, 5, 4, 8)])
        >>> student.shape, teacher.shape
        (torch.Size([2, 8, 3]), torch.Size([2, 8, 5]))
    """

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return sequences, those of a level of one length."""
        out_s, out_t = [], []
        for student, teacher in zip(students, teachers, strict=True):
            check_ndim(type(self).__name__, 'student', student, (3, 4), '(B, N, C) or (B, C, H, W)')
            check_ndim(type(self).__name__, 'teacher', teacher, (3, 4), '(B, N, C) or (B, C, H, W)')
            if student.dim() == teacher.dim() == 3:
                tokens_s, tokens_t = self._places('student', student), self._places('teacher', teacher)
                if tokens_s.shape[1] == tokens_t.shape[1]:
                    out_s.append(tokens_s)
                    out_t.append(tokens_t)
                    continue
            map_s = self._as_map('student', student, [teacher])
            map_t = self._as_map('teacher', teacher, [student])
            map_t = resize_map(map_t, (map_s.shape[2], map_s.shape[3]))
            out_s.append(map_s.flatten(2).transpose(1, 2))
            out_t.append(map_t.flatten(2).transpose(1, 2))
        return out_s, out_t
