"""The mathematics of mmstructkd: tensors in, tensors out, pure torch.

First two arguments ``student, teacher``, the rest by keyword; every ``*_loss``
returns an unweighted scalar of at least float32 and detaches the teacher.
"""

from mmstructkd.functional.adversarial import adversarial_loss, critic_loss, gradient_penalty
from mmstructkd.functional.affinity import pairwise_affinity_loss
from mmstructkd.functional.binary import as_two_classes, two_class_logits
from mmstructkd.functional.boxes import box_masks, focal_attention, focal_feature_loss
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
from mmstructkd.functional.logits import (
    decoupled_kl_loss,
    dist_loss,
    map_logits,
    weighted_soft_label_loss,
    zipf_label_loss,
)
from mmstructkd.functional.nodes import cell_nodes, pool_nodes, unit_vectors
from mmstructkd.functional.pixel_similarity import attention_residuals, pixel_similarity_loss
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.pyramid import hierarchical_context_loss
from mmstructkd.functional.reduce import masked_mean
from mmstructkd.functional.region import box_average, class_centers, intra_class_variation_loss
from mmstructkd.functional.relation import (
    adjacent_correlation_loss,
    correlation_congruence_loss,
    cross_image_kl_loss,
    local_structure_loss,
    relational_loss,
    similarity_preserving_loss,
)
from mmstructkd.functional.resize import resize_labels, resize_map, resize_mask
from mmstructkd.functional.sampling import draw_positions
from mmstructkd.functional.softening import scale_gradient, standardize_logits
from mmstructkd.functional.statistics import (
    attention_map,
    attention_transfer_loss,
    feature_mse_loss,
    standardized_mse_loss,
)

__all__ = [
    'adjacent_correlation_loss',
    'adversarial_loss',
    'as_two_classes',
    'attention_map',
    'attention_residuals',
    'attention_transfer_loss',
    'binary_kl_loss',
    'box_average',
    'box_masks',
    'category_similarity_loss',
    'cell_nodes',
    'channelwise_kl_loss',
    'class_centers',
    'correlation_congruence_loss',
    'critic_loss',
    'cross_image_kl_loss',
    'decoupled_kl_loss',
    'depth_l1_loss',
    'depth_of_disparity',
    'depth_readings',
    'disparity_of_depth',
    'dist_loss',
    'draw_positions',
    'edge_confidence',
    'feature_mse_loss',
    'focal_attention',
    'focal_feature_loss',
    'full_precision',
    'gradient_matching_loss',
    'gradient_penalty',
    'hierarchical_context_loss',
    'inside_boxes',
    'interclass_kl_matrix',
    'interclass_similarity_loss',
    'intra_class_variation_loss',
    'local_structure_loss',
    'localization_kl_loss',
    'map_logits',
    'masked_mean',
    'memory_kl_loss',
    'normalize_depth',
    'ordinal_relation_loss',
    'pairwise_affinity_loss',
    'pixel_similarity_loss',
    'pixelwise_kl_loss',
    'pool_nodes',
    'present_classes',
    'region_contrast_loss',
    'relational_loss',
    'resize_labels',
    'resize_map',
    'resize_mask',
    'scale_gradient',
    'scale_shift_invariant_loss',
    'silog_loss',
    'similarity_preserving_loss',
    'sinkhorn_loss',
    'standardize_logits',
    'standardized_mse_loss',
    'two_class_logits',
    'unit_vectors',
    'virtual_normal_loss',
    'wasserstein_contrast_loss',
    'weighted_soft_label_loss',
    'zipf_label_loss',
]
