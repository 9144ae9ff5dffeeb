"""Images turned and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, check_one_of
from mmstructkd.registry import MODELS
from mmstructkd.streams.base import Stream, StreamBatch
from mmstructkd.streams.samples import unlabelled
from mmstructkd.structures import Targets

__all__ = ['TURNS', 'TurnedStream']

#: Those that keep the shape of an image, as what is done to its last two axes.
TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    'none': lambda x: x,
    'half': lambda x: x.flip(-1, -2),
    'flip': lambda x: x.flip(-1),
    'flip_half': lambda x: x.flip(-2),
}


@MODELS.register_module()
class TurnedStream(Stream):
    """The batch turned, one copy for each turn, one after the other.

    For the turned views of SSKD (arXiv:2006.07114) and HSAKD (arXiv:2107.13715),
    which turn square images by quarters; dense crops are not square, so that only
    turns that keep their shape are here. Labels and areas turn along.

    Args:
        turns: some of ``'half'`` (by 180 degrees), ``'flip'`` (left to right) and
            ``'flip_half'`` (both); with ``'none'`` beside them the upright batch is
            there too, for losses that compare it with its turned copies.
        norm: what the student's BatchNorm layers do on it.

    Raises:
        ConfigError: no turn but ``'none'``, one twice, or an unknown one.
    """

    labelled = True

    def __init__(self, turns: Sequence[str] = ('half', 'flip', 'flip_half'), norm: str = 'frozen') -> None:
        super().__init__(norm)
        owner = type(self).__name__
        if isinstance(turns, str) or not turns or len(set(turns)) < len(turns):
            raise ConfigError(f'{owner}: `turns` must be a list of different turns of {tuple(TURNS)}, got {turns!r}.')
        for turn in turns:
            check_one_of(owner, 'turns', turn, tuple(TURNS))
        self.turns = tuple(turns)
        if self.turns == ('none',):
            raise ConfigError(
                f"{owner}: `turns` must have another turn beside 'none', got {turns!r}. Set on='labelled' instead."
            )
        self.views = self.turns if 'none' in self.turns else ()

    def _turn(self, value: Tensor | None) -> Tensor | None:
        """All turned copies of a batch of maps."""
        return None if value is None else torch.cat([TURNS[turn](value) for turn in self.turns])

    def make(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        others: Mapping[str, Any],
        step: int,
    ) -> StreamBatch:
        """Turn the batch."""
        images = self._turn(inputs)
        assert images is not None
        samples = unlabelled(data_samples)
        known = Targets(
            labels=self._turn(targets.labels),
            valid=self._turn(targets.valid),
            inside=self._turn(targets.inside),
            ignore_index=targets.ignore_index,
            num_classes=targets.num_classes,
            images=images,
            input_size=targets.input_size,
            depth=self._turn(targets.depth),
            views=self.views,
        )
        return StreamBatch(images, None if samples is None else samples * len(self.turns), known)
