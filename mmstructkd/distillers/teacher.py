"""Where the teacher's tapped tensors come from: the interface, and the frozen network."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.distillers.execution import Execution
from mmstructkd.distillers.folding import fold_batch_norm
from mmstructkd.distillers.loading import build_network, load_weights, model_config
from mmstructkd.distillers.normalization import InputConversion
from mmstructkd.distillers.teacher_cache import TeacherCache, hash_of, preprocessing, weights_hash
from mmstructkd.errors import ConfigError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.taps import Capture, Regions, Tap, in_region_head, probe_regions, tapped_forward

__all__ = ['FrozenTeacher', 'TeacherSource']


class TeacherSource(ABC):
    """Gives the teacher's tensor at each tap for a batch.

    Terms know nothing else about a teacher. A source is no ``nn.Module``, so a
    distiller that holds one does not own what is inside: it is in no
    ``parameters()``, ``state_dict()``, EMA copy or DDP bucket.
    """

    #: Hooks that it needs in a run, by name.
    hooks: tuple[str, ...] = ()

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

    def pace(self, step: int) -> float:
        """Factor of all terms at a step: 0 where the teacher is not asked.

        Args:
            step: iterations done so far.

        Returns:
            1, unless the source leaves out steps; then the mean over them is 1.
        """
        return 1.0

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
        fuse_conv_bn: fold BatchNorm into the convolutions before it; see
            :func:`~mmstructkd.distillers.folding.fold_batch_norm`. Pairs that a
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
            a :class:`~mmstructkd.distillers.teacher_cache.TeacherCache`
            (``folder``, ...).

    Raises:
        ConfigError: no config or no checkpoint, or an option out of range.
        CheckpointError: the checkpoint is not safe to read, or does not give
            every parameter.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any],
        checkpoint: str | None = None,
        allow_random: bool = False,
        trust_checkpoint: bool = False,
        *,
        fuse_conv_bn: bool = False,
        channels_last: bool | None = None,
        dtype: str | None = None,
        compile: bool = False,
        every: int = 1,
        cache: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(fuse_conv_bn, bool):
            raise ConfigError(f'FrozenTeacher: `fuse_conv_bn` must be True or False, got {fuse_conv_bn!r}.')
        if isinstance(every, bool) or not isinstance(every, int) or not 1 <= every <= 10**9:
            raise ConfigError(f'FrozenTeacher: `every` must be a whole number of at least 1, got {every!r}.')
        self.fuse_conv_bn, self.every = fuse_conv_bn, every
        self._execution = Execution(dtype=dtype, channels_last=channels_last, compiled=compile)
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
        self.cache: TeacherCache | None = None
        self._made_of = ''
        self._identity = ''
        if cache is not None:
            self.cache = TeacherCache.from_config(cache)
            self.hooks = ('TeacherCacheHook',)
            options = [fuse_conv_bn, self._execution.channels_last, dtype, compile]
            self._made_of = hash_of([str(model_config(config, 'FrozenTeacher')), weights_hash(network), options])
            self._identity = self._made_of
        self.network = network.requires_grad_(False).eval()
        if self._execution.channels_last:
            self.network.to(memory_format=torch.channels_last)
        self._folded: dict[str, str] | None = None
        self._shared = False
        self._convert: InputConversion | None = None
        self._calls: dict[Tap, int] = {}
        self._clone: set[Tap] = set()

    def __deepcopy__(self, memo: dict) -> FrozenTeacher:
        twin = copy.copy(self)
        twin._calls, twin._clone = dict(self._calls), set(self._clone)
        twin._execution = self._execution.renewed()
        self._shared = twin._shared = True
        return twin

    def attach(self, student: nn.Module) -> None:
        """Derive the conversion between the two normalisations.

        Args:
            student: the student, with its data preprocessor.

        Raises:
            ConfigError: the outputs are to be cached, and the student's
                preprocessor changes batches at random.
        """
        self._convert = InputConversion(student.data_preprocessor, self.network.data_preprocessor)
        if self.cache is not None:
            of_student = preprocessing(student.data_preprocessor, 'FrozenTeacher: `cache`')
            self._identity = hash_of([self._made_of, of_student, preprocessing(self.network.data_preprocessor)])

    def _converted(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Tensor:
        """A batch of the student in the teacher's normalisation."""
        return inputs if self._convert is None else self._convert(inputs, data_samples)

    def probe(self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Iterable[Tap]) -> Capture:
        """Run a full forward; remember how often each tap is passed and what is changed in place.

        Args:
            inputs: a small batch in the student's normalisation.
            data_samples: one per image, or ``None``.
            taps: every tap that will be asked for.

        Returns:
            The capture with all records.
        """
        taps = tuple(taps)
        regions = probe_regions(len(inputs), tuple(inputs.shape[-2:]))
        inputs = self._converted(inputs, data_samples)

        def forward(images: Tensor, clone: Iterable[Tap] = ()) -> Capture:
            with torch.no_grad():
                return tapped_forward(self.network, images, data_samples, taps, clone=clone, regions=regions)

        if self.fuse_conv_bn:
            noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0)).to(inputs)
            self._fold(lambda: forward(noise, clone=taps).records, taps)
        capture = forward(inputs)
        self._clone = capture.changed_in_place()
        self._calls = capture.passes
        if self.cache is not None:
            inside = [str(tap) for tap in taps if in_region_head(tap)]
            if inside:
                raise ConfigError(
                    f'FrozenTeacher: `cache` must be left out where a RoI head is tapped, got {inside[0]!r}: what it '
                    'shows depends on the regions that the student chooses in each step.'
                )
            self.cache.check_probe(capture.records)
        return capture

    def _fold(self, forward: Callable[[], dict[Tap, list[Tensor]]], taps: Iterable[Tap]) -> None:
        """Fold what no tap names, once; later taps must leave what is folded alone."""
        named = {tap.module: str(tap) for tap in taps}
        if self._folded is None:
            before = forward()
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
        taps = tuple(dict.fromkeys(taps))

        def run(images: Tensor, samples: Sequence[Any] | None) -> dict[Tap, list[Tensor]]:
            with torch.no_grad():
                images = self._converted(images, samples)
            return self._execution.run(
                self.network, images, samples, taps, calls=self._calls, clone=self._clone, regions=regions
            )

        if self.cache is None:
            return run(inputs, data_samples)
        identity = hash_of([self._identity, self._execution.precision(inputs.device)])
        return self.cache.serve(identity, inputs, data_samples, taps, run, whole=self._execution.compiled)

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

    def pace(self, step: int) -> float:
        """``every`` at each step that is a multiple of it, else 0.

        Args:
            step: iterations done so far.

        Returns:
            The factor of all terms.
        """
        return float(self.every) if step % self.every == 0 else 0.0

    def provenance(self) -> dict[str, Any]:
        """Config, checkpoint and its SHA-256."""
        return {
            'type': type(self).__name__,
            'config': self.config,
            'checkpoint': self.checkpoint,
            'sha256': self.hash,
        }
