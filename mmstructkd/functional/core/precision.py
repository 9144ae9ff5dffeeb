"""One place that decides in which precision a loss is computed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from mmstructkd.functional.core.sharing import once

__all__ = ['exact_matmul', 'full_precision', 'promote', 'wide_dtype']

P = ParamSpec('P')
R = TypeVar('R')


def promote(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in at least float32.

    Half and bfloat16 go up to float32, float64 stays, and what is not floating
    point is left alone. The conversion is in the graph.

    Args:
        tensor: any tensor.

    Returns:
        The tensor itself where nothing had to change.

    Example:
        >>> promote(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
        >>> promote(torch.ones(2, dtype=torch.float64)).dtype
        torch.float64
    """
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _promote_all(value: Any) -> Any:
    if isinstance(value, Tensor):
        return once(promote, value)
    if type(value) in (list, tuple):
        return type(value)(_promote_all(v) for v in value)
    return value


def _device_types(value: Any) -> set[str]:
    if isinstance(value, Tensor):
        return {value.device.type}
    if type(value) in (list, tuple):
        return set().union(*(_device_types(v) for v in value))
    return set()


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function of tensors run in at least float32, also under autocast.

    ``tensor.float()`` is not enough inside autocast, where the next matrix
    product is rounded to half again. So autocast is switched off, on the
    devices of the arguments, and tensor arguments (also those in lists and
    tuples) are promoted with :func:`promote`. Nothing is ever demoted, so that
    ``gradcheck`` in float64 sees float64.

    Args:
        function: takes tensors, positional or by keyword.

    Returns:
        The function, wrapped.

    Example:
        >>> @full_precision
        ... def product(a, b):
        ...     return a @ b
        >>> with torch.autocast('cpu', torch.bfloat16):
        ...     product(torch.ones(2, 2), torch.ones(2, 2).bfloat16()).dtype
        torch.float32
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        everything = [*args, *kwargs.values()]
        with contextlib.ExitStack() as stack:
            for device_type in sorted(_device_types(everything)):
                # Some device types ('meta') know no autocast and refuse the context.
                if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
                    stack.enter_context(torch.autocast(device_type, enabled=False))
            promoted = [_promote_all(a) for a in args]
            named = {k: _promote_all(v) for k, v in kwargs.items()}
            return function(*promoted, **named)

    return wrapper


@contextlib.contextmanager
def exact_matmul(device_type: str) -> Iterator[None]:
    """Switch reduced float32 matrix products (TF32 and the like) off inside.

    A user may allow them for the networks; a formula that subtracts large
    numbers which are nearly equal cannot bear their three digits.

    Args:
        device_type: of the operands; on others than ``'cuda'`` and ``'cpu'``
            nothing happens.
    """
    backend = {'cuda': torch.backends.cuda, 'cpu': getattr(torch.backends, 'mkldnn', None)}.get(device_type)
    matmul = getattr(backend, 'matmul', None)
    # Older releases have only the switch of CUDA.
    name = next((n for n in ('fp32_precision', 'allow_tf32') if hasattr(matmul, n)), None)
    exact = 'ieee' if name == 'fp32_precision' else False
    if name is None or getattr(matmul, name) in (exact, 'none'):
        yield
        return
    before = getattr(matmul, name)
    setattr(matmul, name, exact)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype sums over nodes are kept in: float64 wherever the device knows it."""
    return tensor.dtype if tensor.device.type == 'mps' else torch.float64
