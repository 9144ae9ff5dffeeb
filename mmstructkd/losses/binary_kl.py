"""Class maps of detectors: each class a yes or no of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, check_count, check_one_of
from mmstructkd.functional.binary_kl import binary_kl_loss
from mmstructkd.functional.core.boxes import inside_boxes
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['BinaryKLLoss']

NORMALIZERS = ('weights', 'positions', 'boxes')


@MODELS.register_module()
class BinaryKLLoss(SoftenedLoss):
    r"""Divergence of independent class probabilities, weighted by the teacher's confidence.

    The pixel-wise term of Structured Knowledge Distillation (arXiv:1903.04197) for
    heads whose classes are sigmoids. See
    :func:`~mmstructkd.functional.binary_kl.binary_kl_loss` for the formula. Tap the
    class maps: ``'bbox_head.conv_cls'`` of FCOS, ``'bbox_head.retina_cls'`` of
    RetinaNet (with its number of ``anchors``), ``'bbox_head.gfl_cls'`` of GFL. The
    default weight is this project's; no published value is known. Positions without
    a label count like all others (``where='inside'``): boxes label none.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens both: a number from 0.001 to 1000, or the config of a registered
            temperature (not the standardised one: a class alone has no spread).
            The loss is multiplied by its square.
        anchors: anchors of a position, side by side in the channels.
        normalizer: what the weighted sum is divided by: ``'weights'``, their sum;
            ``'positions'``, the positions and anchors that count; ``'boxes'``, the
            positions whose centre lies inside a labelled box, at least 1.

    Shape:
        - student, teacher: :math:`(B, A K, H, W)` or :math:`(M, K)`; the teacher is
          detached. Rows know labels and masks of their own only.
        - output: scalar, in nats, 0 with a graph where no position counts.

    Raises:
        ConfigError: an argument is out of range, or the boxes are missing.
        ShapeError: the maps differ in shape, or do not split into anchors.

    Example:
        >>> import torch
        >>> z = torch.randn(2, 5, 4, 4)
        >>> BinaryKLLoss()(z, z).item()
        0.0
    """

    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    by_class = True
    softened_axes = None
    own_temperatures = ('position', 'image')
    tasks = ('seg', 'det')
    transfers = 'independent (sigmoid) class probabilities, most where the teacher is sure'
    paper = 'Structured Knowledge Distillation for Dense Prediction (arXiv:1903.04197)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        temperature: Any = 1.0,
        anchors: int = 1,
        normalizer: str = 'weights',
    ) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        check_count(owner, 'anchors', anchors)
        check_one_of(owner, 'normalizer', normalizer, NORMALIZERS)
        self.anchors = anchors
        self.normalizer = normalizer

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        owner = type(self).__name__
        valid = self.counting(student, targets)
        normalizer: str | Tensor = self.normalizer
        if normalizer == 'boxes':
            if student.dim() != 4 or targets.boxes is None or targets.input_size is None:
                what = 'rows' if student.dim() != 4 else 'no boxes' if targets.boxes is None else 'no input size'
                raise ConfigError(
                    f"{owner}: `normalizer` must be 'weights' or 'positions' where positions have no boxes, "
                    f"got 'boxes' with {what}."
                )
            size = (student.shape[2], student.shape[3])
            inside = inside_boxes(targets.boxes, size, targets.input_size).to(student.device)
            normalizer = (inside if valid is None else inside & valid).sum().float()
        student, teacher, temperature = self.soften(student, teacher, targets)
        return binary_kl_loss(
            student, teacher, temperature=temperature, anchors=self.anchors, normalizer=normalizer, valid=valid
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, anchors={self.anchors}, normalizer={self.normalizer!r}'
