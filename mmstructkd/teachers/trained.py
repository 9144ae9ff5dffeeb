"""What teachers that train beside the student have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.errors import TapError, check_finite_number
from mmstructkd.randomness import own_stream
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Regions, Tap, find_route, in_features, in_region_head, tapped_forward
from mmstructkd.teachers.base import LEARNS, Records, TeacherSource
from mmstructkd.terms import WeightSchedule

__all__ = ['TrainedTeacher', 'scale_losses']

_CHANGES = 'It learns in this training, so that an image shows something else at each step: nothing can be kept of it.'


def scale_losses(losses: Mapping[str, Any], factor: float, prefix: str = '') -> dict[str, Any]:
    """Multiply losses, and put a prefix before all log keys.

    A loss is multiplied and never dropped, so that what it depends on keeps a
    gradient (of 0).

    Args:
        losses: what a network's ``mode='loss'`` returns: tensors, or lists of
            tensors, of which those whose key contains ``loss`` are summed.
        factor: of those.
        prefix: of all keys.

    Returns:
        The same, scaled.

    Example:
        >>> scale_losses({'loss_ce': torch.tensor(2.0), 'acc': torch.tensor(0.5)}, 0.5, 'teacher_')
        {'teacher_loss_ce': tensor(1.), 'teacher_acc': tensor(0.5000)}
    """
    scaled: dict[str, Any] = {}
    for name, value in losses.items():
        if 'loss' in name and factor != 1.0:
            value = [one * factor for one in value] if isinstance(value, (list, tuple)) else value * factor
        scaled[prefix + name] = value
    return scaled


class TrainedTeacher(TeacherSource):
    """A network in training mode beside the student, with its own task loss.

    It runs in ``mode='loss'`` at each step: one forward pass gives its tensors
    (with graph) and its objective. Random numbers come from a stream of its own,
    the same for the same step, so that the student draws what it draws alone.

    Args:
        task_weight: factor of its task losses, at least 0.
        task_schedule: config of a :class:`WeightSchedule` for that factor.
    """

    def __init__(self, task_weight: float = 1.0, task_schedule: Mapping[str, Any] | None = None) -> None:
        owner = type(self).__name__
        check_finite_number(owner, 'task_weight', task_weight, minimum=0)
        self.task_weight = float(task_weight)
        self.schedule = WeightSchedule.from_config(task_schedule, f'{owner}: `task_schedule`')
        self._factor = self.schedule.factor(0, 1)
        self._step = 0
        self._clone: set[Tap] = set()
        self._route = 'tensor'
        self._losses: dict[str, Any] = {}
        self._records: dict[Tap, list[Tensor]] = {}

    def __deepcopy__(self, memo: dict) -> TrainedTeacher:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._losses, twin._records = {}, {}
        if self.trained is not None:
            twin.trained = copy.deepcopy(self.trained, memo)
            twin._adopt(twin.trained)
        return twin

    @abstractmethod
    def _adopt(self, trained: nn.Module) -> None:
        """Point to the parts of a copy of :attr:`trained`."""

    def _check_taps(self, taps: Iterable[Tap]) -> None:
        """Refuse taps that would see regions of its own choice; resolve the others."""
        owner = type(self).__name__
        assert self.network is not None
        for tap in taps:
            tap.resolve(self.network, f'{owner}: a tap of the teacher')
            if in_region_head(tap):
                raise TapError(
                    f'{owner}: taps of a teacher that trains must lie before its RoI head, got {str(tap)!r}. It pools '
                    'proposals of its own, which are not those of the student: tap the neck or the RPN head.'
                )

    def _try(self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Sequence[Tap]) -> Capture:
        """Run it once in eval, by the first route that passes the taps."""
        assert self.network is not None
        routes = ['features', 'loss'] if all(map(in_features, taps)) else ['tensor', 'predict', 'loss']
        self.network.eval()
        try:
            with torch.no_grad(), own_stream(inputs.device):
                capture, self._route = find_route(self.network, inputs, data_samples, taps, routes)
        finally:
            self.network.train()
        self._clone = capture.changed_in_place()
        return capture

    def has_learned(self, tap: Tap) -> bool:
        """It learns in this training."""
        return False

    def repeatable(self) -> str:
        """No: its weights are others at each step."""
        return _CHANGES

    def cannot_rest(self) -> str:
        """Why not: it has to learn."""
        return LEARNS

    def set_progress(self, step: int, last: int) -> None:
        """Follow the schedule of the task's weight.

        Args:
            step: iterations done so far.
            last: iterations of the training.
        """
        self._step = step
        self._factor = self.schedule.factor(step, last)

    def _run(
        self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Sequence[Tap], labelled: bool
    ) -> dict[Tap, list[Tensor]]:
        """One forward pass for tensors and, with labels, for losses."""
        assert self.network is not None
        if not labelled:
            with own_stream(inputs.device, self._step), torch.no_grad():
                return tapped_forward(
                    self.network, inputs, data_samples, taps, clone=self._clone, route=self._route
                ).records
        # Some detectors change the samples they are given, and the student needs them as well.
        samples = copy.deepcopy(data_samples)
        with own_stream(inputs.device, self._step), Capture(self.network, taps, clone=self._clone) as capture:
            self._losses = self.network(inputs, samples, mode='loss')
        self._records = capture.records
        return capture.records

    def objectives(self, student: Records, targets: Targets) -> dict[str, Any]:
        """Its task losses, weighted.

        Args:
            student: the student's tensors at :attr:`reads`.
            targets: what the batch knows.

        Returns:
            The losses by log key, with the prefix ``teacher_``.
        """
        losses, self._losses = self._losses, {}
        return scale_losses(losses, self.task_weight * self._factor, 'teacher_')

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Nothing: the distiller owns what it trains.

        Args:
            function: as for ``nn.Module._apply``.
        """

    def observe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        regions: Regions | None = None,
        labelled: bool = True,
    ) -> dict[Tap, list[Tensor]]:
        """Run the network in training mode; see :class:`TeacherSource`."""
        return self._run(inputs, data_samples, tuple(dict.fromkeys(taps)), labelled)
