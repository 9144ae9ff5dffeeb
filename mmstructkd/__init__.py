"""Structured knowledge distillation for MMSegmentation and MMDetection.

Importing this package is cheap: the mathematics lies in
:mod:`mmstructkd.functional` (pure torch), the registered parts load through
:mod:`mmstructkd.registry` when a config first names one of them.

Where mmengine's runner is in the process, or comes into it later, it is made to
read checkpoints without running code and to write them whole
(:mod:`mmstructkd.compat`). So a config that names mmstructkd in
``custom_imports`` is safe under any script.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__version__ = '0.1.0'

__all__ = ['__version__']

_RUNNER = 'mmengine.runner'


class _PatchingLoader(Loader):
    """Loads mmengine's runner as ever, and patches it before anyone has it."""

    def __init__(self, finder: MetaPathFinder, loader: Loader) -> None:
        self.finder, self.loader = finder, loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the real loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then patch it."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        sys.meta_path.remove(self.finder)
        # What the import system does next, and the patches need: they name the module by its full path.
        sys.modules['mmengine'].runner = module
        import_module('mmstructkd.compat')


class _WhenImported(MetaPathFinder):
    """Waits for mmengine's runner."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> object:
        """Find that one module where it is, and have it loaded by a loader that patches it."""
        if fullname != _RUNNER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None:
            spec.loader = _PatchingLoader(self, spec.loader)
        return spec


if _RUNNER in sys.modules:
    import_module('mmstructkd.compat')
else:
    sys.meta_path.insert(0, _WhenImported())
