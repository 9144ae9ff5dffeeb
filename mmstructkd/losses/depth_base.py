"""What the losses on depth maps share: which pixels count, and draws of pixels."""

from __future__ import annotations

import torch
from mmengine.dist import get_dist_info
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, check_count, check_finite_number, check_one_of
from mmstructkd.functional.core.depth import depth_of_disparity, depth_readings, disparity_of_depth
from mmstructkd.functional.core.resize import resize_labels
from mmstructkd.functional.core.sampling import draw_positions
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.positions import counting_positions
from mmstructkd.structures import Targets

__all__ = ['OUTPUTS', 'DepthLoss', 'SampledDepthLoss']

OUTPUTS = ('depth', 'disparity', 'same')
#: ``'all'`` is the older name of ``'inside'``.
WHERE = ('inside', 'labelled', 'unlabelled', 'all')


def predicted_by(head: nn.Module | None) -> str | None:
    """What a head says that it predicts: ``'depth'``, ``'disparity'``, or ``None``.

    By an attribute ``predicts``, by the name of its class (``DisparityHead``,
    ``InverseDepthHead``), or as a head of :mod:`mmstructkd.models`, which ends in
    ``to_depth``.
    """
    said = getattr(head, 'predicts', None)
    if said in ('depth', 'disparity'):
        return str(said)
    name = type(head).__name__.lower()
    if 'disp' in name or 'inverse' in name:
        return 'disparity'
    return 'depth' if hasattr(head, 'to_depth') else None


class DepthLoss(DistillLoss):
    """A loss between two depth maps in metres.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        min_depth: metres; pixels that the teacher sees nearer do not count.
        max_depth: metres; pixels that it sees further off do not count.
            ``None``: no limit.
        where: ``'inside'`` the image, wherever the teacher has a reading;
            ``'labelled'``: only where the ground truth has one too
            (``targets.depth`` above 0, within both limits); ``'unlabelled'``:
            only where it has none, so that the teacher fills the holes of a
            sensor and leaves the rest to it. ``'all'`` is ``'inside'``.
        teacher_output: what the teacher predicts: ``'depth'``; ``'disparity'``,
            one over depth, which is turned into depth; or the ``'same'`` as the
            student, whatever that is. The first two are checked against the
            ground truth in the first step of training.
        blind_to_unit: the loss compares up to scale and offset of each image, so
            that disparity may have any: then the student's depth is turned into
            disparity instead of the teacher's into depth.
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
        where: str = 'inside',
        teacher_output: str = 'depth',
        blind_to_unit: bool = False,
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
        self.min_depth = float(min_depth)
        self.max_depth = None if max_depth is None else float(max_depth)
        self.restrict(where)
        check_one_of(owner, 'teacher_output', teacher_output, OUTPUTS)
        self.teacher_output = teacher_output
        self.blind_to_unit = blind_to_unit
        if teacher_output == 'disparity' and blind_to_unit and (min_depth or max_depth is not None):
            raise ConfigError(
                f"{owner}: `min_depth` and `max_depth` must be left out with teacher_output='disparity', got "
                f'{min_depth!r} and {max_depth!r}: disparity up to scale and offset has no metres.'
            )

    def restrict(self, where: str) -> None:
        """Say which positions count.

        Args:
            where: ``'inside'`` the image, or only those where the ground truth
                has (``'labelled'``) or has not (``'unlabelled'``) a reading.

        Raises:
            ConfigError: it is none of them.
        """
        check_one_of(type(self).__name__, 'where', where, WHERE)
        self.where = 'inside' if where == 'all' else where

    def check_heads(self, student: nn.Module | None, teacher: nn.Module | None) -> list[str]:
        """Refuse a teacher whose head says that it predicts something else; name other ranges.

        Args:
            student: the student's head.
            teacher: the teacher's.

        Returns:
            A sentence where the two have other ranges.

        Raises:
            ConfigError: a head predicts disparity, or depth, and the loss is told
                otherwise.
        """
        owner = type(self).__name__
        says = {side: predicted_by(head) for side, head in (('student', student), ('teacher', teacher))}
        wanted = {'same': says['student']}.get(self.teacher_output, self.teacher_output)
        if says['teacher'] is not None and wanted is not None and says['teacher'] != wanted:
            raise ConfigError(
                f'{owner}: `teacher_output` must be what the teacher predicts, got {self.teacher_output!r} for a '
                f'{type(teacher).__name__}, whose output is {says["teacher"]}. '
                f'Set teacher_output={says["teacher"]!r}.'
            )
        if says['student'] == 'disparity' and self.teacher_output != 'same':
            raise ConfigError(
                f'{owner}: the student must predict depth with teacher_output={self.teacher_output!r}, got a '
                f'{type(student).__name__}, whose output is disparity. Set '
                "teacher_output='same' where the teacher predicts disparity as well."
            )
        return [] if self.blind_to_unit else self._other_range(student, teacher)

    def _other_range(self, student: nn.Module | None, teacher: nn.Module | None) -> list[str]:
        """Name the ranges of two heads where one ends nearer, unless the loss ends there too."""
        ends = [getattr(head, 'max_depth', None) for head in (student, teacher)]
        known = [end for end in ends if isinstance(end, (int, float))]
        if len(known) < 2 or known[0] == known[1] or (self.max_depth is not None and self.max_depth <= min(known)):
            return []
        return [
            f'{type(self).__name__}: the heads have other ranges: max_depth={known[0]:g} m of the student and '
            f'{known[1]:g} m of the teacher. What lies beyond {min(known):g} m one of them cannot say; set '
            f'max_depth={min(known):g} of the loss to leave it out.'
        ]

    def prepare(self, student: Tensor, teacher: Tensor, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Bring both maps to one unit, and say which pixels count.

        Args:
            student: depth of the student, (B, 1, H, W) or (B, H, W).
            teacher: what the teacher predicts, the same.
            targets: what the batch knows besides.

        Returns:
            Student, teacher and :meth:`readable_pixels`, for the functional core.

        Raises:
            ConfigError: ``where`` asks for ground truth that is not there.
        """
        if self.teacher_output == 'disparity':
            if self.blind_to_unit:
                student = disparity_of_depth(student)
            else:
                teacher = depth_of_disparity(teacher.detach())
        return student, teacher, self.readable_pixels(student, teacher, targets)

    def readable_pixels(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
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
        valid_mask = depth_readings(teacher, min_depth=self.min_depth, max_depth=self.max_depth)
        size = (valid_mask.shape[-2], valid_mask.shape[-1])
        # Labels of classes say nothing about depth.
        given = counting_positions(owner, valid_mask[:, None], targets)
        if given is not None:
            valid_mask = valid_mask & given
        if self.where == 'inside':
            return valid_mask
        if targets.depth is None:
            raise ConfigError(
                f'{owner}: `targets.depth` must be given for where={self.where!r}, got None. '
                "Load depth maps with the batch, or take where='inside'."
            )
        truth = resize_labels(targets.depth, size).to(valid_mask.device)
        labelled = depth_readings(truth, min_depth=self.min_depth, max_depth=self.max_depth)
        return valid_mask & (labelled if self.where == 'labelled' else ~labelled)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        limits = f'min_depth={self.min_depth:g}, max_depth={self.max_depth}'
        output = '' if self.teacher_output == 'depth' else f', teacher_output={self.teacher_output!r}'
        return f'{super().extra_repr()}, {limits}{output}'


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
        teacher_output: see :class:`DepthLoss`.
    """

    stream: Tensor

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        seed: int = 0,
        min_depth: float = 0.0,
        max_depth: float | None = None,
        where: str = 'inside',
        teacher_output: str = 'depth',
    ) -> None:
        super().__init__(
            loss_weight, min_depth=min_depth, max_depth=max_depth, where=where, teacher_output=teacher_output
        )
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
