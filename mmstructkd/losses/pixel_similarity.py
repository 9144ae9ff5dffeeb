"""Pixel-wise similarity distillation: what changes in the attention from stage to stage."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.functional.pixel_similarity import pixel_similarity_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['PixelSimilarityLoss']


@MODELS.register_module()
class PixelSimilarityLoss(DistillLoss):
    r"""Squared distance between the residual attention maps of student and teacher.

    Pixel-wise part (PSD) of Double Similarity Distillation (arXiv:2107.08591).
    See :func:`~mmstructkd.functional.pixel_similarity.pixel_similarity_loss` for
    the formula. Tap at least two stages and put the connector in front that
    makes residuals of them:

    .. code-block:: python

        dict(tap=['backbone[2]', 'backbone[3]', 'decode_head.conv_seg'],
             connector=dict(type='mmstructkd.AttentionResidualConnector'),
             loss=dict(type='mmstructkd.PixelSimilarityLoss', residual=True))

    With ``residual=False`` a tapped feature stands for itself: its attention
    (the mean square over channels), of length 1, is compared.

    The default weight is about that of winycg/CIRKD's re-implementation at
    64 x 128 positions: 1000, where the mean is over positions too.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        residual: the tensors are residuals, (B, 1, H, W), from the connector.

    Shape:
        - student: :math:`(B, D_s, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: scalar in [0, 4], no unit, 0 with a graph where no pixel counts.

    Pixels without a label count, as in that re-implementation
    (``where='inside'``); padding is left out of the distance. In the connector
    it has a part in the length of the attention.

    Raises:
        ShapeError: the maps do not fit each other, or are no residuals.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 4, 4)
        >>> PixelSimilarityLoss()(2 * x, x).item() < 1e-10
        True
    """

    needs_equal_channels = False
    tasks = ('seg', 'depth', 'det')
    transfers = 'changes of spatial attention from stage to stage'
    paper = 'Double Similarity Distillation for Semantic Image Segmentation (arXiv:2107.08591)'

    def __init__(self, loss_weight: float = 0.1, *, residual: bool = False) -> None:
        super().__init__(loss_weight=loss_weight)
        self.residual = residual

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        return pixel_similarity_loss(student, teacher, residual=self.residual, valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, residual={self.residual}'
