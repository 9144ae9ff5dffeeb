"""Taps: where a network is listened to, and the listening."""

from mmstructkd.taps.capture import Capture, ForwardStopped
from mmstructkd.taps.forward import (
    FEATURES,
    ForwardFailed,
    find_route,
    in_features,
    run_tapped,
    tapped_forward,
)
from mmstructkd.taps.gates import Gates, before_gate, read_gates
from mmstructkd.taps.inject import Inject
from mmstructkd.taps.observation import Observation
from mmstructkd.taps.points import Sampled, in_point_head, recorded_points, with_points
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
    'FEATURES',
    'Capture',
    'ForwardFailed',
    'ForwardStopped',
    'Gates',
    'Inject',
    'Observation',
    'RegionRecorder',
    'Regions',
    'Sampled',
    'Tap',
    'before_gate',
    'find_route',
    'in_features',
    'in_point_head',
    'in_region_head',
    'pair_stages',
    'probe_regions',
    'read_gates',
    'recorded_points',
    'run_tapped',
    'shows_regions',
    'tapped_forward',
    'with_points',
]
