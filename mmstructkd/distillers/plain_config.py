"""The config that goes with a student's weights to people who have mmseg or mmdet, and not this package."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import Registry
from mmengine.runner import Runner

from mmstructkd import registry
from mmstructkd.checkpoints import KEY
from mmstructkd.teachers.loading import drop_own_import, own_name, student_config

__all__ = ['plain_config']

#: What a runner wants all of or nothing.
PHASES = {
    'train': ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler'),
    'val': ('val_dataloader', 'val_cfg', 'val_evaluator'),
}
REGISTRIES = [value for value in vars(registry).values() if isinstance(value, Registry)]

#: Stands for what has no counterpart outside this package.
NOTHING = object()


def plain_config(cfg: Config) -> Config:
    """Return the student's config in the terms of mmseg, mmdet and mmengine alone.

    For what inference needs (``model``, the test pipeline, class names and
    palette), and whatever else was theirs from the beginning. A part of this
    package is replaced by the class it is made from, which has the same
    arguments less its own: ``LoadScene`` by ``LoadImageFromFile``,
    ``CamVidDataset`` by ``BaseSegDataset`` with its classes,
    ``AutocastOptimWrapper`` by ``OptimWrapper``. What is made from nothing that a
    config can name (hooks, annotations of scenes) is left out. Training and
    validation on data that only this package gives go as a whole; of such test
    data, pipeline and class names stay.

    Where the student itself has parts of this package, the package is needed
    anyway: its config stays as it is, and imports it.

    Args:
        cfg: a distilling config, or a plain one.

    Returns:
        A copy that does not name this package, unless its model does.
    """
    plain = Config(student_config(cfg).to_dict())
    plain.pop(KEY, None)  # consent is the user's who gave it
    constructor = (plain.get('optim_wrapper') or {}).pop('base_constructor', None)
    if constructor is not None:
        plain.optim_wrapper.constructor = constructor
    if _names_own(plain.get('model')):
        _import_own(plain)
        return plain
    for phase, keys in PHASES.items():
        if any(_cannot_load(kind) for kind in _own_names(plain.get(f'{phase}_dataloader'))):
            for key in keys:
                plain.pop(key, None)
    drop_own_import(plain, always=True)
    runner = inspect.signature(Runner).parameters
    for key in list(plain.keys()):
        value = _translated(plain[key])
        # A name of the config file's own, such as the terms that a base defines: what is left of it serves nobody.
        loose = key not in runner and isinstance(value, Mapping) and 'type' not in value and _names_own(plain[key])
        if value is NOTHING or loose:
            plain.pop(key)
        else:
            plain[key] = value
    return plain


def _import_own(cfg: Config) -> None:
    """Name this package in ``custom_imports``, where it is not named yet."""
    settings = cfg.get('custom_imports') or {}
    imports = settings.get('imports') or []
    names = [imports] if isinstance(imports, str) else list(imports)
    if not any(name.split('.')[0] == registry.SCOPE for name in names):
        cfg.custom_imports = {**settings, 'imports': [*names, registry.SCOPE]}


def _own_names(value: Any) -> Iterable[str]:
    """Yield every name of this package in a part of a config."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _own_names(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _own_names(item)
    elif (name := own_name(value)) is not None:
        yield name


def _names_own(value: Any) -> bool:
    return next(iter(_own_names(value)), None) is not None


def _translated(value: Any) -> Any:
    """A part of a config without this package's names; ``NOTHING`` where it is one, without a counterpart."""
    if own_name(value) is not None:
        return NOTHING
    if isinstance(value, (list, tuple)):
        items = []
        for item in value:
            # A step that holds others: they take its place.
            if isinstance(item, Mapping) and own_name(item.get('type')) and isinstance(item.get('transforms'), list):
                items += _translated(item['transforms'])
            else:
                items += [_translated(item), *_after(item)]
        return type(value)(item for item in items if item is not NOTHING)
    if not isinstance(value, Mapping):
        return value
    if (name := own_name(value.get('type'))) is not None:
        value = _counterpart(name, value)
        if value is NOTHING:
            return NOTHING
    items = {key: _translated(item) for key, item in value.items()}
    return ConfigDict({key: item for key, item in items.items() if item is not NOTHING})


def _after(step: Any) -> list[Mapping[str, Any]]:
    """Steps that the counterpart of an own one needs behind it, as its class says."""
    name = own_name(step.get('type')) if isinstance(step, Mapping) else None
    return [dict(one) for one in getattr(_class_of(name), 'plain_after', ())] if name else []


def _class_of(name: str) -> type | None:
    """The registered class of this package with that name."""
    found = (one.get(f'{registry.SCOPE}.{name}') for one in REGISTRIES)
    return next((cls for cls in found if inspect.isclass(cls)), None)


def _counterpart(name: str, config: Mapping[str, Any]) -> Any:
    """Config of the class that an own one is made from: its arguments, and what the own one sets otherwise."""
    cls = _class_of(name)
    base = None if cls is None else next((one for one in cls.__mro__ if not _is_own(one) and _type_name(one)), None)
    if base is None:
        return NOTHING
    known, defaults = _parameters(base), _parameters(cls)
    own = {key for one in cls.__mro__ if _is_own(one) for key in _named(one)} - known.keys()
    changed = {
        key: parameter.default
        for key, parameter in defaults.items()
        if key in known and parameter.default not in (inspect.Parameter.empty, None, known[key].default)
    }
    kept = {key: item for key, item in config.items() if key not in own and key != 'type'}
    metainfo = {**(getattr(cls, 'METAINFO', None) or {}), **(config.get('metainfo') or {})}
    if metainfo:
        kept['metainfo'] = metainfo
    return {'type': _type_name(base), **changed, **kept}


def _is_own(cls: type) -> bool:
    return cls.__module__.split('.')[0] == registry.SCOPE


def _type_name(cls: type) -> str | None:
    """How a config names a class of mmengine, mmcv, mmseg or mmdet; ``None`` where it cannot."""
    scope, name = cls.__module__.split('.')[0], cls.__name__
    if any(one.root.module_dict.get(name) is cls for one in REGISTRIES):
        return name
    children = (one.root.children.get(scope) for one in REGISTRIES)
    return f'{scope}.{name}' if any(one and one.module_dict.get(name) is cls for one in children) else None


def _named(cls: type) -> dict[str, inspect.Parameter]:
    """Arguments that a class's own constructor names."""
    if '__init__' not in vars(cls):
        return {}
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {one.name: one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)}


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Arguments that its constructor names, and those of the classes it hands the rest to."""
    found: dict[str, inspect.Parameter] = {}
    for one in cls.__mro__:
        found = {**_named(one), **found}
        if '__init__' in vars(one) and not any(
            parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(one.__init__).parameters.values()
        ):
            break
    return found


def _cannot_load(name: str) -> bool:
    """Whether a name is that of a dataset whose samples its counterpart does not find."""
    return bool(getattr(_class_of(name), 'finds_samples_itself', False))
