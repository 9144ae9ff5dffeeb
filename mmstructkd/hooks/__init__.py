"""Hooks that every distilled run gets by itself, and one to ask for (``RegularizationShareHook``)."""

from mmstructkd.hooks.due_validation import DueValidationHook
from mmstructkd.hooks.finite_checkpoint import FiniteCheckpointHook
from mmstructkd.hooks.finite_loss import FiniteLossHook
from mmstructkd.hooks.regularization_share import RegularizationShareHook
from mmstructkd.hooks.stage import StageHook
from mmstructkd.hooks.student_checkpoint import StudentCheckpointHook
from mmstructkd.hooks.teacher_cache import TeacherCacheHook
from mmstructkd.hooks.term_schedule import TermScheduleHook

__all__ = [
    'DueValidationHook',
    'FiniteCheckpointHook',
    'FiniteLossHook',
    'RegularizationShareHook',
    'StageHook',
    'StudentCheckpointHook',
    'TeacherCacheHook',
    'TermScheduleHook',
]
