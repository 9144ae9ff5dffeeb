"""A flag is ``True`` or ``False``: a word from the command line switches nothing on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mmstructkd import functional as F
from mmstructkd.distillers import FrozenTeacher
from mmstructkd.errors import ConfigError, check_flag, shown
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_distiller, toy_segmentor

WORDS = ['no', 'off', '', 1, 0, 1.0, [], np.bool_(True)]


def test_check_flag() -> None:
    check_flag('Owner', 'flag', True)
    check_flag('Owner', 'flag', False)
    for value in (*WORDS, None):
        with pytest.raises(ConfigError, match='^Owner: `flag` must be True or False, got '):
            check_flag('Owner', 'flag', value)


@pytest.mark.parametrize('value', WORDS)
@pytest.mark.parametrize('flag', ['allow_random', 'trust_checkpoint', 'fuse_conv_bn', 'channels_last', 'compile'])
def test_flags_of_the_teacher(flag: str, value: Any) -> None:
    teacher = dict(config=toy_segmentor(4), **{'allow_random': True, flag: value})
    with pytest.raises(ConfigError, match=f'FrozenTeacher: `{flag}` must be True or False, got'):
        FrozenTeacher(**teacher)
    with pytest.raises(ConfigError, match=f'FrozenTeacher: `{flag}` must be True or False, got'):
        MODELS.build(toy_distiller(teacher=teacher))


maps = torch.rand(2, 3, 4, 4)
labels = torch.zeros(2, 4, 4, dtype=torch.long)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    'normalize': lambda **flag: F.interclass_similarity_loss(maps, maps, **flag),
    'residual': lambda **flag: F.pixel_similarity_loss([maps[:, :1]], [maps[:, :1]], **flag),
    'count_ignored': lambda **flag: F.intra_class_variation_loss(maps, maps, labels=labels, num_classes=1, **flag),
    'root': lambda **flag: F.silog_loss(maps[:, 0], maps[:, 0], **flag),
    'robust': lambda **flag: F.scale_shift_invariant_loss(maps[:, 0], maps[:, 0], **flag),
    'align': lambda **flag: F.gradient_matching_loss(maps[:, 0], maps[:, 0], **flag),
    'log': lambda **flag: F.normalize_depth(maps[:, 0], maps[:, 0], **flag),
    'detach_norm': lambda **flag: F.pairwise_affinity_loss(maps, maps, **flag),
    'include_self': lambda **flag: F.local_structure_loss(maps, maps, **flag),
    'detach_teacher': lambda **flag: F.region_contrast_loss(maps[:, :, 0, 0], maps[:, :, 0, 0], **flag),
    'detach_teacher of sinkhorn': lambda **flag: F.sinkhorn_loss(maps[:, :, 0, 0], maps[:, :, 0, 0], **flag),
}


@pytest.mark.parametrize('name', FUNCTIONS)
def test_flags_of_functions(name: str) -> None:
    flag = name.split(' ')[0]
    for value in (*WORDS, None):
        with pytest.raises(ConfigError, match=f'`{flag}` must be True or False, got'):
            FUNCTIONS[name](**{flag: value})
    for value in (True, False):
        FUNCTIONS[name](**{flag: value})


# --- what a message shows ------------------------------------------------------------------------------------


def test_messages_show_a_part_only() -> None:
    assert shown('a') == "'a'"
    assert shown(nn.Linear(1, 1)) == 'a built Linear'
    assert shown(nn.Linear) == repr(nn.Linear)
    assert shown(list(range(1000))).endswith(' ...')
    assert len(shown(list(range(1000)))) < 210
    assert shown(torch.zeros(5, 5)).count('\n') == 0


def test_a_built_module_as_teacher_is_named_only() -> None:
    network = MODELS.build(toy_segmentor(4))
    for teacher in (network, [network], 'r101', 3):
        with pytest.raises(ConfigError, match='StructuredDistiller: `teacher` must be a dict, got') as info:
            MODELS.build(toy_distiller()) if teacher is None else MODELS.get('mmstructkd.StructuredDistiller')(
                toy_segmentor(4), teacher, toy_distiller().terms
            )
        assert len(str(info.value)) < 400
        assert len(str(info.value).splitlines()) == 1
    with pytest.raises(ConfigError, match='got a built EncoderDecoder') as info:
        MODELS.get('mmstructkd.StructuredDistiller')(toy_segmentor(4), network, toy_distiller().terms)


@pytest.mark.parametrize('place', ['config', 'checkpoint'])
def test_a_built_module_inside_the_teacher_is_named_only(place: str) -> None:
    arguments = {'config': toy_segmentor(4), 'checkpoint': 'a.pth', place: MODELS.build(toy_segmentor(4))}
    with pytest.raises(ConfigError, match=f'FrozenTeacher: `{place}` must be .*got .*EncoderDecoder') as info:
        FrozenTeacher(**arguments)
    assert len(str(info.value).splitlines()) == 1


def test_a_student_without_a_type_is_named_by_its_keys() -> None:
    student = toy_segmentor(4)
    student.pop('type')
    with pytest.raises(
        ConfigError, match=r"StructuredDistiller: `student` must be a dict with a `type`, got \{'_scope_'"
    ) as info:
        MODELS.build(toy_distiller(student=student))
    assert len(str(info.value)) < 400
