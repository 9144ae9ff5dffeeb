"""mmrazor's distiller beside ours: its 1.0.0 made to run on current packages, for ``benchmark.py`` alone.

mmrazor 1.0.0 refuses mmcv above 2.1.0 when it is imported, and its quantization
parts import names that torch has removed. Here the version is shown as 2.1.0
during that import, and the quantization packages are replaced by empty
stand-ins; nothing of its distillation uses either. Nothing of mmrazor's own code
is changed or left out of what is timed.

Install it beside the other packages (``pip install --no-deps mmrazor==1.0.0
ordered-set cloudpickle joblib threadpoolctl scikit-learn``), or into a folder of its own that
``PYTHONPATH`` names.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import mmcv
from torch import nn

__all__ = ['available', 'build_distiller', 'version']

#: Packages that are replaced, with the names that others import through their parents.
QUANTIZATION = {
    'mmrazor.structures.quantization': (),
    'mmrazor.models.quantizers': (),
    'mmrazor.models.observers': ('register_torch_observers',),
    'mmrazor.models.fake_quants': ('register_torch_fake_quants',),
    'mmrazor.models.algorithms.quantization': (),
}


@functools.cache
def available() -> str | None:
    """Say why mmrazor cannot be run; ``None`` where it can."""
    if importlib.util.find_spec('mmrazor') is None:
        return 'mmrazor is not installed (see the head of tools/benchmark_mmrazor.py)'
    try:
        _imported()
    except ImportError as err:
        return f'mmrazor cannot be imported: {err}'
    return None


def version() -> str:
    """Version of mmrazor."""
    return str(_imported().__version__)


def _stand_in(name: str, exported: Sequence[str]) -> types.ModuleType:
    """An empty package: whatever is asked of it is a class without content."""

    def anything(attribute: str) -> type:
        if attribute.startswith('__'):
            raise AttributeError(attribute)
        return type(attribute, (), {'__init__': lambda self, *args, **kwargs: None})

    module = types.ModuleType(name)
    module.__path__ = []
    module.__all__ = list(exported)
    module.__getattr__ = anything
    return module


def _imported() -> types.ModuleType:
    """Import mmrazor."""
    if 'mmrazor.models' in sys.modules:
        return sys.modules['mmrazor']
    for name, exported in QUANTIZATION.items():
        sys.modules[name] = _stand_in(name, exported)
    real = mmcv.__version__
    mmcv.__version__ = '2.1.0'
    try:
        import mmrazor
        import mmrazor.models
    finally:
        mmcv.__version__ = real
    return mmrazor


def build_distiller(student: nn.Module, teacher: nn.Module, terms: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Build mmrazor's ``SingleTeacherDistill`` around two networks.

    Args:
        student: a network of mmseg or mmdet.
        teacher: the same, with its weights.
        terms: by name a dict of ``modules`` (names of tapped modules, in both
            networks) and ``loss`` (an mmrazor loss config), one loss a module.

    Returns:
        The distiller, in training mode.
    """
    _imported()
    from mmrazor.registry import MODELS

    recorders: dict[str, dict] = {}
    losses: dict[str, dict] = {}
    mappings: dict[str, dict] = {}
    for name, term in terms.items():
        modules: Sequence[str] = term['modules']
        for place, module in enumerate(modules):
            key = f'{name}_{place}'
            recorders[key] = dict(type='ModuleOutputs', source=module)
            losses[f'loss_{key}'] = dict(term['loss'])
            mappings[f'loss_{key}'] = dict(
                preds_S=dict(from_student=True, recorder=key), preds_T=dict(from_student=False, recorder=key)
            )
    model = MODELS.build(
        dict(
            type='mmrazor.SingleTeacherDistill',
            data_preprocessor=student.data_preprocessor,
            architecture=student,
            teacher=teacher,
            distiller=dict(
                type='mmrazor.ConfigurableDistiller',
                _scope_='mmrazor',
                student_recorders=recorders,
                teacher_recorders=recorders,
                distill_losses=losses,
                loss_forward_mappings=mappings,
            ),
        )
    )
    model.train()  # gives nothing back
    return model
