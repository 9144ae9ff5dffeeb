"""A temperature that follows the training."""

from __future__ import annotations

import math

from torch import Tensor

from mmstructkd.errors import check_one_of
from mmstructkd.registry import MODELS
from mmstructkd.temperatures.base import Progress, Softened, Temperature, check_temperature_range

__all__ = ['ScheduledTemperature']

SHAPES = ('linear', 'cosine', 'exponential')


@MODELS.register_module()
class ScheduledTemperature(Temperature):
    r"""From one temperature to another over a window of the training.

    With progress :math:`r \in [0, 1]` through the window: ``linear`` in r,
    ``cosine`` in :math:`(1 - \cos \pi r) / 2`, ``exponential`` in equal ratios. The
    temperature is held before and after. It is a function of the iteration alone,
    which the distiller's hook tells, so a resumed run goes on with the right one.

    Args:
        start: temperature at ``begin``, from 0.001 to 1000.
        final: temperature at ``end``, from 0.001 to 1000.
        shape: ``'linear'``, ``'cosine'`` or ``'exponential'``.
        begin: first iteration or epoch of the window.
        end: the one after its last; ``None``: the end of training.
        by_epoch: count epochs instead of iterations.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> import torch
        >>> temperature = ScheduledTemperature(start=4, final=1)
        >>> temperature.set_progress(50, 100)
        >>> temperature(torch.zeros(1, 2), torch.zeros(1, 2)).temperature
        2.5
    """

    def __init__(
        self,
        start: float = 4.0,
        final: float = 1.0,
        *,
        shape: str = 'linear',
        begin: int = 0,
        end: int | None = None,
        by_epoch: bool = False,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_temperature_range(owner, 'start', start)
        check_temperature_range(owner, 'final', final)
        check_one_of(owner, 'shape', shape, SHAPES)
        self.start, self.final, self.shape, self.by_epoch = float(start), float(final), shape, by_epoch
        self.progress = Progress(owner, begin, end)

    def set_progress(self, step: int, last: int) -> None:
        """Move to a point of the training.

        Args:
            step: iterations (or epochs) done so far.
            last: of the whole training.
        """
        self.progress.set(step, last)

    @property
    def value(self) -> float:
        """The temperature at this point of the training."""
        ratio = self.progress.ratio
        if self.shape == 'exponential':
            return self.start * (self.final / self.start) ** ratio
        if self.shape == 'cosine':
            ratio = (1.0 - math.cos(math.pi * ratio)) / 2.0
        return self.start + (self.final - self.start) * ratio

    def forward(
        self, student: Tensor, teacher: Tensor, *, dim: int | tuple[int, ...] = 1, valid: Tensor | None = None
    ) -> Softened:
        """Return the scores as they are, and the temperature of this iteration."""
        return Softened(student, teacher, self.value)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        window = f'begin={self.progress.begin}, end={self.progress.end}, by_epoch={self.by_epoch}'
        return f'start={self.start:g}, final={self.final:g}, shape={self.shape!r}, {window}'
