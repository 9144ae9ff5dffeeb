"""Registered losses: settings, a weight, and one call of :mod:`mmstructkd.functional`."""

from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.channelwise_kl import ChannelwiseKLLoss
from mmstructkd.losses.holistic import HolisticLoss
from mmstructkd.losses.pairwise_affinity import PairwiseAffinityLoss
from mmstructkd.losses.pixelwise_kl import PixelwiseKLLoss

__all__ = [
    'ChannelwiseKLLoss',
    'DistillLoss',
    'HolisticLoss',
    'PairwiseAffinityLoss',
    'PixelwiseKLLoss',
]
