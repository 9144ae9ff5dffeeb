"""Features at several coarsenesses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmstructkd.functional.hierarchical_context import check_sizes, hierarchical_context_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['HierarchicalContextLoss']


@MODELS.register_module()
class HierarchicalContextLoss(DistillLoss):
    r"""Squared distance of features, of the map and of its averages over coarser and coarser grids.

    The loss of ReviewKD (arXiv:2104.09044). See
    :func:`~mmstructkd.functional.hierarchical_context.hierarchical_context_loss` for the
    formula. Tap the levels of a neck or the stages of a backbone from fine to
    coarse, with ``connector=dict(type='mmstructkd.AttentionFusionConnector')``;
    without it each level stands alone.

    The default weight 1 is that of the authors' code for RetinaNet and for
    Faster R-CNN with ResNet-50 (ResNet-18: 1.2, MobileNetV2: 2). That code adds
    the levels up, five for P2 to P6, where a term takes their mean:
    ``loss_weight=5`` is its scale.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        sizes: cells of a side of the coarser grids.

    Shape:
        - student, teacher: :math:`(B, D, H, W)`; the teacher is detached.
        - output: scalar, 0 with a graph where no pixel counts.

    Pixels without a label count, as in the published code
    (``where='inside'``); padding is no part of the averages.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 8, 8)
        >>> HierarchicalContextLoss()(x, x).item()
        0.0
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'features at several coarsenesses, fused over levels'
    paper = 'Distilling Knowledge via Knowledge Review (arXiv:2104.09044)'

    def __init__(self, loss_weight: float = 1.0, *, sizes: Sequence[int] = (4, 2, 1)) -> None:
        super().__init__(loss_weight=loss_weight)
        self.sizes = check_sizes(type(self).__name__, sizes)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        return hierarchical_context_loss(student, teacher, sizes=self.sizes, valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, sizes={self.sizes}'
