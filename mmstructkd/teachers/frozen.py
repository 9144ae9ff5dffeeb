"""The frozen network: the teacher that most methods know."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.checkpoints import IN_TEACHER
from mmstructkd.errors import ConfigError, check_flag, shown
from mmstructkd.randomness import own_stream
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import (
    Capture,
    Regions,
    Tap,
    find_route,
    in_features,
    in_point_head,
    probe_regions,
)
from mmstructkd.teachers.base import Records, Repeatable, check_one_batch
from mmstructkd.teachers.cache import hash_of, weights_hash
from mmstructkd.teachers.execution import Execution, agree, unsteady
from mmstructkd.teachers.loading import build_network, load_weights, model_config
from mmstructkd.teachers.normalization import InputConversion, check_network, cover_input

__all__ = ['FrozenTeacher']


@MODELS.register_module()
class FrozenTeacher(Repeatable):
    """A trained network, frozen: always in eval, no gradient, its own normalisation.

    Its forward ends at the deepest tap asked for. Copies made by
    ``copy.deepcopy`` share the network until one of them is moved.

    The input is what its own data preprocessor would have made of the images,
    padded at the right and bottom to the multiple that this asks for; maps are
    cut back to the part that covers the student's input. Random numbers, where
    the network draws any in eval (bases of SegNeXt's head, dropout that stays
    on), come from a stream of its own, the same for the same step: the student
    draws what it draws alone.

    ``every=...`` and ``cache=...`` beside these arguments, in the config of any
    teacher, are read by :func:`~mmstructkd.teachers.building.build_source`, which
    puts this one into a wrapper.

    Args:
        config: path of a config, ``mmseg::...``, or an inline dict (the model,
            or a whole config).
        checkpoint: path, URL, ``open-mmlab://...`` or ``torchvision://...``.
        allow_random: let parameters that the checkpoint does not give stay
            random; then ``checkpoint`` may be ``None``.
        trust_checkpoint: allow a checkpoint whose reading runs code.
        prefix: take the part of the checkpoint whose keys begin so, without
            that: ``'teacher.'`` of a SoftTeacher, ``'architecture.'`` of mmrazor.
        fuse_conv_bn: fold BatchNorm into the convolutions before it; see
            :func:`~mmstructkd.teachers.folding.fold_batch_norm`. Pairs that a
            tap names are left as they are.
        channels_last: run in that memory format; ``None``: if ``dtype`` is of half
            the width, whose kernels are written for it.
        dtype: ``'bf16'`` or ``'fp16'``: the teacher's own autocast, on any
            device; ``'fp32'``: full precision although the student runs under
            AMP; ``None``: as the student.
        compile: run what leads to the taps through ``torch.compile``, for each
            size of input anew; where that fails, warn and go on without. The
            first step of each size takes as long as compiling does.

    Raises:
        ConfigError: no config or no checkpoint, or an option out of range.
        CheckpointError: the checkpoint is not safe to read, or does not give
            every parameter, or values that a trained network can have.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any],
        checkpoint: str | os.PathLike | None = None,
        allow_random: bool = False,
        trust_checkpoint: bool = False,
        *,
        prefix: str | None = None,
        fuse_conv_bn: bool = False,
        channels_last: bool | None = None,
        dtype: str | None = None,
        compile: bool = False,
    ) -> None:
        flags = {'allow_random': allow_random, 'trust_checkpoint': trust_checkpoint}
        for name, flag in flags.items():
            check_flag('FrozenTeacher', name, flag)
        for name, text in (('checkpoint', checkpoint), ('prefix', prefix)):
            if text is not None and not isinstance(text, (str, os.PathLike) if name == 'checkpoint' else str):
                raise ConfigError(f'FrozenTeacher: `{name}` must be a string, got {shown(text)}.')
        self._execution = Execution(
            dtype=dtype, channels_last=channels_last, compiled=compile, fuse_conv_bn=fuse_conv_bn
        )
        if checkpoint is None and not allow_random:
            raise ConfigError(
                'FrozenTeacher: `checkpoint` must name the weights of the teacher, got None. '
                'Give a path or URL (allow_random=True distils from a random teacher).'
            )
        self.config = config if isinstance(config, str) else 'inline'
        self.source = config  # its dataset names the classes
        self.checkpoint = None if checkpoint is None else os.fspath(checkpoint)
        self.prefix = prefix
        self.hash: str | None = None
        network = build_network(config, 'FrozenTeacher')
        if checkpoint is None:
            print_log('The teacher has random weights: allow_random=True and no checkpoint.', 'current', level=30)
        else:
            self.hash = load_weights(
                network,
                self.checkpoint,
                owner='FrozenTeacher',
                allow_random=allow_random,
                trust_checkpoint=trust_checkpoint,
                how=IN_TEACHER,
                prefix=prefix or '',
                prefix_key='prefix={} in `teacher`',
            )
        network.requires_grad_(False)
        network.eval()  # which need not return the network
        self.network = network
        self._execution.lay_out(network)
        self._shared = False
        self._convert: InputConversion | None = None
        self._calls: dict[Tap, int] = {}
        self._clone: set[Tap] = set()
        self._step = 0
        self._alone = False  # an image must be run alone to show the same each time
        self._route = 'tensor'

    def __deepcopy__(self, memo: dict) -> FrozenTeacher:
        twin = copy.copy(self)
        twin._calls, twin._clone = dict(self._calls), set(self._clone)
        twin._execution = self._execution.renewed()
        self._shared = twin._shared = True
        return twin

    def attach(self, student: nn.Module, config: Mapping[str, Any] | None = None) -> None:
        """Derive the conversion between the two normalisations.

        Args:
            student: the student, with its data preprocessor.
            config: not used.

        Raises:
            ConfigError: one of the two preprocessors cannot be converted from or to.
        """
        check_network(self.network)
        self._convert = InputConversion(student.data_preprocessor, self.network.data_preprocessor)

    def _converted(
        self, inputs: Tensor, data_samples: Sequence[Any] | None
    ) -> tuple[Tensor, Sequence[Any] | None, tuple[int, int]]:
        """A batch of the student in the teacher's normalisation, its samples, and its size before padding."""
        size = tuple(inputs.shape[-2:])
        if self._convert is None:
            return inputs, data_samples, size
        return self._convert(inputs, data_samples), self._convert.samples(inputs, data_samples), size

    @staticmethod
    def _covering(records: dict[Tap, list[Tensor]], size: tuple[int, int], images: Tensor) -> dict[Tap, list[Tensor]]:
        """The part of each tensor that belongs to the student's input."""
        padded = tuple(images.shape[-2:])
        return {tap: [cover_input(tensor, tap, size, padded) for tensor in found] for tap, found in records.items()}

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
        """Find a way to run the network that passes every tap; remember how often, and what is changed in place.

        Args:
            inputs: a small batch in the student's normalisation.
            data_samples: one per image, or ``None``.
            taps: every tap that will be asked for.
            student: not used.
            targets: not used.
            regions: what RoI and point heads look at; ``None``: some boxes.

        Returns:
            The capture with all records.

        Raises:
            ConfigError: an option cannot be had with this network and these taps.
            ForwardFailed: the network cannot be run on such a batch.
        """
        taps = tuple(taps)
        if regions is None:
            regions = probe_regions(len(inputs), tuple(inputs.shape[-2:]))
        images, samples, size = self._converted(inputs, data_samples)
        routes = self._routes(taps)
        if data_samples is None:
            routes = [route for route in routes if route != 'loss'] or routes

        def forward(batch: Tensor, clone: Iterable[Tap] = ()) -> Capture:
            with torch.no_grad(), own_stream(batch.device, watch=True) as draws:
                seen, self._route = find_route(self.network, batch, samples, taps, routes, clone=clone, regions=regions)
            self._alone = self._alone or draws.any
            return seen

        self._execution.fold(self.network, lambda: forward(_noise(images), clone=taps).records, taps)
        capture = forward(images)
        self._clone = capture.changed_in_place()
        self._calls = capture.passes
        capture.records = self._covering(capture.records, size, images)
        return capture

    def _routes(self, taps: Sequence[Tap]) -> list[str]:
        """Ways to run the network that may pass the taps, the cheapest first."""
        if any(in_point_head(self.network, tap) for tap in taps):
            return ['loss']  # inference looks at other points
        return ['features', 'loss'] if all(map(in_features, taps)) else ['tensor', 'predict', 'loss']

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
        """Return the tensors at ``taps``; nothing behind the deepest of them runs.

        Args:
            inputs: a batch in the student's normalisation, shape (B, 3, H, W).
            data_samples: one per image, or ``None``.
            taps: taps that were probed.
            student: not used.
            regions: what a RoI head pools, for taps in it.
            labelled: not used.

        Returns:
            For each tap its tensors in the order of the calls, without graph.
        """
        taps = tuple(dict.fromkeys(taps))
        check_one_batch(type(self).__name__, inputs)
        return self._run(inputs, data_samples, taps, regions, self._step)[0]

    def _run(
        self,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: tuple[Tap, ...],
        regions: Regions | None,
        step: int,
        *,
        watch: bool = False,
    ) -> tuple[dict[Tap, list[Tensor]], bool]:
        """Run the network on a batch of the student; say whether it drew random numbers, if that is watched."""
        with torch.no_grad():
            images, samples, size = self._converted(inputs, data_samples)
        with own_stream(images.device, step, watch=watch) as draws:
            records = self._execution.run(
                self.network,
                images,
                samples,
                taps,
                calls=self._calls,
                clone=self._clone,
                regions=regions,
                route=self._route,
            )
        return self._covering(records, size, images), draws.any

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or cast the network, a copy of its own where it is shared.

        Args:
            function: as for ``nn.Module._apply``.
        """
        if self._shared:
            self.network = copy.deepcopy(self.network)
            self._shared = False
        self.network._apply(function)
        self._execution = self._execution.renewed()

    def set_progress(self, step: int, last: int) -> None:
        """Draw from the random stream of this step.

        Args:
            step: iterations done so far.
            last: iterations of the training.
        """
        self._step = step

    @property
    def compiled(self) -> bool:  # type: ignore[override]
        """Whether it runs through a compiler; not where that has failed."""
        return self._execution.compiled

    def held_modules(self) -> list[nn.Module]:
        """The network, and its copy in low precision where there is one."""
        return self._execution.held_modules(self.network)

    # --- as a function of the image, for a cache ---

    def fingerprint(self) -> str:
        """Hash of config, weights and options, as long as no probe has folded a weight."""
        config = str(model_config(self.source, type(self).__name__))
        return hash_of([config, weights_hash(self.network), self._execution.options()])

    def run_state(self, device: torch.device) -> list[Any]:
        """The precision that it runs in there, now, and whether it runs image by image.

        Args:
            device: of the images.
        """
        return [self._execution.precision(device), self._alone]

    @property
    def wants_whole_batches(self) -> bool:
        """Whether each size of batch is compiled anew."""
        return self._execution.compiled and not self._alone

    def check_repeatable(self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Sequence[Tap]) -> None:
        """Find out whether an image may be run with others: not where it then shows something else.

        Args:
            inputs: one image in the student's normalisation.
            data_samples: its sample, or ``None``.
            taps: those that were probed.

        Raises:
            ConfigError: it shows something else of the same image each time.
        """
        images, samples, size = self._converted(inputs, data_samples)
        regions = probe_regions(len(inputs), size)

        def forward(batch: Tensor, samples: Sequence[Any] | None) -> dict[Tap, list[Tensor]]:
            with torch.no_grad(), own_stream(batch.device, watch=True) as draws:
                seen, _ = find_route(self.network, batch, samples, taps, [self._route], clone=taps, regions=regions)
            self._alone = self._alone or draws.any
            return seen.records

        both = torch.cat([_noise(images, seed) for seed in range(2)])
        alone, again = (forward(both[1:], samples) for _ in range(2))
        if not agree(again, alone):
            raise unsteady('cache', self.network)
        together = forward(both, None if samples is None else [*samples, *samples])
        second = {tap: [tensor[1:] for tensor in found] for tap, found in together.items()}
        self._alone = self._alone or not agree(second, alone)

    def observe_each(
        self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Sequence[Tap]
    ) -> dict[Tap, list[Tensor]]:
        """Run images one by one where they depend on each other, and from the random stream of step 0.

        Args:
            inputs: a batch, or a part of one, in the student's normalisation.
            data_samples: one per image, or ``None``.
            taps: taps that were probed.

        Returns:
            For each tap its tensors, without graph.
        """
        taps = tuple(taps)
        if not self._alone:
            records, self._alone = self._run(inputs, data_samples, taps, None, 0, watch=True)
            if not self._alone or len(inputs) == 1:
                return records
        singles = [(inputs[i : i + 1], data_samples and data_samples[i : i + 1]) for i in range(len(inputs))]
        parts = [self._run(image, sample, taps, None, 0)[0] for image, sample in singles]
        return {tap: [torch.cat(rows) for rows in zip(*(part[tap] for part in parts), strict=True)] for tap in taps}

    def provenance(self) -> dict[str, Any]:
        """Config, checkpoint and its SHA-256."""
        return {
            'type': type(self).__name__,
            'config': self.config,
            'checkpoint': self.checkpoint,
            'sha256': self.hash,
            **({'prefix': self.prefix} if self.prefix else {}),
        }


def _noise(images: Tensor, seed: int = 0) -> Tensor:
    """Noise of the shape of some images, the same each time."""
    return torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)).to(images)
