"""Depth up to scale and offset of each image."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_finite_number, check_positive
from mmstructkd.functional.scale_shift_invariant import scale_shift_invariant_loss
from mmstructkd.losses.depth_base import DepthLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['ScaleShiftInvariantLoss']

#: Its square must be a float32.
MAX_EPS = 1e6


@MODELS.register_module()
class ScaleShiftInvariantLoss(DepthLoss):
    """The student's depth shall be the teacher's up to a factor and an offset of each image.

    For a teacher whose scale is not to be trusted, or that has none. See
    :func:`~mmstructkd.functional.scale_shift_invariant.scale_shift_invariant_loss` for the
    formula. Tap the depth maps of both networks. With a teacher of disparity up
    to scale and offset (MiDaS) set ``teacher_output='disparity'``: then one over
    the student's depth is compared with it. MiDaS uses a weight of 1 on
    normalised disparity; there is no published one for distillation.

    Pixels count where the teacher has a reading, labelled or not
    (``where='inside'``): teaching beyond the ground truth is what it is for.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        robust: align by median and mean deviation, and take absolute instead of
            squared differences.
        eps: in the maps' unit, above 0: a spread below it counts as ``eps``.
        min_depth: metres; pixels that the teacher sees nearer do not count.
        max_depth: metres; pixels that it sees further off do not count.
            ``None``: no limit.
        where: ``'inside'`` the image, or only ``'labelled'`` or ``'unlabelled'``
            pixels (``targets.depth``); see
            :class:`~mmstructkd.losses.depth_base.DepthLoss`.
        teacher_output: ``'depth'``, ``'disparity'`` (of any scale and offset; the
            student's depth is turned into it) or the ``'same'`` as the student,
            see there.

    Shape:
        - student, teacher: :math:`(B, 1, H, W)`; the teacher is detached.
        - output: scalar, square metres (``robust``: no unit), 0 with a graph
          where no pixel counts.

    Raises:
        ConfigError: an argument is out of range, or ``where`` asks for ground
            truth that the batch has not.
        ShapeError: the maps are no depth maps, or differ in shape.

    Example:
        >>> import torch
        >>> depth = torch.rand(2, 1, 4, 4) + 1
        >>> ScaleShiftInvariantLoss()(3 * depth + 2, depth).item() < 1e-6
        True
    """

    transfers = 'depth up to scale and offset'
    paper = 'Towards Robust Monocular Depth Estimation (arXiv:1907.01341)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        robust: bool = False,
        eps: float = 1e-3,
        min_depth: float = 0.0,
        max_depth: float | None = None,
        where: str = 'inside',
        teacher_output: str = 'depth',
    ) -> None:
        super().__init__(
            loss_weight,
            min_depth=min_depth,
            max_depth=max_depth,
            where=where,
            teacher_output=teacher_output,
            blind_to_unit=True,
        )
        check_positive(type(self).__name__, 'eps', eps)
        check_finite_number(type(self).__name__, 'eps', eps, maximum=MAX_EPS)
        self.robust = robust
        self.eps = float(eps)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher, valid = self.prepare(student, teacher, targets)
        return scale_shift_invariant_loss(student, teacher, robust=self.robust, eps=self.eps, valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, robust={self.robust}'
