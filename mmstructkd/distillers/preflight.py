"""Builds the distiller of a config as training would, to be tried on one batch before it begins.

What looks at a step is :mod:`mmstructkd.distillers.trial`, what measures it
:mod:`mmstructkd.distillers.step_cost`. Nothing here is part of training. What is
tried is used up a little: running statistics move, and random numbers are drawn, as
in a few training steps.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed

from mmstructkd import compat
from mmstructkd.checkpoints import IN_CONFIG, consented, read_checkpoint, trusts
from mmstructkd.distillers.class_names import check_classes, names_of_config
from mmstructkd.distillers.step_cost import CostReport, measure_cost
from mmstructkd.distillers.structured_distiller import StructuredDistiller
from mmstructkd.distillers.trial import LevelReport, TermReport, Trial, gradient_share, try_batch
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.run_config import config_at_hand
from mmstructkd.teachers.loading import DISTILLER, drop_pretrained, init_without_weights
from mmstructkd.terms import Term
from mmstructkd.weights import tensors_in

__all__ = [
    'CostReport',
    'LevelReport',
    'TermReport',
    'Trial',
    'build_distiller',
    'gradient_share',
    'measure_cost',
    'peak_factor',
    'try_batch',
]

OWNER = 'Preflight'


def _is_distiller(kind: Any) -> bool:
    """Whether a config's ``type`` names a distiller."""
    if isinstance(kind, str):
        kind = StructuredDistiller if kind == DISTILLER.split('.')[-1] else MODELS.get(kind)
    return isinstance(kind, type) and issubclass(kind, StructuredDistiller)


def build_distiller(cfg: Config, *, random_init: bool = False) -> StructuredDistiller:
    """Build and initialise the distiller of a config as the runner does.

    Args:
        cfg: a distilling config.
        random_init: leave out the weights that the student would start from
            (``pretrained``, ``init_cfg``, ``load_from``), and their download.

    Returns:
        The distiller on the CPU, in training mode.

    Raises:
        ConfigError: the config has no model or does not distil; and whatever a
            :class:`StructuredDistiller` raises.
    """
    compat.install()
    model = cfg.get('model')
    if not isinstance(model, Mapping) or 'type' not in model:
        raise ConfigError(f'{OWNER}: the config must define `model` with a `type`, got keys {sorted(cfg.keys())}.')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    if not _is_distiller(model.type):
        raise ConfigError(
            f'{OWNER}: `model.type` must be {DISTILLER!r}, got {model.type!r}. This config trains a plain model, '
            'there is nothing to check: start it with tools/train.py, or wrap the model in a distiller.'
        )
    model = copy.deepcopy(model)
    if random_init and isinstance(model.get('student'), Mapping):
        drop_pretrained(model.student)
    set_random_seed((cfg.get('randomness') or {}).get('seed') or 0)
    with consented(trusts(cfg), IN_CONFIG), compat.without_pretrained() if random_init else contextlib.nullcontext():
        try:
            with config_at_hand(cfg):
                distiller = MODELS.build(model)
        except FileNotFoundError as err:
            raise ConfigError(
                f'{OWNER}: a network must find the files that its config names, got {err}. Give their full path.'
            ) from err
        except OSError as err:
            if not random_init:
                raise
            reason = (str(err).strip().splitlines() or [''])[0]
            raise ConfigError(
                f'{OWNER}: a network must be built without downloads with --random-init, got one that needs files '
                f'({reason}). Put them into the cache first, e.g. by building it once without --random-init.'
            ) from err
        check_classes(distiller.terms.values(), names_of_config(cfg), distiller.teacher)
        if random_init:
            init_without_weights(distiller)
        else:
            distiller.init_weights()
        if cfg.get('load_from') and not random_init:
            _load_from(distiller, cfg.load_from)
    distiller.teacher.without_cache()  # nothing is written here, and what the teacher costs is asked
    return distiller.train()


def _load_from(distiller: StructuredDistiller, path: str) -> None:
    """Load the weights that training would start from, as leniently as mmengine does."""
    weights = tensors_in(read_checkpoint(path), OWNER, path)
    try:
        distiller.load_state_dict(weights, strict=False)
    except RuntimeError as err:
        raise CheckpointError(f'{OWNER}: `load_from` must fit the student, got {path!r}. {err}') from err


def peak_factor(term: Term, cfg: Config) -> tuple[float, float]:
    """Factors of a term's schedule over the training of a config.

    Args:
        term: the term.
        cfg: the config; its ``train_cfg`` says how long training is.

    Returns:
        The factor at the first iteration, and the largest one.
    """
    train = cfg.get('train_cfg') or {}
    last = train.get('max_epochs' if term.schedule.by_epoch else 'max_iters') or train.get('max_iters') or 1
    steps = {round(last * number / 200) for number in range(201)} | {term.schedule.begin}
    if term.schedule.type not in ('linear', 'cosine'):
        steps = {step for step in steps if step < last}  # what begins at the end never does; those two hold before it
    return term.schedule.factor(0, last), max(term.schedule.factor(step, last) for step in steps)
