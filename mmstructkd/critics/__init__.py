"""Critics: registered networks that score maps for holistic distillation."""

from mmstructkd.critics.sagan import SAGANCritic, SpatialSelfAttention

__all__ = ['SAGANCritic', 'SpatialSelfAttention']
