"""Checks configs of mmcv's layers, so that a mistake in one is told by the class that takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmcv.cnn import build_activation_layer, build_conv_layer, build_norm_layer

from mmstructkd.errors import ConfigError, shown

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

    Norms and activations draw no random numbers; a convolution is made of one
    channel and leaves the random stream behind by as many numbers.

    Args:
        owner: who takes the configs, for the message.
        channels: width of the normalisation.
        conv_cfg: config of a convolution; ``None``: none is checked.
        norm_cfg: config of a normalisation; likewise.
        act_cfg: config of an activation; likewise.
    """
    builders: dict[str, tuple[Mapping[str, Any] | None, Callable[[dict[str, Any]], Any]]] = {
        'conv_cfg': (conv_cfg, lambda config: build_conv_layer(config, 1, 1, 1)),
        'norm_cfg': (norm_cfg, lambda config: build_norm_layer(config, channels)),
        'act_cfg': (act_cfg, build_activation_layer),
    }
    for argument, (config, build) in builders.items():
        if config is None:
            continue
        try:
            build(dict(config))
        except Exception as err:  # whatever mmcv or torch trips over
            raise ConfigError(
                f'{owner}: `{argument}` must be the config of a layer, got {shown(config)}. {type(err).__name__}: {err}'
            ) from err
