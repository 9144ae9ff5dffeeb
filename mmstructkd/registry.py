"""Registries of mmstructkd: children of mmengine's, found by their scope.

``type='mmstructkd.X'`` in any config makes mmengine import this file and then
the locations below; ``custom_imports`` is documentation.
"""

from __future__ import annotations

from collections.abc import Callable
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

__all__ = [
    'DATASETS',
    'HOOKS',
    'METRICS',
    'MODELS',
    'OPTIM_WRAPPERS',
    'OPTIM_WRAPPER_CONSTRUCTORS',
    'TRANSFORMS',
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
