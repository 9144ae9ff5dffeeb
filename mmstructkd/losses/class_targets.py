"""Which class a pixel's losses take for the right one, and teachers over other classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, is_count
from mmstructkd.functional.core.binary import two_class_logits
from mmstructkd.functional.core.scores import map_logits
from mmstructkd.structures import Targets

__all__ = ['TARGETS', 'ClassMap', 'class_targets']

TARGETS = ('labels', 'teacher')


def class_targets(owner: str, target: str, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """The right class of each pixel or row.

    Args:
        owner: the loss, for messages.
        target: ``'labels'``, or ``'teacher'`` for the class it scores highest.
        student: the student's scores, shape (B, C, H, W) or (M, C).
        teacher: the teacher's.
        targets: what the batch knows besides.

    Returns:
        Classes, shape (B, h, w) or (M,).

    Raises:
        ConfigError: there are no labels.
    """
    if target == 'teacher':
        return teacher.detach().argmax(dim=1)
    labels = targets.labels
    if student.dim() != 4 and labels is not None and tuple(labels.shape) != tuple(student.shape[:1]):
        labels = None  # a map of the batch says nothing about rows
    if labels is None:
        wanted = 'a map of the batch' if student.dim() == 4 else f'of shape {tuple(student.shape[:1])}'
        got = 'None' if targets.labels is None else str(tuple(targets.labels.shape))
        raise ConfigError(
            f"{owner}: `targets.labels` must be {wanted} for target='labels', got {got}. "
            "Set target='teacher' to take the class that the teacher scores highest."
        )
    return labels


class ClassMap:
    """Brings a teacher's scores to the student's classes.

    Args:
        owner: the loss, for messages.
        numbers: for each class of the teacher the student's class that it is
            (part of), -1 for none.

    Raises:
        ConfigError: not a sequence of such integers.
    """

    def __init__(self, owner: str, numbers: Sequence[int]) -> None:
        good = isinstance(numbers, Sequence) and not isinstance(numbers, str)
        if not good or any(not is_count(k) or k < -1 for k in numbers):
            raise ConfigError(
                f'{owner}: `class_map` must hold for each class of the teacher a class of the student, or -1, '
                f'got {numbers!r}.'
            )
        self.owner = owner
        self.numbers = list(numbers)
        #: The student's classes that the teacher knows.
        self.known = sorted(set(self.numbers) - {-1})
        if not self.known:
            raise ConfigError(f'{owner}: `class_map` must map some class, got {self.numbers!r}.')
        position = {k: i for i, k in enumerate(self.known)}
        self.order = [position.get(k, -1) for k in self.numbers]

    def __call__(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores of both over the classes that both know.

        Args:
            student: scores, shape (B, C, H, W) or (M, C); one channel is the
                score of class 1 of two.
            teacher: scores over its own classes.

        Returns:
            Student and teacher, over the same classes.

        Raises:
            ConfigError: the map does not fit the classes of one of the two.
        """
        if student.dim() in (2, 4) and student.shape[1] == 1:
            student = two_class_logits(student)
        if teacher.dim() in (2, 4) and teacher.shape[1] == 1:
            teacher = two_class_logits(teacher)
        if teacher.dim() > 1 and teacher.shape[1] != len(self.numbers):
            raise ConfigError(
                f"{self.owner}: `class_map` must have one entry for each of the teacher's {teacher.shape[1]} classes, "
                f'got {len(self.numbers)}.'
            )
        if student.dim() > 1 and self.known[-1] >= student.shape[1]:
            raise ConfigError(
                f"{self.owner}: `class_map` must name classes of the student's {student.shape[1]}, "
                f'got {self.known[-1]}. The first class is 0.'
            )
        mapped: Any = map_logits(teacher.detach(), self.order)
        if len(self.known) < student.shape[1]:
            student = student[:, self.known]
        return student, mapped
