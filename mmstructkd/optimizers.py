"""Checks configs of optimisers: names, kinds and ranges, long before there is an optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS, Registry
from torch import nn
from torch.optim import Optimizer

from mmstructkd.arguments import check_call
from mmstructkd.errors import ConfigError, check_finite_number, shown, suggest

__all__ = ['check_kinds', 'check_optimizer', 'check_registered', 'optimizer_refused']


def check_optimizer(owner: str, settings: Any) -> None:
    """Check the config of an optimiser without building it.

    Args:
        owner: whose it is, for the message.
        settings: the config.

    Raises:
        ConfigError: no type, an unknown one, an argument that it does not have
            or that is of another kind; of torch's own optimisers also a value
            that they refuse.

    Example:
        >>> check_optimizer('Loss', dict(type='Adam', lr=1e-3, betas=(0.5, 0.9)))
        >>> check_optimizer('Loss', dict(type='Adam', lr=1e-3, betas=0.9))
        Traceback (most recent call last):
        mmstructkd.errors.ConfigError: Loss: `optimizer`: `betas` must be 2 values, got 0.9.
    """
    if not isinstance(settings, Mapping) or 'type' not in settings:
        raise ConfigError(
            f'{owner}: `optimizer` must name its type, got {shown(settings)}. '
            "Write e.g. optimizer=dict(type='Adam', lr=4e-4, betas=(0.9, 0.99))."
        )
    kind = check_registered(owner, "optimizer['type']", settings['type'], OPTIMIZERS)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)) and not inspect.isroutine(kind):
        raise ConfigError(f"{owner}: `optimizer['type']` must be an optimiser, got {shown(kind)}.")
    arguments = {name: value for name, value in settings.items() if name not in ('type', '_scope_')}
    if 'params' in arguments:
        raise ConfigError(f"{owner}: `optimizer['params']` must be left out, got a value. The distiller fills it in.")
    parameters = inspect.signature(kind).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in parameters:
                raise ConfigError(
                    f'{owner}: `optimizer` must have only arguments of {kind.__name__}, got {name!r}. '
                    f'{suggest(name, [key for key in parameters if key not in ("self", "params")])}'
                )
    check_kinds(f'{owner}: `optimizer`', kind, arguments)
    if getattr(kind, '__module__', '').startswith('torch.optim.'):
        try:
            kind([nn.Parameter(torch.zeros(1, 1))], **arguments)
        except (AssertionError, IndexError, KeyError, TypeError, ValueError) as err:
            raise optimizer_refused(owner, settings, err) from err
        except RuntimeError:
            return  # about this parameter, on a CPU (fused kernels): the real ones may well be taken


def check_kinds(owner: str, kind: Any, arguments: Mapping[str, Any]) -> None:
    """Raise unless each argument of an optimiser is of the kind that its signature names, and each number finite.

    torch takes ``True`` for a learning rate, and NaN for a momentum. Annotations of
    other packages do not always say all that is taken; there numbers are looked at alone.

    Args:
        owner: whose it is, for the message.
        kind: the class or function.
        arguments: by name.

    Raises:
        ConfigError: a value is of another kind.
    """
    if isinstance(kind, type) and kind.__module__.startswith('torch.'):
        check_call(owner, kind, (), arguments, filled=('params',))
    for name, value in arguments.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                check_finite_number(owner, name, number)


def optimizer_refused(owner: str, settings: Mapping[str, Any], err: Exception) -> ConfigError:
    """The error for an optimiser that refuses its settings."""
    return ConfigError(f'{owner}: `optimizer` must be one that can be built, got {shown(dict(settings))}. {err}')


def check_registered(owner: str, argument: str, kind: Any, registry: Registry) -> Any:
    """Return the class behind a ``type``.

    Args:
        owner: who has it, for the message.
        argument: where it stands.
        kind: the name, or the class itself.
        registry: where a name is looked up.

    Returns:
        The class or function.

    Raises:
        ConfigError: a name that is not registered, or neither name nor class.
    """
    if not isinstance(kind, str):
        if callable(kind):
            return kind
        raise ConfigError(f'{owner}: `{argument}` must name a registered class, got {shown(kind)}.')
    found = None
    with registry.switch_scope_and_registry(None) as current:
        if kind:
            found = current.get(kind)
        known = {*current.module_dict, *registry.module_dict}
    if found is None:
        raise ConfigError(
            f'{owner}: `{argument}` must name a registered class, got {kind!r}. '
            f'{suggest(kind.rpartition(".")[2], known)}'
        )
    return found
