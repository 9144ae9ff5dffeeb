"""Pictures of what a student learnt."""

from mmstructkd.visualization.paint import colour_depth, colour_mask, draw_boxes
from mmstructkd.visualization.samples import (
    Looks,
    choose_looks,
    draw_samples,
    paint_image,
    paint_prediction,
    paint_truth,
)
from mmstructkd.visualization.side_by_side import side_by_side

__all__ = [
    'Looks',
    'choose_looks',
    'colour_depth',
    'colour_mask',
    'draw_boxes',
    'draw_samples',
    'paint_image',
    'paint_prediction',
    'paint_truth',
    'side_by_side',
]
