"""Running averages of a network's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_finite_number

__all__ = ['average_momentum', 'average_update']


def average_momentum(step: int, *, momentum: float = 0.999, ramp: bool = True) -> float:
    r"""Momentum of a running average at a step of the training.

    .. math:: m_k = \min\!\big(m, 1 - \tfrac{1}{k + 1}\big)

    Mean teacher (arXiv:1703.01780): at first the plain mean of all weights so far,
    so that the random start is forgotten at once; a function of the step alone.

    Args:
        step: k, updates done before, at least 0; the first copies the network.
        momentum: m, in [0, 1).
        ramp: without it the momentum from the first step on.

    Returns:
        The momentum, in [0, 1).

    Raises:
        ConfigError: ``step`` is negative or ``momentum`` out of range.

    Example:
        >>> [average_momentum(k, momentum=0.9) for k in (0, 1, 3, 100)]
        [0.0, 0.5, 0.75, 0.9]
    """
    owner = 'average_momentum'
    check_finite_number(owner, 'step', step, minimum=0)
    check_finite_number(owner, 'momentum', momentum, minimum=0)
    if momentum >= 1:
        raise ConfigError(f'{owner}: `momentum` must lie in [0, 1), got {momentum!r}. At 1 nothing is ever learned.')
    return min(momentum, 1 - 1 / (step + 1)) if ramp else momentum


@torch.no_grad()
def average_update(average: Tensor, current: Tensor, *, momentum: float) -> Tensor:
    r"""One step of a running average.

    .. math:: a \leftarrow a + (1 - m) (w - a)

    What is not floating point (the counter of a BatchNorm) is taken over as it is.

    Args:
        average: a, any shape. Keep it in float32: in half precision a step of
            1 - m = 0.001 is mostly rounded away.
        current: w, same shape, any dtype.
        momentum: m, in [0, 1].

    Returns:
        The new average, in the dtype of the old one; computed in at least float32,
        without a graph. At m = 0 that is w exactly, at m = 1 a.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: ``momentum`` is not in [0, 1].

    Example:
        >>> average_update(torch.tensor(1.0), torch.tensor(3.0), momentum=0.75)
        tensor(1.5000)
        >>> average_update(torch.tensor(4), torch.tensor(7), momentum=0.75)
        tensor(7)
    """
    owner = 'average_update'
    check_finite_number(owner, 'momentum', momentum, minimum=0)
    if momentum > 1:
        raise ConfigError(f'{owner}: `momentum` must lie in [0, 1], got {momentum!r}.')
    if average.shape != current.shape:
        raise ShapeError(
            f'{owner}: `average` and `current` must share one shape, '
            f'got {tuple(average.shape)} and {tuple(current.shape)}.'
        )
    current = current.to(average.device)
    if not average.is_floating_point():
        return current.to(average.dtype, copy=True)
    wide = torch.promote_types(torch.promote_types(average.dtype, current.dtype), torch.float32)
    return torch.lerp(average.to(wide), current.to(wide), 1 - momentum).to(average.dtype)
