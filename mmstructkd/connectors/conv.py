"""1x1 convolution from the student's width to the teacher's."""

from __future__ import annotations

from mmcv.cnn import ConvModule
from torch import Tensor

from mmstructkd.connectors.base import MAX_KERNEL, Connector, check_input, check_width
from mmstructkd.errors import ConfigError, check_count
from mmstructkd.layers import check_layers
from mmstructkd.registry import MODELS

__all__ = ['ConvConnector']


@MODELS.register_module()
class ConvConnector(Connector):
    """Project the student's feature to the teacher's number of channels.

    The regressor of FitNets (arXiv:1412.6550). Trained with the student,
    dropped from its checkpoint. The term fills in both widths from the probe.

    Args:
        in_channels: width of the student's feature.
        out_channels: width of the teacher's feature.
        kernel_size: side of the kernel, odd; the map keeps its size.
        norm_cfg: normalisation behind the convolution, or ``None``.
        act_cfg: activation at the end, or ``None``: a feature may be negative.

    Raises:
        ConfigError: a width is not a positive integer, or ``kernel_size`` is even.

    Example:
        >>> import torch
        >>> ConvConnector(3, 5)(torch.zeros(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """

    paper = 'FitNets: Hints for Thin Deep Nets (arXiv:1412.6550)'

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        for name, value in (('in_channels', in_channels), ('out_channels', out_channels)):
            check_width('ConvConnector', name, value)
        check_count('ConvConnector', 'kernel_size', kernel_size, maximum=MAX_KERNEL)
        if kernel_size % 2 == 0:
            raise ConfigError(
                f'ConvConnector: `kernel_size` must be odd, got {kernel_size!r}. An even one would shift the map.'
            )
        check_layers('ConvConnector', out_channels, norm_cfg=norm_cfg, act_cfg=act_cfg)
        self.in_channels = in_channels
        self.conv = ConvModule(
            in_channels,
            out_channels,
            kernel_size,
            padding=kernel_size // 2,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            bias='auto',
        )

    def forward(self, student: Tensor) -> Tensor:
        """Return the projected feature, shape (B, out_channels, H, W)."""
        check_input(type(self).__name__, student, self.in_channels)
        return self.conv(student)
