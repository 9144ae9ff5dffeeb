"""Intra-class feature variation: how like the centre of its class a pixel is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import MAX_CLASSES, ConfigError, check_count
from mmstructkd.functional.intra_class_variation import intra_class_variation_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.presets import settle
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['IntraClassVariationLoss']

_DEFAULTS: dict[str, Any] = {'loss_weight': 20.0, 'count_ignored': False}
_PRESETS: dict[str, dict[str, Any]] = {'code': {'loss_weight': 200.0, 'count_ignored': True}}


@MODELS.register_module()
class IntraClassVariationLoss(DistillLoss):
    r"""Squared gap between how like its class's centre a pixel is in student and teacher.

    IFVD (ECCV 2020). See
    :func:`~mmstructkd.functional.intra_class_variation.intra_class_variation_loss` for the
    formula. Tap features, e.g. the last ones before the classifier; widths may
    differ. Needs labels.

    =============  =======  ==========
    argument       default  ``'code'``
    =============  =======  ==========
    loss_weight    20       200
    count_ignored  no       yes
    =============  =======  ==========

    The default weight is winycg/CIRKD's, ``'code'`` that of the authors. Both
    divide by pixels without a label too, which add nothing. Only labelled pixels
    count (``where='labelled'``).

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        num_classes: of the labels. ``None``: the number the task has.
        count_ignored: divide by all pixels, not only by those with a label.
        preset: ``'code'`` or ``None``. A preset fixes the values of its column;
            an argument that says otherwise is an error.

    Shape:
        - student: :math:`(B, D_s, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: scalar in [0, 4], no unit, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, or
            the batch has no labels or no number of classes.
        ShapeError: the maps differ in B, H or W.

    Example:
        >>> import torch
        >>> x, labels = torch.randn(2, 5, 4, 4), torch.randint(0, 3, (2, 8, 8))
        >>> IntraClassVariationLoss(num_classes=3)(2 * x, x, Targets(labels=labels)).item() < 1e-10
        True
    """

    needs_equal_channels = False
    where = 'labelled'
    needs_labels = True
    tasks = ('seg',)
    transfers = 'likeness of pixels to the centre of their class'
    paper = 'Intra-class Feature Variation Distillation for Semantic Segmentation (ECCV 2020)'

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        num_classes: int | None = None,
        count_ignored: bool | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {'loss_weight': loss_weight, 'count_ignored': count_ignored}
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(loss_weight=settings['loss_weight'])
        if num_classes is not None:
            check_count(owner, 'num_classes', num_classes, maximum=MAX_CLASSES)
        self.preset = preset
        self.num_classes = num_classes
        self.count_ignored: bool = settings['count_ignored']

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        owner = type(self).__name__
        if targets.labels is None:
            raise ConfigError(
                f'{owner}: `targets.labels` must be the class of each pixel, got None. '
                'Use it on a segmentation task, or PairwiseAffinityLoss, which needs no labels.'
            )
        classes = targets.num_classes if self.num_classes is None else self.num_classes
        if classes is None:
            raise ConfigError(f'{owner}: `num_classes` must be given where the task does not tell it, got None.')
        return intra_class_variation_loss(
            student,
            teacher,
            labels=targets.labels,
            num_classes=classes,
            ignore_index=targets.ignore_index,
            # The mask leaves out what has no label: with it, ignored pixels would not be counted.
            valid=targets.inside if self.count_ignored else targets.valid,
            count_ignored=self.count_ignored,
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, num_classes={self.num_classes}, count_ignored={self.count_ignored}'
