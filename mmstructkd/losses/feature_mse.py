"""Raw features, as hints."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.functional.feature_mse import feature_mse_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['FeatureMSELoss']


@MODELS.register_module()
class FeatureMSELoss(DistillLoss):
    r"""Squared distance of raw features.

    Hints of FitNets (arXiv:1412.6550), trained along with the task. See
    :func:`~mmstructkd.functional.feature_mse.feature_mse_loss` for the formula.
    Tap features; the term puts a 1x1 convolution in front of the student where
    the widths differ. The default weight 10 is that of CIRKD's code for
    segmentation. Channels with large values decide:
    :class:`~mmstructkd.losses.standardized_mse.StandardizedMSELoss` weighs all
    alike. Pixels without a label count, as in that code (``where='inside'``);
    padding does not.

    Args:
        loss_weight: factor of the loss, finite and at least 0.

    Shape:
        - student, teacher: :math:`(B, D, H, W)`; the teacher is detached.
        - output: scalar, mean over channels and pixels that count, 0 with a
          graph where none does.

    Raises:
        ConfigError: the weight is out of range.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 4, 4)
        >>> FeatureMSELoss()(x, x).item()
        0.0
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'raw features'
    paper = 'FitNets: Hints for Thin Deep Nets (arXiv:1412.6550)'

    def __init__(self, loss_weight: float = 10.0) -> None:
        super().__init__(loss_weight=loss_weight)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        return feature_mse_loss(student, teacher, valid=valid)
