"""A depth estimator that trains in milliseconds."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import ConfigDict

from mmstructkd.testing.toy import toy_segmentor

__all__ = ['toy_depth_estimator']


def toy_depth_estimator(width: int = 4, head: str = 'DepthRegressionHead', **changes: Any) -> ConfigDict:
    """Config of a depth estimator on the backbone of :func:`~mmstructkd.testing.toy_segmentor`.

    Args:
        width: channels of the first stage.
        head: ``'DepthRegressionHead'`` or ``'DepthClassificationHead'``.
        **changes: override keys of the model.

    Returns:
        Config of an mmseg ``DepthEstimator``; limits are those of the scenes.
    """
    model = toy_segmentor(width)
    model.type = 'DepthEstimator'
    model.data_preprocessor.seg_pad_val = 0
    model.pop('auxiliary_head')
    model.decode_head = dict(
        type=f'mmstructkd.{head}',
        in_channels=8 * width,
        channels=2 * width,
        in_index=3,
        min_depth=0.5,
        max_depth=25.0,
        norm_cfg=model.decode_head.norm_cfg,
        align_corners=False,
        **(dict(num_bins=12) if head == 'DepthClassificationHead' else {}),
    )
    model.update(copy.deepcopy(changes))
    return model
