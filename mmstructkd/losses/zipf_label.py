"""Zipf's label smoothing: the wrong classes by the rank of their votes."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import ConfigError, check_one_of, is_count
from mmstructkd.functional.logits import zipf_label_loss
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
    :func:`~mmstructkd.functional.logits.zipf_label_loss` for the formula. It
    distils a network into itself: **no probabilities of the teacher are used**, at
    most its votes. Tap class scores. The default weight of 0.1 is the authors' for
    CIFAR and ImageNet, 1.0 theirs for TinyImageNet; there is no evidence for maps.

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

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        labels, valid = class_targets(type(self).__name__, self.target, student, teacher, targets)
        return zipf_label_loss(
            student,
            teacher if self.voter == 'teacher' else None,
            labels=labels,
            kernel_size=self.kernel_size,
            ignore_index=-1,
            valid=valid,
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, kernel_size={self.kernel_size}, voter={self.voter!r}, target={self.target!r}'
