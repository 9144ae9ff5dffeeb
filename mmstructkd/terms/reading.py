"""Reads the config of a term: its keys, its taps, the batches that it compares on, its loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from mmstructkd.errors import ConfigError, TapError, check_finite_number, check_one_of, prefix_errors, shown, suggest
from mmstructkd.losses.base import DistillLoss
from mmstructkd.optim import check_optimizer
from mmstructkd.registry import MODELS, build_part, look_up
from mmstructkd.taps import Tap

__all__ = [
    'MATCHES',
    'TERM_KEYS',
    'Confidence',
    'build_loss',
    'check_keys',
    'connector_classes',
    'read_confidence',
    'read_outputs',
    'read_sides',
    'read_streams',
    'read_taps',
]

TERM_KEYS = ('tap', 'loss', 'connector', 'schedule', 'match', 'where', 'on', 'confidence')
#: What configs give a term by mistake, and where it belongs.
MISPLACED = {
    **dict.fromkeys(('type', 'loss_weight', 'temperature', 'preset'), 'It belongs into `loss`.'),
    **dict.fromkeys(('student', 'teacher'), 'Taps that differ go into tap=dict(student=..., teacher=...).'),
}
MATCHES = ('stride', 'order')


def check_keys(name: Any, config: Any, whose: str) -> None:
    """Check the name of a term and the keys of its config.

    Args:
        name: name of the term.
        config: what stands under it.
        whose: who has the terms, for messages.

    Raises:
        ConfigError: an unknown key, a missing one, or a name that cannot be logged.
    """
    owner = f'term {name!r}'
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f'{owner}: the name of a term in `terms` must be a plain identifier, got {name!r}.')
    if name in (*TERM_KEYS, *MISPLACED) and not isinstance(config, Mapping):
        raise ConfigError(
            f'{whose}: `terms` must be a dict of terms by name, got the key {name!r} of a single term. '
            'Give it a name: terms=dict(<name>=dict(tap=..., loss=...)).'
        )
    if name in dir(nn.ModuleDict) or '__' in name:
        raise ConfigError(f'{owner}: `name` must not be one of torch.nn.ModuleDict, got {name!r}. Rename it.')
    if not isinstance(config, Mapping):
        raise ConfigError(f'{owner}: each of `terms` must be a dict with the keys {TERM_KEYS}, got {config!r}.')
    for key in config:
        if key not in TERM_KEYS:
            way_out = MISPLACED.get(key) or suggest(key, TERM_KEYS)
            raise ConfigError(f'{owner}: a term must have only the keys {TERM_KEYS}, got {key!r}. {way_out}')
    for key in ('tap', 'loss'):
        if key not in config:
            raise ConfigError(f'{owner}: `{key}` must be given, got keys {list(config)}.')


def read_streams(on: Any, owner: str) -> tuple[str, ...]:
    """Read on which batches a term compares: one name or several."""
    names = (on,) if isinstance(on, str) else tuple(on) if isinstance(on, (list, tuple)) else ()
    good = all(isinstance(name, str) and name.isidentifier() for name in names)
    if not names or not good or len(set(names)) < len(names):
        raise ConfigError(
            f"{owner}: `on` must be the name of a stream or a list of them, got {on!r}. 'labelled' is the batch "
            'that the task is trained on.'
        )
    return names


@dataclasses.dataclass(frozen=True)
class Confidence:
    """From which confidence on a position counts.

    Attributes:
        minimum: the least that counts, in [0, 1].
        by: ``'teacher'``, its largest probability, or ``'both'``, that of teacher and student
            multiplied.
    """

    minimum: float = 0.9
    by: str = 'both'


def read_confidence(confidence: Any, owner: str) -> Confidence | None:
    """Read how sure of a position the networks must be.

    Raises:
        ConfigError: no dict of ``minimum`` and ``by``, or one of them is out of range.
    """
    if confidence is None:
        return None
    if not isinstance(confidence, Mapping) or not set(confidence) <= {'minimum', 'by'}:
        raise ConfigError(
            f"{owner}: `confidence` must be a dict with the keys 'minimum' and 'by', got {shown(confidence)}. "
            "Example: confidence=dict(minimum=0.9, by='teacher')."
        )
    made = Confidence(**confidence)
    check_finite_number(f'{owner}: `confidence`', 'minimum', made.minimum, minimum=0)
    if made.minimum > 1:
        raise ConfigError(f'{owner}: `confidence`: `minimum` must lie in [0, 1], got {made.minimum!r}.')
    check_one_of(f'{owner}: `confidence`', 'by', made.by, ('teacher', 'both'))
    return made


def read_sides(tap: Any, owner: str) -> Mapping[str, Any]:
    """Split ``tap`` into the student's and the teacher's."""
    if not isinstance(tap, Mapping):
        return {'student': tap, 'teacher': tap}
    if set(tap) != {'student', 'teacher'}:
        raise ConfigError(
            f"{owner}: `tap` must have the keys 'student' and 'teacher', got {list(tap)}. "
            "One string serves both networks: tap='decode_head.conv_seg'."
        )
    return tap


def read_taps(taps: Any, owner: str) -> tuple[Tap, ...]:
    """Read one tap or several."""
    several = taps if isinstance(taps, (list, tuple)) else [taps]
    if not several:
        raise TapError(f'{owner} must name at least one tap, got {taps!r}.')
    parsed = tuple(Tap.parse(text, owner) for text in several)
    if len(set(parsed)) < len(parsed):
        raise TapError(f'{owner} must name each `tap` once, got {list(several)!r}.')
    return parsed


def connector_classes(config: Any) -> list[type | None]:
    """Classes of the configured connectors, in their order; one ``None`` where it is automatic."""
    configs = config if isinstance(config, (list, tuple)) else [config]
    kinds = [one.get('type') if isinstance(one, Mapping) else None for one in configs]
    return [look_up(MODELS, kind) if isinstance(kind, str) else kind for kind in kinds] or [None]


def read_outputs(taps: tuple[Tap, ...], connector: Any) -> tuple[Tap, ...]:
    """The outputs that the connector reads, where the teacher's tap names a module that gives several."""
    keys = getattr(connector_classes(connector)[0], 'teacher_outputs', ())
    if not keys or len(taps) != 1 or taps[0].keys or taps[0].side != 'output':
        return taps
    return tuple(dataclasses.replace(taps[0], keys=each) for each in keys)


def build_loss(owner: str, config: Any, where: str | None = None) -> DistillLoss:
    """Build a term's loss, with the term's name in the errors.

    Args:
        owner: the term, for messages.
        config: config of a registered loss.
        where: which positions count, as the term says; ``None``: as the loss does.

    Returns:
        The loss.

    Raises:
        ConfigError: no distillation loss, or ``where`` is said by both.
    """
    loss = build_part(
        owner,
        'loss',
        config,
        example="dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=1.0)",
        known=DistillLoss,
    )
    if not isinstance(loss, DistillLoss):
        raise ConfigError(
            f'{owner}: `loss` must be a distillation loss, got {type(loss).__name__}. '
            'Losses of mmseg and mmdet compare with labels; subclass mmstructkd.losses.DistillLoss.'
        )
    if loss.own_optimizer is not None:
        check_optimizer(owner, loss.own_optimizer)
    if where is not None:
        _restrict(owner, loss, where, config.get('where'))
    return loss


def _restrict(owner: str, loss: DistillLoss, where: str, own: str | None) -> None:
    """Let a loss count where the term says."""
    if own is not None and loss.where != where:
        raise ConfigError(
            f'{owner}: `where` must be said once, got {where!r} of the term and {own!r} of its loss. '
            'Leave one of them out.'
        )
    with prefix_errors(owner):
        loss.restrict(where)
