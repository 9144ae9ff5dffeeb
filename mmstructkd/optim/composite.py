"""One optimiser made of several: student and critic under one optim wrapper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from mmstructkd.errors import CheckpointError

__all__ = ['CompositeOptimizer']


class CompositeOptimizer(Optimizer):
    """Several optimisers that step together and look like one.

    ``param_groups`` is the concatenation of the parts' own groups (the same
    dict objects), so learning-rate schedules, gradient clipping and the
    gradient scaler of AMP see every parameter; each part keeps its own update
    rule and state.

    Args:
        parts: the optimisers. No parameter may be in two of them.
    """

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts: list[Optimizer] = []
        super().__init__([p for part in parts for g in part.param_groups for p in g['params']], defaults={})
        self.parts = list(parts)
        self._link()

    def _link(self) -> None:
        """Make the groups of the parts the groups of the whole."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.defaults = self.parts[0].defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the first part, which is the student's.

        Args:
            param_group: as for any optimiser.
        """
        if not self.parts:
            super().add_param_group(param_group)  # torch's own constructor calls this
            return
        self.parts[0].add_param_group(param_group)
        self._link()

    @property
    def state(self) -> dict[torch.Tensor, Any]:
        """State of each parameter, whichever part it belongs to. Read only."""
        return {param: state for part in self.parts for param, state in part.state.items()}

    @state.setter
    def state(self, value: dict) -> None:
        if value:
            raise AttributeError('CompositeOptimizer: `state` must be set on the parts, got a state of its own.')

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step the first part, and each other one that has a gradient.

        Args:
            closure: not supported.

        Raises:
            ValueError: a closure is given; each part would run it anew.
        """
        if closure is not None:
            raise ValueError('CompositeOptimizer.step: `closure` must be None, got a function. Step without it.')
        for number, part in enumerate(self.parts):
            # a part at rest: some optimisers count steps, or decay, whether there are gradients or not
            if number == 0 or any(p.grad is not None for group in part.param_groups for p in group['params']):
                part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of every part."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each part, in order."""
        return {'parts': [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of each part.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            CheckpointError: it comes from another optimiser, or from another
                number of parts.
        """
        states = state_dict.get('parts')
        if states is None or len(states) != len(self.parts):
            got = 'a plain optimiser' if states is None else f'{len(states)} parts'
            raise CheckpointError(
                f'CompositeOptimizer: `state_dict` must hold {len(self.parts)} parts, got {got}. '
                'Resume with the terms the checkpoint was trained with, or start anew with load_from=.'
            )
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._link()
