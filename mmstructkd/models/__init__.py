"""Task parts that mmseg lacks: light depth heads for its ``DepthEstimator``, and losses to train them.

Without mmseg there are only the losses.
"""

from importlib.util import find_spec

from mmstructkd.models.depth_bins import BinsToDepth, DepthBinLoss, ScoreToDepth
from mmstructkd.models.depth_losses import DepthL1Loss, DepthSILogLoss

__all__ = ['BinsToDepth', 'DepthBinLoss', 'DepthL1Loss', 'DepthSILogLoss', 'ScoreToDepth']

if find_spec('mmseg') is not None:
    from mmstructkd.models.depth_classification_head import DepthClassificationHead
    from mmstructkd.models.depth_head import DepthHead
    from mmstructkd.models.depth_regression_head import DepthRegressionHead

    __all__ += ['DepthClassificationHead', 'DepthHead', 'DepthRegressionHead']

if find_spec('mmdet') is not None:
    from mmstructkd.models.efficientnet_lite import EfficientNetLite

    __all__ += ['EfficientNetLite']
