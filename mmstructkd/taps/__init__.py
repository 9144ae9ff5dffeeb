"""Taps: where a network is listened to, and the listening."""

from mmstructkd.taps.capture import Capture, ForwardStopped
from mmstructkd.taps.forward import tapped_forward
from mmstructkd.taps.tap import Tap

__all__ = ['Capture', 'ForwardStopped', 'Tap', 'tapped_forward']
