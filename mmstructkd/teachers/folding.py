"""Folds frozen BatchNorm into the convolutions before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['fold_batch_norm']

# Subclasses may change the weight on its way (weight standardisation), so that only these very classes count.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, wrappers.Conv2d, wrappers.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED += (wrappers.ConvTranspose2d, wrappers.ConvTranspose3d)


class _Uses(TorchDispatchMode):
    """Counts how often each tensor is the argument of an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.kept: list[Tensor] = []  # a number stands for one tensor as long as that lives

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, dict(kwargs or {}))):
            if isinstance(leaf, Tensor):
                self.counts[id(leaf)] += 1
                self.kept.append(leaf)
        return func(*args, **dict(kwargs or {}))


def _pairs(network: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, nn.Module]:
    """Each BatchNorm with the convolution that feeds it and nothing else, as one run shows."""
    made: dict[int, nn.Module] = {}
    sources: dict[nn.Module, set[nn.Module | None]] = {}
    targets: dict[nn.Module, set[nn.Module]] = {}
    outputs: dict[nn.Module, list[Tensor]] = {}
    handles = []

    def after_convolution(module: nn.Module, args: tuple, output: Tensor) -> None:
        made[id(output)] = module
        outputs.setdefault(module, []).append(output)

    def before_norm(module: nn.Module, args: tuple) -> None:
        source = made.get(id(args[0]))
        sources.setdefault(module, set()).add(source)
        if source is not None:
            targets.setdefault(source, set()).add(module)

    for module in network.modules():
        if type(module) in CONVOLUTIONS + TRANSPOSED and not is_parametrized(module):
            handles.append(module.register_forward_hook(after_convolution))
        elif isinstance(module, _BatchNorm) and module.running_var is not None and not module.training:
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        with _Uses() as uses:
            run()
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for norm, convolutions in sources.items():
        source = next(iter(convolutions))
        if source is None or len(convolutions) > 1 or targets[source] != {norm}:
            continue
        if all(uses.counts[id(output)] == 1 for output in outputs[source]):
            found[norm] = source
    return found


def fold_batch_norm(network: nn.Module, run: Callable[[], Any], keep: Collection[str] = ()) -> dict[str, str]:
    """Fold each frozen BatchNorm into the convolution before it, in place.

    Which convolution is before it is not guessed from the order of definition:
    ``run`` is watched. A pair is folded where the norm gets nothing but this
    convolution's output and nobody else reads that, so that shared
    convolutions (levels with norms of their own), norms before activations and
    weights that are standardised or parametrised stay as they are. What the
    network computes changes by rounding alone; weights are folded in float64.

    Args:
        network: in eval, without gradient.
        run: runs all of the network that will be used, on any input.
        keep: names of modules whose pairs are left alone: their inputs and
            outputs stay what they were.

    Returns:
        Names of the norms, each replaced by an ``Identity``, with the names of
        their convolutions.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    folded = {}
    for norm, convolution in _pairs(network, run).items():
        if set(keep) & {*names[norm], *names[convolution]}:
            continue
        _fold(convolution, norm)
        for name in names[norm]:
            parent, _, leaf = name.rpartition('.')
            setattr(network.get_submodule(parent), leaf, nn.Identity().eval())
            folded[name] = names[convolution][0]
    return folded


def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    """Give a convolution the weights of the pair."""

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()

    weight, bias = fuse_conv_bn_weights(
        wide(convolution.weight),
        wide(convolution.bias),
        wide(norm.running_mean),
        wide(norm.running_var),
        norm.eps,
        wide(norm.weight),
        wide(norm.bias),
        transpose=type(convolution) in TRANSPOSED,
    )
    dtype = convolution.weight.dtype
    with torch.no_grad():
        convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        convolution.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
