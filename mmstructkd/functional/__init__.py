"""The mathematics of mmstructkd: tensors in, tensors out, pure torch.

First two arguments ``student, teacher``, the rest by keyword; every ``*_loss``
returns an unweighted scalar of at least float32 and detaches the teacher.
"""

from mmstructkd.functional.adversarial import adversarial_loss, critic_loss, gradient_penalty
from mmstructkd.functional.affinity import pairwise_affinity_loss
from mmstructkd.functional.averaging import average_momentum, average_update
from mmstructkd.functional.binary import as_two_classes, two_class_logits
from mmstructkd.functional.blending import blend, blended_cross_entropy_loss, blended_feature_loss, blended_kl_losses
from mmstructkd.functional.boxes import box_masks, focal_attention, focal_feature_loss
from mmstructkd.functional.chain_marginals import chain_cross_entropy_loss, chain_marginals
from mmstructkd.functional.classes import (
    category_similarity_loss,
    interclass_kl_matrix,
    interclass_similarity_loss,
    present_classes,
)
from mmstructkd.functional.contrast import (
    memory_kl_loss,
    region_contrast_loss,
    sinkhorn_loss,
    wasserstein_contrast_loss,
)
from mmstructkd.functional.cosine_distance import cosine_distance_loss
from mmstructkd.functional.cross_entropy import cross_entropy_loss
from mmstructkd.functional.cross_view_similarity import cross_view_similarity_loss, rows_worth_keeping
from mmstructkd.functional.depth import (
    depth_l1_loss,
    depth_of_disparity,
    depth_readings,
    disparity_of_depth,
    gradient_matching_loss,
    normalize_depth,
    ordinal_relation_loss,
    scale_shift_invariant_loss,
    silog_loss,
    virtual_normal_loss,
)
from mmstructkd.functional.detection import binary_kl_loss, edge_confidence, inside_boxes, localization_kl_loss
from mmstructkd.functional.divergence import channelwise_kl_loss, pixelwise_kl_loss
from mmstructkd.functional.feature_spread import covariance_loss, variance_hinge_loss
from mmstructkd.functional.instance_temperature import bounded_temperature, instance_temperature_kl_loss
from mmstructkd.functional.layer_bridge import bridge_loss, mix_layers
from mmstructkd.functional.local_learning import gate_gradient, local_learning_loss
from mmstructkd.functional.logits import (
    decoupled_kl_loss,
    dist_loss,
    map_logits,
    weighted_soft_label_loss,
    zipf_label_loss,
)
from mmstructkd.functional.mean_discrepancy import mean_discrepancy_loss
from mmstructkd.functional.mutual_contrast import MutualContrast, mutual_contrast_losses, prototype_contrast_loss
from mmstructkd.functional.mutual_kl import mutual_kl_losses
from mmstructkd.functional.nodes import cell_nodes, pool_nodes, unit_vectors
from mmstructkd.functional.pixel_similarity import attention_residuals, pixel_similarity_loss
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.pyramid import hierarchical_context_loss
from mmstructkd.functional.query_marginals import pool_probabilities, query_marginals
from mmstructkd.functional.reduce import masked_mean
from mmstructkd.functional.refinement import fuse_maps, refine_pyramid
from mmstructkd.functional.region import box_average, class_centers, intra_class_variation_loss
from mmstructkd.functional.regularization_share import regularization_share
from mmstructkd.functional.relation import (
    adjacent_correlation_loss,
    correlation_congruence_loss,
    cross_image_kl_loss,
    local_structure_loss,
    relational_loss,
    similarity_preserving_loss,
)
from mmstructkd.functional.residual import residual_loss
from mmstructkd.functional.resize import resize_labels, resize_map, resize_mask
from mmstructkd.functional.route import equal_hardness_route, equal_interval_route, next_stop, route_stage
from mmstructkd.functional.sample_selection import (
    confident_pixels,
    filter_by_quantile,
    image_mean,
    joint_confidence,
    score_disagreement,
    value_disagreement,
)
from mmstructkd.functional.sampling import draw_positions
from mmstructkd.functional.schedules import adaptation_factor, exponential_factor, objective_weights
from mmstructkd.functional.score_fusion import fuse_scores, score_confidence
from mmstructkd.functional.soft_target import constrained_soft_target, next_multiplier, soft_target_loss
from mmstructkd.functional.softening import scale_gradient, standardize_logits
from mmstructkd.functional.spatial_mean import spatial_mean_loss
from mmstructkd.functional.statistics import (
    attention_map,
    attention_transfer_loss,
    feature_mse_loss,
    standardized_mse_loss,
)
from mmstructkd.functional.turning import joint_labels, turn_back, turn_maps

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
