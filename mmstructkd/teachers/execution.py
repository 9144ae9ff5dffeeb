"""How a frozen network is run: in which precision, memory format, and compiled or not."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import wrappers
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.errors import check_flag, check_one_of
from mmstructkd.taps import Regions, Tap, in_features, in_region_head, run_tapped, tapped_forward

__all__ = ['DTYPES', 'Execution']

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

    Raises:
        ConfigError: an unknown ``dtype``, or a flag that is none.
    """

    def __init__(self, *, dtype: str | None = None, channels_last: bool | None = None, compiled: bool = False) -> None:
        if dtype is not None:
            check_one_of('FrozenTeacher', 'dtype', dtype, tuple(DTYPES))
        if channels_last is not None:
            check_flag('FrozenTeacher', 'channels_last', channels_last)
        check_flag('FrozenTeacher', 'compile', compiled)
        self.dtype, self.compiled = dtype, compiled
        self.channels_last = self.low is not None if channels_last is None else channels_last
        self._cast: nn.Module | None = None
        self._programs: dict[tuple[Tap, ...], Any] = {}

    def renewed(self) -> Execution:
        """The same settings, nothing prepared yet."""
        return Execution(dtype=self.dtype, channels_last=self.channels_last, compiled=self.compiled)

    @property
    def cast_network(self) -> nn.Module | None:
        """The copy of the network whose weights were cast; ``None``: there is none yet."""
        return self._cast

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
