"""Checks configs of mmcv's layers, so that a mistake in one is told by the class that takes it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn import ConvModule

from mmstructkd.arguments import check_call
from mmstructkd.errors import ConfigError, check_finite_number, check_positive, shown
from mmstructkd.registry import MODELS, look_up

__all__ = ['check_layers']


def check_layers(
    owner: str,
    channels: int,
    *,
    conv_cfg: Mapping[str, Any] | None = None,
    norm_cfg: Mapping[str, Any] | None = None,
    act_cfg: Mapping[str, Any] | None = None,
) -> None:
    """Raise :class:`ConfigError` unless each config builds a layer, as ``ConvModule`` would build it.

    The global random stream is left as it was.

    Args:
        owner: who takes the configs, for the message.
        channels: width of the normalisation.
        conv_cfg: config of a convolution; ``None``: none is checked.
        norm_cfg: config of a normalisation; likewise.
        act_cfg: config of an activation; likewise.
    """
    for argument, config in (('conv_cfg', conv_cfg), ('norm_cfg', norm_cfg), ('act_cfg', act_cfg)):
        if config is None:
            continue
        kind = config.get('type')
        cls = look_up(MODELS, kind) if isinstance(kind, str) else kind
        # Annotations of other packages do not always say all that is taken.
        if isinstance(cls, type) and cls.__module__.startswith('torch.'):
            given = {name: value for name, value in config.items() if name not in ('type', 'requires_grad')}
            check_call(f'{owner}: `{argument}`', cls, (), given, filled=inspect.signature(cls).parameters)
        if argument == 'norm_cfg':  # torch takes any number here
            if config.get('eps') is not None:
                check_positive(f'{owner}: `{argument}`', 'eps', config['eps'])
            if config.get('momentum') is not None:
                check_finite_number(f'{owner}: `{argument}`', 'momentum', config['momentum'], minimum=0, maximum=1)
        settings: dict[str, Any] = {'act_cfg': None, argument: dict(config)}
        try:
            with torch.random.fork_rng(devices=[]):  # a convolution draws its weights
                ConvModule(1, channels, 1, **settings)
        except Exception as err:  # whatever mmcv or torch trips over
            raise ConfigError(
                f'{owner}: `{argument}` must be the config of a layer, got {shown(config)}. {type(err).__name__}: {err}'
            ) from err
