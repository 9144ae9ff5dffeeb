"""Where the teacher's tapped tensors come from: the interface, and the frozen network."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.distillers.loading import build_network, load_weights
from mmstructkd.distillers.normalization import InputConversion
from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.taps import Capture, Regions, Tap, probe_regions, tapped_forward

__all__ = ['FrozenTeacher', 'TeacherSource']


class TeacherSource(ABC):
    """Gives the teacher's tensor at each tap for a batch.

    Terms know nothing else about a teacher. A source is no ``nn.Module``, so a
    distiller that holds one does not own what is inside: it is in no
    ``parameters()``, ``state_dict()``, EMA copy or DDP bucket.
    """

    @abstractmethod
    def attach(self, student: nn.Module) -> None:
        """Learn about the student, once, before anything else is asked."""

    @abstractmethod
    def probe(self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Iterable[Tap]) -> Capture:
        """Run one full forward on a small input and plan later ones by it."""

    @abstractmethod
    def observe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        regions: Regions | None = None,
    ) -> dict[Tap, list[Tensor]]:
        """Return the detached tensors at ``taps`` for a batch of the student.

        ``regions`` are those that the student's RoI head pooled, where a tap
        lies in the teacher's.
        """

    @abstractmethod
    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply what the distiller's ``.to()`` applies to its own tensors."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Say in plain values what this teacher is; saved with checkpoints."""


@MODELS.register_module()
class FrozenTeacher(TeacherSource):
    """A trained network, frozen: always in eval, no gradient, its own normalisation.

    Its forward ends at the deepest tap asked for. Copies made by
    ``copy.deepcopy`` share the network until one of them is moved.

    Args:
        config: path of a config, ``mmseg::...``, or an inline dict (the model,
            or a whole config).
        checkpoint: path, URL, ``open-mmlab://...`` or ``torchvision://...``.
        allow_random: let parameters that the checkpoint does not give stay
            random; then ``checkpoint`` may be ``None``.
        trust_checkpoint: allow a checkpoint whose reading runs code.

    Raises:
        ConfigError: no config or no checkpoint.
        CheckpointError: the checkpoint is not safe to read, or does not give
            every parameter.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any],
        checkpoint: str | None = None,
        allow_random: bool = False,
        trust_checkpoint: bool = False,
    ) -> None:
        if checkpoint is None and not allow_random:
            raise ConfigError(
                'FrozenTeacher: `checkpoint` must name the weights of the teacher, got None. '
                'Give a path or URL (allow_random=True distils from a random teacher).'
            )
        self.config = config if isinstance(config, str) else 'inline'
        self.checkpoint = checkpoint
        self.hash: str | None = None
        network = build_network(config, 'FrozenTeacher')
        if checkpoint is None:
            print_log('The teacher has random weights: allow_random=True and no checkpoint.', 'current', level=30)
        else:
            self.hash = load_weights(
                network,
                checkpoint,
                owner='FrozenTeacher',
                allow_random=allow_random,
                trust_checkpoint=trust_checkpoint,
            )
        self.network = network.requires_grad_(False).eval()
        self._shared = False
        self._convert: InputConversion | None = None
        self._calls: dict[Tap, int] = {}
        self._clone: set[Tap] = set()

    def __deepcopy__(self, memo: dict) -> FrozenTeacher:
        twin = copy.copy(self)
        twin._calls, twin._clone = dict(self._calls), set(self._clone)
        self._shared = twin._shared = True
        return twin

    def attach(self, student: nn.Module) -> None:
        """Derive the conversion between the two normalisations.

        Args:
            student: the student, with its data preprocessor.
        """
        self._convert = InputConversion(student.data_preprocessor, self.network.data_preprocessor)

    def _forward(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        calls: Mapping[Tap, int] | None,
        regions: Regions | None,
    ) -> Capture:
        """Run the network on a batch of the student."""
        with torch.no_grad():
            inputs = inputs if self._convert is None else self._convert(inputs, data_samples)
            return tapped_forward(
                self.network, inputs, data_samples, taps, calls=calls, clone=self._clone, regions=regions
            )

    def probe(self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Iterable[Tap]) -> Capture:
        """Run a full forward; remember how often each tap is passed and what is changed in place.

        Args:
            inputs: a small batch in the student's normalisation.
            data_samples: one per image, or ``None``.
            taps: every tap that will be asked for.

        Returns:
            The capture with all records.
        """
        regions = probe_regions(len(inputs), tuple(inputs.shape[-2:]))
        capture = self._forward(inputs, data_samples, taps, None, regions)
        self._clone = capture.changed_in_place()
        self._calls = capture.passes
        return capture

    def observe(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        regions: Regions | None = None,
    ) -> dict[Tap, list[Tensor]]:
        """Return the tensors at ``taps``; nothing behind the deepest of them runs.

        Args:
            inputs: a batch in the student's normalisation, shape (B, 3, H, W).
            data_samples: one per image, or ``None``.
            taps: taps that were probed.
            regions: what a RoI head pools, for taps in it.

        Returns:
            For each tap its tensors in the order of the calls, without graph.
        """
        return self._forward(inputs, data_samples, taps, self._calls, regions).records

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the network, a copy of its own where it is shared.

        Args:
            function: as for ``nn.Module._apply``.
        """
        if self._shared:
            self.network = copy.deepcopy(self.network)
            self._shared = False
        self.network._apply(function)

    def provenance(self) -> dict[str, Any]:
        """Config, checkpoint and its SHA-256."""
        return {
            'type': type(self).__name__,
            'config': self.config,
            'checkpoint': self.checkpoint,
            'sha256': self.hash,
        }
