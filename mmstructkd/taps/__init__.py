"""Taps: where a network is listened to, and the listening."""

from mmstructkd.taps.capture import Capture, ForwardStopped
from mmstructkd.taps.forward import run_tapped, tapped_forward
from mmstructkd.taps.regions import (
    RegionRecorder,
    Regions,
    in_region_head,
    pair_stages,
    probe_regions,
    shows_regions,
)
from mmstructkd.taps.tap import Tap

__all__ = [
    'Capture',
    'ForwardStopped',
    'RegionRecorder',
    'Regions',
    'Tap',
    'in_region_head',
    'pair_stages',
    'probe_regions',
    'run_tapped',
    'shows_regions',
    'tapped_forward',
]
