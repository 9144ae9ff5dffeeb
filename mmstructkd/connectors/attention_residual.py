"""From the stages of both networks to what changes in their attention."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmstructkd.connectors.base import Connector, check_widths
from mmstructkd.errors import ConfigError
from mmstructkd.functional.pixel_similarity import attention_residuals
from mmstructkd.registry import MODELS

__all__ = ['AttentionResidualConnector']


@MODELS.register_module()
class AttentionResidualConnector(Connector):
    """Turn the maps of L stages into the L (L - 1) / 2 differences of their attention.

    For :class:`~mmstructkd.losses.PixelSimilarityLoss` with ``residual=True``;
    see :func:`~mmstructkd.functional.pixel_similarity.attention_residuals`. It
    has no parameters. Both networks' residuals come at the smallest size of the
    student's stages. Attention is normalised over whole maps: which pixels count
    is the loss's affair.

    Args:
        in_channels: widths of the student's stages, from the probe.
        out_channels: widths of the teacher's.

    Raises:
        ConfigError: there are fewer than two stages.
    """

    joint = True
    paper = 'Double Similarity Distillation for Semantic Image Segmentation (arXiv:2107.08591)'

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int]) -> None:
        super().__init__()
        check_widths(type(self).__name__, 'in_channels', in_channels)
        check_widths(type(self).__name__, 'out_channels', out_channels)
        if len(in_channels) < 2:
            raise ConfigError(
                f'AttentionResidualConnector: `in_channels` must list the widths of at least two stages, '
                f"got {in_channels!r}. Tap several: tap=['backbone[1]', 'backbone[2]', ...]."
            )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the residuals of both networks, each (B, 1, h, w)."""
        size = (min(s.shape[2] for s in students), min(s.shape[3] for s in students))
        return attention_residuals(students, size=size), attention_residuals(teachers, size=size)
