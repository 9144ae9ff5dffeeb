"""Pixel-wise distillation: what class each pixel is, and how surely."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import check_one_of, check_positive
from mmstructkd.functional.divergence import pixelwise_kl_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.presets import settle
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['PixelwiseKLLoss']

_REDUCTIONS = ('mean', 'sum')
_DEFAULTS: dict[str, Any] = {'loss_weight': 1.0, 'temperature': 1.0, 'batch_reduction': 'mean'}
_PRESETS: dict[str, dict[str, Any]] = {
    'paper': {'loss_weight': 10.0, 'temperature': 1.0, 'batch_reduction': 'mean'},
    'code': {'loss_weight': 10.0, 'temperature': 1.0, 'batch_reduction': 'sum'},
}


@MODELS.register_module()
class PixelwiseKLLoss(DistillLoss):
    r"""Divergence of the student's class probabilities from the teacher's at each pixel.

    Knowledge distillation per pixel, and the pixel-wise term of Structured
    Knowledge Distillation (arXiv:1903.04197). See
    :func:`~mmstructkd.functional.divergence.pixelwise_kl_loss` for the formula.
    Tap class scores of the same classes in both networks.

    ===============  =======  ===========  ==========
    argument         default  ``'paper'``  ``'code'``
    ===============  =======  ===========  ==========
    loss_weight      1        10           10
    temperature      1        1            1
    batch_reduction  mean     mean         sum
    ===============  =======  ===========  ==========

    ``'code'``: the authors' released code divides by the pixels of one image,
    not by those of the batch, so that its weight of 10 is 10 B on the mean, with
    B the images of one process. It counts pixels without a label like all
    others; here these count nowhere.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens both distributions, above 0; the loss is multiplied
            by its square.
        batch_reduction: ``'mean'`` over the pixels of the batch that count, or
            ``'sum'``: that mean times B.
        preset: ``'paper'``, ``'code'`` or ``None``. A preset fixes the values of
            its column; an argument that says otherwise is an error.

    Shape:
        - student, teacher: :math:`(B, C, H, W)`; the teacher is detached.
        - output: scalar, in nats, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> loss = PixelwiseKLLoss(loss_weight=10.0)
        >>> z = torch.randn(2, 5, 4, 4)
        >>> loss(z, z).item()
        0.0
    """

    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        temperature: float | None = None,
        batch_reduction: str | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {'loss_weight': loss_weight, 'temperature': temperature, 'batch_reduction': batch_reduction}
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(loss_weight=settings['loss_weight'])
        check_positive(owner, 'temperature', settings['temperature'])
        check_one_of(owner, 'batch_reduction', settings['batch_reduction'], _REDUCTIONS)
        self.preset = preset
        self.temperature = float(settings['temperature'])
        self.batch_reduction: str = settings['batch_reduction']

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        loss = pixelwise_kl_loss(
            student,
            teacher,
            temperature=self.temperature,
            labels=targets.labels,
            ignore_index=targets.ignore_index,
            valid=targets.valid,
        )
        return loss * student.shape[0] if self.batch_reduction == 'sum' else loss

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, temperature={self.temperature:g}, batch_reduction={self.batch_reduction!r}'
