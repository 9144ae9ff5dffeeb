"""1x1 convolution from the student's width to the teacher's."""

from __future__ import annotations

from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmstructkd.errors import check_positive
from mmstructkd.registry import MODELS

__all__ = ['ConvConnector']


@MODELS.register_module()
class ConvConnector(nn.Module):
    """Project the student's feature to the teacher's number of channels.

    Trained with the student, dropped from its checkpoint. The term fills in
    both widths from the probe.

    Args:
        in_channels: width of the student's feature.
        out_channels: width of the teacher's feature.
        kernel_size: side of the kernel, odd; the map keeps its size.
        norm_cfg: normalisation behind the convolution, or ``None``.
        act_cfg: activation at the end, or ``None``: a feature may be negative.
    """

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
            check_positive('ConvConnector', name, value)
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
        return self.conv(student)
