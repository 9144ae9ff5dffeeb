"""Checks the optimiser settings that a loss has for its own parameters, long before there is an optimiser."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from torch import nn

from mmstructkd.arguments import check_call
from mmstructkd.errors import ConfigError, shown
from mmstructkd.registry import build_part, look_up

__all__ = ['check_optimizer']


def check_optimizer(owner: str, argument: str, config: Any) -> None:
    """Raise :class:`~mmstructkd.errors.ConfigError` unless ``config`` builds an optimiser.

    Names and kinds are compared with the optimiser's own signature, then it is
    built for one number, so that its own checks of ranges speak as well.

    Args:
        owner: who takes the config, for messages.
        argument: its name.
        config: a dict with a ``type`` of mmengine's ``OPTIMIZERS``.

    Example:
        >>> check_optimizer('Loss', 'optimizer', dict(type='Adam', lr=1e-3))
        >>> check_optimizer('Loss', 'optimizer', dict(type='Adma', lr=1e-3))
        Traceback (most recent call last):
        mmstructkd.errors.ConfigError: Loss: `optimizer` must name a registered optimizer, got 'Adma'. Did you mean ...
    """
    if isinstance(config, Mapping) and 'params' in config:
        raise ConfigError(f'{owner}: `{argument}` must leave `params` out, got {shown(config["params"])}.')
    kind = config.get('type') if isinstance(config, Mapping) else None
    cls = look_up(OPTIMIZERS, kind) if isinstance(kind, str) else kind
    if isinstance(cls, type):
        settings = {name: value for name, value in config.items() if name != 'type'}
        check_call(f'{owner}: `{argument}`', cls, (), settings, filled=('params',))
    made = build_part(
        owner,
        argument,
        config,
        what='optimizer',
        example="dict(type='Adam', lr=4e-4, betas=(0.9, 0.99))",
        known=torch.optim.Optimizer,
        filled={'params': [nn.Parameter(torch.zeros(1))]},
        registry=OPTIMIZERS,
    )
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f'{owner}: `{argument}` must be an optimiser, got {type(made).__name__}.')
    for name, value in made.defaults.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f'{owner}: `{argument}`: `{name}` must be a finite number, got {value!r}.')
