"""DIST: how the classes rank, at each pixel and among the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, check_some_weight
from mmstructkd.functional.dist import dist_loss
from mmstructkd.losses.class_targets import ClassMap
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['DistLoss']


@MODELS.register_module()
class DistLoss(SoftenedLoss):
    r"""One minus the correlation of the class probabilities, among classes and among pixels.

    DIST (arXiv:2205.10536). See :func:`~mmstructkd.functional.dist.dist_loss`
    for the formula. Tap class scores of the same classes in both networks: of a
    segmentation head, of depth in bins, or the rows of a box head. The default
    weights are the published ones for segmentation, where the auxiliary head is
    distilled as well, with weight 0.4. Pixels without a label count, as in the
    published code (``where='inside'``); padding does not. Of two classes the first part is 1 or -1
    at a pixel and has no gradient.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        inter_weight: factor of the part among the classes of a pixel.
        intra_weight: factor of the part among the pixels of a class; they are
            those of one process's batch.
        temperature: softens the probabilities: a number from 0.001 to 1000, or the config of
            a registered temperature. The loss is multiplied by its square.
        class_map: for each class of the teacher the student's class that it is
            (part of), -1 for none; see :class:`PixelwiseKLLoss`. ``None``: both
            have the same classes.

    Shape:
        - student, teacher: :math:`(B, C, H, W)` or :math:`(M, C)`; the teacher is
          detached. Rows know labels and masks of their own only.
        - output: scalar without unit, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the scores differ in shape.

    Example:
        >>> import torch
        >>> z = torch.randn(2, 5, 4, 4)
        >>> abs(DistLoss()(z, z).item()) < 1e-5
        True
    """

    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    over_classes = True
    tasks = ('seg', 'depth', 'det')
    transfers = 'how class probabilities rank, among classes and among pixels'
    paper = 'Knowledge Distillation from A Stronger Teacher (arXiv:2205.10536)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        inter_weight: float = 1.0,
        intra_weight: float = 1.0,
        temperature: Any = 1.0,
        class_map: Sequence[int] | None = None,
    ) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        check_some_weight(owner, inter_weight=inter_weight, intra_weight=intra_weight)
        self.inter_weight = float(inter_weight)
        self.intra_weight = float(intra_weight)
        self.class_map = None if class_map is None else ClassMap(owner, class_map)

    @property
    def maps_classes(self) -> bool:
        """Whether the teacher may have other classes."""
        return self.class_map is not None

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Refuse two classes where only their rank at a pixel would count.

        Args:
            student: a probed tensor of the student.
            teacher: the probed tensor of the teacher.

        Raises:
            ConfigError: there are two classes, and no part among the pixels.
        """
        classes = student.shape[1] if self.class_map is None else len(self.class_map.known)
        if classes < 3 and self.intra_weight == 0:
            raise ConfigError(
                f'{type(self).__name__}: `intra_weight` must be above 0 for two classes, got 0. The correlation of two '
                'probabilities is 1 or -1, and has no gradient; among the pixels of a class it has one.'
            )

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        if self.class_map is not None:
            student, teacher = self.class_map(student, teacher)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return dist_loss(
            student,
            teacher,
            inter_weight=self.inter_weight,
            intra_weight=self.intra_weight,
            temperature=temperature,
            valid=self.counting(student, targets),
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, inter_weight={self.inter_weight:g}, intra_weight={self.intra_weight:g}'
