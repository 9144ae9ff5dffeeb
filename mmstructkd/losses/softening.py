"""The temperature of a loss: a number, or a module in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.losses.base import DistillLoss
from mmstructkd.structures import Targets
from mmstructkd.temperatures import Softened, Temperature, build_temperature

__all__ = ['SoftenedLoss']


class SoftenedLoss(DistillLoss):
    """A loss that divides scores by a temperature.

    A subclass calls :meth:`soften` on what it is given and hands on all three
    results; the functional core divides, and multiplies by the square.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: a number from 0.001 to 1000, or the config of a registered temperature
            (``ScheduledTemperature``, ``LearnableTemperature``, ...).

    Attributes:
        softened_axes: axes of the distribution that the loss makes of its inputs:
            1, classes at each position; (2, 3), positions of each channel.
            ``None``: there are none, as where a temperature applies to similarities
            of features; then a temperature that changes scores is refused.
        own_temperatures: whose own temperatures have a meaning to it, of
            ``'position'`` and ``'image'``.

    Raises:
        ConfigError: an argument is out of range.
    """

    softened_axes: int | tuple[int, ...] | None = 1
    own_temperatures: tuple[str, ...] = ()

    def __init__(self, loss_weight: float, temperature: Any) -> None:
        super().__init__(loss_weight=loss_weight)
        owner = type(self).__name__
        self.temperature: float | Temperature = build_temperature(owner, temperature)
        if self.softened_axes is None and isinstance(self.temperature, Temperature) and self.temperature.reshapes:
            raise ConfigError(
                f'{owner}: `temperature` must be one that leaves the scores as they are, got '
                f'{type(self.temperature).__name__}. Its inputs are not the scores of one distribution along an axis.'
            )

        per = getattr(self.temperature, 'per', 'all')
        if per != 'all' and per not in self.own_temperatures:
            raise ConfigError(
                f'{owner}: `temperature` must be one for {"all positions of an image" if per == "position" else "all"}'
                f', got {type(self.temperature).__name__} with per={per!r}. {self._why_not(per)}'
            )

    def _why_not(self, per: str) -> str:
        """Why a temperature of each position's or image's own means nothing to this loss."""
        if 'image' in self.own_temperatures:
            return "Its distributions run over positions, which must share one: set per='image'."
        if isinstance(self.softened_axes, tuple):
            return 'Its distributions run over positions and are compared as a whole: take LearnableTemperature.'
        if self.softened_axes is None:
            return 'Its inputs are not scores of classes at a position: take LearnableTemperature.'
        return f'It is no mean over positions or images that T squared of each {per} could stand in: take a number.'

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Size what the temperature learns by what it will be asked about.

        Args:
            student: a probed tensor of the student.
            teacher: the probed tensor of the teacher.
        """
        if isinstance(self.temperature, Temperature) and self.temperature.per != 'all':
            if student.dim() in (2, 4) and self.softened_axes is not None:
                student, teacher = as_two_classes(student, teacher, alone=self.over_classes)
            self.temperature.bind(student, teacher)

    def soften(self, student: Tensor, teacher: Tensor, targets: Targets | None = None) -> Softened:
        """Ask the temperature.

        Args:
            student: the student's scores.
            teacher: the teacher's.
            targets: what the batch knows besides; what does not count there is
                left out of a temperature's statistics.

        Returns:
            Student, teacher and the temperature, for the functional core. Scores
            of binary heads come as two classes, see
            :func:`~mmstructkd.functional.core.binary.as_two_classes`.

        Raises:
            ShapeError: the temperature divides by the spread of the scores, and
                there are only two.
        """
        if self.softened_axes is not None:
            student, teacher = as_two_classes(student, teacher, alone=self.over_classes)
        if not isinstance(self.temperature, Temperature):
            return Softened(student, teacher, self.temperature)
        if self.temperature.reshapes and self.softened_axes == 1 and student.dim() > 1 and student.shape[1] < 3:
            raise ShapeError(
                f'{type(self).__name__}: `temperature` must be one that leaves the scores of two classes as they are, '
                f'got {type(self.temperature).__name__} for {tuple(student.shape)}. Divided by their own spread, two '
                'scores keep nothing but their sign, and have no gradient: set a number.'
            )
        valid = None
        if (self.temperature.reshapes or self.temperature.per != 'all') and targets is not None:
            valid = self.counting(student, targets)
        softened: Softened = self.temperature(student, teacher, dim=self.softened_axes or 1, valid=valid)
        return softened

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        shown = f'{self.temperature:g}' if isinstance(self.temperature, float) else type(self.temperature).__name__
        return f'{super().extra_repr()}, temperature={shown}'
