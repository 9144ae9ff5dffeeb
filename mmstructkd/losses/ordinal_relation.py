"""Which of two pixels is nearer."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_finite_number, check_positive
from mmstructkd.functional.ordinal_relation import ordinal_relation_loss
from mmstructkd.losses.depth_base import SampledDepthLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['OrdinalRelationLoss']


@MODELS.register_module()
class OrdinalRelationLoss(SampledDepthLoss):
    """Pairs of pixels shall be ordered in depth as the teacher orders them.

    See :func:`~mmstructkd.functional.ordinal_relation.ordinal_relation_loss` for the
    formula. Needs no common scale of the two maps. Tap the depth maps. There is
    no published weight for distillation; Chen et al. train on this loss alone.

    Pixels count where the teacher has a reading, labelled or not
    (``where='inside'``): teaching beyond the ground truth is what it is for.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        num_pairs: how many pairs to draw from each image in each step.
        ratio_threshold: two depths are equal where the larger is at most
            1 + this times the smaller.
        eps: metres, above 0; below it the student's logarithm goes on as its
            tangent.
        seed: of the draw. Draw and step counter are the loss's own, and saved
            with it: the global random streams stay as they are.
        min_depth: metres; pixels that the teacher sees nearer do not count.
        max_depth: metres; pixels that it sees further off do not count.
            ``None``: no limit.
        where: ``'inside'`` the image, or only ``'labelled'`` or ``'unlabelled'``
            pixels (``targets.depth``); see
            :class:`~mmstructkd.losses.depth_base.DepthLoss`.
        teacher_output: ``'depth'``, ``'disparity'`` (one over depth; turned into
            depth) or the ``'same'`` as the student, see there.

    Shape:
        - student, teacher: :math:`(B, 1, H, W)`; the teacher is detached.
        - output: scalar, no unit, 0 with a graph where no pair counts. Not 0
          where both maps are equal.

    Raises:
        ConfigError: an argument is out of range, or ``where`` asks for ground
            truth that the batch has not.
        ShapeError: the maps are no depth maps, or differ in shape.

    Example:
        >>> import torch
        >>> depth = torch.tensor([[[[1.0, 2.0, 4.0]]]])
        >>> loss = OrdinalRelationLoss(num_pairs=100).eval()
        >>> bool(loss(3 * depth, depth) < loss(1 / depth, depth))
        True
    """

    transfers = 'depth order of pairs of pixels'
    paper = 'Single-Image Depth Perception in the Wild (arXiv:1604.03901)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        num_pairs: int = 5000,
        ratio_threshold: float = 0.03,
        eps: float = 1e-3,
        seed: int = 0,
        min_depth: float = 0.0,
        max_depth: float | None = None,
        where: str = 'inside',
        teacher_output: str = 'depth',
    ) -> None:
        super().__init__(
            loss_weight,
            seed=seed,
            min_depth=min_depth,
            max_depth=max_depth,
            where=where,
            teacher_output=teacher_output,
        )
        owner = type(self).__name__
        check_finite_number(owner, 'ratio_threshold', ratio_threshold, minimum=0)
        check_positive(owner, 'eps', eps)
        self.num_pairs = self._check_number('num_pairs', num_pairs)
        self.ratio_threshold = float(ratio_threshold)
        self.eps = float(eps)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher, valid = self.prepare(student, teacher, targets)
        pairs = self.draw(student, self.num_pairs, 2)
        return ordinal_relation_loss(
            student, teacher, pairs=pairs, ratio_threshold=self.ratio_threshold, eps=self.eps, valid=valid
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, num_pairs={self.num_pairs}, ratio_threshold={self.ratio_threshold:g}'
