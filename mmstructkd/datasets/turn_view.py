"""Turns a packed sample at random, and says how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.functional.turning import check_turns, turn_maps
from mmstructkd.registry import TRANSFORMS

__all__ = ['TurnView']


@TRANSFORMS.register_module()
class TurnView(BaseTransform):
    """Turn an image and the maps of its labels by one of several turns, drawn evenly.

    For teachers with :class:`~mmstructkd.models.joint_turn_head.JointTurnHead`:
    the turn goes into the sample's metainfo as ``turn``. It stands last in the
    pipeline, behind ``PackSegInputs``. HSAKD shows each image in all of its turns
    within a batch; here each has one, which is the same on average over batches.

    Boxes are not turned: a sample that has any is refused.

    Args:
        turns: ``'none'``, ``'half'`` (by 180 degrees), ``'flip'`` (left to right) and
            ``'flip_half'`` keep the shape; ``'quarter'`` and ``'three_quarters'`` are
            for square images. 4 stands for the four quarters.

    Raises:
        ConfigError: unknown turns, a sample that is not packed or has instances.
        ShapeError: a quarter turn of an image that is not square.
    """

    def __init__(self, turns: int | Sequence[str] = ('none', 'half', 'flip', 'flip_half')) -> None:
        self.turns = check_turns(type(self).__name__, turns)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Turn the image and every map of the sample.

        Args:
            results: with ``inputs``, shape (3, H, W), and ``data_samples``.

        Returns:
            The same dict, changed.
        """
        owner = type(self).__name__
        image, sample = results.get('inputs'), results.get('data_samples')
        if not isinstance(image, Tensor) or image.dim() != 3 or sample is None:
            raise ConfigError(
                f'{owner}: the sample must be packed, with `inputs` (3, H, W) and `data_samples`, got the keys '
                f'{sorted(results)}. Put it behind PackSegInputs, last in the pipeline.'
            )
        if 'gt_instances' in sample:
            raise ConfigError(f'{owner}: the sample must have maps as labels, got boxes. They are not turned.')
        turn = self.turns[int(np.random.randint(len(self.turns)))]
        results['inputs'] = turn_maps(image[None], turns=[turn])[0].contiguous()
        for name, field in sample.items():
            if isinstance(getattr(field, 'data', None), Tensor):
                field.data = turn_maps(field.data[None], turns=[turn])[0].contiguous()
                sample.set_field(field, name, dtype=type(field))
        sample.set_metainfo({'turn': turn})
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(turns={list(self.turns)})'
