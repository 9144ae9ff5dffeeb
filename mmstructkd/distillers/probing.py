"""Runs a student once, as training will run it: what its taps give, and whether a gradient leaves them.

Nothing of it stays: the student itself is not run but a copy that shares its
weights, so that its buffers, its counters and its modes are what they were.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmstructkd.compat import without_pretrained
from mmstructkd.errors import ConfigError, TapError, is_count
from mmstructkd.run_config import current_config
from mmstructkd.taps import (
    Capture,
    ForwardFailed,
    Gates,
    RegionRecorder,
    Regions,
    Tap,
    find_route,
    in_features,
    in_point_head,
    in_region_head,
    probe_regions,
    recorded_points,
    with_points,
)
from mmstructkd.tasks.batches import fixed_size, needs_of, pipeline_size, synthetic_batch
from mmstructkd.tasks.targets import probe_samples
from mmstructkd.teachers.loading import init_without_weights

__all__ = [
    'Probe',
    'as_one_process',
    'check_probe_size',
    'explain_cut',
    'no_size_works',
    'on_device',
    'probe_devices',
    'probe_sizes',
    'probe_student',
]

#: Tried one after another on a network that says nothing about its input. Strides up to 128 give maps of sizes of
#: their own on the first, and 3x6 at stride 32: deformable convolutions refuse 2x4.
SIZES = ((96, 192), (256, 384), (512, 768), (800, 1344))
#: Most pixels of the first attempt on a network that says what it is fed in training.
CHEAP = 256 * 512


@dataclass(frozen=True, eq=False)
class Probe:
    """What a student showed.

    Attributes:
        inputs: what it was fed, shape (1, 3, H, W).
        samples: with the labels that a batch of its task has.
        capture: its records.
        regions: what RoI and point heads looked at.
        chosen: whether the student has chosen them.
    """

    inputs: Tensor
    samples: list[Any]
    capture: Capture
    regions: Regions
    chosen: bool

    def to(self, device: str) -> Probe:
        """The same on another device."""
        moved = moved_to(self.regions, device)
        return Probe(self.inputs.to(device), self.samples, on_device(self.capture, device), moved, self.chosen)


def moved_to(value: Any, device: str) -> Any:
    """The same with every tensor in it on another device: of dataclasses, dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {part.name: moved_to(getattr(value, part.name), device) for part in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, dict):
        return {key: moved_to(item, device) for key, item in value.items()}
    return type(value)(moved_to(item, device) for item in value) if type(value) in (list, tuple) else value


def on_device(capture: Capture, device: str) -> Capture:
    """Move the records of a capture.

    Args:
        capture: changed in place.
        device: where to.

    Returns:
        The capture.
    """
    for tap, tensors in capture.records.items():
        capture.records[tap] = [tensor.to(device) for tensor in tensors]
    return capture


def probe_devices(student: nn.Module) -> list[str | None]:
    """Devices to probe on: where the student is, then the GPU, which may know an operator that the CPU lacks.

    Args:
        student: the student.

    Returns:
        Names; ``None``: where it is.
    """
    here = next((parameter.device.type for parameter in student.parameters()), 'cpu')
    return [None, 'cuda'] if here == 'cpu' and torch.cuda.is_available() else [None]


@contextlib.contextmanager
def as_one_process() -> Iterator[None]:
    """Let the code of networks believe that there is one process only.

    A probe runs on the CPU, where NCCL can reduce nothing: the losses of mmdet
    average their denominators over the processes, and synchronised BatchNorm
    its statistics. All ask ``torch.distributed.is_initialized``. Every process
    probes the same, so that none waits for another meanwhile.

    Yields:
        Nothing.
    """
    asked = torch.distributed.is_initialized
    torch.distributed.is_initialized = lambda: False
    try:
        yield
    finally:
        torch.distributed.is_initialized = asked


def check_probe_size(size: Any) -> tuple[int, int] | None:
    """Read ``probe_size`` of a config.

    Args:
        size: (h, w), or ``None``.

    Returns:
        The same.

    Raises:
        ConfigError: it is neither.
    """
    if size is None:
        return None
    sides = list(size) if isinstance(size, (tuple, list)) else []
    if len(sides) != 2 or not all(is_count(side) and side > 0 for side in sides):
        raise ConfigError(
            f'StructuredDistiller: `probe_size` must be two whole numbers (h, w) above 0, got {size!r}. '
            'Write the size that training feeds, e.g. probe_size=(512, 1024), or leave it out.'
        )
    return (sides[0], sides[1])


def probe_sizes(networks: Sequence[nn.Module | None]) -> list[tuple[int, int]]:
    """Sizes to probe at, the cheapest first.

    What the networks say they are made for, and what the train pipeline makes
    where a run builds them, first shrunk to at most 256x512 pixels; where there
    is neither, 96x192 and then what detectors are fed.

    Args:
        networks: the student, then the teacher; ``None``: there is none.

    Returns:
        Pairs (H, W), each once.
    """
    cfg = current_config()
    asked = [fixed_size(network) for network in networks if network is not None]
    asked.insert(1, None if cfg is None else pipeline_size(cfg))
    made = [size for size in asked if size is not None]
    sizes: list[tuple[int, int]] = []
    for height, width in made:
        if height * width > CHEAP:
            scale = (CHEAP / (height * width)) ** 0.5
            sizes.append((max(int(height * scale) // 128, 1) * 128, max(int(width * scale) // 128, 1) * 128))
        sizes.append((height, width))
    largest = max((height * width for height, width in sizes), default=0)
    sizes += [size for size in SIZES if size[0] * size[1] > largest]
    return list(dict.fromkeys(sizes))


@contextlib.contextmanager
def _stand_in(network: nn.Module, *, initialised: bool = False) -> Iterator[nn.Module]:
    """A copy of a network that shares its parameters, in training mode, normalising by what it has stored.

    One image makes no batch statistics. What the copy changes in buffers and
    attributes is gone with it; parameters that its ``train()`` freezes are as they
    were afterwards. A copy that is ``initialised`` has parameters of
    its own: a network is built before it gets the weights that it starts from,
    and some (whose boxes are weights) cannot be trained without. A network that
    cannot be copied stands in for itself.
    """
    shared: dict[int, Any] = {} if initialised else {id(parameter): parameter for parameter in network.parameters()}
    with contextlib.ExitStack() as stack:
        for parameter in network.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
        try:
            twin = copy.deepcopy(network, shared)
        except (RuntimeError, TypeError, NotImplementedError) as err:  # an earlier batch's tensor may have a graph
            print_log(f'The student itself is probed, it cannot be copied: {err}', 'current', level=logging.DEBUG)
            twin = stack.enter_context(_restored(network))
        if initialised and twin is not network:
            with without_pretrained():
                init_without_weights(twin, level=logging.DEBUG)
        twin.train()
        for module in twin.modules():
            if 'BatchNorm' in type(module).__name__:
                module.eval()
        preprocessor = getattr(twin, 'data_preprocessor', None)
        if getattr(preprocessor, 'batch_augments', None) is not None:
            preprocessor.batch_augments = None  # they would resize or pad what is probed
        yield twin


@contextlib.contextmanager
def _restored(network: nn.Module) -> Iterator[nn.Module]:
    """Put back the attributes, modes and buffers of a network afterwards."""
    kept = [
        (
            module,
            dict(vars(module)),
            dict(module._modules),
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
        )
        for module in network.modules()
    ]
    try:
        yield network
    finally:
        for module, attributes, children, buffers in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
            module._buffers.clear()  # what was registered meanwhile goes
            for name, (buffer, values) in buffers.items():
                module._buffers[name] = buffer if values is None else buffer.copy_(values)


@contextlib.contextmanager
def _graph_only() -> Iterator[None]:
    """Build graphs, to see where gradients reach, and keep no tensor for them."""

    def refuse(_: Any) -> Tensor:
        raise RuntimeError('a probe has no backward pass')

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, refuse):
        yield


def _batch(twin: nn.Module, size: tuple[int, int]) -> tuple[Tensor, list[Any]]:
    """One image of noise with labels of the student's task, as its data preprocessor makes it."""
    device = next((parameter.device for parameter in twin.parameters()), torch.device('cpu'))
    preprocessor = getattr(twin, 'data_preprocessor', None)
    if getattr(preprocessor, 'size', None) is not None:
        preprocessor.size = size
    try:
        batch = synthetic_batch(twin, size, 1, needs=needs_of(twin, current_config()))
        inputs, samples = batch['inputs'], batch['data_samples']
        if isinstance(inputs, Tensor) and inputs.dim() == 4:
            return inputs.to(device), samples
    except Exception as err:  # a preprocessor may want anything of a data pipeline of its own
        print_log(f'The probe goes on without labels: {type(err).__name__}: {err}', 'current', level=10)
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    return noise.to(device), probe_samples(1, size)


def _routes(taps: Sequence[Tap]) -> list[str]:
    """Ways to run a student in training mode that may pass the taps, the cheapest first."""
    if all(map(in_features, taps)):
        return ['features', 'loss']
    return ['tensor', 'loss'] if any(map(in_region_head, taps)) else ['loss']


def probe_student(
    student: nn.Module,
    taps: Sequence[Tap],
    size: tuple[int, int],
    owners: Mapping[Tap, str] | None = None,
    gates: Sequence[str] = (),
) -> Probe:
    """Run a student as training does and record its taps.

    Args:
        student: a segmentor, depth estimator or detector.
        taps: places to record.
        size: (H, W) of the image.
        owners: who asks for each tap, for messages.
        gates: modules behind which no gradient passes.

    Returns:
        What it showed, without a graph.

    Raises:
        ConfigError: what lies before a gate is taught by no tap.
        ForwardFailed: the network cannot be run at this size.
        TapError: a tap names an output that is not there, or only inference
            passes it.
    """
    taps = tuple(dict.fromkeys(taps))
    try:
        with _stand_in(student) as twin:
            probe = _in_training(twin, taps, size, owners or {}, gates)
    except ForwardFailed as err:
        try:
            with _stand_in(student, initialised=True) as twin:
                probe = _in_training(twin, taps, size, owners or {}, gates)
        except ForwardFailed:
            with _stand_in(student) as twin:
                found = _in_inference(twin, taps, size)
            if found is None:
                raise err from None
            probe = found
            print_log(
                f'The training step of {type(student).__name__} could not be tried before training ({err}). '
                'Shapes are those of inference.',
                'current',
                level=30,
            )
    for tap, tensors in probe.capture.records.items():
        probe.capture.records[tap] = [tensor.detach() for tensor in tensors]
    return probe


def _regions(inputs: Tensor) -> Regions:
    """Some regions of the image, where it is."""
    regions = probe_regions(1, (int(inputs.shape[-2]), int(inputs.shape[-1])))
    boxes, masks = ([boxes.to(inputs.device) for boxes in part] for part in (regions.boxes, regions.masks))
    return dataclasses.replace(regions, boxes=boxes, masks=masks)


def _in_training(
    twin: nn.Module, taps: tuple[Tap, ...], size: tuple[int, int], owners: Mapping[Tap, str], gates: Sequence[str]
) -> Probe:
    """What a training step shows of the taps."""
    inputs, samples = _batch(twin, size)
    regions, chosen = _regions(inputs), False
    with (
        recorded_points(twin) as points,
        RegionRecorder(twin) as recorder,
        Gates(twin, gates) as closed,
        _graph_only(),
    ):
        capture, route = find_route(twin, inputs, samples, taps, _routes(taps), regions=regions)
    if route == 'loss' and any(map(in_region_head, taps)):
        regions, chosen = recorder.regions, True
    if any(in_point_head(twin, tap) for tap in taps):
        regions, chosen = with_points(regions, list(points)), True
    missed = [tap for tap, passes in capture.passes.items() if not passes]
    if missed:
        why = 'which the forward pass does not reach'
        if _in_inference(twin, missed[:1], size) is not None:
            why = 'which only runs in eval, not in a training step'
        raise TapError(
            f'{owners.get(missed[0], "a tap")}: `student` must name a module that runs in training, got '
            f'{str(missed[0])!r}, {why}. Tap a module that training calls.'
        )
    _check_gates(twin, closed, capture)
    return Probe(inputs, samples, capture, regions, chosen)


def _check_gates(twin: nn.Module, gates: Gates, capture: Capture) -> None:
    """Refuse a gate before which something would learn from nothing, which nobody would see."""
    names = {id(parameter): name for name, parameter in twin.named_parameters()}
    for name, left in gates.untaught(t for tensors in capture.records.values() for t in tensors).items():
        if left:
            shown = ', '.join(repr(names.get(id(parameter), '?')) for parameter in left[:3])
            raise ConfigError(
                f'StructuredDistiller: `gates` must have a term tapped between each gate and the one before it, got '
                f'{name!r}: {len(left)} parameters before it would learn from nothing ({shown}). Tap {name!r} in a '
                'term, or remove the gate.'
            )
        if left is None:
            raise ConfigError(
                f'StructuredDistiller: `gates` must name modules that training passes on the way to the taps of the '
                f'terms, with something that is trained before them and behind the gate before, got {name!r}. Tap '
                f'{name!r} in a term, or remove the gate.'
            )


def _in_inference(twin: nn.Module, taps: Sequence[Tap], size: tuple[int, int]) -> Probe | None:
    """What inference shows of the taps; ``None`` where it does not pass them either."""
    twin.eval()
    inputs, samples = _batch(twin, size)
    regions = _regions(inputs)
    with torch.no_grad(), contextlib.suppress(ForwardFailed, TapError):
        capture, _ = find_route(twin, inputs, samples, taps, ['tensor', 'predict'], regions=regions)
        if all(capture.passes.values()):
            return Probe(inputs, samples, capture, regions, False)
    return None


def explain_cut(reason: str, tap: Tap) -> str:
    """Say why no gradient leaves a tap, and what to do.

    Args:
        reason: of :attr:`~mmstructkd.taps.Capture.cut`.
        tap: the student's tap.

    Returns:
        The end of a message: what was got, and the way out.
    """
    outside = "Tap the block's own output, or set with_cp=False there"
    return {
        'checkpoint': f'inside a checkpointed block (with_cp), which runs without a graph and is computed again in the '
        f'backward pass. {outside}',
        'no_grad': 'in a part that runs under torch.no_grad(). Tap a module outside of it',
        'dtype': 'a tensor of whole numbers, which has no gradient. Tap what it is made of',
        'detached': 'a tensor that its own module has cut off the graph (detach). Tap a module before that',
        'frozen': f'in a frozen part of the student: nothing that is trained lies before {str(tap)!r}. Tap a deeper '
        'module, or train that part (frozen_stages=-1)',
    }[reason]


def no_size_works(failures: Sequence[tuple[str, tuple[int, int], ForwardFailed]], given: bool) -> TapError:
    """The error for networks that could not be run at any size.

    Args:
        failures: of each attempt which network failed, at which size, and how.
        given: whether the config has set ``probe_size``.

    Returns:
        The error.
    """
    role, _, first = failures[0]
    tried: dict[str, list[str]] = {}
    for _, (height, width), err in failures:
        tried.setdefault(str(err), []).append(f'{height}x{width}')
    got = '; '.join(f'{text} ({", ".join(dict.fromkeys(sizes))})' for text, sizes in list(tried.items())[:3])
    set_size = '`probe_size`' if given else 'probe_size=(h, w) of the distiller'
    return TapError(
        f'StructuredDistiller: the {role} ({first.network}) must run before training on one image of noise, so that '
        f'its taps {[str(tap) for tap in first.taps]} are known, got {got}. Set {set_size} to the size that training '
        'feeds, or tap a module before that.'
    )
