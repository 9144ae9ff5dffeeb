"""What every registered connector promises, whatever it changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import mmstructkd.connectors
from mmstructkd.connectors import Connector
from mmstructkd.registry import MODELS

NAMES = sorted(
    name
    for name, kind in MODELS.module_dict.items()
    if isinstance(kind, type) and kind.__module__.startswith('mmstructkd.connectors.')
)
#: Settings without which a connector cannot be built, or that keep it small.
SMALL = {
    'PoolConnector': {'kernel_size': 2},
    'SequentialConnector': {
        'connectors': [
            {'type': 'mmstructkd.DeepProjectorConnector'},
            {'type': 'mmstructkd.TeacherHeadConnector', 'head': 'head'},
            {'type': 'mmstructkd.StandardizeConnector'},
        ]
    },
    'TeacherHeadConnector': {'head': 'head'},
}
#: Shapes of student and teacher, one level each, where a connector wants others than these.
PYRAMID = ([(2, 4, 8, 6), (2, 5, 4, 3)], [(2, 6, 8, 6), (2, 6, 4, 3)])
SHAPES = {
    'LayerMixConnector': ([(2, 4, 8, 6), (2, 6, 4, 3)], [(2, 6, 8, 6)] * 3),
    'QueryMarginals': ([(2, 4, 8, 6)], [(2, 7, 5), (2, 7, 4, 3)]),
    'TokensToMapConnector': ([(2, 48, 4)], [(2, 6, 8, 6)]),
}

every = pytest.mark.parametrize('name', NAMES)


class Network(nn.Module):
    """A teacher with a head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(7, 6, 1), nn.BatchNorm2d(6), nn.Dropout(0.5))


def build(name, **kwargs):
    cls = MODELS.get(f'mmstructkd.{name}')
    students, teachers = SHAPES.get(name, PYRAMID)
    widths = [[s[-1] if len(s) == 3 else s[1] for s in shapes] for shapes in (students, teachers)]
    if not getattr(cls, 'joint', False):
        widths = [w[0] for w in widths]
    connector = MODELS.build(
        {
            'type': f'mmstructkd.{name}',
            'in_channels': widths[0],
            'out_channels': widths[1],
            **SMALL.get(name, {}),
            **kwargs,
        }
    )
    if getattr(connector, 'needs_teacher', False):
        connector.attach(Network().requires_grad_(False).eval())
    return connector


def inputs(name, **kwargs):
    students, teachers = SHAPES.get(name, PYRAMID)
    if not getattr(MODELS.get(f'mmstructkd.{name}'), 'joint', False):
        students, teachers = students[:1], teachers[:1]
    return [torch.randn(s, requires_grad=True, **kwargs) for s in students], [torch.randn(t) for t in teachers]


def connect(connector, students, teachers, seed=0):
    """Run a connector; those that draw random numbers draw the same each time."""
    torch.manual_seed(seed)
    if getattr(connector, 'joint', False):
        return connector(students, teachers)
    return [connector(student) for student in students], teachers


def total(students, teachers):
    """A sum of all that depends on both sides, in which nothing cancels."""
    both = zip(students, teachers, strict=True)
    out = 0.0
    for student, teacher in both:
        difference = student - teacher.detach() if student.shape == teacher.shape else student - 0.3
        out = out + (difference.square() * torch.linspace(0.5, 1.5, difference.numel()).view(difference.shape)).sum()
    return out


def test_all_connectors_are_here():
    exported = {n for n in mmstructkd.connectors.__all__ if n[0].isupper() and n != 'Connector'}
    assert set(NAMES) == exported
    assert len(NAMES) >= 10
    assert set(SMALL) | set(SHAPES) <= set(NAMES)


@every
def test_gradient_reaches_every_student_and_every_parameter_and_no_teacher(name):
    connector = build(name)
    students, teachers = inputs(name)
    for teacher in teachers:
        teacher.requires_grad_()
    total(*connect(connector, students, teachers)).backward()
    for student in students:
        assert student.grad.isfinite().all()
        assert student.grad.any()
    # A parameter that gets none would stop DistributedDataParallel.
    assert [n for n, p in connector.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(teacher.grad is None or not teacher.grad.any() for teacher in teachers)


@every
def test_pairs_of_equal_length_and_inputs_stay_as_they_are(name):
    connector = build(name)
    students, teachers = inputs(name)
    before = [t.detach().clone() for t in students + teachers]
    given = list(students), list(teachers)
    out_s, out_t = connect(connector, students, teachers)
    assert len(out_s) == len(out_t) > 0
    assert all(map(torch.equal, before, [t.detach() for t in given[0] + given[1]]))
    assert all(a is b for a, b in zip(students + teachers, given[0] + given[1], strict=True))


@every
def test_channels_last_equals_contiguous(name):
    connector = build(name).eval()
    students, teachers = inputs(name)
    want = total(*connect(connector, students, teachers))
    want_grads = torch.autograd.grad(want, students)

    def last(t):
        t = t.detach()
        return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t.mT.contiguous().mT

    others = [last(s).requires_grad_() for s in students]
    got = total(*connect(connector, others, [last(t) for t in teachers]))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, others), want_grads, rtol=1e-4, atol=1e-5)


@every
def test_copies_and_pickles_give_the_same(name):
    connector = build(name).eval()
    students, teachers = inputs(name)
    want = connect(connector, students, teachers)
    total(*want).backward()
    twin = copy.deepcopy(connector)
    torch.testing.assert_close(connect(twin, students, teachers), want, rtol=0, atol=0)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in connector.parameters()}
    twin = pickle.loads(pickle.dumps(connector))
    if getattr(connector, 'needs_teacher', False):
        torch.manual_seed(0)
        network = Network()
        connector.attach(network)
        twin.attach(network)
        want = connect(connector, students, teachers)
    torch.testing.assert_close(connect(twin, students, teachers), want, rtol=0, atol=0)


@every
def test_state_dict_round_trip(name):
    first = build(name)
    students, teachers = inputs(name)
    connect(first, students, teachers)  # in training, where BatchNorm counts
    second = copy.deepcopy(first)
    with torch.no_grad():
        for tensor in second.state_dict().values():
            tensor.zero_()
    second.load_state_dict(first.state_dict(), strict=True)
    got, want = (connect(c.eval(), students, teachers) for c in (second, first))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@every
def test_eval_moves_nothing_and_is_repeatable(name):
    connector = build(name)
    students, teachers = inputs(name)
    connect(connector, students, teachers)
    connector.eval()
    before = copy.deepcopy(connector.state_dict())
    first, second = (connect(connector, students, teachers) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    after = connector.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in after)
    connector.train()
    connect(connector, students, teachers)


@every
def test_odd_sizes_and_one_image(name):
    students, teachers = SHAPES.get(name, PYRAMID)
    if 'LayerMix' in name:
        sizes = [(1, 4, 7, 5), (1, 6, 3, 3)], [(1, 6, 5, 5)] * 3
    elif name == 'QueryMarginals':
        sizes = [(1, 4, 7, 5)], [(1, 3, 5), (1, 3, 5, 9)]
    elif len(students[0]) == 3:
        sizes = [(1, 35, 4)], [(1, 6, 7, 5)]
    else:
        sizes = [(1, 4, 7, 5), (1, 5, 3, 3)], [(1, 6, 7, 5), (1, 6, 3, 3)]
    connector = build(name).eval()
    if not getattr(connector, 'joint', False):
        sizes = sizes[0][:1], sizes[1][:1]
    students, teachers = ([torch.randn(shape) for shape in side] for side in sizes)
    out_s, out_t = connect(connector, students, teachers)
    assert all(t.isfinite().all() for t in out_s + out_t)


@every
def test_runs_under_autocast(name):
    connector = build(name)
    students, teachers = inputs(name)
    with torch.autocast('cpu', torch.bfloat16):
        out = total(*connect(connector, students, teachers))
    out.backward()
    assert all(student.grad.isfinite().all() for student in students)


@every
def test_unknown_argument_raises(name):
    with pytest.raises(TypeError, match='no_such_argument'):
        build(name, no_such_argument=1)


@every
def test_says_what_it_is(name):
    kind = MODELS.get(f'mmstructkd.{name}')
    assert kind.__doc__.strip()
    if issubclass(kind, Connector):
        assert name in repr(build(name))
