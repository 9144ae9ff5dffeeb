"""Focal and global distillation: objects, background, attention, and the image as a whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_same, check_some_weight
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.valid import zero_elsewhere
from mmstructkd.functional.feature_mse import feature_mse_loss
from mmstructkd.functional.focal_global import focal_feature_loss
from mmstructkd.losses.presets import settle
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['ContextBlock', 'FocalGlobalLoss']

_WEIGHTS = ('foreground_weight', 'background_weight', 'attention_weight', 'global_weight')


def _preset(*numbers: float) -> dict[str, Any]:
    return dict(zip((*_WEIGHTS, 'temperature'), numbers, strict=True))


_PRESETS: dict[str, dict[str, Any]] = {
    'one-stage': _preset(1e-3, 5e-4, 5e-4, 5e-6, 0.5),
    'reppoints': _preset(1.6e-3, 8e-4, 8e-4, 8e-6, 0.5),
    'fcos': _preset(1.6e-3, 8e-4, 8e-4, 8e-6, 0.8),
    'two-stage': _preset(5e-5, 2.5e-5, 5e-5, 5e-7, 0.5),
}
_DEFAULTS = _PRESETS['one-stage']


class ContextBlock(nn.Module):
    r"""What the whole image adds to each of its features: pooled by a learned mask, then transformed.

    The relation module of GcNet (arXiv:1904.11492) as Focal and Global
    Distillation uses it: a softmax over positions, the weighted mean, and two
    linear maps with layer norm and ReLU between them. The last one starts at 0,
    so that at first nothing is added.

    Args:
        channels: width D of the feature; half of it in between.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 2)
        self.mask = nn.Linear(channels, 1)
        self.reduce = nn.Linear(channels, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.expand = nn.Linear(hidden, channels)
        nn.init.kaiming_normal_(self.mask.weight, nonlinearity='relu')
        nn.init.zeros_(self.mask.bias)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return what is added, shape (B, D, 1, 1).

        Args:
            features: shape (B, D, H, W), finite, in the dtype of the parameters.
            valid: positions that count, bool, shape (B, H, W).
        """
        flat = features.flatten(2)
        scores = self.mask.weight @ flat + self.mask.bias
        if valid is not None:
            scores = torch.where(valid.flatten(1)[:, None], scores, torch.finfo(scores.dtype).min)
        context = (flat * scores.softmax(dim=-1)).sum(dim=-1)
        added: Tensor = self.expand(torch_functional.relu(self.norm(self.reduce(context))))
        return added[..., None, None]


@full_precision
def _relation(
    student: Tensor, teacher: Tensor, valid: Tensor | None, context_s: ContextBlock, context_t: ContextBlock
) -> Tensor:
    """Sum of squares of R_s(f^s) - R_t(f^t), averaged over images."""
    teacher = teacher.detach()
    student = zero_elsewhere(student, valid)
    teacher = zero_elsewhere(teacher, valid)
    dtype = context_s.mask.weight.dtype
    added = context_s(student.to(dtype), valid) - context_t(teacher.to(dtype), valid)
    # On the student's side both: the function detaches its second argument, and the teacher's block learns.
    return feature_mse_loss(student + added, teacher, reduction='sum', valid=valid)


@MODELS.register_module()
class FocalGlobalLoss(SoftenedLoss):
    r"""Features of objects and of the background apart, where the teacher looks, and the image as a whole.

    .. math::
        L = L_{focal} + \frac{\lambda}{B} \sum_b \lVert R_s(f^s_b) - R_t(f^t_b) \rVert_F^2,
        \quad R(f) = f + c(f)

    Focal and Global Distillation (arXiv:2111.11837). See
    :func:`~mmstructkd.functional.focal_global.focal_feature_loss` for the focal part;
    c is a :class:`ContextBlock`, one of the student and one of the teacher, both
    trained with the student and dropped from its checkpoint. For detectors: tap
    the levels of the neck; the term puts a 1x1 convolution in front of the
    student where the widths differ.

    =================  =======  =============  =============  ========  =============
    argument           default  ``one-stage``  ``reppoints``  ``fcos``  ``two-stage``
    =================  =======  =============  =============  ========  =============
    foreground_weight  1e-3     1e-3           1.6e-3         1.6e-3    5e-5
    background_weight  5e-4     5e-4           8e-4           8e-4      2.5e-5
    attention_weight   5e-4     5e-4           8e-4           8e-4      5e-5
    global_weight      5e-6     5e-6           8e-6           8e-6      5e-7
    temperature        0.5      0.5            0.5            0.8       0.5
    =================  =======  =============  =============  ========  =============

    The columns are the configs of the authors' code, ``'one-stage'`` those of
    detectors with anchors. That code adds the five levels of the neck up where a
    term takes their mean: ``loss_weight=5`` is its scale. Sums over positions
    grow with the image; pixels without a label are part of them
    (``where='inside'``), padding is not.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        foreground_weight: alpha, at least 0.
        background_weight: beta, at least 0.
        attention_weight: gamma, at least 0.
        global_weight: lambda, at least 0.
        temperature: of the attention: a number from 0.001 to 1000, or the config of a registered
            temperature.
        preset: a column of the table, or ``None``. A preset fixes the values of
            its column; an argument that says otherwise is an error.

    Shape:
        - student, teacher: :math:`(B, D, H, W)`; the teacher is detached.
        - targets: ``boxes`` and ``input_size``.
        - output: scalar, 0 with a graph where no pixel counts.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, there
            are no boxes, or the loss runs before :meth:`bind`.
        ShapeError: the maps differ in shape, or in width from those of
            :meth:`bind`.

    Example:
        >>> x = torch.randn(1, 8, 4, 4)
        >>> loss = FocalGlobalLoss(preset='two-stage')
        >>> loss.bind(x, x)
        >>> targets = Targets(boxes=(torch.tensor([[0.0, 0.0, 9.0, 9.0]]),), input_size=(32, 32))
        >>> loss(x, x, targets).item()
        0.0
    """

    softened_axes = None
    tasks = ('det',)
    transfers = 'features of objects and background, attention, global context'
    paper = 'Focal and Global Knowledge Distillation for Detectors (arXiv:2111.11837)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        foreground_weight: float | None = None,
        background_weight: float | None = None,
        attention_weight: float | None = None,
        global_weight: float | None = None,
        temperature: Any = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {
            'foreground_weight': foreground_weight,
            'background_weight': background_weight,
            'attention_weight': attention_weight,
            'global_weight': global_weight,
            'temperature': temperature,
        }
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(loss_weight, settings['temperature'])
        check_some_weight(owner, **{name: settings[name] for name in _WEIGHTS})
        self.preset = preset
        self.foreground_weight = float(settings['foreground_weight'])
        self.background_weight = float(settings['background_weight'])
        self.attention_weight = float(settings['attention_weight'])
        self.global_weight = float(settings['global_weight'])
        self.channels: int | None = None
        self.context_student: ContextBlock | None = None
        self.context_teacher: ContextBlock | None = None

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Build the context blocks for the channels of the probed maps.

        A second call with maps of as many channels keeps them. Without a global
        part there are none.

        Args:
            student: a probed map of the student, (B, D, H, W).
            teacher: the probed map of the teacher, the same shape.

        Raises:
            ShapeError: the maps are not 4-D, or differ.
        """
        self._check_maps(student, teacher)
        if self.channels is not None:
            self._check_channels(student)
            return
        self.channels = student.shape[1]
        if self.global_weight > 0:
            self.context_student = ContextBlock(self.channels)
            self.context_teacher = ContextBlock(self.channels)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        owner = type(self).__name__
        boxes, input_size = targets.boxes, targets.input_size
        if boxes is None or input_size is None:
            name = 'boxes' if boxes is None else 'input_size'
            raise ConfigError(
                f'{owner}: `targets.{name}` must be given, got None. Use it with a detector and labelled images; '
                "without boxes take e.g. StandardizedMSELoss(preset='pkd')."
            )
        self._check_maps(student, teacher)
        if self.channels is None:
            raise ConfigError(
                f'{owner}: `bind` must be called before the loss, got no call yet. '
                'Hand it one probed pair of maps: it builds its context blocks for their channels.'
            )
        self._check_channels(student)
        valid = self.counting(student, targets)
        student, teacher, temperature = self.soften(student, teacher, targets)
        focal = focal_feature_loss(
            student,
            teacher,
            boxes=boxes,
            input_size=input_size,
            foreground_weight=self.foreground_weight,
            background_weight=self.background_weight,
            attention_weight=self.attention_weight,
            temperature=temperature,
            valid=valid,
        )
        if self.context_student is None or self.context_teacher is None:
            return focal
        return focal + self.global_weight * _relation(
            student, teacher, valid, self.context_student, self.context_teacher
        )

    def _check_maps(self, student: Tensor, teacher: Tensor) -> None:
        owner = type(self).__name__
        check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
        check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
        way_out = 'Leave it to the term, which aligns widths and sizes.'
        check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', way_out)

    def _check_channels(self, student: Tensor) -> None:
        if student.shape[1] != self.channels:
            raise ShapeError(
                f'{type(self).__name__}: `student` must have the {self.channels} channels that it was bound to, '
                f'got {tuple(student.shape)}. Use one term for each width.'
            )

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return (
            f'{super().extra_repr()}, foreground_weight={self.foreground_weight:g}, '
            f'background_weight={self.background_weight:g}, attention_weight={self.attention_weight:g}, '
            f'global_weight={self.global_weight:g}'
        )
