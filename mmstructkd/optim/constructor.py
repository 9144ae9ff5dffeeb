"""Builds the optim wrapper of a distiller: student as in plain training, critic apart."""

from __future__ import annotations

import copy

from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import OPTIMIZERS
from torch import nn

from mmstructkd.errors import ConfigError, shown, suggest
from mmstructkd.optim.composite import CompositeOptimizer
from mmstructkd.registry import OPTIM_WRAPPER_CONSTRUCTORS, look_up

__all__ = ['DistillOptimWrapperConstructor']


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

    The distiller installs this one by itself; a config need not name it.

    Args:
        optim_wrapper_cfg: the ``optim_wrapper`` of the config. Its key
            ``base_constructor`` names the constructor of the student's part.
        paramwise_cfg: handed to the base constructor.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.optim_wrapper_cfg = copy.deepcopy(optim_wrapper_cfg)
        self.base_constructor = self.optim_wrapper_cfg.pop('base_constructor', 'DefaultOptimWrapperConstructor')
        self.paramwise_cfg = paramwise_cfg

    def _of_student(self, student: nn.Module) -> OptimWrapper:
        """What the base constructor makes of the plain model, its mistakes told with the config's name."""
        owner = type(self).__name__
        settings = {
            'type': self.base_constructor,
            'optim_wrapper_cfg': copy.deepcopy(self.optim_wrapper_cfg),
            'paramwise_cfg': copy.deepcopy(self.paramwise_cfg),
        }
        if look_up(MMENGINE_CONSTRUCTORS, self.base_constructor) is None:
            raise ConfigError(
                f'{owner}: `base_constructor` must name a registered constructor, got {self.base_constructor!r}. '
                f'{suggest(self.base_constructor, MMENGINE_CONSTRUCTORS.module_dict)}'
            )
        optimizer = self.optim_wrapper_cfg.get('optimizer')
        kind = optimizer.get('type') if isinstance(optimizer, dict) else None
        if isinstance(kind, str) and look_up(OPTIMIZERS, kind) is None:
            raise ConfigError(
                f'{owner}: `optim_wrapper_cfg`: `optimizer` must name a registered optimizer, got {kind!r}. '
                f'{suggest(kind, OPTIMIZERS.module_dict)}'
            )
        try:
            return MMENGINE_CONSTRUCTORS.build(settings)(student)
        except Exception as err:  # mmengine and torch raise whatever they trip over
            raise ConfigError(
                f'{owner}: `optim_wrapper_cfg` and `paramwise_cfg` must make an optimiser of the student, '
                f'got {shown(self.optim_wrapper_cfg)} and {shown(self.paramwise_cfg)}. {type(err).__name__}: {err}'
            ) from err

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the wrapper.

        Args:
            model: a distiller, wrapped for distribution or not.

        Returns:
            The optim wrapper over every trained parameter, each in it once.

        Raises:
            ConfigError: ``model`` is no distiller, or no optimiser can be made of the config.
        """
        if is_model_wrapper(model):
            model = model.module
        if not hasattr(model, 'auxiliary_parameters'):
            raise ConfigError(
                f'DistillOptimWrapperConstructor: `model` must be a StructuredDistiller, got {type(model).__name__}. '
                'Remove `constructor` from optim_wrapper for plain training.'
            )
        wrapper = self._of_student(model.student)
        shared, own = model.auxiliary_parameters()
        bare = {
            getattr(module, name) for module in model.terms.modules() for name in getattr(module, 'no_weight_decay', ())
        }
        decayed, undecayed = [p for p in shared if p not in bare], [p for p in shared if p in bare]
        if decayed:
            wrapper.optimizer.add_param_group({'params': decayed})
        if undecayed:
            wrapper.optimizer.add_param_group({'params': undecayed, 'weight_decay': 0.0})
        if own:
            parts = [OPTIMIZERS.build({**settings, 'params': params}) for settings, params in own]
            wrapper.optimizer = CompositeOptimizer([wrapper.optimizer, *parts])
        return wrapper
