"""Runs a network of mmseg or mmdet so far that its taps are passed.

A network can be run in several ways, here called routes; which of them pass a
tap is only known by trying. From the cheapest on:

- ``'features'``: backbone and neck;
- ``'tensor'``: ``mode='tensor'``, the path both frameworks have for a forward
  without losses and predictions, with auxiliary heads, and RoI heads on regions
  that are handed in;
- ``'predict'``: inference, for heads that run only there or need what leads up to it;
- ``'loss'``: the path of training. A frozen network takes it with the branches
  of training in its parts, while normalisation and dropout stay in eval.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmstructkd.errors import TapError
from mmstructkd.taps.capture import Capture
from mmstructkd.taps.points import replayed_points
from mmstructkd.taps.regions import REGION_HEAD, Regions, in_region_head, pool_regions, shows_regions
from mmstructkd.taps.tap import Tap

__all__ = ['FEATURES', 'ROUTES', 'ForwardFailed', 'find_route', 'in_features', 'run_tapped', 'tapped_forward']

AUXILIARY = 'auxiliary_head'
FEATURES = ('backbone', 'neck')
ROUTES = ('features', 'tensor', 'predict', 'loss')


class ForwardFailed(RuntimeError):
    """A network that no route leads to its taps; says where it failed.

    Args:
        network: the network.
        taps: the taps.
        reasons: for each route that was tried, what stopped it.
    """

    def __init__(self, network: nn.Module, taps: Sequence[Tap], reasons: Mapping[str, Exception]) -> None:
        route, error = list(reasons.items())[-1]  # the way that leaves least out
        lines = str(error).strip().splitlines()
        text = lines[0] if lines else traceback.extract_tb(error.__traceback__)[-1].line  # an assertion without a word
        super().__init__(f'{type(error).__name__} in {stage_of(error, network)}: {text}')
        self.network = type(network).__name__
        self.taps = tuple(taps)
        self.reasons = dict(reasons)
        self.route = route


def stage_of(error: BaseException, network: nn.Module) -> str:
    """Name the innermost module of a network that an exception passed on its way out.

    Args:
        error: the exception, with its traceback.
        network: the network.

    Returns:
        The module's dotted name in quotes, with the method where it is not ``forward``.
    """
    names = {id(module): name for name, module in network.named_modules()}
    found = type(network).__name__
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        name = names.get(id(frame.f_locals.get('self')))
        if name and not frame.f_code.co_name.startswith(('_call_impl', '_wrapped_call', 'inner')):
            method = frame.f_code.co_name
            found = repr(name) + ('' if method.startswith(('forward', '_forward', '_conv_forward')) else f' ({method})')
        trace = trace.tb_next
    return found


def in_features(tap: Tap) -> bool:
    """Whether a tap lies in backbone or neck."""
    return tap.module.split('.')[0] in FEATURES


def tapped_forward(
    network: nn.Module,
    inputs: Tensor,
    data_samples: Sequence[Any] | None,
    taps: Iterable[Tap],
    *,
    calls: Mapping[Tap, int] | None = None,
    clone: Iterable[Tap] = (),
    regions: Regions | None = None,
    route: str = 'tensor',
) -> Capture:
    """Run ``network`` along a route and record its taps.

    Args:
        network: a segmentor, depth estimator or detector.
        inputs: preprocessed images, shape (B, 3, H, W).
        data_samples: one per image, with their ``metainfo``, or ``None``.
        taps: places to record.
        calls: how often each is passed; given, the forward ends at the last.
        clone: taps recorded as a copy.
        regions: what a RoI head pools and a point head scores; only for taps in them.
        route: one of :data:`ROUTES`.

    Returns:
        The capture, its records filled as far as the network got.

    Raises:
        TapError: a RoI head is tapped and there are no regions.
    """
    taps = tuple(taps)
    capture = Capture(network, taps, calls=calls, clone=clone)
    with capture:
        run_tapped(network, inputs, data_samples, taps, regions=regions, route=route)
    return capture


def find_route(
    network: nn.Module,
    inputs: Tensor,
    data_samples: Sequence[Any] | None,
    taps: Iterable[Tap],
    routes: Iterable[str],
    *,
    clone: Iterable[Tap] = (),
    regions: Regions | None = None,
) -> tuple[Capture, str]:
    """Run ``network`` along several routes, until one passes every tap.

    A route that ends in an exception counts only if no other passes all taps;
    what it had passed by then is what there is to know, and the capture says
    that it is partial.

    Args:
        network: a segmentor, depth estimator or detector.
        inputs: preprocessed images, shape (B, 3, H, W).
        data_samples: one per image, or ``None``.
        taps: places to record.
        routes: which to try, of :data:`ROUTES`.
        clone: taps recorded as a copy.
        regions: what a RoI head pools and a point head scores; only for taps in them.

    Returns:
        The capture and the route. Where some taps were passed by no route at
        all, their records are empty.

    Raises:
        ForwardFailed: the network itself failed on each route.
        TapError: what a tap names is not there.
    """
    taps = tuple(taps)
    partial: tuple[Capture, str] | None = None
    short: tuple[Capture, str] | None = None
    failed: dict[str, Exception] = {}
    wrong: TapError | None = None
    for route in routes:
        capture = Capture(network, taps, clone=clone)
        try:
            with capture:
                run_tapped(network, inputs, data_samples, taps, regions=regions, route=route)
        except TapError as err:
            wrong = wrong or err
            continue
        except Exception as err:  # whatever a network runs into that is run in a way that it is not made for
            failed[route] = err
            if all(capture.passes.values()) and partial is None:
                capture.partial = True
                partial = (capture, route)
            continue
        if all(capture.passes.values()):
            own = _own_regions(network, capture, route)
            if own is not None:
                raise wrong or own  # why the regions of the student could not be had
            return capture, route
        if short is None or _passed(capture) > _passed(short[0]):
            short = (capture, route)
    if partial is not None:
        return partial
    if wrong is not None:
        raise wrong
    if short is not None:
        return short
    raise ForwardFailed(network, taps, failed)


def _passed(capture: Capture) -> int:
    """How many taps were passed."""
    return sum(map(bool, capture.passes.values()))


def _own_regions(network: nn.Module, capture: Capture, route: str) -> TapError | None:
    """The error for tensors of regions that a network has chosen for itself: those of the other are others."""
    chosen = [tap for tap in capture.records if shows_regions(tap)]
    if not chosen or route in ('tensor', 'features') or network.training:
        return None
    return TapError(
        f'Tap {str(chosen[0])!r}: a teacher must look at the regions of the student, got a module of '
        f'{type(network).__name__} that can only be run on its own. Tap the neck instead.'
    )


def run_tapped(
    network: nn.Module,
    inputs: Tensor,
    data_samples: Sequence[Any] | None,
    taps: Sequence[Tap],
    *,
    regions: Regions | None = None,
    route: str = 'tensor',
) -> None:
    """Run what is tapped of ``network``, without listening.

    Args:
        network: a segmentor, depth estimator or detector.
        inputs: preprocessed images, shape (B, 3, H, W).
        data_samples: one per image, or ``None``.
        taps: places that must be passed.
        regions: what a RoI head pools and a point head scores; only for taps in them.
        route: one of :data:`ROUTES`.

    Raises:
        TapError: a RoI head is tapped and there are no regions.
    """
    if route == 'features':
        network.extract_feat(inputs)
    elif route == 'predict':
        _predict(network, inputs, data_samples)
    elif route == 'loss':
        # Some networks change their samples, and others have still to see them.
        samples = None if data_samples is None else [_copied(sample) for sample in data_samples]
        frozen = contextlib.nullcontext() if network.training else branches_of_training(network)
        with frozen, replayed_points(network, getattr(regions, 'points', ())):
            network(inputs, samples, mode='loss')
    elif hasattr(network, REGION_HEAD):
        _two_stage(network, inputs, taps, regions)
    elif any(tap.module.split('.')[0] == AUXILIARY for tap in taps):
        _heads(network, inputs, taps)
    else:
        network(inputs, data_samples, mode='tensor')


def _copied(sample: Any) -> Any:
    """A data sample whose fields can be replaced, with the tensors of the old one."""
    if not isinstance(sample, BaseDataElement):
        return copy.deepcopy(sample)
    twin = sample.new()
    for name, value in sample.items():
        if isinstance(value, BaseDataElement):
            twin.set_field(value.new(), name, dtype=type(value))
    return twin


@contextlib.contextmanager
def branches_of_training(network: nn.Module) -> Iterator[None]:
    """Let the parts of a network take the branches of training, and nothing else of it.

    Backbone, neck and heads of some networks give more outputs then, decided by
    their own ``training``. Only these parts are told so: normalisation, dropout
    and everything else inside them go on as in eval.

    Args:
        network: a network in eval.

    Yields:
        Nothing.
    """
    parts = [network]
    for name, child in network.named_children():
        parts += child if isinstance(child, nn.ModuleList) else [child]
        if name == REGION_HEAD:
            for head in child.children():
                parts += head if isinstance(head, nn.ModuleList) else [head]
    told = [
        part
        for part in parts
        if not part.training and not type(part).__module__.startswith('torch.') and next(part.children(), None)
    ]
    try:
        for part in told:
            part.training = True
        yield
    finally:
        for part in told:
            part.training = False


def _predict(network: nn.Module, inputs: Tensor, data_samples: Sequence[Any] | None) -> None:
    """Infer; of a segmentor the whole image at once, whatever its windows."""
    if hasattr(network, 'encode_decode'):
        size = tuple(inputs.shape[2:])
        whole = {'ori_shape': size, 'img_shape': size, 'pad_shape': size, 'padding_size': [0, 0, 0, 0]}
        metas = [whole] * len(inputs) if data_samples is None else [sample.metainfo for sample in data_samples]
        network.encode_decode(inputs, metas)
    else:
        samples = None if data_samples is None else [_copied(sample) for sample in data_samples]
        network(inputs, samples, mode='predict')


def _heads(network: nn.Module, inputs: Tensor, taps: Sequence[Tap]) -> None:
    """Run those heads of a segmentor on its features that are tapped, the auxiliary ones as well."""
    features = network.extract_feat(inputs)
    tapped = {tap.module.split('.')[0] for tap in taps}
    if 'decode_head' in tapped:
        head = network.decode_head
        first, *others = head if isinstance(head, nn.ModuleList) else [head]
        scores = first(features)
        for head in others:
            scores = head(features, scores)
    heads = getattr(network, AUXILIARY)
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        head(features)


def _two_stage(network: nn.Module, inputs: Tensor, taps: Sequence[Tap], regions: Regions | None) -> None:
    """Run what is tapped of a two-stage detector, part by part.

    Its region proposals, which cost much and are noise in a probe, never; its
    RoI head on the regions that are handed in.
    """
    features = network.extract_feat(inputs)
    if any(tap.module.split('.')[0] == 'rpn_head' for tap in taps):
        network.rpn_head(features)
    inside = [tap for tap in taps if in_region_head(tap)]
    if inside:
        if regions is None:
            raise TapError(
                f'Tap {str(inside[0])!r}: a RoI head needs the regions that the student pools, got none. '
                'The student must be a two-stage detector as well: tap the neck instead.'
            )
        pool_regions(network, features, regions, inside)
