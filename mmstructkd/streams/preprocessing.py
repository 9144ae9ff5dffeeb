"""A data preprocessor that treats the batches of streams as the labelled one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseDataPreprocessor
from torch import nn

__all__ = ['StreamPreprocessor']


class StreamPreprocessor(BaseDataPreprocessor):
    """Hands the labelled batch to the student's preprocessor, and each stream's as well.

    Everything else (``mean``, ``size``, ...) is the student's.

    Args:
        inner: the student's data preprocessor.
        streams: names of the streams that read data.
    """

    def __init__(self, inner: nn.Module, streams: Sequence[str]) -> None:
        super().__init__()
        self.inner = inner
        self.streams = tuple(streams)

    def __getattr__(self, name: str) -> Any:
        """Answer as the student's does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'inner' or name.startswith('__'):
                raise
            return getattr(super().__getattr__('inner'), name)

    def forward(self, data: Any, training: bool = False) -> Any:
        """Preprocess a batch.

        Args:
            data: of the data loader.
            training: handed on.

        Returns:
            What the student's preprocessor returns; in training with the batch of
            each stream under its name.
        """
        if not isinstance(data, dict):
            return self.inner(data, training)
        others = {name: data[name] for name in self.streams if name in data}
        batch = self.inner({key: value for key, value in data.items() if key not in others}, training)
        if training:
            batch.update({name: self.inner(value, training) for name, value in others.items()})
        return batch
