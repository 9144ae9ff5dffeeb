"""Images turned and mirrored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, check_one_of
from mmstructkd.registry import MODELS
from mmstructkd.streams.base import Stream, StreamBatch
from mmstructkd.structures import Targets
from mmstructkd.tasks.area import image_sizes
from mmstructkd.tasks.sample_copies import unlabelled

__all__ = ['TurnedStream']

#: Turns that keep the shape of an image: whether each mirrors left to right, and top to bottom.
MIRRORS: dict[str, tuple[bool, bool]] = {
    'none': (False, False),
    'half': (True, True),
    'flip': (True, False),
    'flip_half': (False, True),
}


def turn(maps: Tensor, name: str) -> Tensor:
    """Turn maps.

    Args:
        maps: shape (..., h, w).
        name: one of :data:`MIRRORS`.

    Returns:
        The same shape.
    """
    across, over = MIRRORS[name]
    return maps.flip([axis for axis, mirrored in ((-1, across), (-2, over)) if mirrored])


@MODELS.register_module()
class TurnedStream(Stream):
    """The batch turned, one copy for each turn, one after the other.

    For the turned views of SSKD (arXiv:2006.07114) and HSAKD (arXiv:2107.13715),
    which turn square images by quarters; dense crops are not square, so that only
    turns that keep their shape are here. Labels, depth, boxes and areas turn along.
    An image that the batch has padded is turned in its own place, and its padding
    stays at the right and bottom, where networks expect it.

    Args:
        turns: some of ``'half'`` (by 180 degrees), ``'flip'`` (left to right) and
            ``'flip_half'`` (upside down: one after the other); with ``'none'`` beside
            them the upright batch is there too, for losses that compare it with its
            turned copies.
        norm: what BatchNorm layers do on it.

    Raises:
        ConfigError: no turn but ``'none'``, one twice, or an unknown one.
    """

    labelled = True

    def __init__(self, turns: Sequence[str] = ('half', 'flip', 'flip_half'), norm: str = 'frozen') -> None:
        super().__init__(norm)
        owner = type(self).__name__
        if isinstance(turns, str) or not turns or len(set(turns)) < len(turns):
            raise ConfigError(f'{owner}: `turns` must be a list of different turns of {tuple(MIRRORS)}, got {turns!r}.')
        for name in turns:
            check_one_of(owner, 'turns', name, tuple(MIRRORS))
        self.turns = tuple(turns)
        if self.turns == ('none',):
            raise ConfigError(
                f"{owner}: `turns` must have another turn beside 'none', got {turns!r}. Set on='labelled' instead."
            )
        self.views = self.turns if 'none' in self.turns else ()

    def _turn(self, value: Tensor | None, sizes: Sequence[tuple[int, int]] | None) -> Tensor | None:
        """All turned copies of a batch of maps, each image inside its own (h, w)."""
        if value is None:
            return None
        if sizes is None:
            return torch.cat([turn(value, name) for name in self.turns])
        turned = value.repeat(len(self.turns), *[1] * (value.dim() - 1))
        for place, name in enumerate(self.turns):
            for image, (h, w) in enumerate(sizes):
                turned[place * len(value) + image, ..., :h, :w] = turn(value[image, ..., :h, :w], name)
        return turned

    def _turn_boxes(
        self, boxes: Sequence[Tensor] | None, sizes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, ...] | None:
        """All turned copies of boxes (n, 4), ``xyxy`` in pixels of images of some (h, w)."""
        if boxes is None:
            return None
        turned = []
        for name in self.turns:
            across, over = MIRRORS[name]
            for box, (h, w) in zip(boxes, sizes, strict=True):
                x1, y1, x2, y2 = box.unbind(dim=-1)
                if across:
                    x1, x2 = w - x2, w - x1
                if over:
                    y1, y2 = h - y2, h - y1
                turned.append(torch.stack([x1, y1, x2, y2], dim=-1))
        return tuple(turned)

    def make(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        others: Mapping[str, Any],
        step: int,
    ) -> StreamBatch:
        """Turn the batch."""
        whole = (inputs.shape[-2], inputs.shape[-1])
        shown = image_sizes(data_samples) or [whole] * len(inputs)
        sizes = [(min(h, whole[0]), min(w, whole[1])) for h, w in shown]
        padded = None if all(size == whole for size in sizes) else sizes
        images = self._turn(inputs, padded)
        assert images is not None
        samples = unlabelled(data_samples)
        times = len(self.turns)
        known = Targets(
            labels=self._turn(targets.labels, padded),
            valid=self._turn(targets.valid, padded),
            inside=self._turn(targets.inside, padded),
            ignore_index=targets.ignore_index,
            num_classes=targets.num_classes,
            images=images,
            input_size=targets.input_size,
            views=self.views,
            depth=self._turn(targets.depth, padded),
            boxes=self._turn_boxes(targets.boxes, sizes),
            box_labels=None if targets.box_labels is None else targets.box_labels * times,
        )
        return StreamBatch(images, None if samples is None else samples * times, known)
