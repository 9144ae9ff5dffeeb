"""Builds a network from a config and fills every weight from a checkpoint, or says which not."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections.abc import Collection, Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmstructkd.checkpoints import ON_COMMAND_LINE, local_checkpoint, read_checkpoint
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import build_part
from mmstructkd.weights import check_values, describe_mismatch, take_prefix, tensors_in

__all__ = [
    'build_network',
    'drop_pretrained',
    'file_hash',
    'init_without_weights',
    'load_student',
    'load_weights',
    'student_config',
]

DISTILLER = 'mmstructkd.StructuredDistiller'


def student_config(cfg: Config) -> Config:
    """Return the config with which the student inside a distilling config runs, tests and predicts.

    Args:
        cfg: any config.

    Returns:
        A copy whose model is the student and that needs mmstructkd for
        nothing but what it names; a plain config is returned as it is.
    """
    model = cfg.get('model')
    if not isinstance(model, Mapping) or not _distils(model):
        return cfg
    plain = copy.deepcopy(cfg)
    student = copy.deepcopy(model.student)
    if model.get('data_preprocessor') is not None:
        student.setdefault('data_preprocessor', model.data_preprocessor)
    plain.model = student
    drop_own_import(plain)
    return plain


def _distils(model: Mapping[str, Any]) -> bool:
    """Whether a model's config is a distiller's; one of the user's own has the same parts."""
    if own_name(model.get('type')) == DISTILLER.split('.')[-1] or model.get('type') == DISTILLER.split('.')[-1]:
        return True
    taught = 'teacher' in model or 'teachers' in model
    return isinstance(model.get('student'), Mapping) and taught and 'terms' in model


def drop_own_import(cfg: Config, *, always: bool = False) -> None:
    """Take mmstructkd out of ``custom_imports`` where nothing that a runner builds needs it.

    Args:
        cfg: the config, changed in place.
        always: where something needs it as well.
    """
    settings = cfg.get('custom_imports')
    if not settings or not (always or not _names_own(cfg, inspect.signature(Runner).parameters)):
        return
    imports = settings['imports']
    left = [name for name in ([imports] if isinstance(imports, str) else imports) if name.split('.')[0] != 'mmstructkd']
    if left:
        settings['imports'] = left
    else:
        cfg.pop('custom_imports')


def own_name(value: Any) -> str | None:
    """Name of a class of mmstructkd, where a value of a config names one.

    Args:
        value: ``'mmstructkd.X'``, or the class itself, as configs in Python's own syntax have it.

    Returns:
        ``'X'``, or ``None``.
    """
    if isinstance(value, type):
        value = f'{value.__module__}.{value.__name__}'
    if not isinstance(value, str) or not value.startswith('mmstructkd.'):
        return None
    return value.rpartition('.')[2]


def _names_own(value: Any, keys: Collection[str] | None = None) -> bool:
    """Whether a ``type`` of mmstructkd stands in (some keys of) a config."""
    if isinstance(value, (Config, Mapping)):
        return any(_names_own(item) for key, item in value.items() if keys is None or key in keys)
    if isinstance(value, (list, tuple)):
        return any(_names_own(item) for item in value)
    return own_name(value) is not None


def model_config(config: str | Mapping[str, Any], owner: str, *, pretrained: bool = False) -> ConfigDict:
    """Read the ``model`` of a file, of ``mmseg::...``, or of an inline dict.

    Args:
        config: path, ``scope::path``, a whole config, or the model itself.
        owner: who asks, for the message.
        pretrained: keep what names the weights that it would start from.

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
        except Exception as err:
            # A config is a program: anything may stop it.
            reason = (str(err).strip().splitlines() or [type(err).__name__])[0]
            raise ConfigError(f'{owner}: `config` must be a readable config, got {config!r} ({reason}).') from err
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
    if not pretrained:
        drop_pretrained(model)
    return model


def init_without_weights(network: nn.Module, *, level: int = logging.WARNING) -> None:
    """Initialise a network whose pretrained weights were left out.

    Some networks have an initialiser only for those weights, which trips over
    their absence: they stay as they were built, and the log says so.

    Args:
        network: with the ``init_weights`` of mmengine.
        level: of the line in the log.
    """
    try:
        network.init_weights()
    except (AttributeError, KeyError, TypeError) as err:
        print_log(
            f'{type(network).__name__} stays as it was built: {type(err).__name__}: {err}', 'current', level=level
        )


def drop_pretrained(config: Any) -> None:
    """Remove what would load other weights first: the checkpoint gives them all."""
    if isinstance(config, dict):
        config.pop('pretrained', None)
        config.pop('teacher_ckpt', None)  # of mmdet's own distilling detectors
        init = config.get('init_cfg')
        several = isinstance(init, (list, tuple))
        kept = [one for one in (init if several else [init]) if not _names_weights(one)]
        if init is not None and not kept:
            config.pop('init_cfg')
        elif several:
            config['init_cfg'] = kept
        for value in config.values():
            drop_pretrained(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            drop_pretrained(value)


def _names_weights(init: Any) -> bool:
    """Whether an ``init_cfg`` reads weights; some backbones take it without a ``type``."""
    return isinstance(init, dict) and (str(init.get('type', '')).startswith('Pretrained') or 'checkpoint' in init)


def build_network(config: str | Mapping[str, Any], owner: str, *, pretrained: bool = False) -> nn.Module:
    """Build a network of mmseg or mmdet; no weights are read.

    Args:
        config: see :func:`model_config`.
        owner: who asks, for the message.
        pretrained: keep what names the weights that it would start from, for
            ``init_weights()``.

    Returns:
        The network.

    Raises:
        ConfigError: it cannot be built, or is none of mmengine's.
    """
    made: nn.Module = build_part(
        owner,
        'config',
        model_config(config, owner, pretrained=pretrained),
        what='network',
        example="'mmseg::...'",
        known=BaseModel,
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
    network: nn.Module,
    checkpoint: str,
    *,
    owner: str,
    allow_random: bool = False,
    trust_checkpoint: bool = False,
    how: str = ON_COMMAND_LINE,
    prefix: str = '',
    prefix_key: str | None = None,
) -> str:
    """Fill ``network`` from a checkpoint; every parameter must come from it.

    Args:
        network: the network.
        checkpoint: path, URL, ``open-mmlab://name`` or ``torchvision://name``.
        owner: who asks, for the message.
        allow_random: let parameters keep their random values.
        trust_checkpoint: allow a file whose reading runs code.
        how: what the user writes to allow it, for the message.
        prefix: take the part of the checkpoint whose keys begin so, without that.
        prefix_key: how the user sets it, see :func:`~mmstructkd.weights.describe_mismatch`.

    Returns:
        SHA-256 of the file.

    Raises:
        CheckpointError: the file cannot be read safely, or does not fit (the
            message has what is missing, unexpected or of another shape), or its
            values cannot be those of a trained network.
    """
    path = local_checkpoint(checkpoint)
    weights = tensors_in(read_checkpoint(path, trust=trust_checkpoint, how=how), owner, checkpoint)
    own = network.state_dict()
    if prefix:
        weights = take_prefix(weights, prefix, own, owner)
    mismatch = describe_mismatch(owner, checkpoint, own, weights, prefix_key)
    if mismatch and not allow_random:
        raise CheckpointError(mismatch)
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    check_values(network, fitting, owner, checkpoint)
    if mismatch:
        print_log(
            f'{owner}: of {len(own)} tensors {len(fitting)} come from {checkpoint!r}, the others stay random '
            '(allow_random=True).',
            'current',
            level=logging.WARNING,
        )
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
    network.eval()  # which need not return the network
    return network
