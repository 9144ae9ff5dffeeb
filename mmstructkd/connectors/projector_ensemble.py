"""Several independent projectors, averaged."""

from __future__ import annotations

from typing import cast

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmstructkd.connectors.base import Connector, check_input, check_width
from mmstructkd.errors import check_count
from mmstructkd.registry import MODELS

__all__ = ['ProjectorEnsembleConnector']

MAX_PROJECTORS = 64


@MODELS.register_module()
class ProjectorEnsembleConnector(Connector):
    r"""Mean of several 1x1 projections of the student's feature, each with its own ReLU.

    .. math:: \bar f = \frac{1}{K} \sum_k \max(0, W_k f + b_k)

    Projector ensemble (NeurIPS 2022). Projectors that start from different
    weights differ in what they take from the student; their mean shares the
    teacher's knowledge out over all of them. Differs from the authors' code,
    which builds one more projector that it never trains nor uses. The result is
    never negative: it suits a teacher's feature behind a ReLU. Published with
    the cosine distance over channels.

    Args:
        in_channels: width of the student's feature.
        out_channels: width of the teacher's feature.
        num_projectors: K, at least 1.

    Raises:
        ConfigError: an argument is not a positive integer.

    Example:
        >>> import torch
        >>> out = ProjectorEnsembleConnector(3, 5)(torch.randn(2, 3, 4, 4))
        >>> out.shape, bool((out >= 0).all())
        (torch.Size([2, 5, 4, 4]), True)
    """

    paper = 'Improved Feature Distillation via Projector Ensemble (NeurIPS 2022)'

    def __init__(self, in_channels: int, out_channels: int, num_projectors: int = 3) -> None:
        super().__init__()
        given = {'in_channels': in_channels, 'out_channels': out_channels}
        for name, value in given.items():
            check_width('ProjectorEnsembleConnector', name, value)
        check_count('ProjectorEnsembleConnector', 'num_projectors', num_projectors, maximum=MAX_PROJECTORS)
        self.in_channels = in_channels
        self.projectors = nn.ModuleList(
            ConvModule(in_channels, out_channels, 1, act_cfg=dict(type='ReLU')) for _ in range(num_projectors)
        )

    def forward(self, student: Tensor) -> Tensor:
        """Return the mean projection, shape (B, out_channels, H, W)."""
        check_input(type(self).__name__, student, self.in_channels)
        total = sum(projector(student) for projector in self.projectors)
        return cast(torch.Tensor, total) / len(self.projectors)
