"""Gates: where the gradient of what lies behind does not pass, so that stages of a network learn for themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmstructkd.errors import ConfigError, shown
from mmstructkd.functional.core.softening import scale_gradient
from mmstructkd.taps.tap import Tap

__all__ = ['Gates', 'before_gate', 'read_gates']

_BEFORE = 'mmstructkd_before_gate'


def read_gates(owner: str, gates: Any, network: nn.Module) -> tuple[str, ...]:
    """Read the names of modules behind which no gradient passes.

    Args:
        owner: whose option it is, for messages.
        gates: what the config says.
        network: the network that has the modules.

    Returns:
        The names.

    Raises:
        ConfigError: not a list of different names.
        TapError: a module is not there.
    """
    names = list(gates) if isinstance(gates, (list, tuple)) else None
    if names is None or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ConfigError(
            f'{owner}: `gates` must be a list of modules of the student, each once, got {shown(gates)}.'
            " Example: gates=['backbone.layer2', 'backbone.layer3']."
        )
    for name in names:
        Tap(name).resolve(network, f'{owner}: `gates`')
    return tuple(names)


def before_gate(tensor: Tensor) -> Tensor:
    """Return what went into a gate, for what came out of it; any other tensor itself.

    So a tap sees the graph before the gate however it names the place: as the
    output of the module, as one of several outputs of the part that holds it, or as
    the input of what follows.
    """
    found: Tensor = getattr(tensor, _BEFORE, tensor)
    return found


class Gates:
    """Context manager: the outputs of some modules keep their values, and their gradient becomes 0.

    It is multiplied by 0 and not cut: every parameter before a gate has a gradient,
    so processes that share gradients wait for none, whatever the terms do.

    Args:
        network: the network.
        modules: their dotted names.

    Attributes:
        passed: for each name the tensors that went into the gate.
    """

    def __init__(self, network: nn.Module, modules: Iterable[str]) -> None:
        self._network = network
        self.passed: dict[str, list[Tensor]] = {name: [] for name in modules}
        self._stops: set[Any] = set()
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Gates:
        for name in self.passed:
            module = self._network.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return self._closed(name, output)

        return hook

    def _closed(self, name: str, value: Any) -> Any:
        """The same with each tensor in it behind a gate."""
        if isinstance(value, Tensor):
            if not value.requires_grad:
                return value
            gated = scale_gradient(value, 0.0)
            setattr(gated, _BEFORE, before_gate(value))  # a gate right behind another is one
            self.passed[name].append(value)
            self._stops.add(gated.grad_fn)
            return gated
        if isinstance(value, dict):
            return type(value)((key, self._closed(name, item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._closed(name, item) for item in value)
        return value

    def untaught(self, tapped: Iterable[Tensor]) -> dict[str, list[Tensor] | None]:
        """What lies between each gate and those before it, and is taught by no tap.

        Args:
            tapped: what the taps of the terms recorded, with its graph.

        Returns:
            For each gate the trained parameters there that no tapped tensor depends
            on; ``None`` where nothing that is trained lies there, or the gate was not
            passed.
        """
        taught = {id(parameter) for parameter in self._trained(tapped)}
        found: dict[str, list[Tensor] | None] = {}
        for name, inputs in self.passed.items():
            own = self._trained(inputs)
            found[name] = [parameter for parameter in own if id(parameter) not in taught] if own else None
        return found

    def _trained(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Parameters that tensors depend on, no further back than the gates."""
        left: list[Any] = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
        seen, found = set(left), []
        while left:
            node = left.pop()
            if node in self._stops:
                continue
            if hasattr(node, 'variable'):
                found.append(node.variable)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    left.append(following)
        return found
