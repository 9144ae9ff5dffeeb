"""How like each place of a turned image is to the places of the upright ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_count, check_finite_number, check_ndim, check_same
from mmstructkd.functional.core.nodes import cell_nodes, norm_floor, unit_vectors
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.cross_view_similarity import cross_view_similarity_loss, rows_worth_keeping
from mmstructkd.functional.turning import turn_back
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['CrossViewSimilarityLoss']

#: More cells in a direction are a slip: memory grows with the fourth power.
MAX_GRID = 64
#: What a batch without turned copies is compared with: itself.
ALONE = ('none', 'none')


@MODELS.register_module()
class CrossViewSimilarityLoss(SoftenedLoss):
    r"""Divergence of how like each turned cell is to the upright cells of the batch.

    Self-supervision distillation (SSKD, ECCV 2020, arXiv:2006.07114) for maps; see
    :func:`~mmstructkd.functional.cross_view_similarity.cross_view_similarity_loss`
    for the formula. Where the authors compare images, cells of a grid stand here: the
    views are brought onto one grid, and each turned cell is compared with all upright
    cells of the batch. The right one is the same place of the same image. Rows that
    the teacher ranks wrong count by ``keep``.

    Put the term on a stream that holds upright and turned copies together:
    ``TurnedStream(turns=('none', 'half'))`` and ``on='<that stream>'``. Elsewhere a
    batch is taken for both its copies, and the loss compares cells of upright
    images with each other; the distiller says so. Tap features; widths may differ.
    The authors train a projection for the teacher first; here its features are taken
    as they are. The published weight is 10.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: of the softmax over cosines: a number from 0.001 to 1000, or the
            config of a registered temperature.
        keep: share of the rows that count among those that the teacher ranks wrong,
            in [0, 1].
        grid: cells in each direction, at most one a position.

    Shape:
        - student: :math:`(V B, D_s, H, W)`, one copy of the batch after the other;
          teacher: likewise, any width, detached.
        - output: scalar, in nats, 0 with a graph where nothing counts. Memory
          :math:`O(V B^2 g^4)` for g = ``grid``.

    A cell counts if a position of it does in each view. Those that do not are vectors
    of zero among the upright ones.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the maps differ in B, H or W, or are no copies of a batch.

    Example:
        >>> x = torch.randn(4, 5, 4, 4)
        >>> CrossViewSimilarityLoss()(3 * x, x).item() < 1e-6
        True
    """

    needs_equal_channels = False
    needs_views = True
    softened_axes = None
    tasks = ('seg',)
    transfers = 'likeness of each turned place to the upright ones'
    paper = 'Knowledge Distillation Meets Self-Supervision (arXiv:2006.07114)'

    def __init__(self, loss_weight: float = 10.0, *, temperature: Any = 0.5, keep: float = 0.75, grid: int = 8) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        check_finite_number(owner, 'keep', keep, minimum=0)
        if keep > 1:
            raise ConfigError(f'{owner}: `keep` must be a share in [0, 1], got {keep!r}.')
        check_count(owner, 'grid', grid, maximum=MAX_GRID)
        self.keep, self.grid = float(keep), int(grid)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        owner = type(self).__name__
        for name, tensor in (('student', student), ('teacher', teacher)):
            check_ndim(owner, name, tensor, 4, '(V B, D, H, W)')
        check_same(owner, student, teacher, (0, 2, 3), 'V B, H and W', 'Resize the teacher with resize_map.')
        counts = self.counting(student, targets)
        views = targets.views
        if not views:
            views = ALONE
            student, teacher = torch.cat([student, student]), torch.cat([teacher, teacher])
            counts = None if counts is None else torch.cat([counts, counts])
        if len(student) % len(views):
            raise ShapeError(f'{owner}: `student` must have a copy for each of {views}, got {tuple(student.shape)}.')
        student, teacher, temperature = self.soften(student, teacher, targets)
        floor = norm_floor(student, teacher)
        nodes_s, known = _cells(student, views, self.grid, counts)
        nodes_t, _ = _cells(teacher.detach(), views, self.grid, counts)
        rows = None
        if known is not None:
            rows = _rows(nodes_t, known, len(views), self.keep, floor)
        return cross_view_similarity_loss(
            nodes_s, nodes_t, keep=self.keep, temperature=temperature, views=len(views), rows=rows
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, keep={self.keep:g}, grid={self.grid}'


@full_precision
def _cells(maps: Tensor, views: tuple[str, ...], grid: int, counts: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Cells of all views on one grid.

    Returns:
        Nodes (B n V, D), the views of a cell one after the other, the upright one
        first; and which cells count in all views, bool, shape (B n,), or ``None``.
    """
    order = [views.index('none'), *(k for k in range(len(views)) if k != views.index('none'))]
    names = [views[k] for k in order]

    def upright(tensor: Tensor) -> Tensor:
        rows = tensor.unflatten(0, (len(views), -1))[order]
        turned = [turn_back(row, turns=[name]) for row, name in zip(rows, names, strict=True)]
        return torch.stack(turned, dim=1).flatten(0, 1)

    sides = (min(grid, maps.shape[2]), min(grid, maps.shape[3]))
    nodes, known = cell_nodes(upright(maps), sides, None if counts is None else upright(counts))
    nodes = nodes.unflatten(0, (-1, len(views))).transpose(1, 2).flatten(0, 2)
    if known is not None:
        known = known.unflatten(0, (-1, len(views))).all(dim=1).flatten()
        nodes = torch.where(known.repeat_interleave(len(views))[:, None], nodes, 0)
    return nodes, known


@full_precision
def _rows(teacher: Tensor, known: Tensor, views: int, keep: float, floor: float) -> Tensor:
    """The teacher's choice among the turned rows of cells that count."""
    unit = unit_vectors(teacher, 1, floor).unflatten(0, (-1, views))
    with exact_matmul(unit.device.type):
        near = unit[:, 1:].flatten(0, 1) @ unit[:, 0].mT
    own = torch.arange(len(known), device=near.device).repeat_interleave(views - 1)
    counting = known.repeat_interleave(views - 1)
    # What does not count is above no other, and no wrong row.
    near = near.masked_fill(~known, -torch.inf).masked_fill(~counting[:, None], -torch.inf)
    near = near.scatter(1, own[:, None], torch.where(counting, near.gather(1, own[:, None]).squeeze(1), 0)[:, None])
    chosen: Tensor = rows_worth_keeping(near, own, keep=keep) & counting
    return chosen
