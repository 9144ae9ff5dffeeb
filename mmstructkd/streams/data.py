"""Images of another dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.streams.base import Stream, StreamBatch
from mmstructkd.structures import Targets
from mmstructkd.tasks.area import valid_area
from mmstructkd.tasks.sample_copies import unlabelled

__all__ = ['DataStream']


@MODELS.register_module()
class DataStream(Stream):
    """Reads the images that a :class:`~mmstructkd.datasets.PairedDataset` puts beside each sample.

    Their labels, if they have any, are never read: every image teaches, as in the
    open-set form of SRD (arXiv:2205.06701) and StructKD's experiments with
    unlabelled images.

    Args:
        norm: ``'update'``: BatchNorm sees them as the labelled images, which are
            concatenated with them in the published code; or ``'frozen'``.
    """

    reads_data = True

    def __init__(self, norm: str = 'update') -> None:
        super().__init__(norm)

    def make(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        others: Mapping[str, Any],
        step: int,
    ) -> StreamBatch:
        """Take the images of the other dataset."""
        if not others:
            raise ConfigError(
                'DataStream: the batch must hold images under the name of the stream, got none. Wrap the training '
                "dataset: dict(type='mmstructkd.PairedDataset', dataset=..., NAME=dict(...))."
            )
        images, samples = others['inputs'], unlabelled(others.get('data_samples'))
        inside = valid_area(images, samples)
        known = Targets(
            valid=inside,
            inside=inside,
            ignore_index=targets.ignore_index,
            num_classes=targets.num_classes,
            images=images,
            input_size=tuple(images.shape[-2:]),
        )
        return StreamBatch(images, samples, known)
