"""Standardised features: what a channel looks like, whatever its offset and scale."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import check_flag, check_one_of, check_positive
from mmstructkd.functional.standardized_mse import OVER, standardized_mse_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.presets import settle
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['StandardizedMSELoss']

_DEFAULTS: dict[str, Any] = {'over': 'image', 'half': False}
_PRESETS: dict[str, dict[str, Any]] = {
    'nfd': {'over': 'image', 'half': False},
    'pkd': {'over': 'batch', 'half': True},
}


@MODELS.register_module()
class StandardizedMSELoss(DistillLoss):
    r"""Squared distance of features whose channels have mean 0 and standard deviation 1.

    Normalized Feature Distillation (arXiv:2207.05256) and PKD (arXiv:2207.02039).
    See :func:`~mmstructkd.functional.standardized_mse.standardized_mse_loss` for the
    formula. Tap the last stage of the backbone, the decoder's bottleneck, or the
    levels of a neck; the term puts a 1x1 convolution in front of the student
    where the widths differ.

    ========  ==========  ==========  ===========
    argument  default     ``'nfd'``   ``'pkd'``
    ========  ==========  ==========  ===========
    over      image       image       batch
    half      False       False       True
    ========  ==========  ==========  ===========

    The default weight 1 is ours: the weight of NFD is not known. PKD takes four
    levels of the neck with 6 for two-stage detectors and 10 for others, and adds
    the levels up where a term takes their mean: ``loss_weight=24`` or ``40`` on
    four levels is its scale.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        over: ``'image'``: statistics of each image; ``'batch'``: of all images
            of one process.
        half: multiply by one half.
        eps: standard deviation below which a channel counts as constant.
        preset: ``'nfd'``, ``'pkd'`` or ``None``. A preset fixes the values of
            its column; an argument that says otherwise is an error.

    Shape:
        - student, teacher: :math:`(B, D, H, W)`; the teacher is detached.
        - output: scalar in [0, 4], 0 with a graph where no pixel counts, and
          where there is one position only.

    Pixels without a label count, as in the published code
    (``where='inside'``); padding is no part of the statistics.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> loss = StandardizedMSELoss(preset='pkd')
        >>> x = torch.randn(2, 5, 4, 4)
        >>> loss(2 * x + 1, x).item() < 1e-10
        True
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'features, standardised per channel'
    paper = (
        'Normalized Feature Distillation for Semantic Segmentation (arXiv:2207.05256); '
        'PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient '
        '(arXiv:2207.02039)'
    )

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        over: str | None = None,
        half: bool | None = None,
        eps: float = 1e-6,
        preset: str | None = None,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        owner = type(self).__name__
        settings = settle(owner, preset, {'over': over, 'half': half}, defaults=_DEFAULTS, presets=_PRESETS)
        check_one_of(owner, 'over', settings['over'], OVER)
        check_flag(owner, 'half', settings['half'])
        check_positive(owner, 'eps', eps)
        self.preset = preset
        self.over: str = settings['over']
        # Not `half`: a module has a method of that name.
        self.factor = 0.5 if settings['half'] else 1.0
        self.eps = float(eps)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        return self.factor * standardized_mse_loss(student, teacher, over=self.over, eps=self.eps, valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, over={self.over!r}, half={self.factor != 1}'
