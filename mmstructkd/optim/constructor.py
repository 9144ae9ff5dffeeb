"""Builds the optim wrapper of a distiller: student as in plain training, critic apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_WRAPPERS
from mmengine.registry import OPTIMIZERS
from torch import nn
from torch.optim import Optimizer

from mmstructkd.errors import ConfigError, check_count, shown
from mmstructkd.optim.composite import CompositeOptimizer
from mmstructkd.optim.step import DistillStep, extend_wrapper
from mmstructkd.optimizers import check_kinds, check_optimizer, check_registered, optimizer_refused
from mmstructkd.registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['DistillOptimWrapperConstructor', 'check_optimizer', 'for_distiller']

NAME = 'mmstructkd.DistillOptimWrapperConstructor'
DEFAULT = 'DefaultOptimWrapperConstructor'
OWNER = 'StructuredDistiller: `optim_wrapper`'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DistillOptimWrapperConstructor:
    """Gives each part of a distiller its optimiser settings, under one wrapper.

    - the student: exactly what ``base_constructor`` makes of the plain model
      (layer decay, ``paramwise_cfg``, names without a prefix);
    - connectors and what else the terms train: one more group of that
      optimiser, with its default settings; those that a module of the terms names
      in ``no_weight_decay`` (learnable temperatures): another one, without decay;
    - a part with settings of its own (``HolisticLoss(optimizer=...)``): an
      optimiser of its own, stepped, scheduled and resumed with the rest.

    The wrapper is of the class that the config names, extended by
    :class:`~mmstructkd.optim.DistillStep`: parts are clipped apart, those that
    are not used rest, and no step is taken that is not finite.

    The distiller installs this one by itself; a config need not name it.

    Args:
        optim_wrapper_cfg: the ``optim_wrapper`` of the config. Its key
            ``base_constructor`` names the constructor of the student's part.
        paramwise_cfg: handed to the base constructor.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.optim_wrapper_cfg = copy.deepcopy(optim_wrapper_cfg)
        self.base_constructor = self.optim_wrapper_cfg.pop('base_constructor', DEFAULT)
        self.paramwise_cfg = paramwise_cfg

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper.

        Args:
            model: a distiller, wrapped for distribution or not.

        Returns:
            The optim wrapper over every trained parameter, each in it once.

        Raises:
            ConfigError: ``model`` is no distiller, or what is configured cannot
                be built; of a term's own optimiser with the term's name.
        """
        if is_model_wrapper(model):
            model = model.module
        if not hasattr(model, 'auxiliary_parameters'):
            raise ConfigError(
                f'DistillOptimWrapperConstructor: `model` must be a StructuredDistiller, got {type(model).__name__}. '
                'Remove `constructor` from optim_wrapper for plain training.'
            )
        wrapper = self._build_student(model.student)
        shared, own = model.auxiliary_parameters()
        bare = {
            getattr(module, name) for module in model.terms.modules() for name in getattr(module, 'no_weight_decay', ())
        }
        decayed, undecayed = [p for p in shared if p not in bare], [p for p in shared if p in bare]
        names = {id(p): name for name, p in model.named_parameters()}
        for params, settings in ((decayed, {}), (undecayed, {'weight_decay': 0.0})):
            group = {'params': params, **settings}
            # constructors that decay by layer name their parameters, and torch wants all groups to do so, or none
            if any('param_names' in known for known in wrapper.optimizer.param_groups):
                group['param_names'] = [names[id(p)] for p in params]
            if params:
                wrapper.optimizer.add_param_group(group)
        if own:
            owners = {id(p): 'StructuredDistiller: `teacher`' for p in model.companion.parameters()}
            owners.update({id(p): f'term {name!r}' for name, term in model.terms.items() for p in term.parameters()})
            parts = [build_optimizer(owners[id(params[0])], settings, params) for settings, params in own]
            wrapper.optimizer = CompositeOptimizer([wrapper.optimizer, *parts])
        return extend_wrapper(wrapper, model)

    def _build_student(self, student: nn.Module) -> OptimWrapper:
        """What the base constructor makes of the plain model, with readable errors."""
        config = self.optim_wrapper_cfg
        check_registered(OWNER, 'base_constructor', self.base_constructor, MMENGINE_CONSTRUCTORS)
        check_registered(OWNER, 'type', config.get('type', 'OptimWrapper'), MMENGINE_WRAPPERS)
        optimizer = config.get('optimizer')
        if not isinstance(optimizer, Mapping) or 'type' not in optimizer:
            raise ConfigError(
                f"{OWNER}['optimizer'] must be a dict with a `type`, got {optimizer!r}. "
                "Write e.g. optimizer=dict(type='SGD', lr=0.01, momentum=0.9)."
            )
        check_registered(f"{OWNER}['optimizer']", 'type', optimizer['type'], OPTIMIZERS)
        try:
            constructor = MMENGINE_CONSTRUCTORS.build(
                {
                    'type': self.base_constructor,
                    'optim_wrapper_cfg': copy.deepcopy(config),
                    'paramwise_cfg': copy.deepcopy(self.paramwise_cfg),
                }
            )
            wrapper = constructor(student)
        except Exception as err:  # mmengine and torch raise whatever they trip over
            raise ConfigError(
                f'{OWNER} must be one that can be built, got {shown(dict(config))} with '
                f'paramwise_cfg={shown(self.paramwise_cfg)}. {type(err).__name__}: {err}'
            ) from err
        arguments = {name: value for name, value in optimizer.items() if name not in ('type', '_scope_')}
        check_kinds(f"{OWNER}['optimizer']", type(wrapper.optimizer), arguments)
        check_count(OWNER, 'accumulative_counts', config.get('accumulative_counts', 1))
        _check_clipping(wrapper)
        return wrapper


def _check_clipping(wrapper: OptimWrapper) -> None:
    """Clip one number: arguments that clipping does not take would show in the first step only."""
    if wrapper.clip_grad_kwargs is None:
        return
    for name in ('max_norm', 'clip_value', 'norm_type'):
        value = wrapper.clip_grad_kwargs.get(name, 1.0)
        if isinstance(value, (bool, str)):  # torch makes numbers of them
            raise ConfigError(f'{OWNER}: `clip_grad`: `{name}` must be a number, got {value!r}.')
    number = nn.Parameter(torch.ones(1))
    number.grad = torch.ones(1)
    try:
        wrapper.clip_func([number], **wrapper.clip_grad_kwargs)
        left = float(number.grad)
    except Exception as err:  # whatever torch trips over
        raise ConfigError(
            f'{OWNER}: `clip_grad` must be arguments of {wrapper.clip_func.__name__}, '
            f'got {shown(wrapper.clip_grad_kwargs)}. {type(err).__name__}: {err}'
        ) from err
    if not 0 < left <= 1:
        raise ConfigError(
            f'{OWNER}: `clip_grad` must leave a gradient its direction, got {shown(wrapper.clip_grad_kwargs)}, which '
            f'makes {left} of 1.'
        )


def build_optimizer(owner: str, settings: Mapping[str, Any], params: list) -> Optimizer:
    """Build an optimiser of its own for a part of a distiller.

    Args:
        owner: whose it is, for the message.
        settings: its config.
        params: the parameters.

    Returns:
        The optimiser.

    Raises:
        ConfigError: an unknown type, or an argument that it does not take.
    """
    check_optimizer(owner, settings)
    try:
        return OPTIMIZERS.build({**settings, 'params': params})
    except (TypeError, ValueError, KeyError, AssertionError) as err:
        raise optimizer_refused(owner, settings, err) from err


def for_distiller(settings: Any, model: nn.Module) -> Any:
    """Make what a runner was given as ``optim_wrapper`` one for a distiller.

    Args:
        settings: a config, or a built wrapper.
        model: the distiller, without a wrapper.

    Returns:
        A config with the distiller's constructor, which keeps the one that was
        there as ``base_constructor``; or the built wrapper, extended.

    Raises:
        ConfigError: it cannot serve a distiller, or names two constructors for
            the student.
    """
    if settings is None:
        return None
    if isinstance(settings, Mapping) and isinstance(settings.get('optimizer'), Optimizer):
        settings = MMENGINE_WRAPPERS.build({'type': 'OptimWrapper', **settings})
    if isinstance(settings, OptimWrapper):
        return _adopted(settings, model)
    if not isinstance(settings, Mapping) or 'optimizer' not in settings:
        got = sorted(settings) if isinstance(settings, Mapping) else type(settings).__name__
        raise ConfigError(
            f"{OWNER} must be a dict with the key 'optimizer', got {got}. Terms that need settings of their own have "
            'them: HolisticLoss(optimizer=...).'
        )
    constructor, base = settings.get('constructor'), settings.get('base_constructor')
    if constructor is not None and _is_ours(constructor):
        constructor = None
    if constructor is not None and base is not None and constructor != base:
        raise ConfigError(
            f'{OWNER} must name one constructor for the student, got constructor={constructor!r} and '
            f'base_constructor={base!r}. Leave one of them out.'
        )
    base = constructor or base or DEFAULT
    check_registered(OWNER, 'constructor' if constructor else 'base_constructor', base, MMENGINE_CONSTRUCTORS)
    if _is_ours(base):
        raise ConfigError(
            f"{OWNER}: `base_constructor` must be that of the plain student, got {base!r}. Leave it out for mmengine's."
        )
    return {**settings, 'constructor': NAME, 'base_constructor': base}


def _is_ours(constructor: str | Callable) -> bool:
    """Whether a config names the distiller's constructor, by any of its names."""
    if isinstance(constructor, str):
        return constructor.rpartition('.')[2] == DistillOptimWrapperConstructor.__name__
    return constructor is DistillOptimWrapperConstructor


def _adopted(wrapper: OptimWrapper, model: nn.Module) -> OptimWrapper:
    """A wrapper that somebody has built, extended where it trains what the terms train."""
    if not isinstance(wrapper, DistillStep):
        for name, term in model.terms.items():
            if any(loss.own_optimizer is not None and any(True for _ in loss.parameters()) for loss in term.losses):
                raise ConfigError(
                    f'term {name!r}: its own `optimizer` must be built with the rest, got an optim_wrapper that is '
                    'built already. Give optim_wrapper as a config.'
                )
    return extend_wrapper(wrapper, model)
