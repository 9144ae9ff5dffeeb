"""Builds a network from a config and fills every weight from a checkpoint, or says which not."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

from mmstructkd.compat import local_checkpoint, read_checkpoint
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import build_part

__all__ = ['build_network', 'file_hash', 'load_student', 'load_weights', 'student_config']

DISTILLER = 'mmstructkd.StructuredDistiller'


def student_config(cfg: Config) -> Config:
    """Return the plain config of the student inside a distilling config.

    Args:
        cfg: any config.

    Returns:
        A copy whose model is the student and that needs mmstructkd for
        nothing but what it names; a plain config is returned as it is.
    """
    if cfg.model.get('type') not in (DISTILLER, DISTILLER.split('.')[-1]):
        return cfg
    plain = copy.deepcopy(cfg)
    student = copy.deepcopy(cfg.model.student)
    if cfg.model.get('data_preprocessor') is not None:
        student.setdefault('data_preprocessor', cfg.model.data_preprocessor)
    plain.model = student
    _drop_own_import(plain)
    return plain


def _drop_own_import(cfg: Config) -> None:
    """Take mmstructkd out of ``custom_imports`` where nothing that a runner builds needs it."""
    settings = cfg.get('custom_imports')
    if not settings or _names_own(cfg, inspect.signature(Runner).parameters):
        return
    imports = settings['imports']
    left = [name for name in ([imports] if isinstance(imports, str) else imports) if name.split('.')[0] != 'mmstructkd']
    if left:
        settings['imports'] = left
    else:
        cfg.pop('custom_imports')


def _names_own(value: Any, keys: Collection[str] | None = None) -> bool:
    """Whether a ``type`` of mmstructkd stands in (some keys of) a config."""
    if isinstance(value, (Config, Mapping)):
        return any(_names_own(item) for key, item in value.items() if keys is None or key in keys)
    if isinstance(value, (list, tuple)):
        return any(_names_own(item) for item in value)
    return isinstance(value, str) and value.startswith('mmstructkd.')


def model_config(config: str | Mapping[str, Any], owner: str) -> ConfigDict:
    """Read the ``model`` of a file, of ``mmseg::...``, or of an inline dict.

    Args:
        config: path, ``scope::path``, a whole config, or the model itself.
        owner: who asks, for the message.

    Returns:
        The model's config, with ``_scope_`` and ``data_preprocessor`` filled in,
        and without weights of its own to download.

    Raises:
        ConfigError: there is no model in it, or the file cannot be read.
    """
    if isinstance(config, str):
        try:
            # Config.fromfile knows `scope::path` as a base only; mmengine.hub would call pip for a missing package.
            path = Config._get_cfg_path(config, '')[0] if '::' in config else config
            cfg = student_config(Config.fromfile(path))
        except (AssertionError, AttributeError, ImportError, KeyError, OSError, ValueError) as err:
            raise ConfigError(f'{owner}: `config` must be a readable config, got {config!r} ({err}).') from err
    elif isinstance(config, Mapping):
        whole = 'model' in config and 'type' not in config
        cfg = Config(copy.deepcopy(dict(config)) if whole else {'model': copy.deepcopy(dict(config))})
    else:
        raise ConfigError(f"{owner}: `config` must be a path, 'mmseg::...' or a dict, got {type(config).__name__}.")
    if cfg.get('model') is None or 'type' not in cfg.model:
        raise ConfigError(f'{owner}: `config` must define `model` with a `type`, got keys {sorted(cfg.keys())}.')
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    scope = cfg.get('default_scope')
    if scope is None:
        current = DefaultScope.get_current_instance()
        scope = None if current is None else current.scope_name
    if scope is not None:
        model.setdefault('_scope_', scope)
    _drop_pretrained(model)
    return model


def _drop_pretrained(config: Any) -> None:
    """Remove what would load other weights first: the checkpoint gives them all."""
    if isinstance(config, dict):
        config.pop('pretrained', None)
        init = config.get('init_cfg')
        if isinstance(init, dict) and init.get('type') == 'Pretrained':
            config.pop('init_cfg')
        for value in config.values():
            _drop_pretrained(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            _drop_pretrained(value)


def build_network(config: str | Mapping[str, Any], owner: str) -> nn.Module:
    """Build a network of mmseg or mmdet without any weights.

    Args:
        config: see :func:`model_config`.
        owner: who asks, for the message.

    Returns:
        The network.

    Raises:
        ConfigError: it cannot be built, or is none of mmengine's.
    """
    made: nn.Module = build_part(
        owner, 'config', model_config(config, owner), what='network', example="'mmseg::...'", known=BaseModel
    )
    if not isinstance(made, BaseModel):
        raise ConfigError(f'{owner}: `config` must be of a network of mmengine, got {type(made).__name__}.')
    return made


def file_hash(path: str) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def load_weights(
    network: nn.Module, checkpoint: str, *, owner: str, allow_random: bool = False, trust_checkpoint: bool = False
) -> str:
    """Fill ``network`` from a checkpoint; every parameter must come from it.

    Args:
        network: the network.
        checkpoint: path, URL, ``open-mmlab://name`` or ``torchvision://name``.
        owner: who asks, for the message.
        allow_random: let parameters keep their random values.
        trust_checkpoint: allow a file whose reading runs code.

    Returns:
        SHA-256 of the file.

    Raises:
        CheckpointError: the file cannot be read safely, or does not fit; the
            message lists what is missing, unexpected or of another shape.
    """
    path = local_checkpoint(checkpoint)
    content = read_checkpoint(path, trust=trust_checkpoint)
    weights = content.get('state_dict', content)
    weights = {k.removeprefix('module.'): v for k, v in weights.items() if isinstance(v, Tensor)}
    own = network.state_dict()
    missing = [k for k in own if k not in weights and not k.endswith('num_batches_tracked')]
    unexpected = [k for k in weights if k not in own and not k.startswith('data_preprocessor.')]
    misshapen = [k for k in own if k in weights and own[k].shape != weights[k].shape]
    if (missing or unexpected or misshapen) and not allow_random:
        raise CheckpointError(_mismatch(owner, checkpoint, own, weights, missing, unexpected, misshapen))
    fitting = {k: v for k, v in weights.items() if k in own and k not in misshapen}
    network.load_state_dict(fitting, strict=False)
    return file_hash(path)


def load_student(cfg: Config, checkpoint: str, *, owner: str, trust_checkpoint: bool = False) -> nn.Module:
    """Build the plain network of a config and fill it from a checkpoint, every key matched.

    Args:
        cfg: a plain config, or a distilling one, whose student is meant.
        checkpoint: see :func:`load_weights`.
        owner: who asks, for the message.
        trust_checkpoint: allow a file whose reading runs code.

    Returns:
        The network, in eval.

    Raises:
        CheckpointError: see :func:`load_weights`.
        ConfigError: there is no model in the config.
    """
    plain = student_config(cfg)
    network = build_network({key: plain.get(key) for key in ('model', 'default_scope', 'data_preprocessor')}, owner)
    load_weights(network, checkpoint, owner=owner, trust_checkpoint=trust_checkpoint)
    return network.eval()


def _mismatch(
    owner: str,
    checkpoint: str,
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    misshapen: list[str],
) -> str:
    """Say in full what does not fit."""
    lines = [
        f'{owner}: `checkpoint` must give every parameter of the config, got {checkpoint!r} with '
        f'{len(missing)} missing, {len(unexpected)} unexpected and {len(misshapen)} of another shape.'
    ]
    for k in misshapen:
        if k.rsplit('.', 2)[-2] in ('conv_seg', 'fc_cls', 'cls') and own[k].shape[1:] == weights[k].shape[1:]:
            lines.append(
                f'  The checkpoint has {weights[k].shape[0]} classes, the config num_classes={own[k].shape[0]} ({k}).'
            )
    lines += [f'  missing: {k} {tuple(own[k].shape)}' for k in missing]
    lines += [f'  unexpected: {k} {tuple(weights[k].shape)}' for k in unexpected]
    lines += [f'  shape: {k} is {tuple(weights[k].shape)}, must be {tuple(own[k].shape)}' for k in misshapen]
    lines.append('Use the config this checkpoint was trained with (allow_random=True lets the rest stay random).')
    return '\n'.join(lines)
