"""A segmentation head that tells class and turn of each pixel together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models.decode_heads import FCNHead
from torch import Tensor

from mmstructkd.errors import ConfigError, check_count
from mmstructkd.functional.turning import check_turns
from mmstructkd.registry import MODELS

__all__ = ['JointTurnHead']

#: The label that stands for none where the joint labels reach the one of the classes.
NONE = -100
#: More are a slip, and would fill the memory.
MAX_CLASSES = 2**18


@MODELS.register_module()
class JointTurnHead(FCNHead):
    r"""An auxiliary head over :math:`T C` classes: class y of a pixel and turn k of its image, at T y + k.

    The auxiliary classifiers of hierarchical self-supervised distillation (HSAKD,
    IJCAI 2021, arXiv:2107.13715) for maps: the teacher learns them on turned images
    (:class:`~mmstructkd.datasets.TurnView`, last in the pipeline), and a student
    learns their scores through a connector; it needs no such head of its own.
    Pixels without a label have none of these either. The turn is read from the
    metainfo of each image.

    Args:
        num_classes: T C, a multiple of the number of turns.
        turns: names of the turns as :class:`~mmstructkd.datasets.TurnView` draws
            them, or 4 for the four quarters of a square; their order numbers them.
        **kwargs: of mmseg's ``FCNHead`` (``in_channels``, ``channels``, ``in_index``, ...).

    Raises:
        ConfigError: an argument is out of range, or an image in training does not
            say how it is turned.
    """

    def __init__(
        self, num_classes: int, turns: int | Sequence[str] = ('none', 'half', 'flip', 'flip_half'), **kwargs: Any
    ) -> None:
        owner = type(self).__name__
        names = check_turns(owner, turns)
        check_count(owner, 'num_classes', num_classes, maximum=MAX_CLASSES)
        if num_classes % len(names):
            raise ConfigError(
                f'{owner}: `num_classes` must be a multiple of the {len(names)} turns, got {num_classes}. Of C classes '
                f'there are {len(names)} C of class and turn.'
            )
        super().__init__(num_classes=num_classes, **kwargs)
        if self.out_channels != num_classes:
            raise ConfigError(
                f'{owner}: `out_channels` must be `num_classes`={num_classes}, got {self.out_channels}. Leave it out.'
            )
        self.turns = names
        self.label_ignore_index = self.ignore_index
        if self.ignore_index is not None and 0 <= self.ignore_index < num_classes:
            self.ignore_index = NONE

    def _stack_batch_gt(self, batch_data_samples: Any) -> Tensor:
        """Joint labels of a batch, whose maps are turned already, shape (B, 1, H, W)."""
        places = []
        for sample in batch_data_samples:
            turn = sample.metainfo.get('turn')
            if turn not in self.turns:
                raise ConfigError(
                    f'{type(self).__name__}: each image must say its turn, one of {list(self.turns)}, got {turn!r}. '
                    "Put dict(type='mmstructkd.TurnView') with these turns last in the training pipeline."
                )
            places.append(self.turns.index(turn))
        labels = super()._stack_batch_gt(batch_data_samples)
        number = torch.tensor(places, device=labels.device).view(-1, 1, 1, 1)
        joint = labels.long() * len(self.turns) + number
        if self.label_ignore_index is None:
            return joint
        return torch.where(labels == self.label_ignore_index, self.ignore_index, joint)
