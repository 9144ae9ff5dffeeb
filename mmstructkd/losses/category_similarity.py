"""Category-wise similarity distillation: which classes are likely in the same places."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.functional.category_similarity import category_similarity_loss
from mmstructkd.functional.core.pooling import check_kernel_size
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['CategorySimilarityLoss']


@MODELS.register_module()
class CategorySimilarityLoss(SoftenedLoss):
    r"""Squared distance between the products of the classes' distributions over the map.

    Category-wise part (CSD) of Double Similarity Distillation
    (arXiv:2107.08591). See
    :func:`~mmstructkd.functional.category_similarity.category_similarity_loss` for the
    formula, and whose it is. Tap class scores. The default weight is that of
    winycg/CIRKD's re-implementation; the value falls with the square of the
    number of positions.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens the distributions over positions: a number from 0.001 to
            1000, or the config of a registered temperature.
        kernel_size: side of the patches that are averaged first, or (h, w).

    Shape:
        - student, teacher: :math:`(B, C, H, W)`; the teacher is detached.
        - output: scalar in [0, 1], no unit, 0 with a graph where no pixel counts.

    Pixels without a label count, as in that re-implementation
    (``where='inside'``); padding is no part of any distribution.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> z = torch.randn(2, 5, 4, 4)
        >>> CategorySimilarityLoss()(z, z).item()
        0.0
    """

    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    over_classes = True
    softened_axes = (2, 3)
    tasks = ('seg', 'depth', 'det')
    transfers = 'products of the distributions of classes over the map'
    paper = 'Double Similarity Distillation for Semantic Image Segmentation (arXiv:2107.08591)'

    def __init__(
        self,
        loss_weight: float = 10.0,
        *,
        temperature: Any = 4.0,
        kernel_size: int | tuple[int, int] = 2,
    ) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        self.kernel_size = check_kernel_size(owner, kernel_size)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return category_similarity_loss(
            student, teacher, temperature=temperature, kernel_size=self.kernel_size, valid=valid
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, kernel_size={self.kernel_size}'
