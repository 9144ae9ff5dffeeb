"""Batches other than the labelled one, on which terms may compare student and teacher."""

from mmstructkd.streams.base import Stream, StreamBatch, statistics_kept
from mmstructkd.streams.building import LABELLED, build_streams
from mmstructkd.streams.data import DataStream
from mmstructkd.streams.mixed import MixedStream
from mmstructkd.streams.preprocessing import StreamPreprocessor
from mmstructkd.streams.scaled import ScaledStream
from mmstructkd.streams.stream_set import StreamSet, TrainingBatch
from mmstructkd.streams.turned import TurnedStream

__all__ = [
    'LABELLED',
    'DataStream',
    'MixedStream',
    'ScaledStream',
    'Stream',
    'StreamBatch',
    'StreamPreprocessor',
    'StreamSet',
    'TrainingBatch',
    'TurnedStream',
    'build_streams',
    'statistics_kept',
]
