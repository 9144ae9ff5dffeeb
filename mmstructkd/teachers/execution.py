"""How a frozen network is run: in which precision, memory format, with folded norms, and compiled or not."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import wrappers
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, TapError, check_flag, check_one_of
from mmstructkd.taps import Regions, Tap, in_features, in_region_head, run_tapped, tapped_forward
from mmstructkd.teachers.folding import fold_batch_norm

__all__ = ['DTYPES', 'Execution', 'agree', 'unsteady']

#: What a config may write.
DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}

# Autocast runs these in low precision whatever follows. Subclasses may use their weights for more than that.
CAST = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
CAST += (wrappers.Conv2d, wrappers.Conv3d, wrappers.ConvTranspose2d, wrappers.ConvTranspose3d, wrappers.Linear)
Records = dict[Tap, list[Tensor]]


class _Listening(nn.Module):
    """A network as a function from images to its tapped tensors, for the compiler.

    Hooks stay for good, on a network of its own. The forward is not ended
    early: the compiler leaves out what no tapped tensor needs.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap], clone: frozenset[Tap]) -> None:
        super().__init__()
        self.network = network
        self.taps = tuple(taps)
        self._found: list[tuple[int, Tensor]] = []
        modules = dict(network.named_modules())
        for place, tap in enumerate(self.taps):
            module = modules[tap.module]
            if tap.side == 'input':
                module.register_forward_pre_hook(self._input_hook(place, tap, tap in clone))
            else:
                module.register_forward_hook(self._output_hook(place, tap, tap in clone))

    def _output_hook(self, place: int, tap: Tap, clone: bool) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            for tensor in tap.pick(output):
                self._found.append((place, tensor.clone() if clone else tensor))

        return hook

    def _input_hook(self, place: int, tap: Tap, clone: bool) -> Any:
        def hook(module: nn.Module, args: tuple) -> None:
            for tensor in tap.pick(args[0]):
                self._found.append((place, tensor.clone() if clone else tensor))

        return hook

    def forward(self, inputs: Tensor) -> list[tuple[int, Tensor]]:
        """Return each tapped tensor with the number of its tap."""
        self._found = []  # anew, not cleared: the compiler would ask how long it was
        route = 'features' if all(in_features(tap) for tap in self.taps) else 'tensor'
        run_tapped(self.network, inputs, None, self.taps, route=route)
        found, self._found = self._found, []
        return found


class Execution:
    """Runs a frozen network up to its taps.

    Args:
        dtype: ``'bf16'`` or ``'fp16'``: the network's own autocast, on any
            device, with the weights of convolutions and linear layers cast once.
            ``'fp32'``: no autocast, whatever the student runs in. ``None``: as
            the student.
        channels_last: feed images in that memory format; the network's weights
            must have it as well. ``None``: where ``dtype`` is of half the width,
            whose kernels are written for it.
        compiled: compile what leads to the taps, for each size of input anew.
            Where that fails, warn and go on without.
        fuse_conv_bn: fold BatchNorm into convolutions, see :meth:`fold`.

    Raises:
        ConfigError: an unknown ``dtype``, or a flag that is none.
    """

    def __init__(
        self,
        *,
        dtype: str | None = None,
        channels_last: bool | None = None,
        compiled: bool = False,
        fuse_conv_bn: bool = False,
    ) -> None:
        check_flag('FrozenTeacher', 'fuse_conv_bn', fuse_conv_bn)
        if dtype is not None:
            check_one_of('FrozenTeacher', 'dtype', dtype, tuple(DTYPES))
        if channels_last is not None:
            check_flag('FrozenTeacher', 'channels_last', channels_last)
        check_flag('FrozenTeacher', 'compile', compiled)
        self.dtype, self.compiled, self.fuse_conv_bn = dtype, compiled, fuse_conv_bn
        self.channels_last = self.low is not None if channels_last is None else channels_last
        self._cast: nn.Module | None = None
        self._programs: dict[tuple[Tap, ...], Any] = {}
        self._folded: dict[str, str] | None = None

    def renewed(self) -> Execution:
        """The same settings for the same network, whose weights have been moved, replaced or shared."""
        renewed = Execution(
            dtype=self.dtype,
            channels_last=self.channels_last,
            compiled=self.compiled,
            fuse_conv_bn=self.fuse_conv_bn,
        )
        renewed._folded = self._folded
        return renewed

    def options(self) -> list[Any]:
        """What decides the numbers that come out, in plain values."""
        return [self.fuse_conv_bn, self.channels_last, self.dtype, self.compiled]

    def lay_out(self, network: nn.Module) -> None:
        """Bring the weights of a network into the memory format of the images.

        Args:
            network: changed in place.
        """
        if self.channels_last:
            nn.Module.to(network, memory_format=torch.channels_last)  # networks may have a `to` for devices alone

    def held_modules(self, network: nn.Module) -> list[nn.Module]:
        """The network, and the copy in low precision where one has been made.

        Args:
            network: that runs.

        Returns:
            One module or two, which share most tensors.
        """
        return [network, *filter(None, [self._cast])]

    def fold(self, network: nn.Module, forward: Callable[[], Records], taps: Iterable[Tap]) -> None:
        """Fold what no tap names, once; later taps must leave what is folded alone.

        Args:
            network: changed in place.
            forward: runs it on the same images each time and returns its tapped tensors.
            taps: places whose tensors stay what they are.

        Raises:
            ConfigError: the network shows something else each time, or something
                else once it is folded.
            TapError: a tap names what has been folded.
        """
        if not self.fuse_conv_bn:
            return
        named = {tap.module: str(tap) for tap in taps}
        if self._folded is None:
            before = forward()
            if not agree(forward(), before):
                raise unsteady('fuse_conv_bn', network)
            self._folded = fold_batch_norm(network, forward, keep=named)
            after = forward()
            for tap, tensors in before.items():
                for old, new in zip(tensors, after[tap], strict=True):
                    if not torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().max())):
                        raise ConfigError(
                            f'FrozenTeacher: `fuse_conv_bn` must not change what the network computes, got a '
                            f'difference of up to {float((old - new).abs().max()):.3g} at {str(tap)!r}. '
                            f'{type(network).__name__} cannot be folded: set fuse_conv_bn=False.'
                        )
            print_log(f'{len(self._folded)} BatchNorms of the teacher are folded into convolutions.', 'current')
        for norm, convolution in self._folded.items():
            if norm in named or convolution in named:
                raise TapError(
                    f'FrozenTeacher: `tap` must not name a folded BatchNorm or its convolution, got '
                    f'{named.get(norm, named.get(convolution))!r} ({norm!r} is folded into {convolution!r} already). '
                    'Name all taps when the distiller is built, or set fuse_conv_bn=False.'
                )

    @property
    def low(self) -> torch.dtype | None:
        """The dtype of half the width, where there is one."""
        return DTYPES[self.dtype] if self.dtype in ('bf16', 'fp16') else None

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The precision to run in."""
        if self.dtype is None:
            return contextlib.nullcontext()
        if self.low is None:
            return torch.autocast(device.type, enabled=False)
        return torch.autocast(device.type, dtype=self.low)

    def precision(self, device: torch.device) -> str:
        """Name of the dtype that convolutions run in there, now.

        Args:
            device: of the images.

        Returns:
            As torch writes it.
        """
        if self.dtype is not None:
            return str(DTYPES[self.dtype])
        on = torch.is_autocast_enabled(device.type)
        return str(torch.get_autocast_dtype(device.type) if on else torch.float32)

    def run(
        self,
        network: nn.Module,
        inputs: Tensor,
        data_samples: Sequence[Any] | None,
        taps: Iterable[Tap],
        *,
        calls: Mapping[Tap, int],
        clone: Iterable[Tap] = (),
        regions: Regions | None = None,
        route: str = 'tensor',
    ) -> Records:
        """Return the tensors at ``taps``, at least float32, without graph.

        Args:
            network: the frozen network.
            inputs: a batch in its normalisation.
            data_samples: one per image, or ``None``.
            taps: places to record.
            calls: how often each is passed.
            clone: taps recorded as a copy.
            regions: what a RoI head pools.
            route: how the network is run, see :mod:`mmstructkd.taps.forward`.

        Returns:
            For each tap its tensors in the order of the calls.
        """
        taps = tuple(dict.fromkeys(taps))
        if self.channels_last:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), self.autocast(inputs.device):
            compiles = route in ('features', 'tensor')
            records = self._run_compiled(network, inputs, taps, frozenset(clone)) if compiles else None
            if records is None:
                prepared = self._prepared(network)
                capture = tapped_forward(
                    prepared, inputs, data_samples, taps, calls=calls, clone=clone, regions=regions, route=route
                )
                records = capture.records
        # Connectors that take the teacher's side, and resizing, are no place for half precision, whoever asked for it.
        return {tap: [_at_least_float32(tensor) for tensor in tensors] for tap, tensors in records.items()}

    def _prepared(self, network: nn.Module) -> nn.Module:
        """The network, or one whose weights are in low precision and that shares everything else."""
        if self.low is None:
            return network
        if self._cast is None:
            self._cast = _twin(network, self.low)
        return self._cast

    def _run_compiled(
        self, network: nn.Module, inputs: Tensor, taps: tuple[Tap, ...], clone: frozenset[Tap]
    ) -> Records | None:
        """The compiled network's tensors; ``None`` where it must run as it is."""
        if not self.compiled or not taps or any(in_region_head(tap) for tap in taps):
            return None
        try:
            if taps not in self._programs:
                listening = _Listening(_twin(network, self.low), taps, clone).eval()
                # Weights never change: on a CPU they are laid out once for the kernels.
                options: dict[str, Any] | None = {'freezing': True} if inputs.device.type == 'cpu' else None
                self._programs[taps] = torch.compile(listening, dynamic=False, fullgraph=True, options=options)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # those of the compiler, about code of the network
                found = self._programs[taps](inputs)
        except Exception as err:
            # What a compiler cannot do shows in as many exceptions as it has parts. What is wrong with the
            # batch shows again below, without it.
            self.compiled = False
            self._programs.clear()
            reason = (str(err).strip().splitlines() or [''])[0]
            print_log(
                f'FrozenTeacher: compile=True does not work here, the teacher goes on without '
                f'({type(err).__name__}: {reason}).',
                'current',
                level=30,
            )
            return None
        records: Records = {tap: [] for tap in taps}
        for place, tensor in found:
            records[taps[place]].append(tensor)
        return records


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _twin(network: nn.Module, low: torch.dtype | None) -> nn.Module:
    """A copy of the modules that shares their tensors, except weights that are cast to ``low``."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    if low is not None:
        for module in network.modules():
            if type(module) in CAST:
                for weight in module.parameters(recurse=False):
                    shared[id(weight)] = nn.Parameter(weight.detach().to(low), requires_grad=False)
    return copy.deepcopy(network, shared)


def agree(first: Mapping[Tap, Sequence[Tensor]], second: Mapping[Tap, Sequence[Tensor]]) -> bool:
    """Whether tensors agree but for rounding.

    Args:
        first: by tap its tensors.
        second: the same taps.

    Returns:
        Whether all of them do.
    """

    def close(one: Tensor, two: Tensor) -> bool:
        largest = float(two.abs().nan_to_num().max()) if two.numel() else 0.0
        return one.shape == two.shape and torch.allclose(one, two, rtol=1e-3, atol=1e-3 * largest, equal_nan=True)

    return all(
        close(one.double(), two.double()) for tap in second for one, two in zip(first[tap], second[tap], strict=True)
    )


def unsteady(option: str, network: nn.Module) -> ConfigError:
    """The error for a network that shows something else each time it is asked.

    Args:
        option: what cannot be had with it.
        network: the network.

    Returns:
        The error, to raise.
    """
    return ConfigError(
        f'FrozenTeacher: `{option}` must have a teacher that shows the same of the same image, got '
        f'{type(network).__name__}, which differs from one run to the next: it keeps a state, or draws random numbers '
        'from a stream of its own (torch.Generator, numpy.random.default_rng). Those of torch, numpy and Python are '
        f'seeded for it. Leave `{option}` out.'
    )
