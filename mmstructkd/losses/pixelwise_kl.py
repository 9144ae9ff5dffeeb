"""Pixel-wise distillation: what class each pixel is, and how surely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmstructkd.errors import check_one_of
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from mmstructkd.losses.class_targets import ClassMap
from mmstructkd.losses.presets import settle
from mmstructkd.losses.softening import SoftenedLoss
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
class PixelwiseKLLoss(SoftenedLoss):
    r"""Divergence of the student's class probabilities from the teacher's at each pixel.

    Knowledge distillation per pixel, and the pixel-wise term of Structured
    Knowledge Distillation (arXiv:1903.04197). See
    :func:`~mmstructkd.functional.pixelwise_kl.pixelwise_kl_loss` for the formula.
    Tap class scores of the same classes in both networks, or the rows of scores of
    a box head.

    ===============  =======  ===========  ==========
    argument         default  ``'paper'``  ``'code'``
    ===============  =======  ===========  ==========
    loss_weight      1        10           10
    temperature      1        1            1
    batch_reduction  mean     mean         sum
    ===============  =======  ===========  ==========

    ``'code'``: the authors' released code divides by the pixels of one image,
    not by those of the batch, so that its weight of 10 is 10 B on the mean, with
    B the images of one process. The default weight of 1 is winycg/CIRKD's on this
    mean. Pixels without a label count like all others, as in that code
    (``where='inside'``).

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens both distributions: a number from 0.001 to 1000, or the config
            of a registered temperature. The loss is multiplied by its square.
        batch_reduction: ``'mean'`` over the pixels of the batch that count, or
            ``'sum'``: that mean times B.
        class_map: for a teacher of finer or reordered classes: for each of its
            classes the student's class that it is (part of), -1 for none. The
            teacher's probabilities of what is one class are added up; a class of
            the student that the teacher does not know is left out of both
            distributions. ``None``: both have the same classes.
        preset: ``'paper'``, ``'code'`` or ``None``. A preset fixes the values of
            its column; an argument that says otherwise is an error.

    Shape:
        - student, teacher: :math:`(B, C, H, W)` or :math:`(M, C)`; the teacher is
          detached. Rows know labels and masks of their own only.
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

    own_temperatures = ('position', 'image')
    tasks = ('seg', 'depth', 'det')
    transfers = 'class probabilities of each pixel'
    paper = (
        'Distilling the Knowledge in a Neural Network (arXiv:1503.02531); '
        'Structured Knowledge Distillation for Dense Prediction (arXiv:1903.04197)'
    )
    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    over_classes = True

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        temperature: Any = None,
        batch_reduction: str | None = None,
        class_map: Sequence[int] | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {'loss_weight': loss_weight, 'temperature': temperature, 'batch_reduction': batch_reduction}
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(settings['loss_weight'], settings['temperature'])
        check_one_of(owner, 'batch_reduction', settings['batch_reduction'], _REDUCTIONS)
        self.preset = preset
        self.batch_reduction: str = settings['batch_reduction']
        self.class_map = None if class_map is None else ClassMap(owner, class_map)

    @property
    def maps_classes(self) -> bool:
        """Whether the teacher may have other classes."""
        return self.class_map is not None

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Size what the temperature learns by the classes that both know.

        Args:
            student: a probed tensor of the student.
            teacher: the probed tensor of the teacher.
        """
        if self.class_map is not None:
            student, teacher = self.class_map(student, teacher)
        super().bind(student, teacher)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        if self.class_map is not None:
            student, teacher = self.class_map(student, teacher)
        student, teacher, temperature = self.soften(student, teacher, targets)
        loss = pixelwise_kl_loss(
            student,
            teacher,
            temperature=temperature,
            valid=self.counting(student, targets),
        )
        return loss * student.shape[0] if self.batch_reduction == 'sum' else loss

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, batch_reduction={self.batch_reduction!r}'
