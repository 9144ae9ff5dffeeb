"""What the student made of plain images, blended as their images are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, TapError, shown
from mmstructkd.functional.blending import blend as blend_tensors
from mmstructkd.registry import MODELS
from mmstructkd.structures import Blend, Targets
from mmstructkd.taps import Regions, Tap, in_point_head
from mmstructkd.teachers.base import ProbedTensors, Records, TeacherSource

__all__ = ['BlendTeacher']


@MODELS.register_module()
class BlendTeacher(TeacherSource):
    r"""The student's own tensors of two images, blended with the weight of the images.

    .. math:: \gamma f(x_a) + (1 - \gamma) f(x_b)

    is the target for what the student makes of the blend
    :math:`\gamma x_a + (1 - \gamma) x_b` (MixSKD, arXiv:2208.05768): a network is to be
    linear between images. Scores are blended before the softmax, as published. The
    labelled images run with their task as ever, and their tensors are kept for the
    stream, so this teacher costs no pass of its own.

    The targets are detached: the student's answer to the blend moves towards the blend
    of its answers and not the other way. The published form is mutual in all stages but
    the last.

    Args:
        stream: name of the :class:`~mmstructkd.streams.MixedStream` whose images are
            compared; each term that taps this teacher has ``on=`` that stream.

    Raises:
        ConfigError: ``stream`` is no name, or names another kind of stream.
        TapError: a tap lies in a head that scores points of its own choice, or gives
            other than a tensor of numbers for each image.
    """

    follows = True

    def __init__(self, stream: str) -> None:
        if not isinstance(stream, str) or not stream.isidentifier():
            raise ConfigError(
                f"{type(self).__name__}: `stream` must be the name of a stream, got {shown(stream)}. Example: 'mixed'."
            )
        self.stream = stream
        self._student: list[nn.Module] = []  # in a list: not owned

    @property
    def network(self) -> nn.Module | None:  # type: ignore[override]
        """The student."""
        return self._student[0] if self._student else None

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Take the student: it is what the taps name.

        Args:
            student: the student.
            config: not used.
        """
        self._student = [student]

    def listen(self, taps: Iterable[Tap]) -> None:
        """Ask for the student's tensors at the same taps.

        Args:
            taps: every tap that terms have of it.

        Raises:
            TapError: a tap lies in a head that scores points of its own choice.
        """
        self.reads = tuple(dict.fromkeys(taps))
        for tap in self.reads:
            if in_point_head(self._student[0], tap):
                raise TapError(
                    f'{type(self).__name__}: taps must show the same places of both images, got {str(tap)!r}, whose '
                    'head draws other points for each. Tap the head before it.'
                )

    def probe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records | None = None,
        targets: Targets | None = None,
        regions: Regions | None = None,
    ) -> ProbedTensors:
        """Show the student's tensors of one image, and check that they can be blended."""
        records = self._own(taps, student)
        for tap, tensors in records.items():
            for tensor in tensors:
                self._check(tap, tensor, len(inputs))
        return ProbedTensors(records, {tap: len(tensors) for tap, tensors in records.items()})

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
        """Show the student's own tensors: of images that are not blended, nothing else is known.

        No term asks for them in training; whoever tries a labelled batch does.
        """
        return self._own(taps, student)

    def observe_stream(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        student: Records,
        plain: Records,
        blend: Blend | None = None,
    ) -> dict[Tap, list[Tensor]]:
        """Blend what the student made of the labelled images.

        Raises:
            TapError: the student gives another number of tensors there than one an image.
        """
        assert blend is not None  # checked with the stream
        found = self._own(taps, plain)
        for tap, tensors in found.items():
            for tensor in tensors:
                self._check(tap, tensor, len(blend.partners))
        return {
            tap: [blend_tensors(tensor, index=blend.partners, share=blend.share) for tensor in tensors]
            for tap, tensors in found.items()
        }

    @staticmethod
    def _own(taps: Iterable[Tap], records: Records | None) -> dict[Tap, list[Tensor]]:
        """The student's tensors without their graph."""
        return {tap: [tensor.detach() for tensor in (records or {})[tap]] for tap in dict.fromkeys(taps)}

    def _check(self, tap: Tap, tensor: Tensor, images: int) -> None:
        """Refuse what cannot be blended image by image."""
        if not torch.is_floating_point(tensor) or tensor.dim() < 2 or len(tensor) != images:
            raise TapError(
                f'{type(self).__name__}: each tap must give numbers with one row an image ({images} here), got '
                f'{tuple(tensor.shape)}, {tensor.dtype}, at {str(tap)!r}. Tap a map of features or scores.'
            )

    def has_learned(self, tap: Tap) -> bool:
        """It learns in this training."""
        return False

    def repeatable(self) -> str:
        """No: it is the student."""
        return 'It is the student, so that an image shows something else at each step: nothing can be kept of it.'

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Nothing: the distiller owns the student.

        Args:
            function: as for ``nn.Module._apply``.
        """

    def provenance(self) -> dict[str, Any]:
        """Which blends it shows."""
        return {'type': type(self).__name__, 'stream': self.stream}
