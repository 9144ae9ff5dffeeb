"""Base of the losses over nodes: what of a map is a node."""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import MAX_CLASSES, ConfigError, check_count, check_one_of
from mmstructkd.functional.core.nodes import cell_nodes, check_grid
from mmstructkd.functional.core.regions import class_centers
from mmstructkd.losses.base import DistillLoss
from mmstructkd.structures import Targets

__all__ = ['NODES', 'NodeLoss']

NODES = ('cells', 'classes', 'images')


class NodeLoss(DistillLoss):
    """A loss over sets of nodes, made of the tapped tensors.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        nodes: ``'cells'``: averages over the cells of a grid, a set an image;
            ``'classes'``: centres of the classes in the labels, a set an image;
            ``'images'``: flattened maps, one set a batch. A tensor (n, D) is a
            set of nodes as it is.
        grid: cells in each direction, or (h, w); at most one a position.
        num_classes: of the labels, for ``'classes'``. ``None``: the task's.
    """

    needs_equal_channels = False

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        nodes: str = 'cells',
        grid: int | tuple[int, int] = 8,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        owner = type(self).__name__
        check_one_of(owner, 'nodes', nodes, NODES)
        if num_classes is not None:
            check_count(owner, 'num_classes', num_classes, maximum=MAX_CLASSES)
        self.nodes = nodes
        self.grid = check_grid(owner, grid)
        self.num_classes = num_classes
        self.needs_labels = nodes == 'classes'
        self.where = 'labelled' if self.needs_labels else 'inside'

    def nodes_of(self, student: Tensor, teacher: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the nodes of both networks and which count.

        Args:
            student: the student's tensor, (B, D, H, W) or (n, D).
            teacher: the teacher's.
            targets: what the batch knows besides.

        Returns:
            What the functions of :mod:`mmstructkd.functional.relational` and its like take.

        Raises:
            ConfigError: the nodes are classes, and there are no labels.
        """
        if student.dim() != 4 or teacher.dim() != 4:
            return student, teacher, None
        owner = type(self).__name__
        if self.nodes == 'classes':
            classes = targets.num_classes if self.num_classes is None else self.num_classes
            if targets.labels is None or classes is None:
                raise ConfigError(
                    f"{owner}: `targets.labels` and `num_classes` must be known for nodes='classes', got "
                    f"{'no' if targets.labels is None else 'some'} labels and {classes} classes. Use nodes='cells'."
                )
            centers_s, count = class_centers(
                student, targets.labels, classes, ignore_index=targets.ignore_index, valid=targets.valid
            )
            centers_t, _ = class_centers(
                teacher.detach(), targets.labels, classes, ignore_index=targets.ignore_index, valid=targets.valid
            )
            return centers_s, centers_t, count > 0
        valid = self.counting(student, targets)
        if self.nodes == 'images':
            return student, teacher, valid
        cells_s, valid_mask = cell_nodes(student, self.grid, valid)
        with torch.no_grad():
            cells_t, _ = cell_nodes(teacher, self.grid, valid)
        return cells_s, cells_t, valid_mask

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, nodes={self.nodes!r}, grid={self.grid}'
