"""Runs a network of mmseg or mmdet so far that its taps are passed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmstructkd.taps.capture import Capture
from mmstructkd.taps.tap import Tap

__all__ = ['tapped_forward']

AUXILIARY = 'auxiliary_head'


def tapped_forward(
    network: nn.Module,
    inputs: Tensor,
    data_samples: Sequence[Any] | None,
    taps: Iterable[Tap],
    *,
    calls: Mapping[Tap, int] | None = None,
    clone: Iterable[Tap] = (),
) -> Capture:
    """Run ``network`` without its losses and record its taps.

    ``mode='tensor'`` is the path both frameworks have for that. It leaves out
    auxiliary heads; those that are tapped are run on the backbone's features.

    Args:
        network: a segmentor, depth estimator or detector.
        inputs: preprocessed images, shape (B, 3, H, W).
        data_samples: one per image, or ``None``. Two-stage detectors need them.
        taps: places to record.
        calls: how often each is passed; given, the forward ends at the last.
        clone: taps recorded as a copy.

    Returns:
        The capture, its records filled as far as the network got.
    """
    taps = tuple(taps)
    capture = Capture(network, taps, calls=calls, clone=clone)
    auxiliary = any(tap.module.split('.')[0] == AUXILIARY for tap in taps)
    with capture:
        if not auxiliary:
            network(inputs, data_samples, mode='tensor')
        else:
            features = network.extract_feat(inputs)
            network.decode_head(features)
            heads = getattr(network, AUXILIARY)
            for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
                head(features)
    return capture
