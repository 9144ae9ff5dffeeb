"""Weighted soft labels: distil where the student lags behind the teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import check_one_of
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.weighted_soft_label import weighted_soft_label_loss
from mmstructkd.losses.class_targets import TARGETS, class_targets
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['WeightedSoftLabelLoss']


@MODELS.register_module()
class WeightedSoftLabelLoss(SoftenedLoss):
    r"""Cross-entropy to the teacher's soft labels, weighted where the student lags behind.

    Weighted soft labels (arXiv:2102.00650). See
    :func:`~mmstructkd.functional.weighted_soft_label.weighted_soft_label_loss` for the formula;
    it is a cross-entropy and so not 0 on itself. Tap class scores of the same
    classes in both networks. The default weight of 2.5 and temperature of 2 are
    the authors' for ImageNet; they have none for maps. Only labelled pixels count
    (``where='labelled'``), all with ``target='teacher'``.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens both: a number from 0.001 to 1000, or the config of a registered
            temperature. The loss is multiplied by its square; the weights are
            taken at temperature 1 of the same scores.
        target: the right class is that of the ``'labels'``, or the one that the
            ``'teacher'`` scores highest, for images without labels. (A region of a box
            head has the label of the true box it lies on, or is background.)

    Shape:
        - student, teacher: :math:`(B, C, H, W)` or :math:`(M, C)`; the teacher is
          detached. Rows know labels and masks of their own only.
        - output: scalar, in nats, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range, or there are no labels.
        ShapeError: the scores differ in shape.

    Example:
        >>> import torch
        >>> z, labels = torch.randn(2, 5, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
        >>> WeightedSoftLabelLoss()(z, z, Targets(labels=labels)).item() > 0
        True
    """

    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    over_classes = True
    where = 'labelled'
    needs_labels = True
    own_temperatures = ('position', 'image')
    tasks = ('seg', 'det')
    transfers = 'class probabilities, most where the student lags behind'
    paper = 'Rethinking Soft Labels for Knowledge Distillation (arXiv:2102.00650)'

    def __init__(self, loss_weight: float = 2.5, *, temperature: Any = 2.0, target: str = 'labels') -> None:
        super().__init__(loss_weight, temperature)
        check_one_of(type(self).__name__, 'target', target, TARGETS)
        self.target = target
        self.needs_labels = target == 'labels'
        self.where = 'labelled' if self.needs_labels else 'inside'

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher = as_two_classes(student, teacher)
        labels = class_targets(type(self).__name__, self.target, student, teacher, targets)
        valid = self.counting(student, targets)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return weighted_soft_label_loss(
            student, teacher, labels=labels, temperature=temperature, ignore_index=-1, valid=valid
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, target={self.target!r}'
