"""Fewer positions, the same ones in both networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.connectors.base import Connector, check_width, check_widths
from mmstructkd.errors import ConfigError, check_count, check_ndim, check_one_of
from mmstructkd.functional.core.pooling import POOLS, check_kernel_size
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.registry import MODELS

__all__ = ['PoolConnector']


@MODELS.register_module()
class PoolConnector(Connector):
    """Pool the maps of student and teacher to one smaller grid.

    For losses that cost much where there are many positions, or that shall
    compare regions. The grid is given in one of three ways: by the patch that
    becomes a position, by the size of the grid, or by how many positions there
    may be at most.

    With ``kernel_size`` a teacher of another size is first resized to the
    student's (bilinear), and both are pooled in ceil mode: a patch that hangs
    over the edge is pooled over what it covers. Otherwise each network is
    pooled from its own size straight to the grid, which never has more rows or
    columns than the student's map. Masks and labels are brought to the grid by
    the loss, nearest. Nothing is trained.

    Args:
        in_channels: widths of the student, one a level; not used.
        out_channels: widths of the teacher, likewise.
        pool: ``'avg'`` or ``'max'``.
        kernel_size: patch of positions, one number or (h, w).
        output_size: the grid, one number or (h, w).
        max_nodes: at most that many positions; the grid keeps the map's aspect
            ratio as nearly as integers allow.

    Raises:
        ConfigError: not exactly one of the three is given, or it is out of range.
        ShapeError: a tensor is no map.

    Example:
        >>> import torch
        >>> pool = PoolConnector([3], [5], max_nodes=8)
        >>> (student,), (teacher,) = pool([torch.zeros(1, 3, 6, 12)], [torch.zeros(1, 5, 12, 24)])
        >>> student.shape, teacher.shape
        (torch.Size([1, 3, 2, 4]), torch.Size([1, 5, 2, 4]))
    """

    joint = True
    keeps_width = True

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        pool: str = 'avg',
        *,
        kernel_size: int | tuple[int, int] | None = None,
        output_size: int | tuple[int, int] | None = None,
        max_nodes: int | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_widths(owner, 'in_channels', in_channels)
        check_widths(owner, 'out_channels', out_channels)
        check_one_of(owner, 'pool', pool, POOLS)
        given = {'kernel_size': kernel_size, 'output_size': output_size, 'max_nodes': max_nodes}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            one = ', '.join(f'`{name}`' for name in given)
            raise ConfigError(f'{owner}: exactly one of {one} must be given, got {named!r}.')
        self.pool = pool
        self.kernel_size = None if kernel_size is None else check_kernel_size(owner, kernel_size)
        self.output_size = None
        if output_size is not None:
            sides = output_size if isinstance(output_size, (tuple, list)) else (output_size, output_size)
            if len(sides) != 2:
                raise ConfigError(f'{owner}: `output_size` must be one integer or two (h, w), got {output_size!r}.')
            self.output_size = (
                check_width(owner, 'output_size', sides[0]),
                check_width(owner, 'output_size', sides[1]),
            )
        if max_nodes is not None:
            check_count(owner, 'max_nodes', max_nodes)
        self.max_nodes = max_nodes

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the pooled maps, those of a level of one size."""
        pairs = [self._pair(s, t) for s, t in zip(students, teachers, strict=True)]
        return [s for s, _ in pairs], [t for _, t in pairs]

    def _pair(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        owner = type(self).__name__
        check_ndim(owner, 'students', student, 4, '(B, C, H, W)')
        check_ndim(owner, 'teachers', teacher, 4, '(B, C, H, W)')
        size = (student.shape[2], student.shape[3])
        kernel = self.kernel_size
        if kernel is not None:
            return self._by_kernel(student, kernel), self._by_kernel(resize_map(teacher, size), kernel)
        grid = self._grid(size)
        return self._to_grid(student, grid), self._to_grid(teacher, grid)

    def _by_kernel(self, tensor: Tensor, kernel: tuple[int, int]) -> Tensor:
        if self.pool == 'max':
            return torch_functional.max_pool2d(tensor, kernel, kernel, ceil_mode=True)
        return torch_functional.avg_pool2d(tensor, kernel, kernel, ceil_mode=True, count_include_pad=False)

    def _to_grid(self, tensor: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.pool == 'max':
            return torch_functional.adaptive_max_pool2d(tensor, grid)
        return torch_functional.adaptive_avg_pool2d(tensor, grid)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid for a student's map of this size."""
        height, width = size
        if self.output_size is not None:
            return (min(self.output_size[0], height), min(self.output_size[1], width))
        nodes = self.max_nodes or 1
        if height * width <= nodes:
            return size
        # floor(height * sqrt(nodes / (height * width))), without rounding
        rows, columns = max(1, math.isqrt(height * nodes // width)), max(1, math.isqrt(width * nodes // height))
        # A side that cannot shrink below one position leaves less to the other.
        return (min(rows, nodes), 1) if columns == 1 else (rows, min(columns, nodes // rows))

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        given = {'kernel_size': self.kernel_size, 'output_size': self.output_size, 'max_nodes': self.max_nodes}
        name, value = next((n, v) for n, v in given.items() if v is not None)
        return f'pool={self.pool!r}, {name}={value}'
