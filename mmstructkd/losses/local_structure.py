"""Local structure: how like each of its neighbours a place is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import check_count
from mmstructkd.functional.local_structure import local_structure_loss
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['LocalStructureLoss']


@MODELS.register_module()
class LocalStructureLoss(SoftenedLoss):
    r"""Divergence of how like each neighbour a place is in the student from how in the teacher.

    Local structure preserving (CVPR 2020), from graphs to the grid. See
    :func:`~mmstructkd.functional.local_structure.local_structure_loss` for the formula,
    and how it differs. Tap features; widths may differ. The default weight is
    ours.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        radius: neighbours are at most this far away in rows and columns; 1 or 2.
        temperature: of the softmax over cosines: a number from 0.001 to 1000, or the
            config of a registered temperature.
        include_self: a place is its own neighbour, which the others are
            measured against.

    Shape:
        - student: :math:`(B, D_s, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: scalar, in nats, 0 with a graph where no pixel counts.

    Pixels without a label count, as every node of a graph does
    (``where='inside'``); padding neither counts nor is a neighbour.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the maps differ in B, H or W.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 4, 4)
        >>> LocalStructureLoss()(3 * x, x).item() < 1e-6
        True
    """

    needs_equal_channels = False
    softened_axes = None
    tasks = ('seg', 'depth', 'det')
    transfers = 'likeness of each place to its neighbours'
    paper = 'Distilling Knowledge from Graph Convolutional Networks (CVPR 2020)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        radius: int = 1,
        temperature: Any = 0.1,
        include_self: bool = True,
    ) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        check_count(owner, 'radius', radius)
        self.radius = radius
        self.include_self = include_self

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return local_structure_loss(
            student,
            teacher,
            radius=self.radius,
            temperature=temperature,
            include_self=self.include_self,
            valid=valid,
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, radius={self.radius}, include_self={self.include_self}'
