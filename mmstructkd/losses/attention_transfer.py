"""Attention transfer: where a feature is strong."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_one_of
from mmstructkd.functional.attention_transfer import attention_transfer_loss, check_power
from mmstructkd.functional.core.features import REDUCTIONS
from mmstructkd.losses.base import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['AttentionTransferLoss']


@MODELS.register_module()
class AttentionTransferLoss(DistillLoss):
    r"""Squared distance of where student and teacher are strong.

    Attention Transfer (arXiv:1612.03928). See
    :func:`~mmstructkd.functional.attention_transfer.attention_transfer_loss` for the
    formula. Tap features, one or several stages; the widths may differ.

    The default weight 10000 is that of CIRKD's code for segmentation, and goes
    with ``reduction='mean'``, whose value falls with one over the number of
    positions. ``reduction='sum'`` keeps its scale when the map grows; a weight
    of some units has the effect there.

    Pixels without a label count, as in the published code (``where='inside'``);
    padding does not.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        power: of the feature's entries before the mean over channels, at least 1.
        reduction: ``'mean'`` over pixels that count, or ``'sum'``: over those of
            an image, averaged over images.

    Shape:
        - student: :math:`(B, D_s, H, W)`, teacher: :math:`(B, D_t, H, W)`; the
          teacher is detached.
        - output: scalar, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the maps differ in B, H or W.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 4, 4)
        >>> AttentionTransferLoss()(x, x).item()
        0.0
    """

    needs_equal_channels = False
    tasks = ('seg', 'depth', 'det')
    transfers = 'spatial attention map'
    paper = 'Paying More Attention to Attention (arXiv:1612.03928)'

    def __init__(self, loss_weight: float = 1e4, *, power: float = 2, reduction: str = 'mean') -> None:
        super().__init__(loss_weight=loss_weight)
        owner = type(self).__name__
        check_power(owner, power)
        check_one_of(owner, 'reduction', reduction, REDUCTIONS)
        self.power = power
        self.reduction = reduction

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        return attention_transfer_loss(student, teacher, power=self.power, reduction=self.reduction, valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, power={self.power:g}, reduction={self.reduction!r}'
