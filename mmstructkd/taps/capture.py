"""Captures tapped tensors during one forward, and can end it at the deepest tap."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmstructkd.taps.gates import before_gate
from mmstructkd.taps.tap import Tap

__all__ = ['Capture', 'ForwardStopped']


class ForwardStopped(BaseException):
    """Ends a forward at its deepest tap.

    Not an ``Exception``: code of the network that catches those must not
    swallow it. :class:`Capture` does, when its block ends.
    """


def _checkpointed() -> bool:
    """Whether the code that runs now was called by a function that checkpoints activations."""
    frame = sys._getframe(1)
    while frame is not None:
        if Path(frame.f_code.co_filename).name.startswith('checkpoint') and 'checkpoint' in frame.f_globals['__name__']:
            return True
        frame = frame.f_back
    return False


class Capture:
    """Context manager that records what passes the taps.

    Hooks exist inside the block only; the records belong to the object and go
    with it, so nothing keeps the graph of a step alive.

    Args:
        network: the network that is tapped.
        taps: places to record.
        calls: how often each tap is passed in one forward. Where given, the
            forward ends as soon as every tap has been passed that often.
        clone: taps whose tensor the network changes in place afterwards; a
            copy is recorded.

    Attributes:
        records: for each tap the tensors in the order of the calls: one for
            most modules, several for a head shared by levels or a tap of a range.
        passes: for each tap how often it was passed.
        cut: for each tap that no gradient can leave the reason: ``'checkpoint'``
            (inside a block whose activations are computed again in the backward
            pass, from its first input), ``'no_grad'``, ``'dtype'`` (whole numbers),
            ``'detached'`` (the module that gives it is trained, and cuts it off) or
            ``'frozen'`` (nothing that is trained lies before it). Empty where
            gradients are off anyway.
        stopped: whether the forward was ended early.
        partial: whether the network failed on the way, after each tap was passed:
            ``passes`` may be short.
    """

    def __init__(
        self,
        network: nn.Module,
        taps: Iterable[Tap],
        *,
        calls: Mapping[Tap, int] | None = None,
        clone: Iterable[Tap] = (),
    ) -> None:
        self.network = network
        self.taps = tuple(dict.fromkeys(taps))
        self.clone = frozenset(clone)
        self.records: dict[Tap, list[Tensor]] = {tap: [] for tap in self.taps}
        self.passes: dict[Tap, int] = dict.fromkeys(self.taps, 0)
        self.cut: dict[Tap, str] = {}
        self.stopped = False
        self.partial = False
        self._trains = False
        self._left = None if calls is None else sum(calls[tap] for tap in self.taps)
        self._versions: list[tuple[Tap, Tensor, int]] = []
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Capture:
        self._trains = torch.is_grad_enabled()
        modules = dict(self.network.named_modules())
        for tap in self.taps:
            module = modules[tap.module]
            if tap.side == 'input':
                handle = module.register_forward_pre_hook(self._input_hook(tap), with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._output_hook(tap))
            self._handles.append(handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stopped = kind is ForwardStopped
        return self.stopped

    def changed_in_place(self) -> set[Tap]:
        """Taps whose recorded tensor was written to after it was recorded."""
        return {tap for tap, tensor, version in self._versions if tensor._version != version}

    def _output_hook(self, tap: Tap) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            self._record(tap, output, module)

        return hook

    def _input_hook(self, tap: Tap) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            self._record(tap, args[0] if args else next(iter(kwargs.values()), None), None)

        return hook

    @staticmethod
    def _reason(tensor: Tensor, module: nn.Module | None) -> str:
        """Why no gradient can leave a tensor, asked while the network runs."""
        if not torch.is_grad_enabled():
            return 'checkpoint' if _checkpointed() else 'no_grad'
        if not tensor.is_floating_point():
            return 'dtype'
        trained = module is not None and any(parameter.requires_grad for parameter in module.parameters())
        return 'detached' if trained else 'frozen'

    def _record(self, tap: Tap, value: Any, module: nn.Module | None) -> None:
        self.passes[tap] += 1
        for tensor in map(before_gate, tap.pick(value)):
            if self._trains and not tensor.requires_grad:
                self.cut.setdefault(tap, self._reason(tensor, module))
            kept = tensor.clone() if tap in self.clone else tensor
            self.records[tap].append(kept)
            self._versions.append((tap, kept, kept._version))
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                raise ForwardStopped
