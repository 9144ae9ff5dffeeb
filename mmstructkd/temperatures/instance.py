"""A temperature of each position's, or each image's, own, from what both networks say there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, check_count, check_finite_number, check_one_of, check_positive
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.softening import bounded_temperature, scale_gradient
from mmstructkd.functional.core.valid import valid_pixels
from mmstructkd.registry import MODELS
from mmstructkd.temperatures.base import Progress, Softened, Temperature, check_temperature_range
from mmstructkd.temperatures.learnable import PUBLISHED_SHARE

__all__ = ['InstanceTemperature']

#: More hidden channels are a slip.
MAX_HIDDEN = 2**14
#: Scores beyond say nothing more, and would make the network's gradient as large as they are.
LARGEST = 50.0


@MODELS.register_module()
class InstanceTemperature(Temperature):
    r"""Temperatures that two 1x1 convolutions make of the scores, trained against the student more and more.

    .. math:: T_i = T_0 + s \cdot \mathrm{sigmoid}\big(w_2^\top \mathrm{ReLU}(W_1 [z^S_i; z^T_i] + b_1) + b_2\big)

    The instance-wise form of Curriculum Temperature (CTKD, AAAI 2023,
    arXiv:2211.16231), of which the authors released a sketch of the loss and not
    the network. As in :class:`LearnableTemperature` the gradient is reversed by a
    factor that goes from 0 to -1, and nothing is weight-decayed. The factor T
    squared of the loss stands inside its mean over positions, so that a position
    has its own. The bounds keep the network, which learns against the student,
    from silencing the positions that it likes.

    The scores go in without graph, at most 50 in size: the temperature sees the
    student and does not teach it. The student's optimiser trains the convolutions,
    sized by the probe. Losses that make a distribution at each position take it;
    others say why not when they are built.

    Args:
        hidden: channels between the two convolutions.
        per: ``'position'``, or ``'image'``: the hidden channels are averaged over the
            positions of an image that count.
        low: :math:`T_0`, the lowest temperature, from 1; with ``span`` at most 1000.
        span: s, above 0.
        init: initial :math:`b_2`; 1 gives temperatures about 15.6.
        begin: first iteration or epoch of the curriculum.
        end: the one after its last, from which on the factor is -1. ``None``: after
            1/24 of the training, as published for the global form.
        by_epoch: count epochs instead of iterations.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> temperature = InstanceTemperature(hidden=4)
        >>> temperature(torch.zeros(2, 3, 4, 6), torch.zeros(2, 3, 4, 6)).temperature.shape
        torch.Size([2, 1, 4, 6])
    """

    no_weight_decay = ('hidden_weight', 'hidden_bias', 'out_weight', 'out_bias')
    hidden_weight: nn.Parameter
    hidden_bias: nn.Parameter
    out_weight: nn.Parameter
    out_bias: nn.Parameter

    def __init__(
        self,
        hidden: int = 64,
        per: str = 'position',
        *,
        low: float = 1.0,
        span: float = 20.0,
        init: float = 1.0,
        begin: int = 0,
        end: int | None = None,
        by_epoch: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_count(owner, 'hidden', hidden, maximum=MAX_HIDDEN)
        check_one_of(owner, 'per', per, ('position', 'image'))
        check_finite_number(owner, 'low', low, minimum=1)
        check_positive(owner, 'span', span)
        check_temperature_range(owner, 'low + span', low + span)
        check_finite_number(owner, 'init', init)
        self.per = per
        self.hidden, self.low, self.span, self.init = int(hidden), float(low), float(span), float(init)
        self.by_epoch = by_epoch
        self.progress = Progress(owner, begin, end, share=PUBLISHED_SHARE)
        for name in self.no_weight_decay:
            self.register_parameter(name, None)

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Size the convolutions by scores of both networks, once.

        Args:
            student: scores, shape (B, C, H, W) or (M, C).
            teacher: scores, same shape.

        Raises:
            ConfigError: rows know no images to have a temperature each.
            ShapeError: the networks have other widths than before.
        """
        owner = type(self).__name__
        if self.per == 'image' and student.dim() != 4:
            raise ConfigError(
                f"{owner}: `per` must be 'position' for rows (M, C), which belong to no image, got 'image' for "
                f'{tuple(student.shape)}.'
            )
        width = student.shape[1] + teacher.shape[1]
        if self.hidden_weight is not None:
            if self.hidden_weight.shape[1] != width:
                raise ShapeError(
                    f'{owner}: the scores must have {self.hidden_weight.shape[1]} channels together, as when it was '
                    f'sized, got {tuple(student.shape)} and {tuple(teacher.shape)}.'
                )
            return
        layers = nn.Linear(width, self.hidden), nn.Linear(self.hidden, 1)
        nn.init.normal_(layers[1].weight, std=0.1 / math.sqrt(self.hidden))
        nn.init.constant_(layers[1].bias, self.init)
        parameters = (p for layer in layers for p in (layer.weight, layer.bias))
        for name, parameter in zip(self.no_weight_decay, parameters, strict=True):
            setattr(self, name, nn.Parameter(parameter.detach().to(student.device)))

    def set_progress(self, step: int, last: int) -> None:
        """Move to a point of the training.

        Args:
            step: iterations (or epochs) done so far.
            last: of the whole training.
        """
        self.progress.set(step, last)

    @property
    def reversal(self) -> float:
        """Factor of the gradient at this point of the training, from 0 to -1."""
        return -(1.0 - math.cos(math.pi * self.progress.ratio)) / 2.0

    def forward(
        self, student: Tensor, teacher: Tensor, *, dim: int | tuple[int, ...] = 1, valid: Tensor | None = None
    ) -> Softened:
        """Return the scores as they are, and a temperature for each position or image.

        Args:
            student: scores, shape (B, C, H, W) or (M, C).
            teacher: scores, same shape.
            dim: not used.
            valid: positions that count, bool, shape (B, H, W) or (M,). What stands
                elsewhere reaches no temperature of a position that counts, and no
                gradient.

        Returns:
            Temperatures of shape (B, 1, H, W), (B, 1, 1, 1) or (M, 1).
        """
        self.bind(student, teacher)
        counts = valid_pixels(type(self).__name__, student, valid=valid)
        weights = [getattr(self, name) for name in self.no_weight_decay]
        scores = _apply(student.detach(), teacher.detach(), weights, counts, self.per == 'image')
        made = bounded_temperature(scale_gradient(scores, self.reversal), lowest=self.low, span=self.span)
        return Softened(student, teacher, made)

    def _parts(self) -> Iterator[str]:
        """Settings for the print-out."""
        yield f'hidden={self.hidden}, per={self.per!r}, low={self.low:g}, span={self.span:g}'
        yield f'begin={self.progress.begin}, end={self.progress.end}, by_epoch={self.by_epoch}'

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return ', '.join(self._parts())


@full_precision
def _apply(student: Tensor, teacher: Tensor, weights: list[Tensor], counts: Tensor | None, by_image: bool) -> Tensor:
    """The network's output, shape (B, 1, H, W), (B, 1, 1, 1) or (M, 1)."""
    together = torch.cat([student, teacher], dim=1)
    if counts is not None:
        together = torch.where(counts.unsqueeze(1), together, 0)
    weight, bias, out_weight, out_bias = (w.to(together.dtype) for w in weights)
    together = together.clamp(-LARGEST, LARGEST).movedim(1, -1)
    hidden = torch.relu(torch_functional.linear(together, weight, bias))
    if by_image:
        if counts is None:
            hidden = hidden.mean((1, 2), keepdim=True)
        else:
            number = counts.sum((1, 2)).clamp(min=1)[:, None, None, None]
            hidden = torch.where(counts.unsqueeze(-1), hidden, 0).sum((1, 2), keepdim=True) / number
    return torch_functional.linear(hidden, out_weight, out_bias).movedim(-1, 1)
