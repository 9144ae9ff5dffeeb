"""Tokens to maps and back."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.connectors import MapToTokensConnector, TokensToMapConnector
from mmstructkd.connectors.tokens import grid_of
from mmstructkd.errors import ConfigError, ShapeError


def tokens(count, channels=3, batch=2):
    return torch.randn(batch, count, channels)


def to_map(student, teacher, input_size=None, **kwargs):
    connector = TokensToMapConnector([3], [3], **kwargs)
    connector.input_size = input_size
    (out_s,), (out_t,) = connector([student], [teacher])
    return out_s, out_t


@pytest.mark.parametrize(
    ('count', 'size', 'grid'),
    [
        (128, (512, 1024), (8, 16)),
        (2048, (64, 128), (32, 64)),
        (1, (64, 128), (1, 1)),
        (2, (64, 128), (1, 2)),
        (33 * 65, (513, 1025), (33, 65)),
        (23 * 42, (360, 480), None),
        (23 * 30, (360, 480), (23, 30)),
        (1024, (1, 1), (32, 32)),
        (17 * 31, (260, 490), (17, 31)),
        # with a class token left in
        (129, (512, 1024), None),
        (33, (64, 128), None),
        (197, (224, 224), None),
        (1025, (512, 512), None),
        (785, (448, 448), None),
        (513, (16, 32), None),
    ],
)
def test_grid_after_the_aspect_ratio(count, size, grid):
    assert grid_of(count, *size) == grid


def test_rows_come_first_and_maps_pass():
    student, teacher = tokens(12), torch.randn(2, 5, 6, 8)
    out_s, out_t = to_map(student, teacher)
    assert out_t is teacher
    for b in range(2):
        for y in range(3):
            for x in range(4):
                assert torch.equal(out_s[b, :, y, x], student[b, 4 * y + x])


def test_either_network_may_have_tokens():
    student, teacher = torch.randn(2, 3, 4, 8), tokens(129)
    out_s, out_t = to_map(student, teacher, extra_tokens={'teacher': 1})
    assert out_s is student
    assert torch.equal(out_t, teacher[:, 1:].transpose(1, 2).view(2, 3, 8, 16))


def test_where_the_ratio_comes_from():
    shapes = [t.shape[2:] for t in to_map(tokens(32), tokens(8), input_size=(64, 128))]
    assert shapes == [(4, 8), (2, 4)]
    # an input of another ratio than the map: the input counts; then the map; then `grid`; then a square
    assert to_map(tokens(32), torch.randn(2, 3, 8, 4), input_size=(64, 128))[0].shape[2:] == (4, 8)
    assert to_map(tokens(32), torch.randn(2, 3, 8, 4), grid=(64, 128))[0].shape[2:] == (8, 4)
    assert [t.shape[2:] for t in to_map(tokens(32), tokens(8), grid=(16, 32))] == [(4, 8), (2, 4)]
    assert [t.shape[2:] for t in to_map(tokens(16), tokens(64))] == [(4, 4), (8, 8)]


def test_a_given_grid_that_fits_is_taken():
    assert to_map(tokens(32), tokens(32), input_size=(64, 128), grid=(8, 4))[0].shape[2:] == (8, 4)
    out_s, out_t = to_map(tokens(12), tokens(12), grid={'student': (2, 6), 'teacher': (6, 2)})
    assert (out_s.shape[2:], out_t.shape[2:]) == ((2, 6), (6, 2))


def test_the_other_level_helps():
    connector = TokensToMapConnector([3, 3], [3, 3])
    out_s, out_t = connector([tokens(32), tokens(8)], [tokens(128), torch.randn(2, 3, 2, 4)])
    assert [t.shape[2:] for t in out_s + out_t] == [(4, 8), (2, 4), (8, 16), (2, 4)]


def test_tokens_that_make_no_grid_are_named():
    message = (
        r'TokensToMapConnector: the tokens of the student must make a grid of about 64 to 128, '
        r'got 33 after 0 extra ones. Set `extra_tokens`'
    )
    with pytest.raises(ShapeError, match=message):
        to_map(tokens(33), tokens(32), input_size=(64, 128))
    with pytest.raises(ShapeError, match=r'the student must make a grid of about 1 to 1, got 32'):
        to_map(tokens(32), tokens(32))
    with pytest.raises(ShapeError, match='the teacher must have more than 5 tokens'):
        to_map(tokens(16), tokens(5), extra_tokens={'teacher': 5})
    with pytest.raises(ShapeError, match=r'`student` must have shape .* got \(2, 3\)'):
        to_map(torch.zeros(2, 3), tokens(4))


@pytest.mark.parametrize('kind', [TokensToMapConnector, MapToTokensConnector])
@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'grid': 4}, r'`grid` must be two integers \(h, w\), got 4'),
        ({'grid': (4, 0)}, r'`grid` must be an integer of at least 1, got 0'),
        ({'grid': {'pupil': (4, 4)}}, r"`grid` must have the keys 'student' and 'teacher', got \['pupil'\]"),
        ({'extra_tokens': -1}, r'`extra_tokens` must be an integer of at least 0, got -1'),
        ({'extra_tokens': {'student': 1.0}}, r'`extra_tokens` must be an integer of at least 0, got 1.0'),
    ],
)
def test_bad_arguments(kind, arguments, message):
    with pytest.raises(ConfigError, match=f'{kind.__name__}: {message}'):
        kind([3], [3], **arguments)


def to_tokens(student, teacher, **kwargs):
    (out_s,), (out_t,) = MapToTokensConnector([3], [3], **kwargs)([student], [teacher])
    return out_s, out_t


def test_maps_become_tokens_in_row_order():
    student = torch.randn(2, 3, 4, 5)
    out_s, out_t = to_tokens(student, torch.randn(2, 7, 8, 10))
    assert (out_s.shape, out_t.shape) == ((2, 20, 3), (2, 20, 7))
    assert torch.equal(out_s[1, 5 * 2 + 3], student[1, :, 2, 3])
    back = TokensToMapConnector([3], [3], grid=(4, 5))([out_s], [out_s])[0][0]
    assert torch.equal(back, student)


def test_a_map_beside_tokens():
    ramp = torch.arange(16.0).view(1, 1, 1, 16).expand(1, 1, 8, 16)
    student = ramp[:, :, ::2, ::2] + 0.5
    teacher = torch.cat([torch.full((1, 1, 1), 99.0), ramp.flatten(2).transpose(1, 2)], dim=1)
    out_s, out_t = to_tokens(student, teacher, extra_tokens={'teacher': 1})
    torch.testing.assert_close(out_s, out_t)


def test_tokens_of_one_length_pass_without_the_extra_ones():
    student, teacher = tokens(7), tokens(8)
    out_s, out_t = to_tokens(student, teacher, extra_tokens={'teacher': 1})
    assert torch.equal(out_s, student)
    assert torch.equal(out_t, teacher[:, 1:])
    out_s, out_t = to_tokens(tokens(4), tokens(16))
    assert out_s.shape == out_t.shape == (2, 4, 3)
