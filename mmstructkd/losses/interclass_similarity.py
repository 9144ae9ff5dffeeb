"""Inter-class similarity distillation: how the places of the classes relate."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, check_one_of
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.core.classes import present_classes
from mmstructkd.functional.core.valid import valid_pixels
from mmstructkd.functional.interclass_similarity import MODES, interclass_similarity_loss
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
    :func:`~mmstructkd.functional.interclass_similarity.interclass_similarity_loss` for the
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
        temperature: softens the distributions over positions: a number from 0.001 to
            1000, or the config of a registered temperature.
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

    Pixels without a label count, as in the published code
    (``where='inside'``); padding is no part of any distribution.

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
    over_classes = True
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

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Refuse two classes with normalised rows.

        Args:
            student: a probed map of the student.
            teacher: the probed map of the teacher.

        Raises:
            ConfigError: the rows of the matrices have one entry that is not 0,
                which normalising makes 1.
        """
        if student.shape[1] < 3 and self.normalize and self.mode == 'paper':
            raise ConfigError(
                f'{type(self).__name__}: `normalize` must be False for two classes, got True. Each row of the matrix '
                'has one divergence, which brought to length 1 is always 1: the loss would be 0.'
            )

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        owner = type(self).__name__
        student, teacher = as_two_classes(student, teacher)
        valid = self.counting(student, targets)
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
            labels = labels.to(student.device)
            # Where unlabelled pixels count, the ignored label is no class all the same.
            known = valid_pixels(owner, student, labels=labels, ignore_index=targets.ignore_index, valid=valid)
            present = present_classes(labels, student.shape[1], valid=known)
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
