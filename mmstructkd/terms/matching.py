"""Which tensor of the student stands against which of the teacher.

Pure functions of taps, recorded tensors and heads; :class:`~mmstructkd.terms.term.Term`
asks them in each step, and :mod:`mmstructkd.terms.building` once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from mmstructkd.errors import TapError
from mmstructkd.losses.base import DistillLoss
from mmstructkd.taps import Tap
from mmstructkd.tasks.targets import num_classes_of

__all__ = [
    'Classes',
    'Heads',
    'Records',
    'compares_classes',
    'is_binary_pair',
    'order_by_size',
    'recorded',
    'repeat_for_branches',
    'repeat_for_cascade',
    'scores_of_other_classes',
    'tensor_names',
    'widths_in_classes',
]

Records = Mapping[Tap, list[Tensor]]
#: Numbers of classes of student and teacher; ``None`` where a network has no head that knows.
Classes = tuple[int | None, int | None]
#: The heads that the taps of student and teacher lie in, where there are any.
Heads = tuple[nn.Module | None, nn.Module | None]


def recorded(owner: str, side: str, taps: Sequence[Tap], records: Records) -> list[Tensor]:
    """Collect what taps recorded.

    Args:
        owner: the term, for messages.
        side: ``'student'`` or ``'teacher'``.
        taps: its taps on this side.
        records: what was recorded there.

    Returns:
        All tensors, in the order of the taps.

    Raises:
        TapError: a tap was not passed.
    """
    for tap in taps:
        if not records[tap]:
            raise TapError(
                f'{owner}: `{side}` must name a module that runs in training, got {str(tap)!r}, '
                'which the forward pass does not reach.'
            )
    return [tensor for tap in taps for tensor in records[tap]]


def tensor_names(taps: Sequence[Tap], records: Records) -> list[str]:
    """Name each recorded tensor: its tap, with the number of the call where there are several."""
    return [name for tap in taps for name in tap.names(len(records[tap]))]


def repeat_for_cascade(
    tensors: list[Tensor], student_taps: Sequence[Tap], teacher_taps: Sequence[Tap], student: Records, teacher: Records
) -> list[Tensor]:
    """Give the teacher's tensor again where training runs a module twice on the same features.

    The earlier heads of mmseg's cascades are: once for their own loss, once
    for the next head. Inference runs them once.
    """
    if len(student_taps) != len(teacher_taps) or not any(
        re.match(r'decode_head\.\d+', tap.module) for tap in student_taps
    ):
        return tensors
    left, out = iter(tensors), []
    for tap_s, tap_t in zip(student_taps, teacher_taps, strict=True):
        mine = [next(left) for _ in teacher[tap_t]]
        twice = re.match(r'decode_head\.\d+', tap_s.module) and len(student[tap_s]) == 2 * len(mine)
        out += [tensor for tensor in mine for _ in range(2)] if twice else mine
    return out


def repeat_for_branches(students: list[Tensor], teachers: list[Tensor], branches: int) -> list[Tensor]:
    """Give the teacher's images once for each copy of the batch that the student trains on.

    A teacher that has copied the batch itself keeps its tensors.
    """
    rows = [len(tensor) for tensor in students]
    return [
        t.repeat(branches, *[1] * (t.dim() - 1)) if rows[min(place, len(rows) - 1)] == branches * len(t) else t
        for place, t in enumerate(teachers)
    ]


def order_by_size(
    owner: str, students: list[Tensor], teachers: list[Tensor], names: tuple[list[str], list[str]]
) -> tuple[int, ...] | None:
    """Match the levels of two pyramids by the sizes of their maps in the probe.

    Args:
        owner: the term, for messages.
        students: the student's tensors.
        teachers: the teacher's.
        names: names of both, for messages.

    Returns:
        For each tensor of the student the place of the teacher's; ``None``: they
        go first with first.

    Raises:
        TapError: a level of the student has none of its size in the teacher.
    """
    maps = all(tensor.dim() == 4 for tensor in (*students, *teachers))
    if not maps or max(len(students), len(teachers)) == 1:
        return None
    sizes_s, sizes_t = ([tuple(t.shape[2:]) for t in side] for side in (students, teachers))
    if sizes_s == sizes_t or (len(set(sizes_s)) < len(sizes_s) or len(set(sizes_t)) < len(sizes_t)):
        return None  # the same pyramid, or several layers of one size: in order
    lost = [
        f'{name!r} ({_shape(t)})'
        for name, t in zip(names[0], students, strict=True)
        if tuple(t.shape[2:]) not in sizes_t
    ]
    if lost:
        has = ', '.join(f'{name!r} ({_shape(t)})' for name, t in zip(names[1], teachers, strict=True))
        raise TapError(
            f'{owner}: each level of the student must find one of the same stride in the teacher, got '
            f'none for {", ".join(lost)}; the teacher has {has} (channels x height x width in the probe). Leave '
            "levels out, e.g. tap=dict(student='neck[:4]', teacher='neck[*]'), or pair them as they come with "
            "match='order'."
        )
    return tuple(sizes_t.index(size) for size in sizes_s)


def _shape(tensor: Tensor) -> str:
    """Write a shape as 64x16x32."""
    return 'x'.join(str(side) for side in tensor.shape[1:])


def is_binary_pair(widths: Sequence[int], heads: Heads) -> bool:
    """Whether two tensors are scores of two classes, one of them by a sigmoid: one channel and two."""
    if sorted(widths) != [1, 2]:
        return False
    return all(
        head is None or (num_classes_of(head) == 2 and getattr(head, 'out_channels', width) == width)
        for head, width in zip(heads, widths, strict=True)
    )


def widths_in_classes(widths: tuple[int, int], classes: Classes) -> tuple[int, int]:
    """Widths with two in the place of the one channel of a binary head."""
    student, teacher = (2 if width == 1 and count == 2 else width for width, count in zip(widths, classes, strict=True))
    return student, teacher


def scores_of_other_classes(student: Tensor, teacher: Tensor, classes: Classes, *, are_scores: bool = False) -> bool:
    """Whether two tensors have other widths because they are scores over other classes.

    Per position: one score a class, one a class and anchor, or one more for
    the background; ``are_scores``: they are known to be scores of classes.
    """
    if None in classes or classes[0] == classes[1] or 1 in (student.dim(), teacher.dim()):
        return False
    if are_scores:
        return True
    wide = widths_in_classes((student.shape[1], teacher.shape[1]), classes)
    anchors = {width / count for width, count in zip(wide, classes, strict=True)}
    return len(anchors) == 1 or wide == (classes[0] + 1, classes[1] + 1)


def compares_classes(
    loss: DistillLoss, pair: tuple[Tensor, Tensor], classes: Classes, heads: Heads, *, connected: bool
) -> bool:
    """Whether a loss takes channel k of both networks for the same class.

    Args:
        loss: the loss.
        pair: the tapped tensors.
        classes: numbers of classes of both networks.
        heads: the heads that the taps lie in.
        connected: whether the config has a connector between them.

    Returns:
        The answer.
    """
    if loss.over_classes or loss.by_class:
        return True
    if not loss.needs_equal_channels or connected or 1 in (pair[0].dim(), pair[1].dim()):
        return False
    scores = [getattr(head, 'out_channels', None) or count for head, count in zip(heads, classes, strict=True)]
    return [tensor.shape[1] for tensor in pair] == scores
