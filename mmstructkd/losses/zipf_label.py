"""Zipf's label smoothing: the wrong classes by the rank of their votes."""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_one_of, is_count
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.core.reduce import nan_unless_finite
from mmstructkd.functional.zipf_label import zipf_label_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.class_targets import TARGETS, class_targets
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['ZipfLabelLoss']


@MODELS.register_module()
class ZipfLabelLoss(DistillLoss):
    r"""Divergence of the wrong classes' probabilities from Zipf's law over their votes.

    Zipf's label smoothing (arXiv:2207.12980), ported from images to maps: the
    pixels of a window vote for its centre. See
    :func:`~mmstructkd.functional.zipf_label.zipf_label_loss` for the formula. It
    distils a network into itself: **no probabilities of the teacher are used**, at
    most its votes. Tap class scores. The default weight of 0.1 is the authors' for
    CIFAR and ImageNet, 1.0 theirs for TinyImageNet; there is no evidence for maps.
    Only labelled pixels count (``where='labelled'``), all with
    ``target='teacher'``. Needs three classes.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        kernel_size: side of the window, odd.
        voter: ``'student'``, as published, or ``'teacher'``: whose highest class
            is the vote of a pixel.
        target: the right class is that of the ``'labels'``, or the one that the
            ``'teacher'`` scores highest, for images without labels.

    Shape:
        - student, teacher: :math:`(B, C, H, W)`; the teacher is detached.
        - output: scalar, in nats, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range, or there are no labels.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> z, labels = torch.randn(2, 5, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
        >>> ZipfLabelLoss()(z, z, Targets(labels=labels)).item() > 0
        True
    """

    needs_equal_channels = False
    over_classes = True
    where = 'labelled'
    needs_labels = True
    tasks = ('seg',)
    transfers = 'ranks of the wrong classes around a pixel (own votes, no teacher)'
    paper = "Efficient One Pass Self-distillation with Zipf's Label Smoothing (arXiv:2207.12980)"

    def __init__(
        self, loss_weight: float = 0.1, *, kernel_size: int = 7, voter: str = 'student', target: str = 'labels'
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        owner = type(self).__name__
        if not is_count(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ConfigError(f'{owner}: `kernel_size` must be an odd integer above 0, got {kernel_size!r}.')
        check_one_of(owner, 'voter', voter, ('student', 'teacher'))
        check_one_of(owner, 'target', target, TARGETS)
        self.kernel_size = kernel_size
        self.voter = voter
        self.target = target
        self.needs_labels = target == 'labels'
        self.where = 'labelled' if self.needs_labels else 'inside'

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Refuse two classes.

        Args:
            student: a probed map of the student.
            teacher: the probed map of the teacher.

        Raises:
            ShapeError: there are fewer than three classes.
        """
        if student.shape[1] < 3:
            raise ShapeError(
                f'{type(self).__name__}: `student` must have at least 3 classes, got {tuple(student.shape)}. Of two '
                'classes one is wrong, and has no rank: the loss is 0. Take PixelwiseKLLoss.'
            )

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher = as_two_classes(student, teacher)
        labels = class_targets(type(self).__name__, self.target, student, teacher, targets)
        valid = self.counting(student, targets)
        loss = zipf_label_loss(
            student,
            teacher if self.voter == 'teacher' else None,
            labels=labels,
            kernel_size=self.kernel_size,
            ignore_index=-1,
            valid=valid,
        )
        if self.target != 'teacher':
            return loss
        # A class is a whole number, whatever it was made of: a teacher that is not finite must show otherwise.
        scores = teacher.detach().clamp(min=torch.finfo(teacher.dtype).min)
        return loss + nan_unless_finite(scores, None if valid is None else valid.unsqueeze(1))

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, kernel_size={self.kernel_size}, voter={self.voter!r}, target={self.target!r}'
