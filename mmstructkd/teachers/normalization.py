"""From the student's normalised input to the teacher's, on tensors; and back from its padding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor, BaseTTAModel, ImgDataPreprocessor
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from torch.nn.functional import pad

from mmstructkd.errors import ConfigError
from mmstructkd.taps import Tap, in_region_head
from mmstructkd.tasks.area import valid_area

__all__ = [
    'InputConversion',
    'check_network',
    'cover_input',
    'inner_preprocessor',
    'pad_divisor',
    'pad_value',
    'swaps_channels',
]

# Whose forward is known to be (channel order) -> (x - mean) / std -> pad. All others are tried.
KNOWN = ('BaseDataPreprocessor', 'ImgDataPreprocessor', 'SegDataPreProcessor', 'DetDataPreprocessor')
KNOWN += ('BoxInstDataPreprocessor',)
OWNERS = ('mmengine', 'mmseg', 'mmdet')


def inner_preprocessor(preprocessor: nn.Module) -> nn.Module:
    """The data preprocessor that does the work, inside any that wrap it.

    Args:
        preprocessor: of a network; mmdet's ``MultiBranchDataPreprocessor`` holds
            another as ``data_preprocessor``.

    Returns:
        The innermost one.
    """
    inner = getattr(preprocessor, 'data_preprocessor', None)
    return inner_preprocessor(inner) if isinstance(inner, nn.Module) else preprocessor


def swaps_channels(preprocessor: nn.Module) -> bool:
    """Tell whether a data preprocessor turns BGR into RGB (or back).

    mmengine and mmdet keep it in ``_channel_conversion``, and so does mmseg of
    the onedl line; mmseg of the openmmlab line keeps it in ``channel_conversion``.
    """
    private = getattr(preprocessor, '_channel_conversion', False)
    return bool(getattr(preprocessor, 'channel_conversion', private))


def pad_value(preprocessor: nn.Module) -> float:
    """Return what a data preprocessor pads with, after normalisation.

    mmseg pads with its ``pad_val`` on both lines, mmengine and mmdet with ``pad_value``.
    """
    return float(getattr(preprocessor, 'pad_val', getattr(preprocessor, 'pad_value', 0)))


def pad_divisor(preprocessor: nn.Module) -> int:
    """What the sides of a padded batch are multiples of; 1 where it does not matter.

    mmengine and mmdet keep it in ``pad_size_divisor``, mmseg in ``size_divisor``,
    for training and, in ``test_cfg``, for inference. A fixed ``size`` is that of
    the crops in training, and asks nothing of other images.

    Args:
        preprocessor: of mmengine, mmseg or mmdet, unwrapped.
    """
    in_test = getattr(preprocessor, 'test_cfg', None) or {}
    found = [getattr(preprocessor, name, None) for name in ('pad_size_divisor', 'size_divisor')]
    return math.lcm(*(int(value) for value in (*found, in_test.get('size_divisor')) if value))


class InputConversion:
    """Turns a batch normalised for the student into one normalised for the teacher.

    Both preprocessors compute ``(channel order) -> (x - mean) / std -> pad``.
    The inverse of the student's and the teacher's own are one affine map per
    channel; padding gets the teacher's value, and grows at the right and bottom
    to multiples of what the teacher's preprocessor asks for. Where both agree
    the batch is passed on as it is.

    A preprocessor that wraps another counts as the inner one. One of another
    kind is tried on noise: unless it computes the above, or student and teacher
    have the same with the same settings, it is refused.
    ``batch_augments`` of the teacher's (mmdet's ``BatchFixedSizePad`` and random
    resizing) are part of its training and not of what it sees here.

    Args:
        student: the student's data preprocessor.
        teacher: the teacher's data preprocessor.

    Raises:
        ConfigError: one of the two computes something else, has a ``std`` that is
            not above 0, or they have other numbers of channels.
    """

    def __init__(self, student: BaseDataPreprocessor, teacher: BaseDataPreprocessor) -> None:
        student, teacher = inner_preprocessor(student), inner_preprocessor(teacher)
        alike = _alike(student, teacher)
        statistics = {
            side: _statistics(preprocessor, side, alike=alike)
            for side, preprocessor in (('student', student), ('teacher', teacher))
        }
        widths = {side: len(mean) for side, (mean, _) in statistics.items()}
        if len({width for width in widths.values() if width > 1}) > 1:
            raise ConfigError(
                f'FrozenTeacher: `mean` and `std` of its data preprocessor must have as many channels as those of the '
                f'student, got {widths["teacher"]} and {widths["student"]}. Both see the same images: use a teacher '
                'for inputs of this kind.'
            )
        (mean_s, std_s), (mean_t, std_t) = statistics.values()
        self.channels = max(widths.values())
        # more than three are no colours, and no preprocessor swaps them
        self.flip = self.channels <= 3 and swaps_channels(student) != swaps_channels(teacher)
        mean_s, std_s, mean_t, std_t = torch.broadcast_tensors(mean_s, std_s, mean_t, std_t)
        if self.flip:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        self.scale = (std_s / std_t).float()
        self.shift = ((mean_s - mean_t) / std_t).float()
        self.pad_value = pad_value(teacher)
        self.divisor = pad_divisor(teacher)
        same = bool(((self.scale - 1).abs() < 1e-6).all() and (self.shift.abs() < 1e-6).all())
        self.identity = same and not self.flip and pad_value(student) == self.pad_value

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Tensor:
        """Convert a batch.

        Args:
            inputs: normalised for the student, shape (B, C, H, W).
            data_samples: for the size of each unpadded image.

        Returns:
            The batch as the teacher's own preprocessor would have made it.

        Raises:
            ConfigError: it has other channels.
        """
        if self.channels not in (1, inputs.shape[1]):
            raise ConfigError(
                f'FrozenTeacher: `inputs` must have the {self.channels} channels of its data preprocessor, got '
                f'{tuple(inputs.shape)}. Use a teacher for inputs of this kind.'
            )
        converted = inputs if self.identity else self._converted(inputs, data_samples)
        below, right = self._missing(inputs)
        return pad(converted, (0, right, 0, below), value=self.pad_value) if below or right else converted

    def _converted(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Tensor:
        """The batch at its size."""
        if self.flip:
            inputs = inputs.flip(1)
        # moved once, not in every step
        self.scale, self.shift = self.scale.to(inputs.device), self.shift.to(inputs.device)
        converted = inputs * self.scale[:, None, None] + self.shift[:, None, None]
        valid = valid_area(inputs, data_samples)
        return converted if valid is None else converted.masked_fill(~valid[:, None], self.pad_value)

    def _missing(self, inputs: Tensor) -> tuple[int, int]:
        """Rows and columns up to the next multiple."""
        height, width = inputs.shape[-2:]
        return -height % self.divisor, -width % self.divisor

    def samples(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Sequence[Any] | None:
        """The samples that go with a converted batch.

        Args:
            inputs: the batch of the student.
            data_samples: one per image; never changed.

        Returns:
            The samples; where the batch is padded further, copies that name its
            size.
        """
        below, right = self._missing(inputs)
        if data_samples is None or not (below or right):
            return data_samples
        size = (inputs.shape[-2] + below, inputs.shape[-1] + right)
        return [self._resized(sample, size) for sample in data_samples]

    def _resized(self, sample: Any, size: tuple[int, int]) -> Any:
        """A copy of a sample of a batch of another size."""
        if not isinstance(sample, BaseDataElement):
            return sample
        twin, meta = sample.new(), {}
        if 'batch_input_shape' in sample.metainfo_keys():
            meta['batch_input_shape'] = size
        old = sample.get('pad_shape')
        if old is not None:
            whole = 'batch_input_shape' not in meta  # mmseg names the whole batch, mmdet the image
            sides = size if whole else [min(-(-old[i] // self.divisor) * self.divisor, size[i]) for i in (0, 1)]
            meta['pad_shape'] = (*sides, *old[2:])
        twin.set_metainfo(meta)
        return twin


def _alike(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules are of one class, have the same settings, and nothing that is learnt."""
    pair = (first, second)
    if type(first) is not type(second) or any(next(one.parameters(), None) is not None for one in pair):
        return False
    inside = vars(nn.Module())
    settings = [{key: value for key, value in vars(one).items() if key not in inside} for one in pair]
    buffers, children = ([dict(one.named_buffers()) for one in pair], [dict(one.named_children()) for one in pair])
    if buffers[0].keys() != buffers[1].keys() or children[0].keys() != children[1].keys():
        return False
    try:
        same = bool(settings[0] == settings[1])
    except (RuntimeError, ValueError):
        return False  # arrays among them
    return (
        same
        and all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
        and all(_alike(child, children[1][name]) for name, child in children[0].items())
    )


def _statistics(preprocessor: nn.Module, side: str, *, alike: bool) -> tuple[Tensor, Tensor]:
    """Mean and std of the channels in float64, in the order after the swap; one channel stands for all.

    Args:
        preprocessor: the innermost one.
        side: whose it is, for the message.
        alike: the other network has the same, so that nothing is to be converted.

    Raises:
        ConfigError: it does something else, or divides by what is not above 0.
    """
    owner = f'FrozenTeacher: the data preprocessor of the {side}'
    mean, std = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    if next(preprocessor.parameters(), None) is not None:
        raise _unknown(owner, preprocessor, 'it has parameters that are learnt')
    found = [getattr(preprocessor, name, None) for name in ('mean', 'std')]
    tensors = all(isinstance(value, Tensor) for value in found)
    if getattr(preprocessor, '_enable_normalize', False) and (tensors or not alike):
        if not tensors:
            raise _unknown(owner, preprocessor, 'it normalises and has no tensors `mean` and `std`')
        if any(value.numel() != max(value.shape, default=1) for value in found):
            raise _unknown(owner, preprocessor, f'`mean` has shape {tuple(found[0].shape)}')
        if len({value.numel() for value in found} - {1}) > 1:
            raise _unknown(owner, preprocessor, f'it has {found[0].numel()} of `mean` and {found[1].numel()} of `std`')
        mean, std = torch.broadcast_tensors(*(value.detach().flatten().cpu().double() for value in found))
    for name, value, allowed in (('mean', mean, mean.isfinite()), ('std', std, std.isfinite() & (std > 0))):
        if not bool(allowed.all()):
            rule = 'be finite' if name == 'mean' else 'be finite and above 0'
            raise ConfigError(
                f'{owner}: `{name}` must {rule} in each channel, got {value.tolist()}. What it divides by is what the '
                'images were divided by in its training.'
            )
    kind = type(preprocessor).forward
    known = kind.__module__.split('.')[0] in OWNERS and kind.__qualname__.split('.')[0] in KNOWN
    if not (known or alike):
        _try(preprocessor, owner, mean, std)
    return mean, std


def _try(preprocessor: nn.Module, owner: str, mean: Tensor, std: Tensor) -> None:
    """Compare what a preprocessor makes of noise with what its ``mean`` and ``std`` say."""
    generator = torch.Generator().manual_seed(0)
    channels = len(mean) if len(mean) > 1 else 3
    order = [2, 1, 0] if channels == 3 and swaps_channels(preprocessor) else slice(None)
    for brightest in (255, 31):  # what depends on the image itself differs between a light and a dark one
        image = torch.randint(0, brightest + 1, (channels, 32, 64), generator=generator, dtype=torch.uint8)
        size = tuple(image.shape[1:])
        sample = BaseDataElement(metainfo=dict.fromkeys(('img_shape', 'ori_shape'), size))
        try:
            made = preprocessor({'inputs': [image], 'data_samples': [sample]}, False)['inputs']
        except Exception as err:
            # It is not known what it is, so neither is how it fails.
            raise _unknown(owner, preprocessor, f'on one image it raises {type(err).__name__}: {err}') from err
        wanted = (image[order].double() - mean[:, None, None]) / std[:, None, None]
        tolerance = 1e-3 * float(wanted.abs().max())
        if not isinstance(made, Tensor) or made.dim() != 4 or made.shape[:2] != (1, channels):
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise _unknown(owner, preprocessor, f'of one image of shape {tuple(image.shape)} it makes {got}')
        made = made[0, :, : size[0], : size[1]].detach().cpu().double()
        if made.shape != wanted.shape or not torch.allclose(made, wanted, rtol=1e-3, atol=tolerance):
            raise _unknown(owner, preprocessor, 'what it makes of an image is not (x - mean) / std')


def _unknown(owner: str, preprocessor: nn.Module, reason: str) -> ConfigError:
    """The error for a preprocessor that cannot be inverted."""
    return ConfigError(
        f'{owner} must compute (x - mean) / std for each channel of an image, got {type(preprocessor).__name__}: '
        f'{reason}. The teacher gets what the student gets, converted from one to the other: use a data preprocessor '
        f'of mmengine, mmseg or mmdet, or a subclass of {ImgDataPreprocessor.__name__} with these `mean` and `std`.'
    )


def check_network(network: nn.Module) -> None:
    """Refuse a network that prepares its images outside of its data preprocessor.

    Args:
        network: the teacher's.

    Raises:
        ConfigError: it is mmengine's wrapper for test-time augmentation.
    """
    if isinstance(network, BaseTTAModel):
        raise ConfigError(
            f'FrozenTeacher: `config` must be that of the plain network, got {type(network).__name__}, which runs it '
            'on several views of an image. Give the `model` inside as the teacher.'
        )


def cover_input(tensor: Tensor, tap: Tap, size: tuple[int, int], padded: tuple[int, int]) -> Tensor:
    """Cut a map of a padded input to the part that covers the input.

    Of h rows over H' pixels the first ceil(h H / H') begin inside the H rows of
    the input: as many as a network would give that can do without the padding.

    Args:
        tensor: what a tap showed; rows of regions, vectors and maps of one
            position have no place in the image and stay.
        tap: where.
        size: (H, W) of the student's input.
        padded: (H', W') of the teacher's.

    Returns:
        The tensor, or a view of it.

    Raises:
        ConfigError: what it shows has places, and it is not known which.
    """
    if size == padded or in_region_head(tap) or tensor.dim() < 3:
        return tensor
    sides = tuple(tensor.shape[2:])
    if tensor.dim() == 4 and (sides == (1, 1) or _same_stride(sides, padded)):
        rows, columns = (-(-side * inner // outer) for side, inner, outer in zip(sides, size, padded, strict=True))
        return tensor[:, :, :rows, :columns]
    raise ConfigError(
        f'FrozenTeacher: `tap` {str(tap)!r} must be a map (B, C, h, w) of the input where that is padded for the '
        f'teacher, got {tuple(tensor.shape)} of an input padded from {size} to {padded}. Which part of it belongs to '
        "the image is not known: give the student's data preprocessor the same pad_size_divisor (mmseg: "
        'size_divisor), or tap a map.'
    )


def _same_stride(sides: Sequence[int], outer: Sequence[int]) -> bool:
    """Whether both sides of a map may come of one stride over a padded input, rounded up or down."""
    ranges = [
        (full / (side + 1), full / (side - 1) if side > 1 else math.inf)
        for side, full in zip(sides, outer, strict=True)
    ]
    return max(low for low, _ in ranges) < min(high for _, high in ranges)
