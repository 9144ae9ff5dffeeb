"""A projector of four layers, used in training only."""

from __future__ import annotations

import itertools

from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmstructkd.connectors.base import Connector, check_input, check_width
from mmstructkd.errors import check_count
from mmstructkd.layers import check_layers
from mmstructkd.registry import MODELS

__all__ = ['DeepProjectorConnector']

MAX_FACTOR = 64


@MODELS.register_module()
class DeepProjectorConnector(Connector):
    """Four 1x1 convolutions, d to 2d to d to 2d to D, from the student's feature to the teacher's.

    SimReg (BMVC 2021): a regressor that is deeper than a single layer and is
    dropped after training leaves the better student. Normalisation and ReLU
    stand behind the first and the third layer only, as published; 1x1
    convolutions take the place of the linear layers. Published with the cosine
    distance over channels.

    Args:
        in_channels: width d of the student's feature.
        out_channels: width D of the teacher's feature.
        expansion: width of the hidden layers over d; published: 2.
        norm_cfg: normalisation behind layers 1 and 3; ``dict(type='SyncBN')``
            for few images on each of several GPUs, ``dict(type='GN',
            num_groups=...)`` for one image.

    Raises:
        ConfigError: an argument is not a positive integer.

    Example:
        >>> import torch
        >>> DeepProjectorConnector(3, 5)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 5, 4, 4])
    """

    paper = 'SimReg: Regression as a Simple Yet Effective Tool for Self-supervised Knowledge Distillation (BMVC 2021)'

    def __init__(self, in_channels: int, out_channels: int, expansion: int = 2, norm_cfg: dict | None = None) -> None:
        super().__init__()
        given = {'in_channels': in_channels, 'out_channels': out_channels}
        for name, value in given.items():
            check_width('DeepProjectorConnector', name, value)
        check_count('DeepProjectorConnector', 'expansion', expansion, maximum=MAX_FACTOR)
        norm_cfg = {'type': 'BN'} if norm_cfg is None else dict(norm_cfg)
        check_layers('DeepProjectorConnector', in_channels, norm_cfg=norm_cfg)
        self.in_channels = in_channels
        hidden = expansion * in_channels
        widths = (in_channels, hidden, in_channels, hidden, out_channels)
        layers = []
        for number, (before, after) in enumerate(itertools.pairwise(widths)):
            ends = number % 2 == 1
            layers.append(
                ConvModule(
                    before,
                    after,
                    1,
                    norm_cfg=None if ends else norm_cfg,
                    act_cfg=None if ends else dict(type='ReLU'),
                )
            )
        self.layers = nn.Sequential(*layers)

    def forward(self, student: Tensor) -> Tensor:
        """Return the projected feature, shape (B, out_channels, H, W)."""
        check_input(type(self).__name__, student, self.in_channels)
        return self.layers(student)
