"""The learned mix of teacher layers."""

from __future__ import annotations

import math

import pytest
import torch

from mmstructkd.connectors import LayerMixConnector
from mmstructkd.errors import ConfigError, ShapeError


def layers(count=3, shape=(2, 4, 3, 5), dtype=torch.float32):
    return [torch.randn(shape, dtype=dtype) for _ in range(count)]


def entropy(row):
    return -sum(w * math.log(w) for w in row.tolist() if w > 0)


def test_starts_as_the_plain_mean():
    connector = LayerMixConnector([4, 4], [4] * 3)
    students, teachers = layers(2), layers()
    out_s, out_t = connector(students, teachers)
    assert all(map(torch.equal, out_s, students))
    for target in out_t:
        torch.testing.assert_close(target, sum(teachers) / 3)
        assert not target.requires_grad


def test_each_layer_of_the_student_has_its_own_mix():
    connector = LayerMixConnector([4, 4], [4] * 3)
    with torch.no_grad():
        connector.scores.copy_(torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]))
    teachers = layers()
    _, out_t = connector(layers(2), teachers)
    for row, target in zip([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], out_t, strict=True):
        weights = [math.exp(r) / sum(map(math.exp, row)) for r in row]
        torch.testing.assert_close(target, sum(w * t for w, t in zip(weights, teachers, strict=True)))


def test_weights_get_the_gradient_of_the_squared_error():
    connector = LayerMixConnector([4], [4] * 3).double()
    student, teachers = layers(1, dtype=torch.float64), layers(dtype=torch.float64)
    with torch.no_grad():
        connector.scores.copy_(torch.tensor([[0.3, -0.2, 0.5]]))
    (out_s,), (out_t,) = connector(student, teachers)
    (out_s - out_t.detach()).square().mean().backward()
    scores = connector.scores.detach().clone().requires_grad_()
    weights = scores.float().softmax(-1)[0].double()
    (student[0] - sum(w * t for w, t in zip(weights, teachers, strict=True))).square().mean().backward()
    torch.testing.assert_close(connector.scores.grad, scores.grad, rtol=1e-5, atol=1e-8)


def test_learns_which_layer_it_is():
    connector = LayerMixConnector([4], [4] * 3)
    teachers = layers()
    optimizer = torch.optim.Adam(connector.parameters(), lr=0.3)
    for _ in range(40):
        (out_s,), (out_t,) = connector([teachers[1]], teachers)
        optimizer.zero_grad()
        (out_s - out_t).square().mean().backward()
        optimizer.step()
    assert connector.mix()[0].argmax() == 1
    assert connector.mix()[0, 1] > 0.9


@pytest.mark.parametrize('floor', [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize('scores', [[0.0, 0.0, 0.0], [1.0, 0.0, -1.0], [200.0, 0.0, 0.0]])
def test_entropy_floor(floor, scores):
    connector = LayerMixConnector([4], [4] * 3, entropy_floor=floor)
    with torch.no_grad():
        connector.scores.copy_(torch.tensor([scores]))
    (row,) = connector.mix()
    plain = torch.tensor(scores).softmax(-1)
    assert row.sum().item() == pytest.approx(1)
    assert entropy(row) >= floor * math.log(3) - 1e-5
    if entropy(plain) >= floor * math.log(3):
        torch.testing.assert_close(row, plain)
    elif floor < 1:
        assert entropy(row) < (floor + 0.02) * math.log(3), 'no more of the uniform mix than needed'
        assert row.argmax() == plain.argmax()


def test_floor_leaves_the_gradient_finite():
    connector = LayerMixConnector([4], [4] * 3, entropy_floor=0.5)
    with torch.no_grad():
        connector.scores.copy_(torch.tensor([[5.0, 0.0, -200.0]]))
    (out_s,), (out_t,) = connector(layers(1), layers())
    (out_s - out_t).square().mean().backward()
    assert connector.scores.grad.isfinite().all()
    assert connector.scores.grad.any()


def test_given_weights_are_fixed():
    connector = LayerMixConnector([4, 4], [4] * 3, weights=[[1, 1, 2], [0, 0, 5]])
    assert not list(connector.parameters())
    torch.testing.assert_close(connector.mix(), torch.tensor([[0.25, 0.25, 0.5], [0.0, 0.0, 1.0]]))
    students, teachers = [s.requires_grad_() for s in layers(2)], layers()
    out_s, out_t = connector(students, teachers)
    assert out_s[0] is students[0]
    assert torch.equal(out_t[1], teachers[2])
    assert 'weights' in connector.state_dict()
    assert LayerMixConnector([4, 4], [4] * 2, weights=[3, 1]).mix().tolist() == [[0.75, 0.25]] * 2


def test_other_widths_and_sizes_of_the_student():
    connector = LayerMixConnector([3, 4], [4, 4])
    out_s, out_t = connector([torch.randn(2, 3, 6, 10), torch.randn(2, 4, 3, 5)], layers(2))
    assert [tuple(s.shape) for s in out_s] == [tuple(t.shape) for t in out_t] == [(2, 4, 6, 10), (2, 4, 3, 5)]


@pytest.mark.parametrize(
    ('widths', 'arguments', 'message'),
    [
        (
            [4, 8],
            {},
            r'`out_channels`: the layers of the teacher must share one width, got \[4, 8\]. Tap blocks of one stage',
        ),
        ([4, 4], {'entropy_floor': 1.5}, r'`entropy_floor` must be a share in \[0, 1\], got 1.5'),
        ([4, 4], {'entropy_floor': -1}, r'`entropy_floor` must be a finite number of at least 0, got -1'),
        ([4, 4], {'weights': [1]}, r'`weights` must be 2 numbers .* or 1 rows of them, got \[1\]'),
        ([4, 4], {'weights': [0, 0]}, r'`weights` must be 2 numbers .* got \[0, 0\]'),
        ([4, 4], {'weights': [-1, 2]}, r'`weights` must be 2 numbers .* got \[-1, 2\]'),
        ([4, 4], {'weights': ['a', 'b']}, r'`weights` must be 2 numbers .* got'),
    ],
)
def test_bad_arguments(widths, arguments, message):
    with pytest.raises(ConfigError, match=f'LayerMixConnector: {message}'):
        LayerMixConnector([4], widths, **arguments)


def test_layers_that_do_not_fit_are_named():
    connector = LayerMixConnector([4], [4, 4])
    with pytest.raises(ShapeError, match='1 tensors of the student and 2 of the teacher.* got 1 and 3'):
        connector(layers(1), layers(3))
    with pytest.raises(ShapeError, match=r'must share one shape, got \[\(2, 4, 3, 5\), \(2, 4, 6, 5\)\]'):
        connector(layers(1), [*layers(1), *layers(1, (2, 4, 6, 5))])
