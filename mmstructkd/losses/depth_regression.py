"""Regression on the teacher's depth."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import ConfigError, check_finite_number, check_one_of, check_positive
from mmstructkd.functional.depth_regression import depth_l1_loss, silog_loss
from mmstructkd.losses.depth_base import DepthLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['DepthRegressionLoss']

KINDS = ('l1', 'silog')


@MODELS.register_module()
class DepthRegressionLoss(DepthLoss):
    """The student's depth shall be the teacher's, in metres or up to a share of the scale.

    The depth form of distilling the output; Structured Knowledge Distillation
    (arXiv:1903.04197) drops its pixel term for depth, so there is no published
    weight. See :func:`~mmstructkd.functional.depth_regression.depth_l1_loss` and
    :func:`~mmstructkd.functional.depth_regression.silog_loss` for the formulas. Tap the
    depth maps (``decode_head.to_depth`` of the heads of ``mmstructkd.models``).
    Logits over depth bins go to :class:`~mmstructkd.losses.PixelwiseKLLoss`.

    Pixels count where the teacher has a reading, labelled or not
    (``where='inside'``): teaching beyond the ground truth is what it is for.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        kind: ``'l1'`` (metres) or ``'silog'`` (nats squared; ``root``: nats).
        variance_weight: of ``'silog'``: from 0 (all of the error in scale
            counts) to 1 (none does).
        root: of ``'silog'``: take the root of each image's value.
        eps: of ``'silog'``, metres: below it the logarithm goes on as its tangent.
        min_depth: metres; pixels that the teacher sees nearer do not count.
        max_depth: metres; pixels that it sees further off do not count.
            ``None``: no limit.
        where: ``'inside'`` the image: the teacher also teaches where the ground
            truth has no reading; ``'labelled'`` or ``'unlabelled'``: only where it has one, or
            only where it has none (``targets.depth``). See
            :class:`~mmstructkd.losses.depth_base.DepthLoss`.
        teacher_output: ``'depth'``, ``'disparity'`` (one over depth; turned into
            depth) or the ``'same'`` as the student, see there.

    Shape:
        - student, teacher: :math:`(B, 1, H, W)`; the teacher is detached.
        - output: scalar, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range, or ``where`` asks for ground
            truth that the batch has not.
        ShapeError: the maps are no depth maps, or differ in shape.

    Example:
        >>> import torch
        >>> depth = torch.rand(2, 1, 4, 4) + 1
        >>> loss = DepthRegressionLoss(kind='l1')
        >>> round(loss(depth + 0.5, depth).item(), 3)
        0.5
    """

    transfers = 'depth in metres'
    paper = ''

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        kind: str = 'l1',
        variance_weight: float = 0.5,
        root: bool = False,
        eps: float = 1e-3,
        min_depth: float = 0.0,
        max_depth: float | None = None,
        where: str = 'inside',
        teacher_output: str = 'depth',
    ) -> None:
        super().__init__(
            loss_weight, min_depth=min_depth, max_depth=max_depth, where=where, teacher_output=teacher_output
        )
        owner = type(self).__name__
        check_one_of(owner, 'kind', kind, KINDS)
        check_positive(owner, 'eps', eps)
        check_finite_number(owner, 'variance_weight', variance_weight, minimum=0)
        if variance_weight > 1:
            raise ConfigError(f'{owner}: `variance_weight` must be at most 1, got {variance_weight!r}.')
        self.kind = kind
        self.variance_weight = float(variance_weight)
        self.root = root
        self.eps = float(eps)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher, valid = self.prepare(student, teacher, targets)
        if self.kind == 'l1':
            return depth_l1_loss(student, teacher, valid=valid)
        return silog_loss(
            student, teacher, variance_weight=self.variance_weight, root=self.root, eps=self.eps, valid=valid
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        silog = f', variance_weight={self.variance_weight:g}, root={self.root}' if self.kind == 'silog' else ''
        return f'{super().extra_repr()}, kind={self.kind!r}{silog}'
