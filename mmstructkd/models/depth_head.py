"""What the depth heads share: features, ground truth, and its checks.

B images, H x W the grid; metres.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmengine.logging import print_log
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS as MMSEG_MODELS
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, check_count, check_finite_number, check_flag, is_count
from mmstructkd.functional.core.depth import depth_readings
from mmstructkd.layers import check_layers
from mmstructkd.registry import build_part

__all__ = ['DepthHead']

#: Calls of the loss in which the ground truth is looked at, which makes the host wait.
CHECKED_CALLS = 3
#: More channels than any feature has; a number above is a slip that would fill the memory.
MAX_WIDTH = 2**16


class DepthHead(BaseDecodeHead):
    """Base of light depth heads for mmseg's ``DepthEstimator``.

    3x3 convolutions, a 1x1 convolution ``conv_depth``, and ``to_depth``, which
    makes metres of it. A term taps ``decode_head.convs`` (features),
    ``decode_head.conv_depth`` (scores) or ``decode_head.to_depth`` (the depth
    map, at the features' size); the head itself is called by its ``forward`` in
    mmseg, past the hooks of a tap.

    The ground truth is ``gt_depth_map`` of each sample. A reading is finite and
    from ``min_depth`` to ``max_depth``; everything else, and the padding of the
    batch, is no reading and counts nowhere. Losses on the depth map see it
    resized to the ground truth, bilinearly.

    Args:
        in_channels: channels of the feature, or of each feature.
        channels: channels of the convolutions.
        to_depth: module from scores to metres.
        scores: channels of ``conv_depth``.
        min_depth: metres, above 0.
        max_depth: metres.
        num_convs: number of 3x3 convolutions, 1 or 2.
        in_index: number of the backbone's or neck's feature, or several, which
            are resized to the first one and concatenated.
        input_transform: ``None`` or ``'resize_concat'``; follows from ``in_index``.
        dropout_ratio: of whole channels before ``conv_depth``.
        loss_decode: config of a loss of (depth map, ground truth), both (B, 1, H,
            W), or several.
        **kwargs: of mmseg's ``BaseDecodeHead``: ``conv_cfg``, ``norm_cfg``,
            ``act_cfg``, ``align_corners``, ``init_cfg``.

    Raises:
        ConfigError: an argument is out of range; in training, a batch whose
            readings all lie outside the limits: other units (looked at in the
            first calls alone).
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        channels: int,
        *,
        to_depth: nn.Module,
        scores: int,
        min_depth: float,
        max_depth: float,
        num_convs: int = 1,
        in_index: int | Sequence[int] = -1,
        input_transform: str | None = None,
        dropout_ratio: float = 0.0,
        loss_decode: dict | Sequence[dict] = (),
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        for width in in_channels if isinstance(in_channels, (list, tuple)) else [in_channels]:
            check_count(owner, 'in_channels', width, maximum=MAX_WIDTH)
        check_count(owner, 'channels', channels, maximum=MAX_WIDTH)
        if not is_count(num_convs) or num_convs not in (1, 2):
            raise ConfigError(f'{owner}: `num_convs` must be 1 or 2, got {num_convs!r}.')
        check_finite_number(owner, 'dropout_ratio', dropout_ratio, minimum=0, maximum=1)
        check_flag(owner, 'align_corners', kwargs.get('align_corners', False))
        layers = {name: kwargs[name] for name in ('conv_cfg', 'norm_cfg', 'act_cfg') if name in kwargs}
        check_layers(owner, channels, **layers)
        for fixed in ('num_classes', 'out_channels', 'threshold', 'sampler', 'ignore_index'):
            if fixed in kwargs:
                raise ConfigError(
                    f'{owner}: `{fixed}` must be left out, got {kwargs[fixed]!r}. It belongs to segmentation heads.'
                )
        kwargs.setdefault('init_cfg', dict(type='Normal', std=0.01, override=dict(name='conv_depth')))
        super().__init__(
            in_channels,
            channels,
            num_classes=scores,
            out_channels=scores,
            # mmseg wants a threshold where there is one channel; nothing reads it here.
            threshold=0.0,
            dropout_ratio=dropout_ratio,
            in_index=in_index,
            input_transform=_input_transform(owner, in_channels, in_index, input_transform),
            loss_decode=[],
            **kwargs,
        )
        several = isinstance(loss_decode, (list, tuple))
        parts = [_build_loss(owner, config) for config in (loss_decode if several else [loss_decode])]
        self.loss_decode = nn.ModuleList(parts) if several else parts[0]
        del self.conv_seg
        # What mmseg's sliding windows allocate: one channel, depth.
        self.out_channels = 1
        self.min_depth = float(min_depth)
        self.max_depth = float(max_depth)
        settings = dict(padding=1, conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg, act_cfg=self.act_cfg)
        widths = [self.in_channels, *[channels] * num_convs]
        self.convs = nn.Sequential(
            *(ConvModule(before, after, 3, **settings) for before, after in itertools.pairwise(widths))
        )
        self.conv_depth = nn.Conv2d(channels, scores, kernel_size=1)
        self.to_depth = to_depth
        self._unchecked = CHECKED_CALLS

    def scores(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return what ``conv_depth`` gives.

        Args:
            inputs: features of the backbone or neck.

        Returns:
            Shape (B, K, h, w).
        """
        self._check_inputs(inputs)
        features = self.convs(self._transform_inputs(inputs))
        return self.conv_depth(features if self.dropout is None else self.dropout(features))

    def _check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Refuse features that are not those of the config."""
        several = isinstance(self.in_index, (list, tuple))
        places = self.in_index if several else [self.in_index]
        if not all(-len(inputs) <= place < len(inputs) for place in places):
            raise ConfigError(
                f'{type(self).__name__}: `in_index` must name some of the {len(inputs)} features of the backbone or '
                f'neck, got {self.in_index}.'
            )
        widths = [inputs[place].shape[1] for place in places]
        if sum(widths) != self.in_channels:
            raise ShapeError(
                f'{type(self).__name__}: `in_channels` must be the width of the features with the numbers '
                f'{list(places)}, {widths}, got {self.in_channels} in all.'
            )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the depth map.

        Args:
            inputs: features of the backbone or neck.

        Returns:
            Metres, shape (B, 1, h, w), the size of the (first) feature.
        """
        return self.to_depth(self.scores(inputs))

    def loss(self, inputs: Sequence[Tensor], batch_data_samples: Sequence[Any], train_cfg: Any) -> dict[str, Tensor]:
        """Return the losses of a batch.

        Args:
            inputs: features of the backbone or neck.
            batch_data_samples: one per image, with ``gt_depth_map``.
            train_cfg: not used.

        Returns:
            Losses by name.
        """
        return self.loss_by_scores(self.scores(inputs), batch_data_samples)

    def loss_by_scores(self, scores: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the losses, from what ``conv_depth`` gave."""
        return self.loss_by_feat(self.to_depth(scores), batch_data_samples)

    def loss_by_feat(self, depth: Tensor, batch_data_samples: Sequence[Any]) -> dict[str, Tensor]:
        """Return the losses on the depth map.

        Args:
            depth: metres, shape (B, 1, h, w).
            batch_data_samples: one per image, with ``gt_depth_map``.

        Returns:
            Losses by name.
        """
        return self.depth_losses(depth, self.ground_truth(batch_data_samples))

    def depth_losses(self, depth: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Return the losses of ``loss_decode``, depth resized to the ground truth."""
        depth = resize(depth, size=truth.shape[2:], mode='bilinear', align_corners=self.align_corners)
        several = isinstance(self.loss_decode, nn.ModuleList)
        losses: dict[str, Tensor] = {}
        for loss in self.loss_decode if several else [self.loss_decode]:
            value = loss(depth, truth)
            losses[loss.loss_name] = losses[loss.loss_name] + value if loss.loss_name in losses else value
        return losses

    def ground_truth(self, batch_data_samples: Sequence[Any]) -> Tensor:
        """Stack the depth maps of a batch; 0 where there is no reading.

        Args:
            batch_data_samples: one per image, with ``gt_depth_map``; the padding
                that the preprocessor notes in ``padding_size`` is no reading.

        Returns:
            Metres, float32, shape (B, 1, H, W).

        Raises:
            ConfigError: a sample has no depth map, or the maps have other units.
        """
        if not all(hasattr(sample, 'gt_depth_map') for sample in batch_data_samples):
            raise ConfigError(
                f'{type(self).__name__}: `data_samples` must have a `gt_depth_map`, got one without. Load it in '
                "the train pipeline, e.g. dict(type='LoadDepthAnnotation'); of an unlabelled image it is all 0."
            )
        maps = torch.stack([sample.gt_depth_map.data for sample in batch_data_samples]).float()
        inside = torch.zeros_like(maps, dtype=torch.bool)
        for image, sample in enumerate(batch_data_samples):
            left, right, top, bottom = sample.metainfo.get('padding_size', (0, 0, 0, 0))
            inside[image, :, top : maps.shape[2] - bottom, left : maps.shape[3] - right] = True
        some = depth_readings(maps)[:, None] & inside
        good = depth_readings(maps, min_depth=self.min_depth, max_depth=self.max_depth)[:, None] & inside
        if self._unchecked > 0:
            self._unchecked -= 1
            self._check_units(maps, some, good)
        return torch.where(good, maps, 0)

    def _check_units(self, maps: Tensor, some: Tensor, good: Tensor) -> None:
        """Complain about a batch without a usable reading."""
        owner = type(self).__name__
        if not some.any():
            print_log(
                f'{owner}: no depth map of this batch has a reading (a finite number above 0); it trains nothing.',
                logger='current',
                level=logging.WARNING,
            )
        elif not good.any():
            least, most = maps[some].min().item(), maps[some].max().item()
            raise ConfigError(
                f'{owner}: `max_depth` and `min_depth` must enclose the ground truth, in metres, '
                f'got {self.max_depth:g} and {self.min_depth:g} for readings from {least:g} to {most:g}. '
                'Maps in millimetres: give LoadDepthAnnotation depth_rescale_factor=1e-3 (KITTI: 1/256). '
                'Maps in metres: widen the limits.'
            )


def _build_loss(owner: str, config: Any) -> nn.Module:
    """Build a loss of ``loss_decode``, of this package or of mmseg."""
    loss = build_part(
        owner, 'loss_decode', config, example="dict(type='mmstructkd.DepthL1Loss')", registry=MMSEG_MODELS
    )
    return check_named_loss(owner, 'loss_decode', loss)


def check_named_loss(owner: str, argument: str, loss: Any) -> nn.Module:
    """Return a loss, or raise :class:`ConfigError` unless it is one of mmseg's kind, which has a name."""
    if not isinstance(loss, nn.Module) or not hasattr(loss, 'loss_name'):
        raise ConfigError(
            f'{owner}: `{argument}` must be a loss with a `loss_name`, got {type(loss).__name__}. '
            'Distillation losses belong into a term.'
        )
    return loss


def _input_transform(owner: str, in_channels: Any, in_index: Any, given: str | None) -> str | None:
    """Check how features are chosen; several are resized and concatenated."""
    several = isinstance(in_index, (list, tuple))
    if not all(map(is_count, in_index if several else [in_index])):
        raise ConfigError(f'{owner}: `in_index` must be an integer or a list of them, got {in_index!r}.')
    if given not in (None, 'resize_concat'):
        raise ConfigError(
            f"{owner}: `input_transform` must be None or 'resize_concat', got {given!r}. It follows from `in_index`."
        )
    channels = in_channels if isinstance(in_channels, (list, tuple)) else [in_channels]
    if several != isinstance(in_channels, (list, tuple)) or (several and len(channels) != len(in_index)):
        raise ConfigError(
            f'{owner}: `in_channels` must have a number for each feature of in_index={in_index!r}, got {in_channels!r}.'
        )
    if given is not None and not several:
        raise ConfigError(f'{owner}: `in_index` must be a list with input_transform={given!r}, got {in_index!r}.')
    return 'resize_concat' if several else None
