"""Connectors: what makes a student's tensor comparable with the teacher's."""

from mmstructkd.connectors.attention_fusion import AttentionFusionConnector
from mmstructkd.connectors.attention_residual import AttentionResidualConnector
from mmstructkd.connectors.base import Connector, build_connector, width_of
from mmstructkd.connectors.conv import ConvConnector
from mmstructkd.connectors.deep_projector import DeepProjectorConnector
from mmstructkd.connectors.layer_mix import LayerMixConnector
from mmstructkd.connectors.masked_generation import MaskedGenerationConnector
from mmstructkd.connectors.pool import PoolConnector
from mmstructkd.connectors.projector_ensemble import ProjectorEnsembleConnector
from mmstructkd.connectors.query_marginals import QueryMarginals
from mmstructkd.connectors.sequential import SequentialConnector
from mmstructkd.connectors.standardize import StandardizeConnector
from mmstructkd.connectors.teacher_head import TeacherHeadConnector
from mmstructkd.connectors.tokens import MapToTokensConnector, TokensToMapConnector

__all__ = [
    'AttentionFusionConnector',
    'AttentionResidualConnector',
    'Connector',
    'ConvConnector',
    'DeepProjectorConnector',
    'LayerMixConnector',
    'MapToTokensConnector',
    'MaskedGenerationConnector',
    'PoolConnector',
    'ProjectorEnsembleConnector',
    'QueryMarginals',
    'SequentialConnector',
    'StandardizeConnector',
    'TeacherHeadConnector',
    'TokensToMapConnector',
    'build_connector',
    'width_of',
]
