"""The batch at another resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import interpolate

from mmstructkd.errors import check_positive
from mmstructkd.registry import MODELS
from mmstructkd.streams.base import Stream, StreamBatch
from mmstructkd.streams.samples import resized
from mmstructkd.structures import Targets

__all__ = ['ScaledStream', 'scale_images']

#: More is a slip, and would fill the memory.
MAX_SCALE = 16.0


def scale_images(inputs: Tensor, scale: float) -> Tensor:
    """Resize a batch bilinearly, averaging where it shrinks.

    Args:
        inputs: shape (B, C, H, W).
        scale: factor of both sides.

    Returns:
        Shape (B, C, round(scale H), round(scale W)).
    """
    size = [max(1, round(side * scale)) for side in inputs.shape[-2:]]
    return interpolate(inputs, size=size, mode='bilinear', align_corners=False, antialias=scale < 1)


@MODELS.register_module()
class ScaledStream(Stream):
    """The batch resized, with the labels of the task at their own size.

    Args:
        scale: factor of both sides, above 0 and at most 16.
        norm: what the student's BatchNorm layers do on it.
    """

    labelled = True

    def __init__(self, scale: float, norm: str = 'frozen') -> None:
        super().__init__(norm)
        check_positive(type(self).__name__, 'scale', scale, MAX_SCALE)
        self.scale = float(scale)

    def make(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        others: Mapping[str, Any],
        step: int,
    ) -> StreamBatch:
        """Resize the batch; maps of the targets are brought to any grid by whoever reads them."""
        images = scale_images(inputs, self.scale)
        size = (images.shape[-2], images.shape[-1])
        factors = (size[0] / inputs.shape[-2], size[1] / inputs.shape[-1])
        boxes = targets.boxes
        if boxes is not None:
            boxes = tuple(box * box.new_tensor([factors[1], factors[0]] * 2) for box in boxes)
        known = replace(targets, images=images, input_size=size, boxes=boxes)
        return StreamBatch(images, resized(data_samples, factors, size), known)
