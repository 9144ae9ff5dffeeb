"""Pooling both networks onto one grid."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.connectors import PoolConnector
from mmstructkd.errors import ConfigError, ShapeError


def pool(student, teacher=None, **kwargs):
    (out_s,), (out_t,) = PoolConnector([1], [1], **kwargs)([student], [student if teacher is None else teacher])
    return out_s, out_t


def patches(tensor, kernel, function):
    rows = range(0, tensor.shape[2], kernel[0])
    columns = range(0, tensor.shape[3], kernel[1])
    out = tensor.new_zeros(*tensor.shape[:2], len(rows), len(columns))
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            out[:, :, i, j] = function(tensor[:, :, y : y + kernel[0], x : x + kernel[1]].flatten(2))
    return out


@pytest.mark.parametrize('kernel', [(2, 3), (4, 4), (9, 9), (1, 1)])
@pytest.mark.parametrize(('kind', 'function'), [('avg', lambda p: p.mean(2)), ('max', lambda p: p.amax(2))])
def test_patches_hang_over_the_edge(kernel, kind, function):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64)
    student, teacher = pool(x, kernel_size=kernel, pool=kind)
    torch.testing.assert_close(student, patches(x, kernel, function))
    torch.testing.assert_close(teacher, student)


def test_teacher_of_another_size_comes_onto_the_students_grid():
    ramp = torch.arange(12.0).view(1, 1, 1, 12).expand(1, 1, 6, 12)
    student, teacher = pool(ramp[:, :, ::2, ::2] + 0.5, ramp, kernel_size=2)
    assert student.shape == teacher.shape == (1, 1, 2, 3)
    torch.testing.assert_close(student, teacher)
    student, teacher = pool(ramp[:, :, ::2, ::2] + 0.5, ramp, output_size=(1, 3))
    torch.testing.assert_close(student, teacher)


@pytest.mark.parametrize(
    ('size', 'nodes', 'grid'),
    [
        ((8, 16), 32, (4, 8)),
        ((8, 16), 128, (8, 16)),
        ((8, 16), 1000, (8, 16)),
        ((8, 16), 127, (7, 15)),
        ((8, 16), 1, (1, 1)),
        ((1, 100), 10, (1, 10)),
        ((100, 1), 10, (10, 1)),
        ((3, 50), 10, (1, 10)),
        ((65, 65), 1024, (32, 32)),
    ],
)
def test_grid_of_at_most_so_many_nodes(size, nodes, grid):
    student, teacher = pool(torch.randn(1, 2, *size), torch.randn(1, 2, 2 * size[0], 2 * size[1]), max_nodes=nodes)
    assert student.shape == teacher.shape == (1, 2, *grid)


def test_a_grid_is_never_finer_than_the_student():
    student, teacher = pool(torch.randn(1, 2, 3, 9), torch.randn(1, 2, 12, 12), output_size=4)
    assert student.shape == teacher.shape == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, r'exactly one of .* must be given, got \[\]'),
        ({'kernel_size': 2, 'max_nodes': 4}, r"must be given, got \['kernel_size', 'max_nodes'\]"),
        ({'kernel_size': 0}, r'`kernel_size` must be an integer above 0 or two of them \(h, w\), got 0'),
        ({'output_size': (1, 2, 3)}, r'`output_size` must be one integer or two \(h, w\), got \(1, 2, 3\)'),
        ({'output_size': (1, 0)}, r'`output_size` must be an integer of at least 1, got 0'),
        ({'max_nodes': 2.5}, r'`max_nodes` must be an integer of at least 1, got 2.5'),
        ({'max_nodes': 4, 'pool': 'average'}, r"`pool` must be one of .*, got 'average'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=f'PoolConnector: .*{message}'):
        PoolConnector([1], [1], **arguments)


def test_tokens_are_refused():
    with pytest.raises(ShapeError, match=r'PoolConnector: `students` must have shape \(B, C, H, W\), got \(1, 4, 3\)'):
        pool(torch.zeros(1, 4, 3), kernel_size=2)
