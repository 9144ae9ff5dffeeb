"""Registered losses: settings, a weight, and one call of :mod:`mmstructkd.functional`."""

from mmstructkd.losses.attention_transfer import AttentionTransferLoss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.binary_kl import BinaryKLLoss
from mmstructkd.losses.category_similarity import CategorySimilarityLoss
from mmstructkd.losses.channelwise_kl import ChannelwiseKLLoss
from mmstructkd.losses.correlation_congruence import CorrelationCongruenceLoss
from mmstructkd.losses.cross_image_kl import CrossImageKLLoss
from mmstructkd.losses.cross_view_similarity import CrossViewSimilarityLoss
from mmstructkd.losses.decoupled_kl import DecoupledKLLoss
from mmstructkd.losses.depth_regression import DepthRegressionLoss
from mmstructkd.losses.dist import DistLoss
from mmstructkd.losses.feature_mse import FeatureMSELoss
from mmstructkd.losses.focal_global import FocalGlobalLoss
from mmstructkd.losses.gradient_matching import GradientMatchingLoss
from mmstructkd.losses.hierarchical_context import HierarchicalContextLoss
from mmstructkd.losses.holistic import HolisticLoss
from mmstructkd.losses.interclass_similarity import InterclassSimilarityLoss
from mmstructkd.losses.intra_class_variation import IntraClassVariationLoss
from mmstructkd.losses.local_structure import LocalStructureLoss
from mmstructkd.losses.localization_kl import LocalizationKLLoss
from mmstructkd.losses.masked_generation import MaskedGenerationLoss
from mmstructkd.losses.memory_contrast import MemoryContrastLoss
from mmstructkd.losses.ordinal_relation import OrdinalRelationLoss
from mmstructkd.losses.pairwise_affinity import PairwiseAffinityLoss
from mmstructkd.losses.pixel_similarity import PixelSimilarityLoss
from mmstructkd.losses.pixelwise_kl import PixelwiseKLLoss
from mmstructkd.losses.prototype_contrast import PrototypeContrastLoss
from mmstructkd.losses.region_contrast import RegionContrastLoss
from mmstructkd.losses.relational import RelationalLoss
from mmstructkd.losses.scale_shift_invariant import ScaleShiftInvariantLoss
from mmstructkd.losses.similarity_preserving import SimilarityPreservingLoss
from mmstructkd.losses.standardized_mse import StandardizedMSELoss
from mmstructkd.losses.virtual_normal import VirtualNormalLoss
from mmstructkd.losses.weighted_soft_label import WeightedSoftLabelLoss
from mmstructkd.losses.zipf_label import ZipfLabelLoss

__all__ = [
    'AttentionTransferLoss',
    'BinaryKLLoss',
    'CategorySimilarityLoss',
    'ChannelwiseKLLoss',
    'CorrelationCongruenceLoss',
    'CrossImageKLLoss',
    'CrossViewSimilarityLoss',
    'DecoupledKLLoss',
    'DepthRegressionLoss',
    'DistLoss',
    'DistillLoss',
    'FeatureMSELoss',
    'FocalGlobalLoss',
    'GradientMatchingLoss',
    'HierarchicalContextLoss',
    'HolisticLoss',
    'InterclassSimilarityLoss',
    'IntraClassVariationLoss',
    'LocalStructureLoss',
    'LocalizationKLLoss',
    'MaskedGenerationLoss',
    'MemoryContrastLoss',
    'OrdinalRelationLoss',
    'PairwiseAffinityLoss',
    'PixelSimilarityLoss',
    'PixelwiseKLLoss',
    'PrototypeContrastLoss',
    'RegionContrastLoss',
    'RelationalLoss',
    'ScaleShiftInvariantLoss',
    'SimilarityPreservingLoss',
    'StandardizedMSELoss',
    'VirtualNormalLoss',
    'WeightedSoftLabelLoss',
    'ZipfLabelLoss',
]
