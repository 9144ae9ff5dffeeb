"""A number."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.registry import MODELS
from mmstructkd.temperatures.base import Softened, Temperature, check_temperature_range

__all__ = ['ConstantTemperature']


@MODELS.register_module()
class ConstantTemperature(Temperature):
    """The same temperature throughout, as if the loss were given the number.

    Args:
        value: from 0.001 to 1000.

    Raises:
        ConfigError: ``value`` is out of range.

    Example:
        >>> import torch
        >>> ConstantTemperature(4)(torch.zeros(1, 2), torch.zeros(1, 2)).temperature
        4.0
    """

    def __init__(self, value: float = 1.0) -> None:
        super().__init__()
        check_temperature_range(type(self).__name__, 'value', value)
        self.value = float(value)

    def forward(
        self, student: Tensor, teacher: Tensor, *, dim: int | tuple[int, ...] = 1, valid: Tensor | None = None
    ) -> Softened:
        """Return the scores as they are, and the number."""
        return Softened(student, teacher, self.value)

    def extra_repr(self) -> str:
        """Show the number in the model's print-out."""
        return f'value={self.value:g}'
