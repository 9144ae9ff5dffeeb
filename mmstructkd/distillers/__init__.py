"""The distiller: a student, a teacher, and the terms between them."""

from mmstructkd import compat
from mmstructkd.distillers.structured_distiller import StructuredDistiller
from mmstructkd.teachers import FrozenTeacher, TeacherSource
from mmstructkd.teachers.loading import student_config
from mmstructkd.terms import Term, WeightSchedule

__all__ = ['FrozenTeacher', 'StructuredDistiller', 'TeacherSource', 'Term', 'WeightSchedule', 'student_config']

compat.install()  # a config that only names custom_imports gets the promises too
