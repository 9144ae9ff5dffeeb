"""Critics: registered networks that score maps for holistic distillation."""

from mmstructkd.critics.input_norm import JointBatchNorm
from mmstructkd.critics.sagan import SAGANCritic, SpatialSelfAttention

__all__ = ['JointBatchNorm', 'SAGANCritic', 'SpatialSelfAttention']
