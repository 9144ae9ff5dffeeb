"""Exceptions of mmstructkd and the checks that raise them.

Every message reads ``<Owner>: `<argument>` must <rule>, got <value>. <Way out>.``
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Collection, Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

#: More classes than any label map has; a number above is a slip that would fill the memory.
MAX_CLASSES = 2**16
#: Likewise the side of a map, a kernel or a grid.
MAX_SIDE = 2**16

__all__ = [
    'MAX_CLASSES',
    'MAX_SIDE',
    'ArgumentError',
    'CheckpointError',
    'ConfigError',
    'ShapeError',
    'TapError',
    'check_count',
    'check_finite_number',
    'check_flag',
    'check_ndim',
    'check_one_of',
    'check_positive',
    'check_same',
    'check_seed',
    'check_some_weight',
    'is_count',
    'is_finite_number',
    'prefix_errors',
    'shown',
    'suggest',
]


class ConfigError(ValueError):
    """A config value that cannot be used."""


class ArgumentError(ConfigError, TypeError):
    """An argument that is unknown, missing, or given twice: for Python a ``TypeError``."""


class ShapeError(ValueError):
    """Tensors whose shapes do not fit an operation."""


class TapError(ConfigError):
    """A tap that names nothing, or that a forward pass does not reach."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, is not trusted, or does not fit."""


def suggest(name: str, known: Collection[str]) -> str:
    """Return a sentence with the known names nearest to ``name``.

    Args:
        name: the name that was not found.
        known: the names there are.

    Returns:
        ``"Did you mean 'a' or 'b'?"``, or a list of what is known where
        nothing is near. Empty if nothing is known.
    """
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    if near:
        return 'Did you mean ' + ' or '.join(repr(n) for n in near) + '?'
    if not known:
        return ''
    shown = sorted(known)
    listing = ', '.join(repr(n) for n in shown[:12])
    return f'Known: {listing}' + (f', and {len(shown) - 12} more.' if len(shown) > 12 else '.')


def shown(value: Any, limit: int = 200) -> str:
    """Return ``value`` as it is put into a message: on one line, and not the whole of a network or config.

    Args:
        value: what was got.
        limit: characters after which it is cut.

    Returns:
        Its ``repr``; of a module its class, of another object whose ``repr``
        has several lines the first of them.

    Example:
        >>> shown('a'), shown({'a': [1, 2]})
        ("'a'", "{'a': [1, 2]}")
    """
    if hasattr(value, 'named_modules') and not isinstance(value, type):
        return f'a built {type(value).__name__}'
    lines = repr(value).splitlines() or ['']
    cut = len(lines) > 1 or len(lines[0]) > limit
    return lines[0][:limit].rstrip() + (' ...' if cut else '')


@contextlib.contextmanager
def prefix_errors(owner: str) -> Iterator[None]:
    """Put ``owner`` before the message of every ``ValueError`` that is raised inside.

    Args:
        owner: e.g. ``"term 'pixel'"``.

    Yields:
        Nothing.

    Example:
        >>> with prefix_errors("term 'pixel'"):
        ...     raise ConfigError('PixelwiseKLLoss: `temperature` must be above 0, got 0.')
        Traceback (most recent call last):
        mmstructkd.errors.ConfigError: term 'pixel': PixelwiseKLLoss: `temperature` must be above 0, got 0.
    """
    try:
        yield
    except ValueError as err:
        raise type(err)(f'{owner}: {err}') from err


def check_one_of(owner: str, argument: str, value: Any, allowed: Collection[Any]) -> None:
    """Raise :class:`ConfigError` unless ``value`` is one of ``allowed``."""
    # Not `in`: 1 equals True, and an array is not simply equal to anything.
    if not any(type(value) is type(a) and value == a for a in allowed):
        names = [str(a) for a in allowed]
        raise ConfigError(
            f'{owner}: `{argument}` must be one of {list(allowed)!r}, got {shown(value)}. {suggest(str(value), names)}'
        )


def is_count(value: Any) -> bool:
    """Whether ``value`` is a whole number: an ``int``, and no ``bool``."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: Any) -> bool:
    """Whether ``value`` is a real number that a float can hold, and no ``bool``."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def check_flag(owner: str, argument: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is ``True`` or ``False`` itself.

    What is merely true or false is refused: ``'no'`` is true.
    """
    if not isinstance(value, bool):
        raise ConfigError(f'{owner}: `{argument}` must be True or False, got {shown(value)}.')


def check_count(owner: str, argument: str, value: Any, minimum: int = 1, maximum: int | None = None) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a whole number from ``minimum`` to ``maximum``.

    Args:
        owner: who asks, for the message.
        argument: name of the argument.
        value: the value.
        minimum: the least that is allowed.
        maximum: the most; ``None``: no limit. It need not be a limit of sense: what would fill the memory
            is a slip, and is better refused by name.
    """
    if not is_count(value) or value < minimum or (maximum is not None and value > maximum):
        above = is_count(value) and value >= minimum
        rule = f'of at most {maximum}' if above else f'of at least {minimum}'
        raise ConfigError(f'{owner}: `{argument}` must be an integer {rule}, got {shown(value)}.')


def check_finite_number(
    owner: str, argument: str, value: Any, *, minimum: float | None = None, maximum: float | None = None
) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a finite number from ``minimum`` to ``maximum``."""
    low, high = minimum is not None, maximum is not None
    if (
        not is_finite_number(value)
        or (minimum is not None and value < minimum)
        or (maximum is not None and value > maximum)
    ):
        rule = 'be a finite number'
        if low and high:
            rule += f' from {minimum:g} to {maximum:g}'
        elif low or high:
            rule += f' of at least {minimum:g}' if low else f' of at most {maximum:g}'
        raise ConfigError(f'{owner}: `{argument}` must {rule}, got {shown(value)}.')


def check_seed(owner: str, seed: Any) -> None:
    """Raise :class:`ConfigError` unless ``seed`` is ``None`` or an integer that torch's generators take."""
    if seed is not None and (not is_count(seed) or not 0 <= seed < 2**63):
        raise ConfigError(f'{owner}: `seed` must be an integer of at least 0 or None, got {shown(seed)}.')


def check_positive(owner: str, argument: str, value: Any, maximum: float | None = None) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a finite number above zero, and at most ``maximum``."""
    if not is_finite_number(value) or value <= 0 or (maximum is not None and value > maximum):
        most = '' if maximum is None else f' and at most {maximum:g}'
        raise ConfigError(f'{owner}: `{argument}` must be a finite number above 0{most}, got {shown(value)}.')


def check_some_weight(owner: str, **weights: float) -> None:
    """Raise :class:`ConfigError` unless each weight is finite and at least 0, and one of them is above 0.

    Args:
        owner: who asks, for the message.
        **weights: the weights of the parts of a sum, by argument.
    """
    for name, value in weights.items():
        check_finite_number(owner, name, value, minimum=0)
    if not any(weights.values()):
        names = ', '.join(f'`{name}`' for name in weights)
        raise ConfigError(
            f'{owner}: one of {names} must be above 0, got 0 for all: nothing would be compared. '
            'Set loss_weight=0 to switch the loss off.'
        )


def check_ndim(owner: str, argument: str, tensor: Tensor, ndim: int | Sequence[int], layout: str) -> None:
    """Raise :class:`ShapeError` unless ``tensor`` has (one of) ``ndim`` axes.

    Args:
        owner: who asks, for the message.
        argument: name of the argument.
        tensor: the tensor that is checked.
        ndim: the number of axes allowed, or several of them.
        layout: the axes in words, e.g. ``'(B, C, H, W)'``.
    """
    allowed = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if tensor.dim() not in allowed:
        raise ShapeError(f'{owner}: `{argument}` must have shape {layout}, got {tuple(tensor.shape)}.')


def check_same(
    owner: str,
    student: Tensor,
    teacher: Tensor,
    axes: Sequence[int],
    names: str,
    way_out: str,
) -> None:
    """Raise :class:`ShapeError` unless both tensors agree on ``axes``.

    Args:
        owner: who asks, for the message.
        student: the student's tensor.
        teacher: the teacher's tensor.
        axes: the axes that must agree.
        names: these axes in words, e.g. ``'B, H and W'``.
        way_out: what to do about it.
    """
    same_ndim = student.dim() == teacher.dim()
    if not same_ndim or any(student.shape[a] != teacher.shape[a] for a in axes):
        raise ShapeError(
            f'{owner}: `student` and `teacher` must share {names}, '
            f'got {tuple(student.shape)} and {tuple(teacher.shape)}. {way_out}'
        )
