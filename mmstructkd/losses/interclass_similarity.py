"""Inter-class similarity distillation: how the places of the classes relate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, check_one_of
from mmstructkd.functional.classes import MODES, interclass_similarity_loss, present_classes
from mmstructkd.functional.reduce import valid_pixels
from mmstructkd.losses.presets import settle
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['InterclassSimilarityLoss']

_SOURCES = ('teacher', 'labels', 'all')
_DEFAULTS: dict[str, Any] = {
    'loss_weight': 20.0,
    'temperature': 1.0,
    'normalize': True,
    'mode': 'paper',
    'present': 'teacher',
}
_PRESETS: dict[str, dict[str, Any]] = {
    'code': {'loss_weight': 9500.0, 'temperature': 1.0, 'normalize': True, 'mode': 'released_code', 'present': 'all'},
}


@MODELS.register_module()
class InterclassSimilarityLoss(SoftenedLoss):
    r"""Squared distance between the inter-class divergences of student and teacher.

    AICSD (arXiv:2308.04243). See
    :func:`~mmstructkd.functional.classes.interclass_similarity_loss` for the
    formula, and how the released code departs from it. Tap class scores (or the
    scores of depth bins) of the same classes in both networks.

    ===========  ==========  =============
    argument     default     ``'code'``
    ===========  ==========  =============
    loss_weight  20          9500
    temperature  1           1
    normalize    yes         yes
    mode         paper       released_code
    present      teacher     all
    ===========  ==========  =============

    The weight of 20 is ours: with rows of length 1 the value is of the order of
    1 / C. Of ``'code'``, the authors' README does not make clear which of two
    terms their 9500 belongs to.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens the distributions over positions: a number above 0, or the config of a registered
            temperature.
        normalize: bring the rows of both matrices to length 1.
        mode: ``'paper'`` or ``'released_code'``.
        present: which classes of an image take part: those that the teacher
            predicts somewhere (``'teacher'``), those in the labels
            (``'labels'``), or ``'all'``.
        preset: ``'code'`` or ``None``. A preset fixes the values of its column;
            an argument that says otherwise is an error.

    Shape:
        - student, teacher: :math:`(B, C, H, W)`; the teacher is detached.
        - output: scalar, 0 with a graph where no pixel counts.

    Pixels without a label and padding are no part of any distribution.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, or
            the batch has no labels for ``present='labels'``.
        ShapeError: the maps differ in shape.

    Example:
        >>> import torch
        >>> z = torch.randn(2, 5, 4, 4)
        >>> InterclassSimilarityLoss()(z + 1, z).item() < 1e-8
        True
    """

    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    softened_axes = (2, 3)
    tasks = ('seg', 'depth', 'det')
    transfers = 'divergences between the distributions of classes over the map'
    paper = 'Adaptive Inter-Class Similarity Distillation for Semantic Segmentation (arXiv:2308.04243)'

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        temperature: Any = None,
        normalize: bool | None = None,
        mode: str | None = None,
        present: str | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {
            'loss_weight': loss_weight,
            'temperature': temperature,
            'normalize': normalize,
            'mode': mode,
            'present': present,
        }
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(settings['loss_weight'], settings['temperature'])
        check_one_of(owner, 'mode', settings['mode'], MODES)
        if settings['mode'] == 'released_code' and present is None:
            settings['present'] = 'all'
        check_one_of(owner, 'present', settings['present'], _SOURCES)
        if settings['mode'] == 'released_code' and settings['present'] != 'all':
            raise ConfigError(
                f"{owner}: `present` must be 'all' with mode='released_code', got {settings['present']!r}. "
                'That form takes all classes over the whole batch.'
            )
        self.preset = preset
        self.normalize: bool = settings['normalize']
        self.mode: str = settings['mode']
        self.present: str = settings['present']

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        owner = type(self).__name__
        valid = valid_pixels(
            owner, student, labels=targets.labels, ignore_index=targets.ignore_index, valid=targets.valid
        )
        present = None
        if self.present == 'teacher' and student.shape == teacher.shape:
            present = present_classes(teacher.argmax(dim=1), teacher.shape[1], valid=valid)
        elif self.present == 'labels':
            labels = self.labels_at(targets, (student.shape[-2], student.shape[-1]))
            if labels is None:
                raise ConfigError(
                    f"{owner}: `present` must not be 'labels' where the batch has none, got 'labels'. "
                    "Use present='teacher'."
                )
            present = present_classes(labels.to(student.device), student.shape[1], valid=valid)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return interclass_similarity_loss(
            student,
            teacher,
            temperature=temperature,
            normalize=self.normalize,
            mode=self.mode,
            present=present,
            valid=valid,
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, normalize={self.normalize}, mode={self.mode!r}, present={self.present!r}'
