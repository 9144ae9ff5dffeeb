"""Where depth changes, and by how much."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_count, check_positive
from mmstructkd.functional.gradient_matching import gradient_matching_loss
from mmstructkd.losses.depth_base import DepthLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['GradientMatchingLoss']

#: Each halves the map: more leave nothing of any.
MAX_SCALES = 16


@MODELS.register_module()
class GradientMatchingLoss(DepthLoss):
    """Edges and slopes of the teacher's depth shall be the student's.

    Multi-scale gradient matching of MegaDepth (arXiv:1804.00607) and MiDaS
    (arXiv:1907.01341). See
    :func:`~mmstructkd.functional.gradient_matching.gradient_matching_loss` for the formula.
    Tap the depth maps; beside a regression, which says where the map lies. MiDaS
    gives 0.5 to a sum over four scales and both directions, on aligned inverse
    depth: that is a weight of 4 on the mean here.

    Pixels count where the teacher has a reading, labelled or not
    (``where='inside'``): teaching beyond the ground truth is what it is for.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        scales: number of grids, each half as fine as the last.
        align: first map the student of each image onto the teacher by least
            squares.
        eps: metres, above 0: smallest standard deviation ``align`` divides by.
        min_depth: metres; pixels that the teacher sees nearer do not count.
        max_depth: metres; pixels that it sees further off do not count.
            ``None``: no limit.
        where: ``'inside'`` the image, or only ``'labelled'`` or ``'unlabelled'``
            pixels (``targets.depth``); see
            :class:`~mmstructkd.losses.depth_base.DepthLoss`.
        teacher_output: ``'depth'``, ``'disparity'`` (one over depth; turned into
            depth, with ``align`` the student's depth into it) or the ``'same'``
            as the student, see there.

    Shape:
        - student, teacher: :math:`(B, 1, H, W)`; the teacher is detached.
        - output: scalar, metres a grid step, 0 with a graph where no pair of
          neighbours counts.

    Raises:
        ConfigError: an argument is out of range, or ``where`` asks for ground
            truth that the batch has not.
        ShapeError: the maps are no depth maps, or differ in shape.

    Example:
        >>> import torch
        >>> depth = torch.tensor([[[[1.0, 2.0, 4.0]]]])
        >>> GradientMatchingLoss()(depth + 3, depth).item()
        0.0
    """

    transfers = 'edges and slopes of depth'
    paper = 'MegaDepth (arXiv:1804.00607)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        scales: int = 4,
        align: bool = False,
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
            blind_to_unit=bool(align),
        )
        owner = type(self).__name__
        check_positive(owner, 'eps', eps)
        check_count(owner, 'scales', scales, maximum=MAX_SCALES)
        self.scales = scales
        self.align = align
        self.eps = float(eps)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher, valid = self.prepare(student, teacher, targets)
        return gradient_matching_loss(student, teacher, scales=self.scales, align=self.align, eps=self.eps, valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, scales={self.scales}, align={self.align}'
