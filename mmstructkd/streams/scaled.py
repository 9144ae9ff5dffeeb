"""The batch at another resolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mmstructkd.registry import MODELS
from mmstructkd.streams.base import Stream, StreamBatch
from mmstructkd.structures import Targets
from mmstructkd.tasks.resizing import check_scale, scale_batch

__all__ = ['ScaledStream']


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
        self.scale = check_scale(type(self).__name__, 'scale', scale)

    def make(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        others: Mapping[str, Any],
        step: int,
    ) -> StreamBatch:
        """Resize the batch; maps of the targets are brought to any grid by whoever reads them."""
        images, samples = scale_batch(inputs, data_samples, self.scale)
        size = (images.shape[-2], images.shape[-1])
        factors = (size[0] / inputs.shape[-2], size[1] / inputs.shape[-1])
        boxes = targets.boxes
        if boxes is not None:
            boxes = tuple(box * box.new_tensor([factors[1], factors[0]] * 2) for box in boxes)
        known = replace(targets, images=images, input_size=size, boxes=boxes)
        return StreamBatch(images, samples, known)
