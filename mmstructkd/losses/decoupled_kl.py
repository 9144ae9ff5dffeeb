"""Decoupled distillation: the right class against the rest, and the rest among themselves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, check_one_of, check_some_weight
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.decoupled_kl import decoupled_kl_loss
from mmstructkd.losses.class_targets import TARGETS, class_targets
from mmstructkd.losses.presets import settle
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['DecoupledKLLoss']

_DEFAULTS: dict[str, Any] = {'loss_weight': 1.0, 'alpha': 1.0, 'beta': 1.0, 'temperature': 1.0}
_PRESETS: dict[str, dict[str, Any]] = {
    'coco': {'loss_weight': 1.0, 'alpha': 1.0, 'beta': 0.25, 'temperature': 1.0},
    'imagenet': {'loss_weight': 1.0, 'alpha': 1.0, 'beta': 0.5, 'temperature': 1.0},
}


@MODELS.register_module()
class DecoupledKLLoss(SoftenedLoss):
    r"""Divergence of class probabilities, split at the right class.

    Decoupled Knowledge Distillation (arXiv:2203.08679). See
    :func:`~mmstructkd.functional.decoupled_kl.decoupled_kl_loss` for the formula. Tap
    class scores of the same classes in both networks, or the class scores of a
    box head (rows).

    ===========  =======  ==========  ==============
    argument     default  ``'coco'``  ``'imagenet'``
    ===========  =======  ==========  ==============
    loss_weight  1        1           1
    alpha        1        1           1
    beta         1        0.25        0.5
    temperature  1        1           1
    ===========  =======  ==========  ==============

    The presets are the authors' settings for box heads and for classification;
    they have none for maps. The default weight is 1, as there. Only labelled
    pixels count (``where='labelled'``), all with ``target='teacher'``. Of two
    classes the second part is 0.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        alpha: weight of the right class against the others, at least 0.
        beta: weight of the distribution among the others.
        temperature: softens both: a number from 0.001 to 1000, or the config of a registered
            temperature. The loss is multiplied by its square.
        target: the right class is that of the ``'labels'``, or the one that the
            ``'teacher'`` scores highest, for images without labels. (A region of a box
            head has the label of the true box it lies on, or is background.)
        preset: ``'coco'``, ``'imagenet'`` or ``None``. A preset fixes the values
            of its column; an argument that says otherwise is an error.

    Shape:
        - student, teacher: :math:`(B, C, H, W)` or :math:`(M, C)`; the teacher is
          detached. Rows know labels and masks of their own only.
        - output: scalar, in nats, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, or
            there are no labels to split at.
        ShapeError: the scores differ in shape.

    Example:
        >>> import torch
        >>> z, labels = torch.randn(2, 5, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
        >>> DecoupledKLLoss(beta=0.5)(z, z, Targets(labels=labels)).item()
        0.0
    """

    # A 1x1 convolution would let the student hide behind it: classes must be the same ones.
    needs_equal_channels = False
    over_classes = True
    where = 'labelled'
    needs_labels = True
    own_temperatures = ('position', 'image')
    tasks = ('seg', 'det')
    transfers = 'probability of the right class, and of the others among themselves'
    paper = 'Decoupled Knowledge Distillation (arXiv:2203.08679)'

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        temperature: Any = None,
        target: str = 'labels',
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {'loss_weight': loss_weight, 'alpha': alpha, 'beta': beta, 'temperature': temperature}
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(settings['loss_weight'], settings['temperature'])
        check_some_weight(owner, alpha=settings['alpha'], beta=settings['beta'])
        check_one_of(owner, 'target', target, TARGETS)
        self.preset = preset
        self.alpha = float(settings['alpha'])
        self.beta = float(settings['beta'])
        self.target = target
        self.needs_labels = target == 'labels'
        self.where = 'labelled' if self.needs_labels else 'inside'

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Refuse two classes where only the others of each pixel would count.

        Args:
            student: a probed tensor of the student.
            teacher: the probed tensor of the teacher.

        Raises:
            ConfigError: there are two classes, and ``alpha`` is 0.
        """
        super().bind(student, teacher)
        if student.shape[1] < 3 and self.alpha == 0:
            raise ConfigError(
                f'{type(self).__name__}: `alpha` must be above 0 for two classes, got 0. Beside the right class there '
                'is only one other, and nothing to compare among the others.'
            )

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        student, teacher = as_two_classes(student, teacher)
        labels = class_targets(type(self).__name__, self.target, student, teacher, targets)
        valid = self.counting(student, targets)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return decoupled_kl_loss(
            student,
            teacher,
            labels=labels,
            alpha=self.alpha,
            beta=self.beta,
            temperature=temperature,
            ignore_index=-1,
            valid=valid,
        )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, alpha={self.alpha:g}, beta={self.beta:g}, target={self.target!r}'
