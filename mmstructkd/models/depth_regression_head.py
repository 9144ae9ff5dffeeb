"""A light head that regresses depth in metres."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmstructkd.errors import check_one_of
from mmstructkd.models.depth_bins import ScoreToDepth, check_range
from mmstructkd.models.depth_head import DepthHead
from mmstructkd.registry import MODELS

__all__ = ['DepthRegressionHead']


@MODELS.register_module()
class DepthRegressionHead(DepthHead):
    r"""Depth as a number at each pixel.

    One score a pixel, mapped to metres: ``'sigmoid'``, :math:`d_{min} + (d_{max} -
    d_{min}) \, \sigma(x)`, or ``'softplus'``, :math:`d_{min} + \log(1 + e^x)`
    without an upper limit. See :class:`DepthHead` for taps and ground truth.

    Args:
        in_channels: channels of the feature, or of each feature.
        channels: channels of the convolutions.
        min_depth: metres, above 0; nearer readings do not count.
        max_depth: metres; readings further off do not count.
        mapping: ``'sigmoid'`` or ``'softplus'``.
        num_convs: number of 3x3 convolutions, 1 or 2.
        in_index: number of the feature, or several, which are resized to the
            first one and concatenated.
        loss_decode: config of a loss of (depth map, ground truth), or several.
            ``None``: ``DepthSILogLoss``, and ``DepthL1Loss`` with weight 0.1.
        **kwargs: of :class:`DepthHead`.

    Raises:
        ConfigError: an argument is out of range, or the ground truth has other
            units.

    Example:
        >>> import torch
        >>> head = DepthRegressionHead(8, 4, min_depth=1.0, max_depth=10.0)
        >>> head([torch.randn(2, 8, 6, 5)]).shape
        torch.Size([2, 1, 6, 5])
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int,
        *,
        min_depth: float = 0.1,
        max_depth: float = 10.0,
        mapping: str = 'sigmoid',
        num_convs: int = 1,
        in_index: int | Sequence[int] = -1,
        loss_decode: dict | Sequence[dict] | None = None,
        **kwargs: Any,
    ) -> None:
        check_range(type(self).__name__, min_depth, max_depth)
        check_one_of(type(self).__name__, 'mapping', mapping, ScoreToDepth.MAPPINGS)
        if loss_decode is None:
            loss_decode = [
                dict(type='mmstructkd.DepthSILogLoss'),
                dict(type='mmstructkd.DepthL1Loss', loss_weight=0.1),
            ]
        super().__init__(
            in_channels,
            channels,
            to_depth=ScoreToDepth(min_depth, max_depth, mapping),
            scores=1,
            min_depth=min_depth,
            max_depth=max_depth,
            num_convs=num_convs,
            in_index=in_index,
            loss_decode=loss_decode,
            **kwargs,
        )
