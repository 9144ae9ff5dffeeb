"""The student itself, or its moving average, on another view of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, TapError, check_finite_number
from mmstructkd.randomness import own_stream
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Regions, Tap, find_route, in_features, in_region_head, tapped_forward
from mmstructkd.tasks.resizing import check_scale, scale_batch
from mmstructkd.teachers.base import Records, TeacherSource

__all__ = ['ViewTeacher']


@MODELS.register_module()
class ViewTeacher(TeacherSource):
    """What the student, or an average of it over time, makes of the batch seen otherwise.

    Without ``momentum`` it is siamese self-distillation (SKD-SRL,
    arXiv:2209.01311): the student on a mirrored or rescaled view, without graph and
    in eval. With ``momentum`` it is a mean teacher (arXiv:1703.01780): a copy that
    follows the student by an exponential moving average of all weights and
    buffers. Maps are mirrored back, so that positions correspond. In supervised
    training alone expect little; a mean teacher pays on unlabelled images
    (``on='unlabelled'``).

    The average is kept beside the student: saved for resume, in no
    ``state_dict()`` and no exported file. It starts as a copy of the student's
    initial weights.

    Args:
        flip: mirror the images left to right.
        scale: resize the images by this factor. The depth that a network reads from
            a rescaled image is another one, so a depth estimator must keep 1.
        momentum: part of the average that stays at each step, in (0, 1); early on
            ``(1 + n) / (10 + n)`` after n steps where that is less. ``None``: the
            student itself.

    Raises:
        ConfigError: an argument is out of range, or the view is the same as the
            student's own without an average.
        TapError: a tap lies in a RoI head, whose boxes do not turn with the image.
    """

    def __init__(self, flip: bool = False, scale: float = 1.0, momentum: float | None = None) -> None:
        owner = type(self).__name__
        if not isinstance(flip, bool):
            raise ConfigError(f'{owner}: `flip` must be True or False, got {flip!r}.')
        scale = check_scale(owner, 'scale', scale)
        if momentum is not None:
            check_finite_number(owner, 'momentum', momentum, minimum=0)
            if not 0 < momentum < 1:
                raise ConfigError(f'{owner}: `momentum` must lie between 0 and 1, got {momentum!r}.')
        if momentum is None and not flip and scale == 1.0:
            raise ConfigError(
                f'{owner}: the view must differ from the student, got flip=False, scale=1.0 and no `momentum`. '
                'Set flip=True, or momentum=0.999 for a mean teacher.'
            )
        self.flip, self.scale, self.momentum = flip, scale, momentum
        self._student: list[nn.Module] = []  # in a list: not owned
        self._calls: dict[Tap, int] = {}
        self._clone: set[Tap] = set()
        self._route = 'tensor'
        self._step = 0
        self._ready = False

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Take the student, or a copy of it.

        Args:
            student: the student.
            config: not used.
        """
        from_depth = any(base.__name__ == 'DepthEstimator' for base in type(student).__mro__)
        if from_depth and self.scale != 1.0:
            raise ConfigError(
                f'{type(self).__name__}: `scale` must be 1 for a depth estimator, got {self.scale:g}. Objects of '
                'another size are read as nearer or farther.'
            )
        self._student = [student]
        if self.momentum is not None:
            average = copy.deepcopy(student).requires_grad_(False)
            average.eval()
            self.trained = average
        self.network = self._shown()

    def _shown(self) -> nn.Module:
        """The network that shows."""
        return self._student[0] if self.trained is None else self.trained

    def __deepcopy__(self, memo: dict) -> ViewTeacher:
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._student = [copy.deepcopy(student, memo) for student in self._student]
        twin.trained = copy.deepcopy(self.trained, memo)
        twin.network = twin._shown()
        return twin

    def _look(
        self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: tuple[Tap, ...], calls: Mapping[Tap, int] | None
    ) -> Capture:
        """Run it on the view, in eval and without graph."""
        network = self._shown()
        view = inputs
        if self.scale != 1.0:
            view, data_samples = scale_batch(inputs, data_samples, self.scale)
        if self.flip:
            view = view.flip(-1)
        modes = [(module, module.training) for module in network.modules() if module.training]
        for module, _ in modes:
            module.training = False
        try:
            with torch.no_grad(), own_stream(inputs.device, self._step):
                if calls is None:
                    routes = ['features'] if all(map(in_features, taps)) else ['tensor', 'predict']
                    capture, self._route = find_route(network, view, data_samples, taps, routes)
                else:
                    capture = tapped_forward(
                        network, view, data_samples, taps, calls=calls, clone=self._clone, route=self._route
                    )
        finally:
            for module, mode in modes:
                module.training = mode
        return capture

    def _back(self, records: Records) -> dict[Tap, list[Tensor]]:
        """Bring what was seen back to the student's grid."""
        if not self.flip:
            return dict(records)
        for tap, tensors in records.items():
            for tensor in tensors:
                if tensor.dim() != 4:
                    raise TapError(
                        f'{type(self).__name__}: with flip=True each tap must give maps (B, C, H, W), got '
                        f'{tuple(tensor.shape)} at {str(tap)!r}. Tap a map.'
                    )
        return {tap: [tensor.flip(-1) for tensor in tensors] for tap, tensors in records.items()}

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> Capture:
        """Look once; remember how often each tap is passed."""
        taps = tuple(taps)
        for tap in taps:
            tap.resolve(self._shown(), f'{type(self).__name__}: a tap of the teacher')
            if in_region_head(tap):
                raise TapError(
                    f'{type(self).__name__}: taps must lie before the RoI head, got {str(tap)!r}. Its boxes are those '
                    'of the other view: tap the neck.'
                )
        capture = self._look(inputs, data_samples, taps, None)
        self._clone, self._calls = capture.changed_in_place(), capture.passes
        capture.records = self._back(capture.records)
        return capture

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
        """Look at the batch."""
        taps = tuple(dict.fromkeys(taps))
        return self._back(self._look(inputs, data_samples, taps, self._calls).records)

    def has_learned(self, tap: Tap) -> bool:
        """It learns in this training."""
        return False

    def repeatable(self) -> str:
        """No: it is the student, or follows it."""
        return 'It follows the student, so that an image shows something else at each step: nothing can be kept of it.'

    def set_progress(self, step: int, last: int) -> None:
        """Before the first step the average takes the initial weights.

        Args:
            step: iterations done so far.
            last: iterations of the training.
        """
        self._step = step
        if step == 0 and not self._ready and self.trained is not None:
            self.trained.load_state_dict(self._student[0].state_dict())
        self._ready = True

    def after_step(self, student: nn.Module) -> None:
        """Move the average.

        Args:
            student: the student, updated.
        """
        if self.trained is None or self.momentum is None:
            return
        stays = min(self.momentum, (1 + self._step) / (10 + self._step))
        with torch.no_grad():
            for kept, new in zip(self._tensors(self.trained), self._tensors(student), strict=True):
                if kept.dtype.is_floating_point:
                    kept.lerp_(new.detach().to(kept.dtype), 1 - stays)
                else:
                    kept.copy_(new)

    @staticmethod
    def _tensors(network: nn.Module) -> list[Tensor]:
        """Weights and buffers."""
        return [*network.parameters(), *network.buffers()]

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Nothing: the distiller owns the student and the average.

        Args:
            function: as for ``nn.Module._apply``.
        """

    def provenance(self) -> dict[str, Any]:
        """What the view is."""
        return {'type': type(self).__name__, 'flip': self.flip, 'scale': self.scale, 'momentum': self.momentum}
