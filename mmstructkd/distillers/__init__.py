"""Distillers: a student, a teacher, and the terms between them."""

from mmstructkd import compat
from mmstructkd.distillers.loading import student_config
from mmstructkd.distillers.schedule import WeightSchedule
from mmstructkd.distillers.structured_distiller import StructuredDistiller
from mmstructkd.distillers.teacher import FrozenTeacher, TeacherSource
from mmstructkd.distillers.term import Term

__all__ = ['FrozenTeacher', 'StructuredDistiller', 'TeacherSource', 'Term', 'WeightSchedule', 'student_config']

compat.install()  # a config that only names custom_imports gets the promises too
