"""Copies of data samples that say where an image is and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.structures import BaseDataElement

__all__ = ['resized', 'unlabelled']


def unlabelled(samples: Sequence[Any] | None) -> list[BaseDataElement] | None:
    """Samples with the metainfo of others, and no annotation.

    Args:
        samples: of a batch.

    Returns:
        New ones of the same class.
    """
    return None if samples is None else [type(sample)(metainfo=dict(sample.metainfo)) for sample in samples]


def resized(
    samples: Sequence[Any] | None, factors: tuple[float, float], size: tuple[int, int]
) -> list[BaseDataElement] | None:
    """:func:`unlabelled` samples of images that were resized.

    Args:
        samples: of a batch.
        factors: vertical and horizontal.
        size: (h, w) of the whole batch afterwards.

    Returns:
        New ones.
    """
    found = unlabelled(samples)
    for sample in found or ():
        meta = sample.metainfo
        changed: dict[str, Any] = {'batch_input_shape': size, 'pad_shape': size}
        shape = meta.get('img_shape')
        if shape is not None:
            changed['img_shape'] = tuple(
                min(side, max(1, round(old * factor)))
                for old, factor, side in zip(shape[:2], factors, size, strict=True)
            )
        sample.set_metainfo({key: value for key, value in changed.items() if key in meta or key != 'batch_input_shape'})
    return found
