"""Base of the connectors: what a term may ask of one, and how one is built from its config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, check_count, check_ndim, shown
from mmstructkd.registry import MODELS, build_part, look_up

#: More than any layer has; a number above is a slip that would fill the memory.
MAX_WIDTH = 2**18
#: Likewise the side of a kernel.
MAX_KERNEL = 63

__all__ = ['Connector', 'build_connector', 'check_input', 'check_width', 'check_widths', 'width_of']


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
        gives_log_probabilities: what it makes of the teacher are logarithms of
            probabilities over the classes, which only losses over classes can read.
        teacher_outputs: where in what the tapped module of the teacher gives its
            tensors lie, as keys, for a term whose teacher taps one module and
            names no output of it. Empty: the output itself.
        paper: title and arXiv number of where it comes from.
    """

    joint: bool = False
    needs_teacher: bool = False
    needs_input_size: bool = False
    keeps_width: bool = False
    gives_log_probabilities: bool = False
    teacher_outputs: tuple[tuple[int | str, ...], ...] = ()
    paper: str = ''


def width_of(tensor: Tensor) -> int:
    """Return the number of channels of a tapped tensor.

    Args:
        tensor: a map (B, C, H, W), tokens (B, N, C), vectors (N, C), or numbers (C,).

    Returns:
        C.

    Example:
        >>> import torch
        >>> width_of(torch.zeros(1, 3, 4, 5)), width_of(torch.zeros(1, 20, 3)), width_of(torch.zeros(7, 3))
        (3, 3, 3)
    """
    return int(tensor.shape[-1] if tensor.dim() == 3 else tensor.shape[min(1, tensor.dim() - 1)])


def check_width(owner: str, argument: str, value: Any) -> int:
    """Return a number of channels (or of anything else that is counted), or raise :class:`ConfigError`."""
    check_count(owner, argument, value, maximum=MAX_WIDTH)
    return int(value)


def check_widths(owner: str, argument: str, values: Any) -> None:
    """Raise :class:`ConfigError` unless ``values`` is a list of widths, one a level."""
    if not isinstance(values, (list, tuple)) or not values:
        raise ConfigError(f'{owner}: `{argument}` must be a list of at least one width, got {shown(values)}.')
    for value in values:
        check_width(owner, argument, value)


def check_input(owner: str, student: Tensor, in_channels: int, layout: str = '(B, C, H, W)') -> None:
    """Raise :class:`ShapeError` unless a tensor of the student is a map of the width that a connector was built for."""
    check_ndim(owner, 'student', student, 4, layout)
    if student.shape[1] != in_channels:
        raise ShapeError(
            f'{owner}: `in_channels` must be the width of the student, {student.shape[1]}, got {in_channels}. '
            'Leave it out of the config: the term fills it in.'
        )


def build_connector(
    owner: str, config: Any, in_channels: Sequence[int], out_channels: Sequence[int], argument: str = 'connector'
) -> nn.Module:
    """Build one registered connector for widths that a probe found.

    Args:
        owner: who asks, for messages.
        config: its config, a dict with a ``type``; an ``out_channels`` in it is kept.
        in_channels: widths of the student, one a level. A connector that is not
            joint takes the first.
        out_channels: widths of the teacher, likewise.
        argument: under which the config was given, for messages.

    Returns:
        The connector.

    Raises:
        ConfigError: not a dict with a ``type``, no registered connector, or
            arguments that it does not take.
    """
    kind = config.get('type') if isinstance(config, Mapping) else None
    joint = getattr(look_up(MODELS, kind) if isinstance(kind, str) else kind, 'joint', False)
    widths = {
        'in_channels': list(in_channels) if joint else in_channels[0],
        'out_channels': list(out_channels) if joint else out_channels[0],
    }
    own = config.get('in_channels') if isinstance(config, Mapping) else None
    if own is not None and (list(own) if isinstance(own, (list, tuple)) else own) != widths['in_channels']:
        raise ConfigError(
            f'{owner}: `in_channels` of `{argument}` must be the width of the student, {widths["in_channels"]}, '
            f'got {shown(own)}. Leave it out: the probe fills it in.'
        )
    return build_part(
        owner,
        argument,
        config,
        what='connector',
        example="dict(type='mmstructkd.ConvConnector')",
        known=Connector,
        filled=widths,
    )
