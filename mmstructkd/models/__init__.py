"""Task parts that mmseg lacks: depth heads for its ``DepthEstimator`` with their losses, parts of self-teachers,
and a backbone with an assistant.

Without mmseg there are only the losses.
"""

from importlib.util import find_spec

from mmstructkd.models.depth_bins import BinsToDepth, DepthBinLoss, ScoreToDepth
from mmstructkd.models.depth_losses import DepthL1Loss, DepthSILogLoss
from mmstructkd.models.fusion_neck import FusionNeck
from mmstructkd.models.given_features import GivenFeatures
from mmstructkd.models.refinement_neck import RefinementNeck
from mmstructkd.models.residual_backbone import ResidualBackbone

__all__ = [
    'BinsToDepth',
    'DepthBinLoss',
    'DepthL1Loss',
    'DepthSILogLoss',
    'FusionNeck',
    'GivenFeatures',
    'RefinementNeck',
    'ResidualBackbone',
    'ScoreToDepth',
]

if find_spec('mmseg') is not None:
    from mmstructkd.models.depth_classification_head import DepthClassificationHead
    from mmstructkd.models.depth_head import DepthHead
    from mmstructkd.models.depth_regression_head import DepthRegressionHead
    from mmstructkd.models.joint_turn_head import JointTurnHead

    __all__ += ['DepthClassificationHead', 'DepthHead', 'DepthRegressionHead', 'JointTurnHead']

if find_spec('mmdet') is not None:
    from mmstructkd.models.efficientnet_lite import EfficientNetLite

    __all__ += ['EfficientNetLite']
