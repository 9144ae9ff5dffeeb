"""A bound on a loss, held by a multiplier that is learned beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from mmengine import dist
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, check_finite_number, check_positive, shown, suggest
from mmstructkd.functional.soft_target import next_multiplier

__all__ = ['Constraint', 'build_constraints']

KEYS = ('bound', 'rate', 'start')


class Constraint(nn.Module):
    r"""Holds a loss below a bound instead of giving it a weight.

    .. math:: b \, (L - \epsilon), \quad b \leftarrow \max(0, b + \eta (L - \epsilon))

    The dual form of ProKT's released code: while the loss is above the bound its
    multiplier rises, below it falls, and at 0 the loss no longer counts. The
    multiplier is raised in each training pass, after it was used, from a loss that is
    averaged over processes. It never leaves the device, and is a buffer: a resumed
    run goes on with the same one. See
    :func:`~mmstructkd.functional.soft_target.next_multiplier`.

    Args:
        bound: :math:`\epsilon`, in the unit of the loss (nats for a divergence), at
            least 0; 1 in that code.
        rate: :math:`\eta`, above 0.
        start: b in the first pass, at least 0.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> constraint = Constraint(bound=1.0, rate=0.1)
        >>> constraint(torch.tensor(3.0, requires_grad=True)).item(), round(constraint.multiplier.item(), 4)
        (2.0, 1.2)
    """

    multiplier: Tensor

    def __init__(self, bound: float = 1.0, rate: float = 1e-3, start: float = 1.0) -> None:
        super().__init__()
        owner = type(self).__name__
        check_finite_number(owner, 'bound', bound, minimum=0)
        check_positive(owner, 'rate', rate)
        check_finite_number(owner, 'start', start, minimum=0)
        self.bound, self.rate = float(bound), float(rate)
        self.register_buffer('multiplier', torch.tensor(float(start)))

    def forward(self, loss: Tensor) -> Tensor:
        """Return the multiplier times what the loss is above the bound, which may be negative.

        Args:
            loss: a scalar.

        Returns:
            A scalar; its gradient is the multiplier times that of the loss.
        """
        gap = loss - self.bound
        held = self.multiplier.clone() * gap  # the buffer changes before the backward pass
        if self.training and torch.is_grad_enabled():
            mean = gap.detach().clone()
            dist.all_reduce(mean, 'mean')
            self.multiplier.copy_(next_multiplier(self.multiplier, mean, rate=self.rate))
        return held


def build_constraints(constraints: Any, terms: Iterable[str], owner: str) -> nn.ModuleDict:
    """Build the constraints of some terms.

    Args:
        constraints: arguments of a :class:`Constraint` by the name of a term, or ``None``.
        terms: the names there are.
        owner: whose they are, for messages.

    Returns:
        The constraints by name.

    Raises:
        ConfigError: no dict of dicts, an unknown name or key, or a value out of range.
    """
    names = list(terms)
    if constraints is None:
        return nn.ModuleDict()
    if not isinstance(constraints, Mapping) or not all(isinstance(one, Mapping) for one in constraints.values()):
        raise ConfigError(
            f'{owner}: `constraints` must be a dict of dicts by the name of a term, got {shown(constraints)}. '
            'Example: constraints=dict(follow=dict(bound=1.0, rate=1e-3)).'
        )
    built = nn.ModuleDict()
    for name, settings in constraints.items():
        if name not in names:
            raise ConfigError(
                f'{owner}: `constraints` must name terms of its own, got {name!r}. {suggest(str(name), names)}'
            )
        for key in settings:
            if key not in KEYS:
                raise ConfigError(
                    f'{owner}: `constraints[{name!r}]` must have only the keys {KEYS}, got {key!r}. '
                    f'{suggest(str(key), KEYS)}'
                )
        try:
            built[name] = Constraint(**settings)
        except ConfigError as err:
            raise ConfigError(f'{owner}, term {name!r}: {err}') from err
    return built
