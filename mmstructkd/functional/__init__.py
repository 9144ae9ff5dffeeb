"""The mathematics of mmstructkd: tensors in, tensors out, pure torch.

First two arguments ``student, teacher``, the rest by keyword; every ``*_loss``
returns an unweighted scalar of at least float32 and detaches the teacher.
"""

from mmstructkd.functional.attention_transfer import attention_map, attention_transfer_loss
from mmstructkd.functional.averaging import average_momentum, average_update
from mmstructkd.functional.binary_kl import binary_kl_loss
from mmstructkd.functional.blending import blend, blended_cross_entropy_loss, blended_feature_loss, blended_kl_losses
from mmstructkd.functional.category_similarity import category_similarity_loss
from mmstructkd.functional.chain_marginals import chain_cross_entropy_loss, chain_marginals
from mmstructkd.functional.channelwise_kl import channelwise_kl_loss
from mmstructkd.functional.core.binary import as_two_classes, two_class_logits
from mmstructkd.functional.core.boxes import box_masks, inside_boxes
from mmstructkd.functional.core.classes import present_classes
from mmstructkd.functional.core.depth import depth_of_disparity, depth_readings, disparity_of_depth, normalize_depth
from mmstructkd.functional.core.nodes import cell_nodes, pool_nodes, unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.regions import box_average, class_centers
from mmstructkd.functional.core.resize import resize_labels, resize_map, resize_mask
from mmstructkd.functional.core.sampling import draw_positions
from mmstructkd.functional.core.schedules import adaptation_factor, exponential_factor, objective_weights
from mmstructkd.functional.core.score_fusion import fuse_scores, score_confidence
from mmstructkd.functional.core.scores import map_logits
from mmstructkd.functional.core.softening import bounded_temperature, scale_gradient, standardize_logits
from mmstructkd.functional.correlation_congruence import adjacent_correlation_loss, correlation_congruence_loss
from mmstructkd.functional.cosine_distance import cosine_distance_loss
from mmstructkd.functional.cross_entropy import cross_entropy_loss
from mmstructkd.functional.cross_image_kl import cross_image_kl_loss
from mmstructkd.functional.cross_view_similarity import cross_view_similarity_loss, rows_worth_keeping
from mmstructkd.functional.decoupled_kl import decoupled_kl_loss
from mmstructkd.functional.depth_regression import depth_l1_loss, silog_loss
from mmstructkd.functional.dist import dist_loss
from mmstructkd.functional.feature_mse import feature_mse_loss
from mmstructkd.functional.feature_spread import covariance_loss, variance_hinge_loss
from mmstructkd.functional.focal_global import focal_attention, focal_feature_loss
from mmstructkd.functional.gradient_matching import gradient_matching_loss
from mmstructkd.functional.hierarchical_context import hierarchical_context_loss
from mmstructkd.functional.holistic import adversarial_loss, critic_loss, gradient_penalty
from mmstructkd.functional.interclass_similarity import interclass_kl_matrix, interclass_similarity_loss
from mmstructkd.functional.intra_class_variation import intra_class_variation_loss
from mmstructkd.functional.layer_bridge import bridge_loss, mix_layers
from mmstructkd.functional.local_learning import gate_gradient, local_learning_loss
from mmstructkd.functional.local_structure import local_structure_loss
from mmstructkd.functional.localization_kl import edge_confidence, localization_kl_loss
from mmstructkd.functional.mean_discrepancy import mean_discrepancy_loss
from mmstructkd.functional.memory_contrast import memory_kl_loss
from mmstructkd.functional.mutual_kl import mutual_kl_losses
from mmstructkd.functional.ordinal_relation import ordinal_relation_loss
from mmstructkd.functional.pairwise_affinity import pairwise_affinity_loss
from mmstructkd.functional.pixel_similarity import attention_residuals, pixel_similarity_loss
from mmstructkd.functional.pixelwise_kl import instance_temperature_kl_loss, pixelwise_kl_loss
from mmstructkd.functional.prototype_contrast import MutualContrast, mutual_contrast_losses, prototype_contrast_loss
from mmstructkd.functional.query_marginals import pool_probabilities, query_marginals
from mmstructkd.functional.refinement import fuse_maps, refine_pyramid
from mmstructkd.functional.region_contrast import region_contrast_loss, sinkhorn_loss, wasserstein_contrast_loss
from mmstructkd.functional.regularization_share import regularization_share
from mmstructkd.functional.relational import relational_loss
from mmstructkd.functional.residual import residual_loss
from mmstructkd.functional.route import equal_hardness_route, equal_interval_route, next_stop, route_stage
from mmstructkd.functional.sample_selection import (
    confident_pixels,
    filter_by_quantile,
    image_mean,
    joint_confidence,
    score_disagreement,
    value_disagreement,
)
from mmstructkd.functional.scale_shift_invariant import scale_shift_invariant_loss
from mmstructkd.functional.similarity_preserving import similarity_preserving_loss
from mmstructkd.functional.soft_target import constrained_soft_target, next_multiplier, soft_target_loss
from mmstructkd.functional.spatial_mean import spatial_mean_loss
from mmstructkd.functional.standardized_mse import standardized_mse_loss
from mmstructkd.functional.turning import joint_labels, turn_back, turn_maps
from mmstructkd.functional.virtual_normal import virtual_normal_loss
from mmstructkd.functional.weighted_soft_label import weighted_soft_label_loss
from mmstructkd.functional.zipf_label import zipf_label_loss

__all__ = [
    'MutualContrast',
    'adaptation_factor',
    'adjacent_correlation_loss',
    'adversarial_loss',
    'as_two_classes',
    'attention_map',
    'attention_residuals',
    'attention_transfer_loss',
    'average_momentum',
    'average_update',
    'binary_kl_loss',
    'blend',
    'blended_cross_entropy_loss',
    'blended_feature_loss',
    'blended_kl_losses',
    'bounded_temperature',
    'box_average',
    'box_masks',
    'bridge_loss',
    'category_similarity_loss',
    'cell_nodes',
    'chain_cross_entropy_loss',
    'chain_marginals',
    'channelwise_kl_loss',
    'class_centers',
    'confident_pixels',
    'constrained_soft_target',
    'correlation_congruence_loss',
    'cosine_distance_loss',
    'covariance_loss',
    'critic_loss',
    'cross_entropy_loss',
    'cross_image_kl_loss',
    'cross_view_similarity_loss',
    'decoupled_kl_loss',
    'depth_l1_loss',
    'depth_of_disparity',
    'depth_readings',
    'disparity_of_depth',
    'dist_loss',
    'draw_positions',
    'edge_confidence',
    'equal_hardness_route',
    'equal_interval_route',
    'exponential_factor',
    'feature_mse_loss',
    'filter_by_quantile',
    'focal_attention',
    'focal_feature_loss',
    'full_precision',
    'fuse_maps',
    'fuse_scores',
    'gate_gradient',
    'gradient_matching_loss',
    'gradient_penalty',
    'hierarchical_context_loss',
    'image_mean',
    'inside_boxes',
    'instance_temperature_kl_loss',
    'interclass_kl_matrix',
    'interclass_similarity_loss',
    'intra_class_variation_loss',
    'joint_confidence',
    'joint_labels',
    'local_learning_loss',
    'local_structure_loss',
    'localization_kl_loss',
    'map_logits',
    'masked_mean',
    'mean_discrepancy_loss',
    'memory_kl_loss',
    'mix_layers',
    'mutual_contrast_losses',
    'mutual_kl_losses',
    'next_multiplier',
    'next_stop',
    'normalize_depth',
    'objective_weights',
    'ordinal_relation_loss',
    'pairwise_affinity_loss',
    'pixel_similarity_loss',
    'pixelwise_kl_loss',
    'pool_nodes',
    'pool_probabilities',
    'present_classes',
    'prototype_contrast_loss',
    'query_marginals',
    'refine_pyramid',
    'region_contrast_loss',
    'regularization_share',
    'relational_loss',
    'residual_loss',
    'resize_labels',
    'resize_map',
    'resize_mask',
    'route_stage',
    'rows_worth_keeping',
    'scale_gradient',
    'scale_shift_invariant_loss',
    'score_confidence',
    'score_disagreement',
    'silog_loss',
    'similarity_preserving_loss',
    'sinkhorn_loss',
    'soft_target_loss',
    'spatial_mean_loss',
    'standardize_logits',
    'standardized_mse_loss',
    'turn_back',
    'turn_maps',
    'two_class_logits',
    'unit_vectors',
    'value_disagreement',
    'variance_hinge_loss',
    'virtual_normal_loss',
    'wasserstein_contrast_loss',
    'weighted_soft_label_loss',
    'zipf_label_loss',
]
