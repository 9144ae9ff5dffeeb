"""Outputs of a teacher kept on disk, for pipelines that repeat."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.errors import (
    CheckpointError,
    ConfigError,
    check_finite_number,
    check_one_of,
    check_positive,
    is_count,
    suggest,
)
from mmstructkd.taps import Tap
from mmstructkd.teachers.normalization import inner_preprocessor, pad_divisor, pad_value, swaps_channels
from mmstructkd.teachers.tap_store import DTYPES, PackedTensor, TapStore, pack_tensor, unpack_tensor

__all__ = ['VIEW', 'TeacherCache', 'hash_of', 'preprocessing', 'unrepeatable_steps', 'weights_hash']

#: Where a data sample's metainfo says which of the finite views of an image it is.
VIEW = 'augmentation_view'
#: What decides the tensor besides the pixels, as far as a pipeline records it.
SAMPLE = ('img_path', 'img_id', 'sample_idx')

Records = dict[Tap, list[Tensor]]
Run = Callable[[Tensor, Sequence[Any] | None], Records]
Entry = dict[Tap, list[PackedTensor]]
Shapes = list[tuple[int, ...]]

# Steps that give the same result each time. All that load or pack do.
REPEATABLE = {
    'AdjustGamma',
    'BottomCrop',
    'CLAHE',
    'CenterCrop',
    'DepthWindow',
    'FilterAnnotations',
    'FixScaleResize',
    'FixShapeResize',
    'ImageToTensor',
    'Normalize',
    'Pad',
    'RGB2Gray',
    'Rerange',
    'Resize',
    'ResizeShortestEdge',
    'ResizeToMultiple',
    'ToDataContainer',
    'ToTensor',
    'Transpose',
}
CONTAINERS = ('Compose', 'KeyMapper', 'TransformBroadcaster')


def weights_hash(network: nn.Module) -> str:
    """Hash of all parameters and buffers with their names.

    Args:
        network: any network.

    Returns:
        Hexadecimal.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    """Memory of a tensor, in the order of its axes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data


def hash_of(value: Any) -> str:
    """Hash of nested plain values.

    Args:
        value: what JSON can write; the rest by its text.

    Returns:
        Hexadecimal.
    """
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def preprocessing(preprocessor: nn.Module, owner: str | None = None) -> list[Any]:
    """Describe what a data preprocessor makes of an image.

    Args:
        preprocessor: of mmengine, mmseg or mmdet.
        owner: who needs it to be the same each time; ``None``: nobody.

    Returns:
        Plain values.

    Raises:
        ConfigError: it draws anew for each batch.
    """
    preprocessor = inner_preprocessor(preprocessor)
    steps = [type(step).__name__ for step in getattr(preprocessor, 'batch_augments', None) or ()]
    drawing = [name for name in steps if name != 'BatchFixedSizePad']
    if owner is not None and drawing:
        raise ConfigError(
            f'{owner} must see batches that repeat, got batch_augments {drawing} in the data preprocessor of the '
            'student, drawn anew each time. Leave the cache or these out.'
        )
    numbers = [
        None if value is None else value.flatten().tolist()
        for value in (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    ]
    return [*numbers, swaps_channels(preprocessor), pad_value(preprocessor), pad_divisor(preprocessor), steps]


def unrepeatable_steps(dataset: Any) -> Iterator[str]:
    """Name the steps of a dataset's pipeline that draw anew each time.

    A step repeats if it is known to, or says so by an attribute ``repeatable``
    that is true (as :class:`~mmstructkd.datasets.FiniteAugmentation` does).

    Args:
        dataset: a dataset of mmengine, wrapped or not.

    Yields:
        Class names, in the order of the pipeline.
    """
    if type(dataset).__name__ == 'MultiImageMixDataset':
        yield 'MultiImageMixDataset'
    pipeline = getattr(dataset, 'pipeline', ())
    yield from _drawing(getattr(pipeline, 'transforms', pipeline))
    inner = [getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())]
    for one in inner:
        if one is not None:
            yield from unrepeatable_steps(one)


def _drawing(steps: Any) -> Iterator[str]:
    for step in steps if isinstance(steps, (list, tuple)) else ():
        name = type(step).__name__
        if getattr(step, 'repeatable', False) or name in REPEATABLE or name.startswith(('Load', 'Pack')):
            continue
        if name in CONTAINERS:
            yield from _drawing(getattr(step, 'transforms', ()))
        elif not (name == 'RandomFlip' and getattr(step, 'prob', None) == 0):
            yield name


def _one_stride(*maps: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    """Whether there is a stride that takes each input to its map, with sides rounded up.

    Args:
        *maps: pairs of a map's shape (1, C, h, w) and its input's (C, H, W).
    """
    low, high = 0.0, math.inf
    for shape, size in maps:
        for side, full in zip(shape[2:], size[1:], strict=True):
            low = max(low, full / side)
            high = min(high, full / (side - 1) if side > 1 else math.inf)
    return low < high


class TeacherCache:
    """Keeps what a frozen network shows of an image, one file an image and tap.

    The key of a file is a hash of all that decides the tensor: the sample, the
    view of it (seed and number, where a
    :class:`~mmstructkd.datasets.FiniteAugmentation` drew it) with the hash of
    its pixels, or else the hash of the normalised input itself; the padded size;
    the teacher's config, weights, normalisation and options; the tap; and how
    the tensor is stored. So an entry is never used for anything else: what
    changes, misses. Of a batch only the images that miss run through the network.

    What the terms see is the stored form in any case, also of an image that
    has just missed or found no room: a resumed run, and a second one, see what
    the first did.

    A file counts as absent unless it is whole, in the form that is asked for,
    and of the shapes that the network gives at this size of input. Before a run
    of this process has shown them, maps must have the stride of the probe, and
    other tensors its shapes: else the image is computed once more.

    Args:
        folder: where; several runs and processes may share it.
        dtype: ``'fp16'`` (with a scale where values are large), ``'bf16'`` or
            ``'fp32'``.
        topk: by tap, how many of the largest scores at each position to keep.
        max_gb: most gigabytes; see :class:`TapStore`.
        check: batches, the first without a miss, on which the cached tensors
            are compared with the live teacher's.
        tolerance: largest difference then, relative to the norm. Taps in
            ``topk`` are only reported.

    Raises:
        ConfigError: an argument is out of range, or the folder cannot be used.
    """

    def __init__(
        self,
        folder: str,
        *,
        dtype: str = 'fp16',
        topk: Mapping[str, int] | None = None,
        max_gb: float = 50.0,
        check: int = 1,
        tolerance: float = 0.05,
    ) -> None:
        owner = 'FrozenTeacher'
        check_one_of(owner, 'cache.dtype', dtype, tuple(DTYPES))
        check_positive(owner, 'cache.max_gb', max_gb)
        check_finite_number(owner, 'cache.tolerance', tolerance, minimum=0)
        if not is_count(check) or check < 0:
            raise ConfigError(f'{owner}: `cache.check` must be a whole number of at least 0, got {check!r}.')
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder) or '\0' in str(os.fspath(folder)):
            raise ConfigError(f'{owner}: `cache.folder` must be the path of a folder, got {folder!r}.')
        if topk is not None and not isinstance(topk, Mapping):
            raise ConfigError(
                f'{owner}: `cache.topk` must be a dict of numbers by tap, got {topk!r}. '
                "Example: topk={'decode_head.conv_seg': 5}."
            )
        self.topk: dict[Tap, int] = {}
        for text, count in (topk or {}).items():
            if not is_count(count) or count < 1:
                raise ConfigError(
                    f'{owner}: `cache.topk` must give a number of at least 1 for each tap, got {text!r}: {count!r}.'
                )
            self.topk[Tap.parse(text, f'{owner}: `cache.topk`')] = count
        self.store = TapStore(os.fspath(folder), max_gb)
        self.dtype, self.tolerance = dtype, float(tolerance)
        self.hits = self.misses = 0
        self._checks = check
        self._probed: dict[Tap, tuple[Shapes, tuple[int, ...]]] = {}
        self._layouts: dict[tuple[Tap, tuple[int, ...]], Shapes] = {}

    @classmethod
    def from_config(cls, config: Any) -> TeacherCache:
        """Build from a config's ``cache=dict(...)``.

        Args:
            config: the arguments.

        Returns:
            The cache.

        Raises:
            ConfigError: an unknown or missing argument.
        """
        known = ('folder', 'dtype', 'topk', 'max_gb', 'check', 'tolerance')
        if not isinstance(config, Mapping) or 'folder' not in config:
            raise ConfigError(
                f'FrozenTeacher: `cache` must be a dict with a `folder`, got {config!r}. '
                "Write cache=dict(folder='...')."
            )
        for key in config:
            if key not in known:
                raise ConfigError(
                    f'FrozenTeacher: `cache` must have only the keys {known}, got {key!r}. {suggest(str(key), known)}'
                )
        return cls(**config)

    def check_probe(self, records: Mapping[Tap, Sequence[Tensor]], size: Sequence[int]) -> None:
        """Refuse what cannot be kept image by image; remember the rest, to know it in a file.

        Args:
            records: of a probe with one image.
            size: (C, H, W) of that image.

        Raises:
            ConfigError: a tap has no axis of images, or is no map of more
                classes than ``topk`` keeps.
        """
        for tap, tensors in records.items():
            for tensor in tensors:
                if tensor.dim() < 2 or tensor.shape[0] != 1:
                    raise ConfigError(
                        f'FrozenTeacher: `cache` must keep one tensor an image, got {tuple(tensor.shape)} of one image '
                        f'at tap {str(tap)!r}. Tap something with the images first, or leave the cache out.'
                    )
                if tap in self.topk and (tensor.dim() != 4 or tensor.shape[1] <= self.topk[tap]):
                    raise ConfigError(
                        f'FrozenTeacher: `cache.topk` must be below the number of classes of a map of scores, got '
                        f'{self.topk[tap]} for {tuple(tensor.shape)} at tap {str(tap)!r}. Leave it out.'
                    )
        self._probed.update({tap: ([tuple(t.shape) for t in found], tuple(size)) for tap, found in records.items()})
        for tap in self.topk:
            if tap not in records:
                raise ConfigError(
                    f'FrozenTeacher: `cache.topk` must name taps of the terms, got {str(tap)!r}. '
                    f'{suggest(str(tap), [str(known) for known in records])}'
                )

    def serve(
        self,
        identity: str,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Sequence[Tap],
        run: Run,
        *,
        whole: bool = False,
    ) -> Records:
        """Return the tensors at ``taps``, from files as far as they are there.

        Args:
            identity: hash of the teacher and its options.
            inputs: a batch in the student's normalisation, shape (B, 3, H, W).
            data_samples: one per image, or ``None``.
            taps: places.
            run: runs the live teacher on a part of the batch.
            whole: run it on all images where one misses (one size for a compiler).

        Returns:
            For each tap its tensors, float32.
        """
        abouts = self._abouts(identity, inputs, data_samples)
        keys = [{tap: hash_of([about, str(tap), self._form(tap)]) for tap in taps} for about in abouts]
        size, images = tuple(inputs.shape[1:]), len(inputs)
        found = self._alike([self._read(entry, size) for entry in keys], size)
        computed: set[int] = set()

        def compute(places: Sequence[int], rows: Sequence[int]) -> Records:
            """Fill in some images from a run of the network on some."""
            samples = None if data_samples is None else [data_samples[place] for place in rows]
            live = run(inputs if len(rows) == images else inputs[list(rows)], samples)
            for tap in taps:
                self._layouts[tap, size] = [(1, *tensor.shape[1:]) for tensor in live[tap]]
            for place in places:
                row, entry = rows.index(place), {}
                for tap in taps:
                    parts = [self._pack(tensor[row : row + 1], tap, len(rows), tensor) for tensor in live[tap]]
                    self.store.write(keys[place][tap], parts, {**abouts[place], 'tap': str(tap)})
                    entry[tap] = parts
                found[place] = entry
            computed.update(places)
            return live

        def unlike() -> list[int]:
            """Images that are not there, or not in the shape that a run has shown."""
            return [place for place, entry in enumerate(found) if entry is None or not self._fits(entry, size)]

        missing, everything = unlike(), range(images)
        if missing:
            compute(missing, everything if whole else missing)
            if unlike():  # what was taken for whole before the shapes were known
                compute(everything, everything)
        elif self._checks > 0:
            self._checks -= 1
            live = compute((), everything)
            others = unlike()
            if others:
                compute(others, everything)
            self._compare(self._records(found, taps, inputs.device), live)
        self.hits += images - len(computed)
        self.misses += len(computed)
        return self._records(found, taps, inputs.device)

    @staticmethod
    def _records(found: Sequence[Entry | None], taps: Sequence[Tap], device: torch.device) -> Records:
        """The tensors of a batch, from those of its images."""
        return {
            tap: [
                torch.cat([unpack_tensor(part, device) for part in parts])
                for parts in zip(*(entry[tap] for entry in found if entry is not None), strict=True)
            ]
            for tap in taps
        }

    def report(self) -> str:
        """How often it served so far."""
        total = max(self.hits + self.misses, 1)
        return f'{self.hits} of {total} images came from the cache {str(self.store.folder)!r} ({self.hits / total:.0%})'

    def _form(self, tap: Tap) -> list[Any]:
        return [self.dtype, self.topk.get(tap)]

    def _pack(self, part: Tensor, tap: Tap, images: int, tensor: Tensor) -> PackedTensor:
        if tensor.shape[0] != images:
            raise ConfigError(
                f'FrozenTeacher: `cache` must keep one tensor an image, got {tuple(tensor.shape)} of {images} images '
                f'at tap {str(tap)!r}. Leave the cache out.'
            )
        return pack_tensor(part, self.dtype, self.topk.get(tap))

    def _read(self, keys: Mapping[Tap, str], size: tuple[int, ...]) -> Entry | None:
        """All taps of an image, or nothing."""
        entry: Entry = {}
        for tap, key in keys.items():
            tensors = self.store.read(key)
            if tensors is None:
                return None
            entry[tap] = tensors
        return entry if self._fits(entry, size) else None

    def _fits(self, entry: Entry, size: tuple[int, ...]) -> bool:
        """Whether tensors have the form of this cache, and the shapes that the network gives at a size of input."""
        return all(
            all(part.dtype == DTYPES[self.dtype] and part.topk == self.topk.get(tap) for part in parts)
            and self._has_shapes(tap, [part.shape for part in parts], size)
            for tap, parts in entry.items()
        )

    def _has_shapes(self, tap: Tap, shapes: Shapes, size: tuple[int, ...]) -> bool:
        """Compare with what a run at this size has shown, else with what the probe lets expect."""
        known = self._layouts.get((tap, size))
        if known is not None:
            return shapes == known
        if tap not in self._probed:
            return False
        wanted, probed = self._probed[tap]
        if size == probed:
            return shapes == wanted
        return len(shapes) == len(wanted) and all(
            one == two or (len(one) == len(two) == 4 and one[1] == two[1] and _one_stride((one, size), (two, probed)))
            for one, two in zip(shapes, wanted, strict=True)
        )

    @staticmethod
    def _alike(found: list[Entry | None], size: tuple[int, ...]) -> list[Entry | None]:
        """Of a batch no image, where they differ in shape: there is no saying which is right."""
        kinds = {str([[part.shape for part in parts] for parts in entry.values()]) for entry in found if entry}
        return found if len(kinds) < 2 else [None] * len(found)

    @staticmethod
    def _abouts(identity: str, inputs: Tensor, data_samples: Sequence[Any] | None) -> list[dict[str, Any]]:
        """For each image what decides its tensors, the tap and the stored form apart."""
        abouts = []
        for place in range(len(inputs)):
            meta = {} if data_samples is None else data_samples[place].metainfo
            about: dict[str, Any] = {'teacher': identity, 'padded': list(inputs.shape[1:])}
            about['size'] = list(meta.get('img_shape', ()))[:2]
            about['sample'] = {key: meta[key] for key in SAMPLE if key in meta}
            view = meta.get(VIEW)
            if view is None:
                about['input'] = hashlib.blake2b(_bytes(inputs[place]), digest_size=16).hexdigest()
            else:
                about['view'] = dict(view)
            abouts.append(about)
        return abouts

    def _compare(self, cached: Records, live: Records) -> None:
        """Say how far the cached tensors are from the live ones; stop where that is too far."""
        for tap, tensors in cached.items():
            gap = sum(float((one - two).double().square().sum()) for one, two in zip(tensors, live[tap], strict=True))
            size = sum(float(two.double().square().sum()) for two in live[tap])
            drift = (gap / max(size, 1e-300)) ** 0.5
            print_log(
                f'FrozenTeacher: the cache differs from the live teacher by {drift:.1e} at {str(tap)!r}.', 'current'
            )
            if tap not in self.topk and not drift <= self.tolerance:
                raise CheckpointError(
                    f'FrozenTeacher: the cache {str(self.store.folder)!r} must agree with the live teacher to '
                    f'{self.tolerance:g}, got a relative difference of {drift:.3g} at {str(tap)!r}. Something that '
                    'decides the tensor is not recorded, or the files are of another making: use a new folder.'
                )
