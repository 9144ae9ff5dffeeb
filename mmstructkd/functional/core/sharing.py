"""What several losses of a step compute of the same tensor, computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ['once', 'sharing']

R = TypeVar('R')
#: By function and arguments: the result, and the arguments, whose memory must not be given to others meanwhile.
_results: ContextVar[dict[Hashable, tuple[Any, tuple[Any, ...]]] | None] = ContextVar('_results', default=None)


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Let :func:`once` remember inside; at the end everything is forgotten.

    Example:
        >>> x = torch.zeros(2)
        >>> with sharing():
        ...     once(torch.exp, x) is once(torch.exp, x.detach())
        True
    """
    token = _results.set({})
    try:
        yield
    finally:
        _results.reset(token)


def _identity(argument: Any) -> Hashable:
    """What two arguments have in common that are the same: for tensors the memory, its layout and its version."""
    if not isinstance(argument, Tensor):
        return cast(Hashable, argument)
    return (
        argument.untyped_storage().data_ptr(),
        argument.storage_offset(),
        argument.shape,
        argument.stride(),
        argument.dtype,
        argument.device,
        argument._version,
    )


def _can_be_told_apart(tensor: Tensor) -> bool:
    """Whether a tensor has memory and counts what is written to it, and is in no graph."""
    plain = tensor.layout == torch.strided and not tensor.is_meta
    return plain and not tensor.is_inference() and not tensor.requires_grad


def once(function: Callable[..., R], *args: Any) -> R:
    """Return ``function(*args)``, from memory where :func:`sharing` has it.

    For what losses do with the teacher and the targets: arguments that are in a
    graph are computed anew, and so is everything outside :func:`sharing`.
    Tensors are the same if they show the same memory in the same way and nothing
    was written to it in between.

    Args:
        function: without side effects; it must outlive the step (no closure).
        *args: tensors, and values that can be hashed.

    Returns:
        The result. It is shared: do not write to it.

    Example:
        >>> once(torch.exp, torch.zeros(2))
        tensor([1., 1.])
    """
    results = _results.get()
    if results is None or not all(_can_be_told_apart(a) for a in args if isinstance(a, Tensor)):
        return function(*args)
    key = (function, *map(_identity, args))
    if key not in results:
        results[key] = (function(*args), args)
    return cast(R, results[key][0])
