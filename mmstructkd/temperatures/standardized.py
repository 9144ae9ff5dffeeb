"""A temperature of each position's own: the spread of its scores."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.functional.core.softening import standardize_logits
from mmstructkd.registry import MODELS
from mmstructkd.temperatures.base import Softened, Temperature, check_temperature_range

__all__ = ['StandardizedTemperature']


@MODELS.register_module()
class StandardizedTemperature(Temperature):
    """Divides each distribution's scores by their own spread, then by one number.

    Logit standardisation (Logit Standardization in Knowledge Distillation,
    CVPR 2024, arXiv:2403.01427), for student and teacher apart, at each position:
    the student follows the relations of the teacher's scores and not their scale.
    See :func:`~mmstructkd.functional.core.softening.standardize_logits`. The published
    weights are large (9 at temperature 2), since the gradient shrinks with the
    spread.

    Args:
        value: temperature of the standardised scores, from 0.001 to 1000.

    Raises:
        ConfigError: ``value`` is out of range.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 2.0, 4.0]])
        >>> softened = StandardizedTemperature()(z, 10 * z)
        >>> softened.teacher.tolist(), softened.temperature
        ([[-1.0, 0.0, 1.0]], 2.0)
    """

    reshapes = True

    def __init__(self, value: float = 2.0) -> None:
        super().__init__()
        check_temperature_range(type(self).__name__, 'value', value)
        self.value = float(value)

    def forward(
        self, student: Tensor, teacher: Tensor, *, dim: int | tuple[int, ...] = 1, valid: Tensor | None = None
    ) -> Softened:
        """Return standardised scores, and the number."""
        return Softened(
            standardize_logits(student, dim=dim, valid=valid),
            standardize_logits(teacher.detach(), dim=dim, valid=valid),
            self.value,
        )

    def extra_repr(self) -> str:
        """Show the number in the model's print-out."""
        return f'value={self.value:g}'
