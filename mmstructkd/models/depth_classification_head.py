"""A light head that sorts depth into bins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmseg.models.utils import resize
from torch import Tensor

from mmstructkd.errors import check_count, check_one_of
from mmstructkd.models.depth_bins import MAX_BINS, BinsToDepth, check_range
from mmstructkd.models.depth_head import DepthHead, check_named_loss
from mmstructkd.registry import MODELS, build_part

__all__ = ['DepthClassificationHead']


@MODELS.register_module()
class DepthClassificationHead(DepthHead):
    """Depth as one of many bins, equally wide in the logarithm.

    What Structured Knowledge Distillation (arXiv:1903.04197) starts from for
    depth, after Virtual Normal (arXiv:1907.12209): scores of the bins, trained
    with a cross-entropy in which neighbouring bins count, and a depth that is the
    mean of the bins' centres, in the logarithm, under the softmax. ``conv_depth``
    gives the scores, a tap for :class:`~mmstructkd.losses.PixelwiseKLLoss` and
    other losses on classes; ``to_depth`` gives the depth map. Both networks must
    have the same bins there. See :class:`DepthHead` for taps and ground truth.

    Scores are resized to the ground truth for the loss: K numbers a pixel of it.

    Args:
        in_channels: channels of the feature, or of each feature.
        channels: channels of the convolutions.
        num_bins: K, at least 2. The authors take 150, and 60 with MobileNetV2.
        min_depth: metres, above 0: where the first bin begins; nearer readings
            do not count.
        max_depth: metres: where the last bin ends; readings further off do not
            count.
        average: depth is the mean of centres in the ``'log'`` or of the
            ``'depth'`` itself.
        num_convs: number of 3x3 convolutions, 1 or 2.
        in_index: number of the feature, or several, which are resized to the
            first one and concatenated.
        loss_bins: config of a loss of (scores, number of the right bin, valid).
        loss_decode: config of a further loss of (depth map, ground truth), or
            several.
        **kwargs: of :class:`DepthHead`.

    Raises:
        ConfigError: an argument is out of range, or the ground truth has other
            units.

    Example:
        >>> import torch
        >>> head = DepthClassificationHead(8, 4, num_bins=20, min_depth=1.0, max_depth=10.0)
        >>> head([torch.randn(2, 8, 6, 5)]).shape
        torch.Size([2, 1, 6, 5])
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int,
        *,
        num_bins: int = 150,
        min_depth: float = 0.1,
        max_depth: float = 10.0,
        average: str = 'log',
        num_convs: int = 1,
        in_index: int | Sequence[int] = -1,
        loss_bins: Mapping[str, Any] | None = None,
        loss_decode: dict | Sequence[dict] = (),
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        check_range(owner, min_depth, max_depth)
        check_count(owner, 'num_bins', num_bins, 2, maximum=MAX_BINS)
        check_one_of(owner, 'average', average, BinsToDepth.AVERAGES)
        super().__init__(
            in_channels,
            channels,
            to_depth=BinsToDepth(num_bins, min_depth, max_depth, average),
            scores=num_bins,
            min_depth=min_depth,
            max_depth=max_depth,
            num_convs=num_convs,
            in_index=in_index,
            loss_decode=loss_decode,
            **kwargs,
        )
        example = "dict(type='mmstructkd.DepthBinLoss')"
        settings = {'type': 'mmstructkd.DepthBinLoss', **(loss_bins or {})}
        self.loss_bins = check_named_loss(owner, 'loss_bins', build_part(owner, 'loss_bins', settings, example=example))

    def loss_by_scores(self, scores: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the losses on the bins, and those on the depth map if there are any.

        Args:
            scores: shape (B, K, h, w).
            batch_data_samples: one per image, with ``gt_depth_map``.

        Returns:
            Losses by name.
        """
        truth = self.ground_truth(batch_data_samples)
        # Run also where no loss reads it: a tap of the depth map is passed in training.
        losses = self.depth_losses(self.to_depth(scores), truth)
        full = resize(scores, size=truth.shape[2:], mode='bilinear', align_corners=self.align_corners)
        losses[self.loss_bins.loss_name] = self.loss_bins(full, self.to_depth.bin_of(truth[:, 0]), truth[:, 0] > 0)
        return losses
