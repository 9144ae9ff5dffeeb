"""Whether class k of the teacher is class k of the student: by the names of the data that both were trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.teachers.base import TeacherSource
from mmstructkd.terms import Term

__all__ = ['check_class_names', 'check_classes', 'names_of_config', 'names_of_dataset', 'names_of_teacher']


def _names(value: Any) -> tuple[str, ...] | None:
    """Class names of a dataset's meta information, a checkpoint's, or a list."""
    if isinstance(value, Mapping):
        value = value.get('classes', value.get('CLASSES'))
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        return None
    return tuple(str(name) for name in value)


def names_of_dataset(dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes of a dataset, wrapped or not; ``None`` where it names none."""
    while dataset is not None:
        names = _names(getattr(dataset, 'metainfo', None))
        if names is not None:
            return names
        inner = getattr(dataset, 'dataset', None) or getattr(dataset, 'datasets', None)
        dataset = inner[0] if isinstance(inner, (list, tuple)) and inner else inner
    return None


def names_of_config(config: Any) -> tuple[str, ...] | None:
    """Names of the classes that a whole config trains on; ``None`` where it does not say.

    Args:
        config: path, ``scope::path``, a whole config, or only a model.
    """
    if isinstance(config, str):
        try:
            config = Config.fromfile(Config._get_cfg_path(config, '')[0] if '::' in config else config)
        except (AssertionError, AttributeError, ImportError, KeyError, OSError, ValueError):
            return None  # what the file is wanted for has been read already
    loader = config.get('train_dataloader') if isinstance(config, (Config, Mapping)) else None
    dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
    while isinstance(dataset, Mapping):
        names = _names(dataset.get('metainfo'))
        if names is None:
            kind = dataset.get('type')
            scope = config.get('default_scope')
            if isinstance(kind, str):
                kind = DATASETS.get(f'{scope}.{kind}' if scope and '.' not in kind else kind)
            names = _names(getattr(kind, 'METAINFO', None))
        if names is not None:
            return names
        inner = dataset.get('dataset', dataset.get('datasets'))
        dataset = inner[0] if isinstance(inner, (list, tuple)) and inner else inner
    return None


def names_of_teacher(teacher: TeacherSource) -> tuple[str, ...] | None:
    """Names of the classes that a teacher was trained on; ``None`` where nothing says so.

    Those that its checkpoint holds come before those of its config's dataset.
    """
    checkpoint = getattr(teacher, 'checkpoint', None)
    if checkpoint is not None:
        try:
            # No weight is read: only what stands beside them is asked.
            meta = read_checkpoint(checkpoint, map_location='meta').get('meta')
        except (CheckpointError, OSError):
            meta = None  # a file that has to be trusted was read once, and is not for its names
        if isinstance(meta, Mapping):
            names = _names(meta.get('dataset_meta')) or _names(meta)
            if names is not None:
                return names
    return names_of_config(getattr(teacher, 'source', None))


def _plain(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(' '.join(name.lower().replace('_', ' ').replace('-', ' ').split()) for name in names)


def check_classes(terms: Iterable[Term], student: Sequence[str] | None, teacher: TeacherSource) -> None:
    """Compare the student's class names with those of the teacher that each term taps.

    Args:
        terms: of the distiller.
        student: class names of the student's data; ``None``: not known.
        teacher: of the distiller.

    Raises:
        ConfigError: see :func:`check_class_names`.
    """
    tapped: dict[int, tuple[TeacherSource, list[Term]]] = {}
    for term in terms:
        if getattr(term, 'by_class', False):
            member = teacher.member(term.teacher_taps[0])
            tapped.setdefault(id(member), (member, []))[1].append(term)
    for member, own in tapped.values():
        check_class_names(own, student, names_of_teacher(member))


def check_class_names(terms: Iterable[Term], student: Sequence[str] | None, teacher: Sequence[str] | None) -> None:
    """Compare the class names of both networks for the terms that take class k for class k.

    Args:
        terms: of the distiller.
        student: class names of the student's data; ``None``: not known.
        teacher: of the teacher's.

    Raises:
        ConfigError: both have the same names in another order, and a term has no
            ``class_map``; the message has the one to write.
    """
    concerned = [term for term in terms if term.by_class]
    if student is None or teacher is None or not concerned:
        return
    plain_s, plain_t = _plain(student), _plain(teacher)
    if plain_s == plain_t:
        return
    unmapped = [term for term in concerned if not getattr(term.loss, 'maps_classes', False)]
    if sorted(plain_s) == sorted(plain_t) and len(set(plain_s)) == len(plain_s):
        right = [plain_s.index(name) for name in plain_t]
        first = next(k for k, place in enumerate(right) if place != k)
        where = f'class {first} is {student[first]!r} of the student and {teacher[first]!r} of the teacher'
        for term in unmapped:
            mapped = hasattr(term.loss, 'class_map')
            way_out = f'Write class_map={_for_width(term, right)} in its loss.'
            if not mapped:
                way_out = (
                    f'PixelwiseKLLoss and DistLoss take class_map={_for_width(term, right)}; with '
                    f'{type(term.loss).__name__} train the student on classes in the order of the teacher.'
                )
            raise ConfigError(
                f'term {term.name!r}: the classes of the teacher must be those of the student in the same order, got '
                f'the same names in another order: {where}. {way_out}'
            )
        for term in set(concerned) - set(unmapped):
            numbers = list(term.loss.class_map.numbers)
            if numbers[: len(right)] != right:
                _warn(term, f'its class_map is {numbers}, where the names of the classes say {right}.')
        return
    if not unmapped:
        return
    pairs = list(zip(plain_s, plain_t, strict=False))
    first = next((k for k, (one, other) in enumerate(pairs) if one != other), len(pairs))
    shown = [repr(names[first]) if first < len(names) else 'missing' for names in (student, teacher)]
    for term in unmapped:
        _warn(
            term,
            f'the classes of student and teacher have other names ({len(student)} and {len(teacher)} of them); the '
            f'first that differs is class {first}: {shown[0]} and {shown[1]}. What stands in the same place is taken '
            'for the same class.',
        )


def _for_width(term: Term, numbers: list[int]) -> list[int]:
    """The map for the channels that a term compares, with the background behind the classes of a box head."""
    width = term.levels[0].teacher[1] if term.levels and len(term.levels[0].teacher) > 1 else len(numbers)
    return [*numbers, len(numbers)] if width == len(numbers) + 1 else numbers


def _warn(term: Term, text: str) -> None:
    print_log(f'term {term.name!r}: {text}', 'current', level=logging.WARNING)
