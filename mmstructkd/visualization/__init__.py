"""Pictures of what a student learnt."""

from mmstructkd.visualization.side_by_side import colour_mask, side_by_side

__all__ = ['colour_mask', 'side_by_side']
