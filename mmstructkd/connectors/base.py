"""Base of the connectors: what a term may ask of one, and how one is built from its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import ConfigError, suggest
from mmstructkd.registry import MODELS

__all__ = ['Connector', 'build_connector', 'check_width', 'width_of']


class Connector(nn.Module):
    """A module between a tapped tensor and the loss.

    Trained with the student and dropped from its checkpoint. The term fills in
    ``in_channels`` and ``out_channels``, the widths of student and teacher,
    from the probe. There are two kinds: one module a level, whose ``forward``
    takes the student's tensor and returns it changed; or one module for all
    levels of a term (``joint``), whose ``forward`` takes the lists of tensors of
    both networks and returns two lists of equal length. A joint one gets lists
    of widths.

    Attributes:
        joint: one module sees all levels and both networks.
        needs_teacher: the term calls ``attach(network)`` with the teacher's
            network once, after construction.
        needs_input_size: the term sets ``input_size``, (h, w) of the student's
            input, before each forward.
        keeps_width: the student's width is what it was; else it becomes
            ``out_channels``.
        paper: title and arXiv number of where it comes from.
    """

    joint: bool = False
    needs_teacher: bool = False
    needs_input_size: bool = False
    keeps_width: bool = False
    paper: str = ''


def width_of(tensor: Tensor) -> int:
    """Return the number of channels of a tapped tensor.

    Args:
        tensor: a map (B, C, H, W), tokens (B, N, C), or vectors (N, C).

    Returns:
        C.

    Example:
        >>> import torch
        >>> width_of(torch.zeros(1, 3, 4, 5)), width_of(torch.zeros(1, 20, 3)), width_of(torch.zeros(7, 3))
        (3, 3, 3)
    """
    return tensor.shape[-1] if tensor.dim() == 3 else tensor.shape[1]


def check_width(owner: str, argument: str, value: Any) -> int:
    """Return a number of channels (or of anything else that is counted), or raise :class:`ConfigError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f'{owner}: `{argument}` must be an integer of at least 1, got {value!r}.')
    return value


def build_connector(owner: str, config: Any, in_channels: Sequence[int], out_channels: Sequence[int]) -> nn.Module:
    """Build one registered connector for widths that a probe found.

    Args:
        owner: who asks, for messages.
        config: its config, a dict with a ``type``; widths in it are kept.
        in_channels: widths of the student, one a level. A connector that is not
            joint takes the first.
        out_channels: widths of the teacher, likewise.

    Returns:
        The connector.

    Raises:
        ConfigError: not a dict with a ``type``, no registered connector, or
            arguments that it does not take.
    """
    if not isinstance(config, Mapping) or 'type' not in config:
        raise ConfigError(
            f'{owner}: `connector` must be a dict with a `type`, got {config!r}. '
            "Example: dict(type='mmstructkd.ConvConnector')."
        )
    kind = config['type']
    cls = MODELS.get(kind) if isinstance(kind, str) else kind
    if cls is None:
        known = [name for name, c in MODELS.module_dict.items() if c.__module__.startswith('mmstructkd.connectors.')]
        raise ConfigError(
            f'{owner}: `connector` must name a registered connector, got {kind!r}. '
            f'{suggest(str(kind).split(".")[-1], known)}'
        )
    joint = getattr(cls, 'joint', False)
    widths = {
        'in_channels': list(in_channels) if joint else in_channels[0],
        'out_channels': list(out_channels) if joint else out_channels[0],
    }
    try:
        return MODELS.build({**widths, **config})
    except TypeError as err:
        raise ConfigError(f'{owner}: `connector` cannot be built. {err}') from err
