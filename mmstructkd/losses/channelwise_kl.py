"""Channel-wise distillation: where each channel is active."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.functional.channelwise_kl import channelwise_kl_loss
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['ChannelwiseKLLoss']


@MODELS.register_module()
class ChannelwiseKLLoss(SoftenedLoss):
    r"""Divergence of where each channel of the student is active from where in the teacher.

    Channel-wise Knowledge Distillation (arXiv:2011.13256). See
    :func:`~mmstructkd.functional.channelwise_kl.channelwise_kl_loss` for the
    formula. Tap class scores or features; the term puts a 1x1 convolution in
    front of the student where the widths differ. The default weight of 1 is
    none of the published ones: those are 3 at temperature 4 and 5 at temperature
    1 for class scores, 50 at temperature 4 for features.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens both distributions: a number from 0.001 to 1000, or the config
            of a registered temperature. The loss is multiplied by its square.

    Shape:
        - student, teacher: :math:`(B, C, H, W)`; the teacher is detached.
        - output: scalar, in nats, 0 with a graph where no pixel counts.

    Pixels without a label count, as in the published code
    (``where='inside'``); padding is no part of either distribution.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> loss = ChannelwiseKLLoss(loss_weight=3.0)
        >>> z = torch.randn(2, 5, 4, 4)
        >>> loss(z, z).item()
        0.0
    """

    own_temperatures = ('image',)
    tasks = ('seg', 'depth', 'det')
    transfers = 'where in the image each channel is active'
    paper = 'Channel-wise Knowledge Distillation for Dense Prediction (arXiv:2011.13256)'
    binary_pairs = True
    softened_axes = (2, 3)

    def __init__(self, loss_weight: float = 1.0, *, temperature: Any = 4.0) -> None:
        super().__init__(loss_weight, temperature)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return channelwise_kl_loss(student, teacher, temperature=temperature, valid=valid)
