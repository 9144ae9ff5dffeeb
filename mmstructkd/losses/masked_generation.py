"""Masked generation: the teacher's feature from a part of the student's."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import check_some_weight
from mmstructkd.functional.feature_mse import feature_mse_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.presets import settle
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['MaskedGenerationLoss']

_DEFAULTS: dict[str, Any] = {'alpha': 2e-5}
_PRESETS: dict[str, dict[str, Any]] = {
    'one-stage': {'alpha': 2e-5},
    'two-stage': {'alpha': 5e-7},
    'seg': {'alpha': 2e-5},
}


@MODELS.register_module()
class MaskedGenerationLoss(DistillLoss):
    r"""Squared error of a feature that was generated from a masked one, summed over the map.

    .. math:: L = \frac{\alpha}{B} \sum_b \lVert f^t_b - G(M_b \odot f^s_b) \rVert_F^2

    MGD (arXiv:2205.01529). The mask M and the generator G are the connector,
    ``connector=dict(type='mmstructkd.MaskedGenerationConnector', ratio=...)``;
    without it this is a plain distance. See
    :func:`~mmstructkd.functional.feature_mse.feature_mse_loss` with
    ``reduction='sum'``.

    ========  =======  =============  =============  ==========
    argument  default  ``one-stage``  ``two-stage``  ``seg``
    ========  =======  =============  =============  ==========
    alpha     2e-5     2e-5           5e-7           2e-5
    ========  =======  =============  =============  ==========

    The connector's ``ratio`` of that code is 0.65, 0.45 and 0.75. For detection
    it takes five levels of the neck and adds them up where a term takes their
    mean: ``loss_weight=5`` is its scale. For segmentation it takes the last
    stage of the backbone, together with
    ``ChannelwiseKLLoss(3.0, temperature=4)`` on the class scores.

    A sum over positions grows with the crop. Pixels without a label are part of
    it, as in the published code (``where='inside'``); padding is not, and images
    without a pixel that counts are no part of B.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        alpha: the method's own factor, above 0.
        preset: ``'one-stage'``, ``'two-stage'``, ``'seg'`` or ``None``. A preset
            fixes the values of its column; an argument that says otherwise is an
            error.

    Shape:
        - student, teacher: :math:`(B, D, H, W)`; the teacher is detached.
        - output: scalar, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> x = torch.zeros(2, 5, 4, 4)
        >>> round(MaskedGenerationLoss(preset='two-stage')(x + 1, x).item() * 1e5, 4)
        4.0
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'features generated from masked ones'
    paper = 'Masked Generative Distillation (arXiv:2205.01529)'

    def __init__(self, loss_weight: float = 1.0, *, alpha: float | None = None, preset: str | None = None) -> None:
        super().__init__(loss_weight=loss_weight)
        owner = type(self).__name__
        settings = settle(owner, preset, {'alpha': alpha}, defaults=_DEFAULTS, presets=_PRESETS)
        check_some_weight(owner, alpha=settings['alpha'])
        self.preset = preset
        self.alpha = float(settings['alpha'])

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        return self.alpha * feature_mse_loss(student, teacher, reduction='sum', valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, alpha={self.alpha:g}'
