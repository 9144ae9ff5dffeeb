"""Runs a network of mmseg or mmdet so far that its taps are passed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import TapError
from mmstructkd.taps.capture import Capture
from mmstructkd.taps.regions import REGION_HEAD, Regions, in_region_head, pool_regions
from mmstructkd.taps.tap import Tap

__all__ = ['run_tapped', 'tapped_forward']

AUXILIARY = 'auxiliary_head'


def tapped_forward(
    network: nn.Module,
    inputs: Tensor,
    data_samples: Sequence[Any] | None,
    taps: Iterable[Tap],
    *,
    calls: Mapping[Tap, int] | None = None,
    clone: Iterable[Tap] = (),
    regions: Regions | None = None,
) -> Capture:
    """Run ``network`` without its losses and record its taps.

    ``mode='tensor'`` is the path both frameworks have for that. It leaves out
    auxiliary heads; those that are tapped are run on the backbone's features.
    Of a two-stage detector the parts that are tapped are run one by one: its
    region proposals, which cost much and are noise in a probe, never; its RoI
    head on the ``regions`` that are handed in.

    Args:
        network: a segmentor, depth estimator or detector.
        inputs: preprocessed images, shape (B, 3, H, W).
        data_samples: one per image, with their ``metainfo``, or ``None``.
        taps: places to record.
        calls: how often each is passed; given, the forward ends at the last.
        clone: taps recorded as a copy.
        regions: what a RoI head pools; only for taps in it.

    Returns:
        The capture, its records filled as far as the network got.

    Raises:
        TapError: a RoI head is tapped and there are no regions.
    """
    taps = tuple(taps)
    capture = Capture(network, taps, calls=calls, clone=clone)
    with capture:
        run_tapped(network, inputs, data_samples, taps, regions=regions)
    return capture


def run_tapped(
    network: nn.Module,
    inputs: Tensor,
    data_samples: Sequence[Any] | None,
    taps: Sequence[Tap],
    *,
    regions: Regions | None = None,
) -> None:
    """Run what is tapped of ``network``, without listening.

    Args:
        network: a segmentor, depth estimator or detector.
        inputs: preprocessed images, shape (B, 3, H, W).
        data_samples: one per image, or ``None``.
        taps: places that must be passed.
        regions: what a RoI head pools; only for taps in it.

    Raises:
        TapError: a RoI head is tapped and there are no regions.
    """
    if hasattr(network, REGION_HEAD):
        _two_stage(network, inputs, taps, regions)
    elif any(tap.module.split('.')[0] == AUXILIARY for tap in taps):
        features = network.extract_feat(inputs)
        network.decode_head(features)
        heads = getattr(network, AUXILIARY)
        for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
            head(features)
    else:
        network(inputs, data_samples, mode='tensor')


def _two_stage(network: nn.Module, inputs: Tensor, taps: Sequence[Tap], regions: Regions | None) -> None:
    """Run what is tapped of a two-stage detector."""
    features = network.extract_feat(inputs)
    if any(tap.module.split('.')[0] == 'rpn_head' for tap in taps):
        network.rpn_head(features)
    inside = [tap for tap in taps if in_region_head(tap)]
    if inside:
        if regions is None:
            raise TapError(
                f'Tap {str(inside[0])!r}: a RoI head needs the regions that the student pools, got none. '
                'The student must be a two-stage detector as well: tap the neck instead.'
            )
        pool_regions(network, features, regions, inside)
