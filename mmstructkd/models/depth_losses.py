"""Losses of a depth map with the ground truth, for ``loss_decode`` of a depth head.

B images, H x W the grid of the ground truth; metres, 0 where there is no reading.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import ConfigError, check_finite_number, check_positive
from mmstructkd.functional.depth_regression import depth_l1_loss, silog_loss
from mmstructkd.registry import MODELS

__all__ = ['DepthL1Loss', 'DepthSILogLoss']


def check_loss_name(owner: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` can be a name in mmengine's log."""
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{owner}: `loss_name` must be a name for the log, got {value!r}. Example: 'loss_depth'.")


class _DepthLoss(nn.Module):
    """A weight, and the name under which mmseg logs the loss."""

    def __init__(self, loss_weight: float, loss_name: str) -> None:
        super().__init__()
        check_finite_number(type(self).__name__, 'loss_weight', loss_weight, minimum=0)
        self.loss_weight = float(loss_weight)
        check_loss_name(type(self).__name__, loss_name)
        self._loss_name = loss_name

    @property
    def loss_name(self) -> str:
        """Name in the log; only what contains ``loss`` is optimised."""
        return self._loss_name

    def extra_repr(self) -> str:
        """Show the weight in the model's print-out."""
        return f'loss_weight={self.loss_weight:g}'


@MODELS.register_module()
class DepthL1Loss(_DepthLoss):
    """Mean distance to the ground truth in metres, over its readings.

    See :func:`~mmstructkd.functional.depth_regression.depth_l1_loss`.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        loss_name: name in the log.

    Shape:
        - prediction, truth: (B, 1, H, W) or (B, H, W), metres.
        - output: scalar in metres, 0 with a graph without a reading.

    Example:
        >>> import torch
        >>> DepthL1Loss()(torch.tensor([[[3.0, 9.0]]]), torch.tensor([[[2.0, 0.0]]])).item()
        1.0
    """

    def __init__(self, loss_weight: float = 1.0, loss_name: str = 'loss_l1') -> None:
        super().__init__(loss_weight, loss_name)

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Return the weighted loss."""
        return self.loss_weight * depth_l1_loss(prediction, truth)


@MODELS.register_module()
class DepthSILogLoss(_DepthLoss):
    """Scale-invariant logarithmic distance to the ground truth, over its readings.

    See :func:`~mmstructkd.functional.depth_regression.silog_loss`. With its root, as mmseg's
    ``SiLogLoss``; differs from that in two cases that make its gradient NaN: an
    image without a reading leaves the mean, an image hit exactly has gradient 0.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        variance_weight: from 0 (all of the error in scale counts) to 1 (none
            does).
        eps: metres, above 0; below it the logarithm goes on as its tangent.
        loss_name: name in the log.

    Shape:
        - prediction, truth: (B, 1, H, W) or (B, H, W), metres.
        - output: scalar in nats, 0 with a graph without a reading.

    Example:
        >>> import torch
        >>> truth = torch.tensor([[[1.0, 2.0, 0.0]]])
        >>> DepthSILogLoss(variance_weight=1.0)(3 * truth, truth).item() < 1e-5
        True
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        variance_weight: float = 0.5,
        eps: float = 1e-3,
        loss_name: str = 'loss_silog',
    ) -> None:
        super().__init__(loss_weight, loss_name)
        owner = type(self).__name__
        check_finite_number(owner, 'variance_weight', variance_weight, minimum=0)
        if variance_weight > 1:
            raise ConfigError(f'{owner}: `variance_weight` must be at most 1, got {variance_weight!r}.')
        check_positive(owner, 'eps', eps)
        self.variance_weight = float(variance_weight)
        self.eps = float(eps)

    def forward(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Return the weighted loss."""
        return self.loss_weight * silog_loss(
            prediction, truth, variance_weight=self.variance_weight, root=True, eps=self.eps
        )
