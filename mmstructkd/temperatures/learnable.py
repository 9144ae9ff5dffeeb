"""A temperature that learns to make the student's task harder."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmstructkd.errors import check_finite_number, check_positive
from mmstructkd.functional.core.softening import scale_gradient
from mmstructkd.registry import MODELS
from mmstructkd.temperatures.base import Progress, Softened, Temperature, check_temperature_range

__all__ = ['LearnableTemperature']

#: 10 of 240 epochs.
PUBLISHED_SHARE = 10 / 240


@MODELS.register_module()
class LearnableTemperature(Temperature):
    r"""A temperature trained against the student, more and more.

    .. math:: T = T_0 + s \cdot \mathrm{sigmoid}(\theta), \qquad
        \frac{\partial L}{\partial \theta} \leftarrow \lambda \frac{\partial L}{\partial \theta}, \quad
        \lambda = -\frac{1 - \cos \pi r}{2}

    Curriculum Temperature (CTKD, AAAI 2023, arXiv:2211.16231), its global form:
    one number for all positions, behind a gradient reversal whose factor goes
    from 0 to -1 by a cosine over the first part of the training (r from 0 to 1)
    and stays there. The loss's factor T squared is in the graph. The student's
    optimiser trains :math:`\theta`, without weight decay, which would pull T
    towards the middle of its range. (The authors' code decays it.) Needs no
    other setting: the distiller's hook tells the progress, a checkpoint holds
    :math:`\theta`.

    The gradient reaches :math:`\theta` and both networks' scores as they come.

    Args:
        low: :math:`T_0`, the lowest temperature, from 0.001; with ``span`` at most 1000.
        span: s, above 0.
        init: initial :math:`\theta`; 1 gives 15.6.
        begin: first iteration or epoch of the curriculum.
        end: the one after its last, from which on the factor is -1. ``None``: after
            1/24 of the training, the published 10 of 240 epochs.
        by_epoch: count epochs instead of iterations.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> softened = LearnableTemperature()(torch.zeros(1, 2), torch.zeros(1, 2))
        >>> round(softened.temperature.item(), 2)
        15.62
    """

    no_weight_decay = ('theta',)

    def __init__(
        self,
        low: float = 1.0,
        span: float = 20.0,
        init: float = 1.0,
        *,
        begin: int = 0,
        end: int | None = None,
        by_epoch: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_temperature_range(owner, 'low', low)
        check_positive(owner, 'span', span)
        check_temperature_range(owner, 'low + span', low + span)
        check_finite_number(owner, 'init', init)
        self.low, self.span, self.by_epoch = float(low), float(span), by_epoch
        self.progress = Progress(owner, begin, end, share=PUBLISHED_SHARE)
        self.theta = nn.Parameter(torch.tensor(float(init)))

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
        """Return the scores as they are, and the temperature in the graph."""
        theta = scale_gradient(self.theta.to(torch.promote_types(self.theta.dtype, torch.float32)), self.reversal)
        return Softened(student, teacher, self.low + self.span * torch.sigmoid(theta))

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        window = f'begin={self.progress.begin}, end={self.progress.end}, by_epoch={self.by_epoch}'
        return f'low={self.low:g}, span={self.span:g}, {window}'
