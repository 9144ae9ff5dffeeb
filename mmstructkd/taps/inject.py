"""Injection: the rest of a network runs on a tensor that was made elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmstructkd.errors import ShapeError, TapError
from mmstructkd.taps.tap import Span, Tap

__all__ = ['Inject']


class Inject:
    """Context manager: at a tap the network goes on with another tensor.

    What lies before the tap still runs, and nothing of it is used behind it. The
    gradient of what lies behind reaches the tensor and what it was made of.

    Args:
        network: the network.
        tap: the output of a module, or one of several outputs.
        tensor: of the shape that is there.

    Raises:
        TapError: the tap names no module, an input, or a range of outputs.
        ShapeError: in the forward pass, the tensor there has another shape.
    """

    def __init__(self, network: nn.Module, tap: Tap, tensor: Tensor) -> None:
        self._module = tap.resolve(network, 'Inject: `tap`')
        if tap.side != 'output' or any(isinstance(key, Span) for key in tap.keys):
            raise TapError(f'Inject: `tap` must name one output of a module, got {str(tap)!r}.')
        self._tap, self._tensor = tap, tensor
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Inject:
        self._handle = self._module.register_forward_hook(self._hook)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        (there,) = self._tap.pick(output)
        if there.shape != self._tensor.shape:
            raise ShapeError(
                f'Inject: `tensor` must have the shape of {str(self._tap)!r}, {tuple(there.shape)}, got '
                f'{tuple(self._tensor.shape)}. Resize with resize_map, project the channels.'
            )
        return self._replaced(output, self._tap.keys)

    def _replaced(self, value: Any, keys: tuple[Any, ...]) -> Any:
        """The same output with the tensor in its place."""
        if not keys:
            return self._tensor
        key, *rest = keys
        if isinstance(value, dict):
            return type(value)({**value, key: self._replaced(value[key], tuple(rest))})
        entries = list(value)
        entries[key] = self._replaced(entries[key], tuple(rest))
        return type(value)(entries)
