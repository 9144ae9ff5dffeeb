"""What the losses on depth maps share: which pixels count, and draws of pixels."""

from __future__ import annotations

import torch
from mmengine.dist import get_dist_info
from torch import Tensor

from mmstructkd.errors import ConfigError, check_count, check_finite_number, check_one_of
from mmstructkd.functional.depth import depth_readings
from mmstructkd.functional.reduce import valid_pixels
from mmstructkd.functional.resize import resize_labels
from mmstructkd.functional.sampling import draw_positions
from mmstructkd.losses.base import DistillLoss
from mmstructkd.structures import Targets

__all__ = ['DepthLoss', 'SampledDepthLoss']

WHERE = ('all', 'labelled', 'unlabelled')


class DepthLoss(DistillLoss):
    """A loss between two depth maps in metres.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        min_depth: metres; pixels that the teacher sees nearer do not count.
        max_depth: metres; pixels that it sees further off do not count.
            ``None``: no limit.
        where: ``'all'``; ``'labelled'``: only where the ground truth has a
            reading (``targets.depth`` above 0, within both limits);
            ``'unlabelled'``: only where it has none, so that the teacher fills
            the holes of a sensor and leaves the rest to it.
    """

    # A 1x1 convolution between two depth maps would let the student have its own unit.
    needs_equal_channels = False
    needs_equal_size = True
    tasks = ('depth',)

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        min_depth: float = 0.0,
        max_depth: float | None = None,
        where: str = 'all',
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        owner = type(self).__name__
        check_finite_number(owner, 'min_depth', min_depth, minimum=0)
        if max_depth is not None:
            check_finite_number(owner, 'max_depth', max_depth)
            if max_depth <= min_depth:
                raise ConfigError(
                    f'{owner}: `max_depth` must be above min_depth={min_depth!r}, got {max_depth!r}. '
                    'Both are in metres; leave it out for no limit.'
                )
        check_one_of(owner, 'where', where, WHERE)
        self.min_depth = float(min_depth)
        self.max_depth = None if max_depth is None else float(max_depth)
        self.where = where

    def counts(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Pixels that count: inside the image, read by the teacher, within the limits, and ``where``.

        Args:
            student: depth of the student, (B, 1, H, W) or (B, H, W).
            teacher: depth of the teacher, the same.
            targets: what the batch knows besides.

        Returns:
            Bool, shape (B, H, W).

        Raises:
            ConfigError: ``where`` asks for ground truth that is not there.
        """
        owner = type(self).__name__
        counts = depth_readings(teacher, min_depth=self.min_depth, max_depth=self.max_depth)
        size = (counts.shape[-2], counts.shape[-1])
        given = valid_pixels(
            owner,
            counts[:, None],
            labels=targets.labels,
            ignore_index=targets.ignore_index,
            valid=targets.valid,
        )
        if given is not None:
            counts = counts & given
        if self.where == 'all':
            return counts
        if targets.depth is None:
            raise ConfigError(
                f'{owner}: `targets.depth` must be given for where={self.where!r}, got None. '
                "Load depth maps with the batch, or take where='all'."
            )
        truth = resize_labels(targets.depth, size).to(counts.device)
        labelled = depth_readings(truth, min_depth=self.min_depth, max_depth=self.max_depth)
        return counts & (labelled if self.where == 'labelled' else ~labelled)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        limits = f'min_depth={self.min_depth:g}, max_depth={self.max_depth}'
        return f'{super().extra_repr()}, {limits}, where={self.where!r}'


#: Draws an image; more would fill the memory.
MAX_DRAWS = 10**7


class SampledDepthLoss(DepthLoss):
    """A loss on pixels drawn anew in each step, reproducibly.

    The draw depends on the seed, a step counter that is saved with the module,
    and the number of an image in the joint batch of all processes. So a resumed
    run goes on exactly, several processes draw what one would, and the global
    random streams are neither read nor moved. The counter stands still in eval.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        seed: of the draw, an integer of at least 0.
        min_depth: see :class:`DepthLoss`.
        max_depth: see :class:`DepthLoss`.
        where: see :class:`DepthLoss`.
    """

    stream: Tensor

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        seed: int = 0,
        min_depth: float = 0.0,
        max_depth: float | None = None,
        where: str = 'all',
    ) -> None:
        super().__init__(loss_weight, min_depth=min_depth, max_depth=max_depth, where=where)
        check_count(type(self).__name__, 'seed', seed, 0, maximum=2**63 - 1)
        self.register_buffer('stream', torch.tensor([seed, 0], dtype=torch.int64))

    def draw(self, student: Tensor, count: int, arity: int) -> Tensor:
        """Draw flat positions of the student's map for this step.

        Args:
            student: depth of the student, (B, 1, H, W) or (B, H, W).
            count: K, draws an image.
            arity: M, positions a draw.

        Returns:
            Int64, shape (B, K, M).
        """
        rank, world_size = get_dist_info()
        # mmengine's samplers deal every n-th image to each of n processes.
        images = torch.arange(student.shape[0], device=student.device) * world_size + rank
        stream = self.stream.to(student.device)
        size = student.shape[-2] * student.shape[-1]
        positions = draw_positions(stream, images, count=count, arity=arity, size=size)
        if self.training:
            self.stream[1] += 1
        return positions

    def _check_number(self, name: str, value: int) -> int:
        check_count(type(self).__name__, name, value, maximum=MAX_DRAWS)
        return value
