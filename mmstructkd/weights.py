"""Whether the weights in a checkpoint are those of a network: which keys fit, and whether the values can be true."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmstructkd.errors import CheckpointError, suggest

__all__ = ['check_place', 'check_values', 'describe_mismatch', 'take_prefix', 'tensors_in']

#: Largest magnitudes taken for true. Trained parameters stay below some hundreds (folded and re-parametrised
#: convolutions below 1e5), statistics of images of 0..255 through a wide first layer below 1e9; one flipped bit of a
#: float32's exponent is a factor of 256 at least, of its high bits 1e19 and more.
PARAMETER_LIMIT = 1e6
BUFFER_LIMIT = 1e12

#: Share of the missing keys that lie under a prefix, for it to be the reason.
NEARLY_ALL = 0.9
SHOWN = 5
SEEN = 'num_batches_tracked'


# --- keys ----------------------------------------------------------------------------------------------------


def tensors_in(content: Mapping[str, Any], owner: str, checkpoint: str) -> dict[str, Tensor]:
    """Take the weights out of a checkpoint, without the ``module.`` of a distributed run.

    Args:
        content: of the file.
        owner: who asks, for the message.
        checkpoint: name of the file.

    Returns:
        Tensors by key.

    Raises:
        CheckpointError: there are none, or they lie elsewhere.
    """
    given = content.get('state_dict', content)
    weights = {}
    if isinstance(given, Mapping):
        weights = {str(key).removeprefix('module.'): value for key, value in given.items() if isinstance(value, Tensor)}
    if weights:
        return weights
    elsewhere = [
        repr(key)
        for key, value in content.items()
        if isinstance(value, Mapping) and any(isinstance(inner, Tensor) for inner in value.values())
    ]
    where = (
        f'tensors under {" and ".join(elsewhere)} only' if elsewhere else f'no tensor under its keys {_cut(content)}'
    )
    raise CheckpointError(
        f'{owner}: `checkpoint` must hold weights, as they are or under `state_dict`, got {checkpoint!r} with {where}. '
        "Save that part in a new file as {'state_dict': ...}."
    )


def check_place(content: Any, own: Iterable[str], owner: str, checkpoint: str) -> None:
    """Raise where a checkpoint has the weights of a network, but not where they are looked for.

    For those who load leniently: whatever else does not fit is theirs.

    Args:
        content: of the file.
        own: keys of the network.
        owner: who asks, for the message.
        checkpoint: name of the file.

    Raises:
        CheckpointError: all of them lie under a prefix, or under a key of the file.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f'{owner}: `checkpoint` must hold a dict of weights, got {checkpoint!r} with a {type(content).__name__}. '
            'Save `model.state_dict()`.'
        )
    weights = tensors_in(content, owner, checkpoint)
    missing = [key for key in own if not key.endswith(SEEN)]
    prefixes = {} if any(key in weights for key in missing) else prefixes_of(missing, weights)
    if prefixes:
        raise CheckpointError(_under_prefix(owner, checkpoint, prefixes, len(missing), None))


def take_prefix(weights: Mapping[str, Tensor], prefix: str, own: Iterable[str], owner: str) -> dict[str, Tensor]:
    """Keep the keys under a prefix, without it.

    Args:
        weights: tensors by key.
        prefix: what keys begin with; its last point may be left out.
        own: keys of the network, for those written with underscores (``ema_backbone_conv1_weight``, of mmcv 1.x).
        owner: who asks, for the message.

    Returns:
        Tensors by shortened key.

    Raises:
        CheckpointError: no key begins so.
    """
    if not prefix.endswith('.') and any(key.startswith(f'{prefix}.') for key in weights):
        prefix += '.'
    joined = {key.replace('.', '_'): key for key in own} if prefix.endswith('_') else {}
    taken = {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}
    if not taken:
        known = dict.fromkeys(key_prefix(key) for key in weights)
        raise CheckpointError(
            f'{owner}: `prefix` must be what keys of the checkpoint begin with, got {prefix!r}. '
            f'{suggest(prefix, known)}'
        )
    return {joined.get(key, key): value for key, value in taken.items()}


def key_prefix(key: str) -> str:
    """First part of a key, with what divides it from the rest."""
    return 'ema_' if key.startswith('ema_') else key.partition('.')[0] + '.'


def prefixes_of(missing: Sequence[str], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Find the prefixes under which nearly all missing keys are there.

    Args:
        missing: keys of the network that the checkpoint does not have.
        weights: what it has.

    Returns:
        How many of them, by prefix; the largest number first.
    """
    if not missing:
        return {}
    some = [missing[round(place * (len(missing) - 1) / 4)] for place in range(5)]
    candidates = dict.fromkeys(
        key.removesuffix(form)
        for probe in some
        for form in (probe, probe.replace('.', '_'))
        for key in weights
        if key.endswith(form) and key != form
    )
    found = {}
    for prefix in candidates:
        count = sum(prefix + key in weights or prefix + key.replace('.', '_') in weights for key in missing)
        if count >= NEARLY_ALL * len(missing):
            found[prefix] = count
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def describe_mismatch(
    owner: str,
    checkpoint: str,
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    prefix_key: str | None = None,
) -> str:
    """Say how the keys and shapes of a checkpoint differ from a network's.

    Args:
        owner: who asks.
        checkpoint: name of the file.
        own: state of the network.
        weights: tensors of the file.
        prefix_key: what to set to take the part under a prefix (``'prefix={} in `teacher`'``), if there is such a key.

    Returns:
        The message: one line where a prefix or surplus keys are all it is, else
        a few keys of each kind. Empty if all fits.
    """
    missing, unexpected, misshapen = compare_keys(own, weights)
    if not (missing or unexpected or misshapen):
        return ''
    prefixes = prefixes_of(missing, weights)
    if prefixes:
        return _under_prefix(owner, checkpoint, prefixes, len(missing), prefix_key)
    if not (missing or misshapen):
        groups = Counter(key_prefix(key) for key in unexpected)
        under = ', '.join(f'{count} under {name!r}' for name, count in groups.most_common(SHOWN))
        return (
            f'{owner}: `checkpoint` must give the parameters of the config and no others, got {checkpoint!r} with '
            f'{len(unexpected)} more ({under}; unexpected: {_cut(unexpected)}). Save it without them, or use the '
            'config this checkpoint was trained with (allow_random=True leaves them out).'
        )
    lines = [
        f'{owner}: `checkpoint` must give every parameter of the config, got {checkpoint!r} with '
        f'{len(missing)} missing, {len(unexpected)} unexpected and {len(misshapen)} of another shape.'
    ]
    for key in misshapen:
        if (
            key.split('.')[-2:-1] in (['conv_seg'], ['fc_cls'], ['cls'])
            and own[key].shape[1:] == weights[key].shape[1:]
        ):
            lines.append(
                f'  The checkpoint has {weights[key].shape[0]} classes, the config num_classes={own[key].shape[0]} '
                f'({key}).'
            )
    lines += _few([f'  missing: {key} {tuple(own[key].shape)}' for key in missing], 'missing')
    lines += _few([f'  unexpected: {key} {tuple(weights[key].shape)}' for key in unexpected], 'unexpected')
    shapes = [f'  shape: {k} is {tuple(weights[k].shape)}, must be {tuple(own[k].shape)}' for k in misshapen]
    lines += _few(shapes, 'of another shape')
    lines.append('Use the config this checkpoint was trained with (allow_random=True lets the rest stay random).')
    return '\n'.join(lines)


def _under_prefix(
    owner: str, checkpoint: str, prefixes: Mapping[str, int], missing: int, prefix_key: str | None
) -> str:
    """Say where the weights lie, and how to take them."""
    where = ' and '.join(f'{prefix!r} ({count} of {missing} keys)' for prefix, count in prefixes.items())
    way_out = 'Save that part without its prefix in a new file.'
    if prefix_key is not None:
        way_out = f'Set {prefix_key.format(repr(next(iter(prefixes))))} to take that part.'
    return (
        f'{owner}: `checkpoint` must give every parameter of the config, got {checkpoint!r}, where they lie under '
        f'{where}. {way_out}'
    )


def compare_keys(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Return the missing, the unexpected and the keys of another shape."""
    missing = [key for key in own if key not in weights and not key.endswith(SEEN)]
    unexpected = [key for key in weights if key not in own and not key.startswith('data_preprocessor.')]
    return missing, unexpected, [key for key in own if key in weights and own[key].shape != weights[key].shape]


def _few(lines: list[str], kind: str) -> list[str]:
    """The first lines, and how many more."""
    more = len(lines) - SHOWN
    return lines if more <= 1 else [*lines[:SHOWN], f'  ... and {more} more {kind}']


def _cut(names: Iterable[Any]) -> str:
    """A few names, and how many more."""
    names = list(names)
    shown = ', '.join(str(name) for name in names[:3])
    return shown + (f' and {len(names) - 3} more' if len(names) > 3 else '')


# --- values --------------------------------------------------------------------------------------------------


def check_values(network: nn.Module, weights: Mapping[str, Tensor], owner: str, checkpoint: str) -> None:
    """Raise unless the tensors of a checkpoint can be those of a trained network.

    Floating where the network has floating numbers (of any width), finite, of
    plausible size, no variance below 0, and no part of the network with nothing
    but zeros in its weights.

    Args:
        network: the network, with other weights so far.
        weights: tensors of the file, by the network's keys and in its shapes.
        owner: who asks, for the message.
        checkpoint: name of the file.

    Raises:
        CheckpointError: the message has the first tensors, with their values.
    """
    parameters = {key for key, _ in network.named_parameters(remove_duplicate=False)}
    own = network.state_dict()
    wrong = []
    for key, value in weights.items():
        fault = _fault(key, value, own[key], PARAMETER_LIMIT if key in parameters else BUFFER_LIMIT)
        if fault:
            wrong.append(f'{key} {fault}')
    if not wrong:
        wrong = [f'{name} is all zero' for name in _dead_parts(network, weights, parameters)]
    if wrong:
        more = f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''
        raise CheckpointError(
            f'{owner}: `checkpoint` must hold the weights of a trained network, got {checkpoint!r}, where '
            f'{", ".join(wrong[:SHOWN])}{more}. The file is damaged, or its training failed; take another one.'
        )


def _fault(key: str, value: Tensor, own: Tensor, limit: float) -> str:
    """What is wrong with one tensor; empty if nothing is."""
    kind = str(value.dtype).removeprefix('torch.')
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        return f'is no plain tensor ({"meta" if value.is_meta else value.layout}, {kind})'
    if value.is_complex() and not own.is_complex():
        return f'is {kind}, not real'
    if own.is_floating_point() and not value.is_floating_point():
        return f'is {kind}, not floating'
    if value.numel() == 0 or not (value.is_floating_point() or value.is_complex()):
        return ''
    wide = value.detach().abs().float() if value.is_complex() else value.detach().float()
    # A mask of attention holds infinities: what the network itself puts there is no damage.
    compared = wide
    if limit == BUFFER_LIMIT and not bool(torch.isfinite(own).all()):
        compared = wide[torch.isfinite(own.to(wide.device))]
    odd = int((~torch.isfinite(compared)).sum())
    if odd:
        return f'is not finite ({odd} of {value.numel()} values)'
    if compared.numel() == 0:
        return ''
    largest = float(compared.abs().max())
    if largest > limit:
        return f'is as large as {largest:.3g} (above {limit:g})'
    if key.endswith('running_var') and float(compared.min()) < 0:
        return f'is a variance below 0 ({float(compared.min()):.3g})'
    return ''


def _dead_parts(network: nn.Module, weights: Mapping[str, Tensor], parameters: set[str]) -> list[str]:
    """Names of the network's children whose weight matrices hold nothing but zeros."""
    alive: dict[str, bool] = {}
    for key in parameters & weights.keys():
        # One vector may well be zero (a bias, the scale of a residual branch); all kernels of a part may not.
        if weights[key].dim() > 1 and weights[key].numel() > 0:
            part = key.partition('.')[0]
            alive[part] = alive.get(part, False) or bool(weights[key].any())
    return [name for name, _ in network.named_children() if alive.get(name) is False]
