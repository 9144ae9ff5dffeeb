"""What a stream is: another batch for both networks."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import check_one_of
from mmstructkd.structures import Blend, Targets

__all__ = ['Stream', 'StreamBatch', 'statistics_kept']

NORMS = ('frozen', 'update')


@contextlib.contextmanager
def statistics_kept(*networks: nn.Module) -> Iterator[None]:
    """Put the layers that keep running statistics in eval, and back afterwards.

    Args:
        *networks: whose layers; dropout and all else stay in training.
    """
    layers = {
        module
        for network in networks
        for module in network.modules()
        if module.training and isinstance(getattr(module, 'running_mean', None), Tensor)
    }
    for module in layers:
        module.training = False
    try:
        yield
    finally:
        for module in layers:
            module.training = True


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """A batch of a stream.

    Attributes:
        inputs: images in the student's normalisation, shape (B', 3, h, w).
        data_samples: one per image, without labels; ``None``: nothing is known.
        targets: what is known of it: which pixels are inside images, and labels
            where the stream has any.
        blend: which images of the labelled batch were blended, where its images are blends of these.
    """

    inputs: Tensor
    data_samples: Sequence[Any] | None
    targets: Targets
    blend: Blend | None = None


class Stream(ABC):
    """Turns a training batch into another batch.

    Args:
        norm: what the BatchNorm layers of the student, and of a teacher that trains
            beside it, do on it: ``'frozen'``, as in eval and without moving their
            statistics, or ``'update'``, as in training.

    Attributes:
        labelled: whether its targets have the labels of the task.
        views: turns of the copies that it holds together with the upright one,
            ``'none'`` among them; empty: it has no upright one, or no copies.
        reads_data: whether it reads its images from the data loader's batch.
        blends: whether its images are blends of those of the labelled batch.
    """

    labelled: bool = False
    reads_data: bool = False
    blends: bool = False
    views: tuple[str, ...] = ()

    def __init__(self, norm: str = 'frozen') -> None:
        check_one_of(type(self).__name__, 'norm', norm, NORMS)
        self.norm = norm

    @abstractmethod
    def make(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        targets: Targets,
        others: Mapping[str, Any],
        step: int,
    ) -> StreamBatch:
        """Make the batch.

        Args:
            inputs: the labelled batch in the student's normalisation.
            data_samples: its samples; they are not changed.
            targets: what is known of it.
            others: the preprocessed batch of this stream's dataset, where it
                :attr:`reads_data`.
            step: iterations done so far: what is drawn depends on it alone.

        Returns:
            The batch.
        """
