"""Teachers: whatever can show tensors at taps."""

from mmstructkd.teachers.base import TeacherSource
from mmstructkd.teachers.blend import BlendTeacher
from mmstructkd.teachers.frozen import FrozenTeacher
from mmstructkd.teachers.group import TeacherGroup
from mmstructkd.teachers.mean import TeacherMean
from mmstructkd.teachers.peer import PeerTeacher
from mmstructkd.teachers.route import RouteTeacher
from mmstructkd.teachers.self_teacher import SelfTeacher
from mmstructkd.teachers.view import ViewTeacher

__all__ = [
    'BlendTeacher',
    'FrozenTeacher',
    'PeerTeacher',
    'RouteTeacher',
    'SelfTeacher',
    'TeacherGroup',
    'TeacherMean',
    'TeacherSource',
    'ViewTeacher',
]
