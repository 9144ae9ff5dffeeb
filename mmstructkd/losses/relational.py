"""Relational distillation: distances and angles among nodes."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_some_weight
from mmstructkd.functional.relational import relational_loss
from mmstructkd.losses.node_loss import NodeLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['RelationalLoss']


@MODELS.register_module()
class RelationalLoss(NodeLoss):
    r"""How far distances and angles among nodes are from the teacher's.

    Relational knowledge distillation (arXiv:1904.05068). See
    :func:`~mmstructkd.functional.relational.relational_loss` for the formula. The
    paper's nodes are the embeddings of a batch; in dense tasks a batch is too
    small, and the nodes are cells of each map or centres of its classes (a port
    of ours). Tap features; widths may differ. Weights 25 and 50 are published;
    with cells the outer weight is to be tuned.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        distance_weight: weight of distances, at least 0.
        angle_weight: weight of angles, at least 0.
        nodes: ``'cells'``, ``'classes'`` or ``'images'``, see
            :class:`~mmstructkd.losses.node_loss.NodeLoss`.
        grid: cells in each direction, or (h, w). Time grows with the cube of
            their number: 8 x 8 are few, 32 x 32 too many.
        num_classes: of the labels, for ``'classes'``. ``None``: the task's.

    Shape:
        - student: :math:`(B, D_s, H, W)` or :math:`(n, D_s)`; teacher: likewise,
          any width, detached.
        - output: scalar, no unit, 0 with a graph where nothing counts.

    Pixels without a label count (``where='inside'``), since the published code
    takes whole images; with ``nodes='classes'`` labelled ones only. Padding is no
    part of any node.

    Raises:
        ConfigError: an argument is out of range, or labels are missing for
            ``nodes='classes'``.
        ShapeError: the maps differ in B, H or W.

    Example:
        >>> import torch
        >>> x = torch.randn(6, 5)
        >>> RelationalLoss()(3 * x + 1, x).item() < 1e-8
        True
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'distances and angles among cells, class centres or embeddings'
    paper = 'Relational Knowledge Distillation (arXiv:1904.05068)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        nodes: str = 'cells',
        grid: int | tuple[int, int] = 8,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(loss_weight, nodes=nodes, grid=grid, num_classes=num_classes)
        owner = type(self).__name__
        check_some_weight(owner, distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight = float(distance_weight)
        self.angle_weight = float(angle_weight)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        nodes_s, nodes_t, valid = self.nodes_of(student, teacher, targets)
        return relational_loss(
            nodes_s,
            nodes_t,
            distance_weight=self.distance_weight,
            angle_weight=self.angle_weight,
            valid=valid,
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, distance_weight={self.distance_weight:g}, angle_weight={self.angle_weight:g}'
