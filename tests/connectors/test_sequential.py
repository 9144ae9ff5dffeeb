"""Connectors one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmstructkd.connectors import Connector, SequentialConnector
from mmstructkd.errors import ConfigError, ShapeError


def build(*kinds, widths=([3, 4], [5, 6])):
    configs = [{'type': f'mmstructkd.{kind}'} if isinstance(kind, str) else kind for kind in kinds]
    return SequentialConnector(*widths, connectors=configs)


def maps(widths, size=(4, 6), batch=2):
    return [torch.randn(batch, width, *size) for width in widths]


def test_one_after_the_other():
    connector = build('ConvConnector', 'StandardizeConnector')
    students, teachers = maps([3, 4]), maps([5, 6])
    out_s, out_t = connector(students, teachers)
    convs = connector.steps[0]
    want_s, want_t = connector.steps[1]([convs[0](students[0]), convs[1](students[1])], teachers)
    torch.testing.assert_close((out_s, out_t), (want_s, want_t))


def test_widths_are_passed_along():
    connector = build({'type': 'mmstructkd.ConvConnector', 'out_channels': 7}, 'StandardizeConnector', 'ConvConnector')
    shapes = [m.weight.shape[:2] for m in connector.modules() if isinstance(m, nn.Conv2d)]
    assert shapes == [(7, 3), (7, 4), (5, 7), (6, 7)]
    assert connector.widths == (5, 6)
    assert build('ConvConnector', 'ConvConnector').steps[1][1].conv.conv.weight.shape[:2] == (6, 6)
    assert build('StandardizeConnector').widths == (3, 4)


def test_tokens_then_convolution_then_pool():
    connector = build(
        'TokensToMapConnector',
        'ConvConnector',
        {'type': 'mmstructkd.PoolConnector', 'kernel_size': 2},
        widths=([3], [5]),
    )
    assert connector.needs_input_size
    connector.input_size = (32, 64)
    (student,), (teacher,) = connector([torch.randn(2, 32, 3)], [torch.randn(2, 128, 5)])
    assert student.shape == teacher.shape == (2, 5, 2, 4)


@pytest.mark.parametrize('order', [['ConvConnector', 'LayerMixConnector'], ['LayerMixConnector', 'ConvConnector']])
def test_mix_of_more_layers_than_the_student_has(order):
    connector = build(*order, 'StandardizeConnector', widths=([3], [5, 5, 5]))
    out_s, out_t = connector(maps([3]), maps([5, 5, 5]))
    assert [t.shape for t in out_s + out_t] == [(2, 5, 4, 6)] * 2


def test_only_what_asks_for_the_teacher_gets_it():
    teacher = nn.ModuleDict({'head': nn.Conv2d(9, 6, 1)})
    connector = build(
        'ConvConnector', {'type': 'mmstructkd.TeacherHeadConnector', 'head': 'head'}, widths=([3, 4], [6, 6])
    )
    assert connector.needs_teacher
    assert not build('ConvConnector').needs_teacher
    connector.attach(teacher)
    assert [p.projection.conv.weight.shape[:2] for p in connector.steps[1]] == [(9, 6)] * 2
    out_s, _ = connector(maps([3, 4]), maps([6, 6]))
    assert [t.shape[1] for t in out_s] == [6, 6]


@pytest.mark.parametrize(
    ('connectors', 'message'),
    [
        ([], r'`connectors` must be a list of at least one config, got \[\]'),
        ({'type': 'mmstructkd.ConvConnector'}, r'`connectors` must be a list of at least one config, got \{'),
        ([{'kernel_size': 1}], r'`connectors.0.` must be a dict with a `type`, got'),
        (['mmstructkd.ConvConnector'], r'`connectors.0.` must be a dict with a `type`, got'),
        ([{'type': 'mmstructkd.PolConnector'}], r"got 'mmstructkd.PolConnector'. Did you mean 'PoolConnector'"),
        ([{'type': 'mmstructkd.ConvConnector', 'size': 1}], r"cannot be built. .*'size'"),
    ],
)
def test_what_cannot_be_built_is_named(connectors, message):
    with pytest.raises(ConfigError, match=f'SequentialConnector: .*{message}'):
        SequentialConnector([3], [5], connectors=connectors)


def test_layers_that_do_not_fit_are_named():
    with pytest.raises(ConfigError, match=r'must begin with one that matches 1 layers of the student with 2'):
        build('ConvConnector', widths=([3], [5, 6]))
    with pytest.raises(ShapeError, match='2 tensors of the student and 2 of the teacher.* got 1 and 2'):
        build('ConvConnector')(maps([3]), maps([5, 6]))


def test_levels_that_a_connector_takes_away_are_named():
    class Last(Connector):
        joint = keeps_width = True

        def __init__(self, in_channels, out_channels):
            super().__init__()

        def forward(self, students, teachers):
            return students[-1:], teachers[-1:]

    connector = build({'type': Last}, 'ConvConnector')
    with pytest.raises(ShapeError, match='ConvConnector must come before .* got 1 levels for 2 widths'):
        connector(maps([3, 4]), maps([5, 6]))
    out_s, out_t = build('ConvConnector', {'type': Last})(maps([3, 4]), maps([5, 6]))
    assert [t.shape[1] for t in out_s + out_t] == [6, 6]
