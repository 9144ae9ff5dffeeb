"""A frozen teacher that changes its weights on the way: a route of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.teachers.frozen import FrozenTeacher
from mmstructkd.teachers.loading import load_weights

__all__ = ['RouteTeacher']

KEYS = ('checkpoint', 'begin')


@MODELS.register_module()
class RouteTeacher(FrozenTeacher):
    """Checkpoints of one teacher's own training, one after the other.

    Route-constrained optimisation (RCO, arXiv:1904.09149): a student follows a
    teacher more easily from its early, soft states to the converged one than when
    it sees the last alone. All checkpoints are read and checked when the teacher is
    built; which of them shows is a function of the iteration, so that a resumed run
    goes on with the right one.

    Args:
        config: path of a config, ``mmseg::...``, or an inline dict.
        route: ``dict(checkpoint=..., begin=...)`` for each, with ``begin`` the first
            iteration at which it teaches; 0 for the first one, which may leave it
            out.
        **kwargs: options of a :class:`FrozenTeacher`. ``fuse_conv_bn`` (and
            ``cache``) hold for one set of weights and are refused.

    Raises:
        ConfigError: the route is empty, or its steps do not increase from 0.
        CheckpointError: a checkpoint does not give every parameter.
    """

    def __init__(self, config: str | Mapping[str, Any], route: Sequence[Mapping[str, Any]], **kwargs: Any) -> None:
        owner = type(self).__name__
        steps = self._steps(owner, route)
        for name in ('fuse_conv_bn', 'checkpoint', 'allow_random'):
            if kwargs.get(name):
                raise ConfigError(
                    f'{owner}: `{name}` must be left out, got {kwargs[name]!r}. A route has several sets of weights, '
                    'named in `route`.'
                )
        super().__init__(config, steps[0][1], **kwargs)
        trust = bool(kwargs.get('trust_checkpoint', False))
        self.begins = [begin for begin, _ in steps]
        self.checkpoints = [str(path) for _, path in steps]
        self.hashes = [self.hash]
        self._weights = [self._state()]
        for path in self.checkpoints[1:]:
            self.hashes.append(load_weights(self.network, path, owner=owner, trust_checkpoint=trust))
            self._weights.append(self._state())
        self._place = len(steps) - 1
        self._show(0)

    @staticmethod
    def _steps(owner: str, route: Any) -> list[tuple[int, str]]:
        """Read the route."""
        good = isinstance(route, Sequence) and not isinstance(route, str) and len(route) > 0
        if not good or not all(isinstance(step, Mapping) and 'checkpoint' in step for step in route):
            raise ConfigError(
                f'{owner}: `route` must be a list of dicts with a `checkpoint`, got {route!r}. '
                "Write route=[dict(checkpoint='early.pth'), dict(checkpoint='last.pth', begin=20000)]."
            )
        steps = []
        for number, step in enumerate(route):
            for key in step:
                if key not in KEYS:
                    raise ConfigError(f'{owner}: a step of `route` must have only the keys {KEYS}, got {key!r}.')
            begin = step.get('begin', 0)
            if isinstance(begin, bool) or not isinstance(begin, int) or begin < 0 or (begin > 0) != (number > 0):
                raise ConfigError(
                    f'{owner}: `begin` must be 0 for the first step of the route and an iteration above 0 for each '
                    f'other, got {begin!r} for step {number}.'
                )
            steps.append((begin, step['checkpoint']))
        begins = [begin for begin, _ in steps]
        if begins != sorted(set(begins)):
            raise ConfigError(f'{owner}: `begin` must increase along the route, got {begins}.')
        return steps

    def _state(self) -> dict[str, Tensor]:
        """A copy of the weights that the network has now, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}

    def _show(self, place: int) -> None:
        """Take the weights of a step of the route."""
        if place == self._place:
            return
        self.network.load_state_dict(self._weights[place], strict=True)
        self._execution = self._execution.renewed()  # what was cast or compiled holds the old ones
        self._place = place
        print_log(f'{type(self).__name__}: {self.checkpoints[place]!r} teaches from here.', 'current')

    def __deepcopy__(self, memo: dict) -> RouteTeacher:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, RouteTeacher)
        twin.begins, twin.hashes = list(self.begins), list(self.hashes)
        return twin

    def set_progress(self, step: int, last: int) -> None:
        """Take the weights of this iteration.

        Args:
            step: iterations done so far.
            last: iterations of the training.
        """
        super().set_progress(step, last)
        unreached = [begin for begin in self.begins if begin >= last]
        if unreached:
            raise ConfigError(
                f'{type(self).__name__}: `begin` must lie before the end of the training at iteration {last}, got '
                f'{unreached[0]}. Shorten the route.'
            )
        self._show(max(place for place, begin in enumerate(self.begins) if begin <= step))

    def repeatable(self) -> str:
        """No: what it shows depends on the step as well."""
        return (
            'A route has several sets of weights, named in `route`, so that an image shows something else from step '
            'to step: cache a FrozenTeacher.'
        )

    def provenance(self) -> dict[str, Any]:
        """Config, and each step of the route with the SHA-256 of its file."""
        steps = zip(self.begins, self.checkpoints, self.hashes, strict=True)
        return {
            'type': type(self).__name__,
            'config': self.config,
            'route': [{'begin': begin, 'checkpoint': path, 'sha256': digest} for begin, path, digest in steps],
        }
