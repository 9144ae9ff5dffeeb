"""Two datasets in one sample: what a student is trained on, and other images beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from mmstructkd.errors import ConfigError, shown
from mmstructkd.registry import DATASETS, build_part

__all__ = ['PairedDataset']

RESERVED = ('inputs', 'data_samples')


@DATASETS.register_module()
class PairedDataset:
    """Gives each sample of a dataset a random one of every other dataset.

    Item ``i`` is item ``i`` of ``dataset`` with one key more for each of the
    others: ``dict(inputs=..., data_samples=..., unlabelled=dict(inputs=...,
    data_samples=...))``. A stream of the distiller reads it from the batch
    (:class:`~mmstructkd.streams.DataStream`). There is one loader, one sampler and
    one order, so that resuming, accumulation and several processes work as they
    do for ``dataset`` alone.

    Which sample of the others comes is drawn from numpy's stream, as random
    augmentations are. Everything else (``metainfo``, ``get_data_info``, the
    length) is that of ``dataset``.

    Args:
        dataset: config of the labelled dataset, or the built one.
        lazy_init: for mmengine; the datasets decide for themselves.
        **others: config of each other dataset by the name of its stream.

    Raises:
        ConfigError: there is no other dataset, a name is taken, or a dataset is
            empty.
    """

    def __init__(self, dataset: Any, lazy_init: bool = False, **others: Any) -> None:
        owner = type(self).__name__
        if not others:
            raise ConfigError(
                f'{owner}: another dataset must be named beside `dataset`, got none. '
                'Write unlabelled=dict(type=..., ...), with the name of the stream.'
            )
        for name in others:
            if name in RESERVED:
                raise ConfigError(f'{owner}: a stream must not have a name of {RESERVED}, got {name!r}. Rename it.')
        self.dataset = self._build('dataset', dataset)
        self.others = {name: self._build(name, config) for name, config in others.items()}
        for name, other in {'dataset': self.dataset, **self.others}.items():
            if not len(other):
                raise ConfigError(f'{owner}: `{name}` must hold at least one sample, got an empty dataset.')

    @staticmethod
    def _build(name: str, config: Any) -> Any:
        """Build a dataset from its config."""
        owner = PairedDataset.__name__
        if isinstance(config, Mapping):
            return build_part(owner, name, config, what='dataset', example="dict(type='...', ...)", registry=DATASETS)
        if not isinstance(config, Dataset) and not hasattr(config, 'metainfo'):
            raise ConfigError(f'{owner}: `{name}` must be a dataset or the config of one, got {shown(config)}.')
        return config

    def __getattr__(self, name: str) -> Any:
        """Answer as the labelled dataset does (its pipeline, its ``metainfo``, its categories)."""
        if name.startswith('__') or name in ('dataset', 'others'):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    @property
    def datasets(self) -> list[Any]:
        """All of them, for whoever looks at pipelines."""
        return [self.dataset, *self.others.values()]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = dict(self.dataset[index])
        for name, other in self.others.items():
            sample[name] = other[int(np.random.randint(len(other)))]
        return sample
