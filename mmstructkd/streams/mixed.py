"""Blends of two images of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmstructkd.errors import check_positive
from mmstructkd.randomness import own_stream
from mmstructkd.registry import MODELS
from mmstructkd.streams.base import Stream, StreamBatch
from mmstructkd.structures import Blend, Targets
from mmstructkd.tasks.sample_copies import unlabelled

__all__ = ['MixedStream']


@MODELS.register_module()
class MixedStream(Stream):
    r"""Each image blended with another of the batch: :math:`\gamma x_a + (1 - \gamma) x_b`.

    Virtual samples of similarity transfer (STKD, arXiv:2103.10047) and MixSKD
    (arXiv:2208.05768): what the teacher makes of the blend is a target at every
    pixel, and no label is needed. One weight a batch, drawn from
    :math:`\mathrm{Beta}(\alpha, \alpha)`; partners by a random permutation.
    Both are functions of the iteration alone.

    Meant for segmentation: a blend has no depth, and boxes of both.

    Args:
        alpha: of the Beta distribution, above 0.
        norm: what the student's BatchNorm layers do on it.
    """

    blends = True

    def __init__(self, alpha: float = 1.0, norm: str = 'frozen') -> None:
        super().__init__(norm)
        check_positive(type(self).__name__, 'alpha', alpha)
        self.alpha = float(alpha)

    def make(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        others: Mapping[str, Any],
        step: int,
    ) -> StreamBatch:
        """Blend the batch with itself in another order."""
        with own_stream(torch.device('cpu'), step):
            weight = float(np.random.beta(self.alpha, self.alpha))
            partners = torch.randperm(len(inputs))
        partners = partners.to(inputs.device, non_blocking=True)
        images = torch.lerp(inputs[partners], inputs, weight)
        inside = targets.inside
        if inside is not None:
            inside = inside & inside[partners]
        known = Targets(
            valid=inside,
            inside=inside,
            ignore_index=targets.ignore_index,
            num_classes=targets.num_classes,
            images=images,
            input_size=targets.input_size,
        )
        return StreamBatch(images, unlabelled(data_samples), known, Blend(partners, weight))
