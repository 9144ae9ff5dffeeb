"""Hooks that every distilled run gets by itself."""

from mmstructkd.hooks.due_validation import DueValidationHook
from mmstructkd.hooks.finite_checkpoint import FiniteCheckpointHook
from mmstructkd.hooks.finite_loss import FiniteLossHook
from mmstructkd.hooks.stage import StageHook
from mmstructkd.hooks.student_checkpoint import StudentCheckpointHook
from mmstructkd.hooks.teacher_cache import TeacherCacheHook
from mmstructkd.hooks.term_schedule import TermScheduleHook

__all__ = [
    'DueValidationHook',
    'FiniteCheckpointHook',
    'FiniteLossHook',
    'StageHook',
    'StudentCheckpointHook',
    'TeacherCacheHook',
    'TermScheduleHook',
]
