"""What only training needs of a distiller, in a checkpoint beside the student: terms, companion, who the teacher is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmstructkd.checkpoints import IN_CONFIG, local_checkpoint, read_checkpoint, trusts
from mmstructkd.errors import CheckpointError, shown
from mmstructkd.teachers import TeacherSource

__all__ = ['carry_terms', 'restore', 'state_of']

STATE = 'mmstructkd'  # where StudentCheckpointHook puts it


def state_of(terms: nn.ModuleDict, companion: nn.Module, teacher: TeacherSource) -> dict[str, Any]:
    """Collect it.

    Args:
        terms: the terms, with their connectors and critics.
        companion: what trains beside the student.
        teacher: of which there is only who it is.

    Returns:
        What :func:`restore` takes.
    """
    return {'terms': terms.state_dict(), 'companion': companion.state_dict(), 'teacher': teacher.provenance()}


def restore(state: Mapping[str, Any], terms: nn.ModuleDict, companion: nn.Module, teacher: TeacherSource) -> None:
    """Put it back.

    Args:
        state: from a checkpoint of the same distiller.
        terms: the terms.
        companion: what trains beside the student.
        teacher: the teacher.

    Raises:
        CheckpointError: the terms or the teacher are others.
    """
    try:
        terms.load_state_dict(state['terms'])
    except RuntimeError as err:
        raise CheckpointError(
            f'StructuredDistiller: the resumed checkpoint must hold the terms of the config, got others. {err} '
            'Start anew from its student with load_from=.'
        ) from err
    saved, now = _identity(state['teacher']), _identity(teacher.provenance())
    if saved != now:
        raise CheckpointError(
            f'StructuredDistiller: the teacher must be the one the checkpoint was trained with ({shown(saved)}), '
            f'got {shown(now)}. Give that one, or start anew from the student with load_from=.'
        )
    try:
        companion.load_state_dict(state.get('companion', {}))
    except RuntimeError as err:
        raise CheckpointError(
            f'StructuredDistiller: the resumed checkpoint must hold what the teacher trains, got another. {err} '
            'Start anew from its student with load_from=.'
        ) from err


def carry_terms(path: str, terms: nn.ModuleDict, cfg: Mapping[str, Any]) -> list[str]:
    """Begin with what the terms of another training have learned.

    Args:
        path: a checkpoint of that training.
        terms: the terms of this one.
        cfg: config of the run, which may allow a file that needs more than weights.

    Returns:
        Names of the terms that have taken theirs.

    Raises:
        CheckpointError: the file cannot be read or is of no distilled run, or a term of
            the same name has other parts.
    """
    file = local_checkpoint(path)
    state = read_checkpoint(file, trust=trusts(cfg), how=IN_CONFIG).get(STATE)
    kept = state.get('terms') if isinstance(state, Mapping) else None
    if not isinstance(kept, Mapping):
        raise CheckpointError(
            f'StructuredDistiller: `training_state_from` must be a checkpoint of a distilled run, got '
            f'{path!r}, which holds no terms. Leave it out: load_from= takes the student.'
        )
    taken = []
    for name, term in terms.items():
        begin = f'{name}.'
        part = {key.removeprefix(begin): value for key, value in kept.items() if key.startswith(begin)}
        if not part:
            continue
        try:
            term.load_state_dict(part)
        except RuntimeError as err:
            raise CheckpointError(
                f'term {name!r}: `training_state_from` must hold what the term trains, got another of that name. '
                f'{err} Rename the term to let it start anew.'
            ) from err
        taken.append(name)
    return taken


def _identity(provenance: Any) -> Any:
    """What makes a teacher the same, wherever its files lie."""
    if isinstance(provenance, Mapping):
        left_out = ('checkpoint', 'config') if provenance.get('sha256') else ()
        return {key: _identity(value) for key, value in provenance.items() if key not in left_out}
    return [_identity(value) for value in provenance] if isinstance(provenance, (list, tuple)) else provenance
