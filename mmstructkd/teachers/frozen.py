"""Where the teacher's tapped tensors come from: the interface, and the frozen network."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.checkpoints import IN_TEACHER
from mmstructkd.errors import ConfigError, TapError, check_flag, is_count, shown
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
    in_region_head,
    probe_regions,
)
from mmstructkd.teachers.base import Records, TeacherSource
from mmstructkd.teachers.cache import TeacherCache, hash_of, preprocessing, weights_hash
from mmstructkd.teachers.execution import Execution
from mmstructkd.teachers.folding import fold_batch_norm
from mmstructkd.teachers.loading import build_network, load_weights, model_config
from mmstructkd.teachers.normalization import InputConversion, check_network, cover_input

__all__ = ['FrozenTeacher']


@MODELS.register_module()
class FrozenTeacher(TeacherSource):
    """A trained network, frozen: always in eval, no gradient, its own normalisation.

    Its forward ends at the deepest tap asked for. Copies made by
    ``copy.deepcopy`` share the network until one of them is moved.

    The input is what its own data preprocessor would have made of the images,
    padded at the right and bottom to the multiple that this asks for; maps are
    cut back to the part that covers the student's input. Random numbers, where
    the network draws any in eval (bases of SegNeXt's head, dropout that stays
    on), come from a stream of its own, the same for the same step: the student
    draws what it draws alone.

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
        every: ask the teacher at every k-th iteration only, with all terms
            weighted k times then and silent in between.
        cache: keep its outputs on disk, for pipelines that repeat: arguments of
            a :class:`~mmstructkd.teachers.cache.TeacherCache`
            (``folder``, ...). A network whose output for an image depends on the
            others of its batch (because it draws random numbers, or normalises by
            the batch) is then run image by image, and from one stream at all steps.

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
        every: int = 1,
        cache: Mapping[str, Any] | None = None,
    ) -> None:
        flags = {'allow_random': allow_random, 'trust_checkpoint': trust_checkpoint, 'fuse_conv_bn': fuse_conv_bn}
        for name, flag in flags.items():
            check_flag('FrozenTeacher', name, flag)
        for name, text in (('checkpoint', checkpoint), ('prefix', prefix)):
            if text is not None and not isinstance(text, (str, os.PathLike) if name == 'checkpoint' else str):
                raise ConfigError(f'FrozenTeacher: `{name}` must be a string, got {shown(text)}.')
        if not is_count(every) or not 1 <= every <= 10**9:
            raise ConfigError(f'FrozenTeacher: `every` must be a whole number of at least 1, got {every!r}.')
        self.fuse_conv_bn, self.every = fuse_conv_bn, every
        self._execution = Execution(dtype=dtype, channels_last=channels_last, compiled=compile)
        self.cache = None if cache is None else TeacherCache.from_config(cache)
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
        self._made_of = ''
        self._identity = ''
        if self.cache is not None:
            self.hooks = ('TeacherCacheHook',)
            options = [fuse_conv_bn, self._execution.channels_last, dtype, compile]
            self._made_of = hash_of([str(model_config(config, 'FrozenTeacher')), weights_hash(network), options])
            self._identity = self._made_of
        network.requires_grad_(False)
        network.eval()  # which need not return the network
        self.network = network
        if self._execution.channels_last:
            nn.Module.to(network, memory_format=torch.channels_last)  # networks may have a `to` for devices alone
        self._folded: dict[str, str] | None = None
        self._shared = False
        self._convert: InputConversion | None = None
        self._calls: dict[Tap, int] = {}
        self._clone: set[Tap] = set()
        self._step = 0
        self._alone = False  # images are run one by one
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
            ConfigError: one of the two preprocessors cannot be converted from or
                to; or the outputs are to be cached, and the student's
                preprocessor changes batches at random.
        """
        check_network(self.network)
        self._convert = InputConversion(student.data_preprocessor, self.network.data_preprocessor)
        if self.cache is not None:
            of_student = preprocessing(student.data_preprocessor, 'FrozenTeacher: `cache`')
            self._identity = hash_of([self._made_of, of_student, preprocessing(self.network.data_preprocessor)])

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

        def forward(batch: Tensor, samples: Sequence[Any] | None, clone: Iterable[Tap] = ()) -> Capture:
            with torch.no_grad(), own_stream(batch.device, watch=True) as draws:
                seen, self._route = find_route(self.network, batch, samples, taps, routes, clone=clone, regions=regions)
            self._alone = self._alone or draws.any
            return seen

        if self.fuse_conv_bn:
            noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)).to(images)
            self._fold(lambda: forward(noise, samples, clone=taps).records, taps)
        capture = forward(images, samples)
        self._clone = capture.changed_in_place()
        self._calls = capture.passes
        capture.records = self._covering(capture.records, size, images)
        if self.cache is not None:
            inside = [str(tap) for tap in taps if in_region_head(tap)]
            if inside:
                raise ConfigError(
                    f'FrozenTeacher: `cache` must be left out where a RoI head is tapped, got {inside[0]!r}: what it '
                    'shows depends on the regions that the student chooses in each step.'
                )
            drawing = [str(tap) for tap in taps if in_point_head(self.network, tap)]
            if drawing:
                raise ConfigError(
                    f'FrozenTeacher: `cache` must be left out where a point head is tapped, got {drawing[0]!r}: what '
                    'it shows depends on the points that the student draws in each step.'
                )
            self.cache.check_probe(capture.records, inputs.shape[1:])
            self._check_alone(lambda batch, samples: forward(batch, samples, clone=taps).records, images, samples)
        return capture

    def _check_alone(self, forward: Callable[..., dict[Tap, list[Tensor]]], images: Tensor, samples: Any) -> None:
        """Find out whether an image may be run with others, where each is kept for itself."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((2, *images.shape[1:]), generator=generator).to(images)
        alone, again = (forward(noise[1:], samples) for _ in range(2))
        if not _close(again, alone):
            raise _unsteady('cache', self.network)
        both = forward(noise, None if samples is None else [*samples, *samples])
        second = {tap: [tensor[1:] for tensor in found] for tap, found in both.items()}
        self._alone = self._alone or not _close(second, alone)

    def _routes(self, taps: Sequence[Tap]) -> list[str]:
        """Ways to run the network that may pass the taps, the cheapest first."""
        if any(in_point_head(self.network, tap) for tap in taps):
            return ['loss']  # inference looks at other points
        return ['features', 'loss'] if all(map(in_features, taps)) else ['tensor', 'predict', 'loss']

    def _fold(self, forward: Callable[[], dict[Tap, list[Tensor]]], taps: Iterable[Tap]) -> None:
        """Fold what no tap names, once; later taps must leave what is folded alone."""
        named = {tap.module: str(tap) for tap in taps}
        if self._folded is None:
            before = forward()
            if not _close(forward(), before):
                raise _unsteady('fuse_conv_bn', self.network)
            self._folded = fold_batch_norm(self.network, forward, keep=named)
            after = forward()
            for tap, tensors in before.items():
                for old, new in zip(tensors, after[tap], strict=True):
                    if not torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().max())):
                        raise ConfigError(
                            f'FrozenTeacher: `fuse_conv_bn` must not change what the network computes, got a '
                            f'difference of up to {float((old - new).abs().max()):.3g} at {str(tap)!r}. '
                            f'{type(self.network).__name__} cannot be folded: set fuse_conv_bn=False.'
                        )
            print_log(f'{len(self._folded)} BatchNorms of the teacher are folded into convolutions.', 'current')
        for norm, convolution in self._folded.items():
            if norm in named or convolution in named:
                raise TapError(
                    f'FrozenTeacher: `tap` must not name a folded BatchNorm or its convolution, got '
                    f'{named.get(norm, named.get(convolution))!r} ({norm!r} is folded into {convolution!r} already). '
                    'Name all taps when the distiller is built, or set fuse_conv_bn=False.'
                )

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
        if not isinstance(inputs, Tensor):
            branches = f' of {sorted(map(str, inputs))}' if isinstance(inputs, Mapping) else ''
            raise ConfigError(
                f'FrozenTeacher: `inputs` must be one batch of images, got {type(inputs).__name__}{branches}. Batches '
                'in branches (semi-supervised training) cannot be distilled: give the student a data preprocessor '
                'that makes one batch.'
            )
        if self.cache is None:
            return self._run(inputs, data_samples, taps, regions, self._step)[0]
        identity = hash_of([self._identity, self._execution.precision(inputs.device), self._alone])
        whole = self._execution.compiled and not self._alone
        return self.cache.serve(identity, inputs, data_samples, taps, self._kept(taps), whole=whole)

    def _kept(self, taps: tuple[Tap, ...]) -> Callable[[Tensor, Sequence[Any] | None], dict[Tap, list[Tensor]]]:
        """Runs a batch so that what an image shows does not depend on the step or on the other images."""

        def run(inputs: Tensor, data_samples: Sequence[Any] | None) -> dict[Tap, list[Tensor]]:
            if not self._alone:
                records, self._alone = self._run(inputs, data_samples, taps, None, 0, watch=True)
                if not self._alone or len(inputs) == 1:
                    return records
            singles = [(inputs[i : i + 1], data_samples and data_samples[i : i + 1]) for i in range(len(inputs))]
            parts = [self._run(image, sample, taps, None, 0)[0] for image, sample in singles]
            return {tap: [torch.cat(rows) for rows in zip(*(part[tap] for part in parts), strict=True)] for tap in taps}

        return run

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

    def interval_factor(self, step: int, taps: Iterable[Tap] = ()) -> float:
        """``every`` at each step that is a multiple of it, else 0; the random stream is that of this step.

        Args:
            step: iterations done so far.
            taps: not used.

        Returns:
            The factor of all terms.
        """
        self._step = step
        return float(self.every) if step % self.every == 0 else 0.0

    def without_cache(self) -> None:
        """Run for each batch from now on, and write nothing."""
        self.cache = None

    def held_networks(self) -> list[nn.Module]:
        """Its network, and the copy that was cast for ``dtype``, once there is one."""
        cast = self._execution.cast_network
        return [self.network] if cast is None else [self.network, cast]

    @property
    def is_compiled(self) -> bool:
        """Whether it runs compiled; no longer where compiling has failed."""
        return self._execution.compiled

    def report(self) -> list[str]:
        """What the cache gave, if there is one."""
        return [] if self.cache is None else [self.cache.report()]

    def provenance(self) -> dict[str, Any]:
        """Config, checkpoint and its SHA-256."""
        return {
            'type': type(self).__name__,
            'config': self.config,
            'checkpoint': self.checkpoint,
            'sha256': self.hash,
            **({'prefix': self.prefix} if self.prefix else {}),
        }


def _close(first: Mapping[Tap, Sequence[Tensor]], second: Mapping[Tap, Sequence[Tensor]]) -> bool:
    """Whether tensors agree but for rounding."""

    def close(one: Tensor, two: Tensor) -> bool:
        largest = float(two.abs().nan_to_num().max()) if two.numel() else 0.0
        return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-3 * largest, equal_nan=True)

    return all(
        close(one.double(), two.double()) for tap in second for one, two in zip(first[tap], second[tap], strict=True)
    )


def _unsteady(option: str, network: nn.Module) -> ConfigError:
    """The error for a network that shows something else each time it is asked."""
    return ConfigError(
        f'FrozenTeacher: `{option}` must have a teacher that shows the same of the same image, got '
        f'{type(network).__name__}, which differs from one run to the next: it keeps a state, or draws random numbers '
        'from a stream of its own (torch.Generator, numpy.random.default_rng). Those of torch, numpy and Python are '
        f'seeded for it. Leave `{option}` out.'
    )
