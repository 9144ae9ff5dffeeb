"""Registries of mmstructkd: children of mmengine's, found by their scope.

``type='mmstructkd.X'`` in any config makes mmengine import this file and then
the locations below; ``custom_imports`` is documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

from mmstructkd.arguments import checked
from mmstructkd.errors import CheckpointError, ConfigError, shown, suggest

__all__ = [
    'DATASETS',
    'HOOKS',
    'METRICS',
    'MODELS',
    'OPTIM_WRAPPERS',
    'OPTIM_WRAPPER_CONSTRUCTORS',
    'TRANSFORMS',
    'build_part',
    'look_up',
]

SCOPE = 'mmstructkd'


class CheckedRegistry(Registry):
    """mmengine's registry; what is registered checks its arguments, see :func:`mmstructkd.arguments.checked`.

    Losses, connectors and hooks of others that are registered here are held to
    their own annotations as well.
    """

    def register_module(
        self, name: str | list[str] | None = None, force: bool = False, module: Any = None
    ) -> type | Callable[..., Any]:
        """Register a class or function, as in mmengine.

        Args:
            name: under which it is found; ``None``: its own.
            force: replace what has the name.
            module: the class or function; ``None``: decorate with what is returned.

        Returns:
            ``module``, or a decorator.
        """
        if module is not None:
            return super().register_module(name, force, checked(module))
        register = super().register_module(name, force)
        return lambda module: register(checked(module))


MODELS = CheckedRegistry(
    'model',
    parent=MMENGINE_MODELS,
    scope=SCOPE,
    locations=[
        'mmstructkd.losses',
        'mmstructkd.connectors',
        'mmstructkd.temperatures',
        'mmstructkd.critics',
        'mmstructkd.distillers',
        'mmstructkd.teachers',
        'mmstructkd.streams',
        'mmstructkd.models',
    ],
)
HOOKS = CheckedRegistry('hook', parent=MMENGINE_HOOKS, scope=SCOPE, locations=['mmstructkd.hooks'])
METRICS = CheckedRegistry('metric', parent=MMENGINE_METRICS, scope=SCOPE, locations=['mmstructkd.datasets'])
DATASETS = CheckedRegistry('dataset', parent=MMENGINE_DATASETS, scope=SCOPE, locations=['mmstructkd.datasets'])
TRANSFORMS = CheckedRegistry('transform', parent=MMENGINE_TRANSFORMS, scope=SCOPE, locations=['mmstructkd.datasets'])
OPTIM_WRAPPERS = CheckedRegistry(
    'optim_wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope=SCOPE, locations=['mmstructkd.optim']
)
OPTIM_WRAPPER_CONSTRUCTORS = CheckedRegistry(
    'optim wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope=SCOPE,
    locations=['mmstructkd.optim'],
)


def build_part(
    owner: str,
    argument: str,
    config: Any,
    *,
    example: str,
    what: str | None = None,
    known: type = object,
    filled: Mapping[str, Any] | None = None,
    registry: Registry = MODELS,
) -> Any:
    """Build what an argument describes by a config; whatever goes wrong is told with owner and argument.

    Args:
        owner: who takes the argument, for messages.
        argument: its name.
        config: what was given for it.
        example: a config that would do, as one writes it.
        what: what is registered, in a word; ``None``: the argument's name.
        known: the class whose registered subclasses are suggested for an unknown ``type``.
        filled: arguments that the owner fills in; the config's own come first.
        registry: where the type is looked up.

    Returns:
        What was built.

    Raises:
        ConfigError: not a dict with a ``type``, an unknown type, or arguments
            that it does not take.
        CheckpointError: a file that it reads is at fault.
    """
    if not isinstance(config, Mapping) or 'type' not in config:
        raise ConfigError(
            f'{owner}: `{argument}` must be a dict with a `type`, got {shown(config)}. Example: {example}.'
        )
    kind = config['type']
    with registry.switch_scope_and_registry(config.get('_scope_')) as scoped:
        found = look_up(scoped, kind) if isinstance(kind, str) else kind
        classes = {**registry.module_dict, **scoped.module_dict}
    if not callable(found):
        names = [name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, known)]
        raise ConfigError(
            f'{owner}: `{argument}` must name a registered {what or argument}, got {kind!r}. '
            f'{suggest(str(kind).split(".")[-1], names)}'
        )
    try:
        return registry.build({**filled, **config} if filled else config)
    except (CheckpointError, OSError):
        raise  # a file is at fault, not the config, and its message says which
    except Exception as err:  # mm packages and torch raise whatever they trip over
        told = str(err) if isinstance(err, ValueError) else f'{type(err).__name__}: {err}'
        raise ConfigError(f'{owner}: `{argument}` cannot be built. {told}') from err


def look_up(registry: Registry, name: str) -> Any:
    """Find what is registered under a name.

    Args:
        registry: where to look, its parents and children included.
        name: with or without a scope.

    Returns:
        The class or function; ``None`` where there is none, or no scope of that name.
    """
    try:
        return registry.get(name) if name else None
    except (AssertionError, ImportError, KeyError, RuntimeError, ValueError):  # what a scope that is none leads to
        return None
