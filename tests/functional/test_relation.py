from __future__ import annotations

import functools

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import (
    adjacent_correlation_loss,
    cell_nodes,
    correlation_congruence_loss,
    cross_image_kl_loss,
    local_structure_loss,
    relational_loss,
    similarity_preserving_loss,
)
from mmstructkd.functional.core import nodes
from tests.reference import relation as reference

#: Losses over nodes (n, D), with their reference and the width of the teacher.
NODES = {
    'similarity': (similarity_preserving_loss, reference.similarity_preserving, 5),
    'relational': (relational_loss, reference.relational, 5),
    'congruence': (correlation_congruence_loss, reference.correlation_congruence, 5),
    'adjacent': (adjacent_correlation_loss, reference.adjacent_correlation, 3),
}
#: Losses over maps.
MAPS = {
    'local': (local_structure_loss, reference.local_structure, 5),
    'local2': (
        functools.partial(local_structure_loss, radius=2, temperature=0.5, include_self=False),
        functools.partial(reference.local_structure, radius=2, temperature=0.5, include_self=False),
        5,
    ),
    'cross': (cross_image_kl_loss, reference.cross_image, 5),
}
ALL = {**NODES, **MAPS}

over_nodes = pytest.mark.parametrize('name', NODES)
over_maps = pytest.mark.parametrize('name', MAPS)
every = pytest.mark.parametrize('name', ALL)


def given(name, dtype=torch.float64, scale=1.0):
    shape = (6, 3) if name in NODES else (3, 3, 2, 4)
    student = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    return student, (scale * torch.randn(shape[0], ALL[name][2], *shape[2:])).to(dtype)


def mask(name):
    if name in NODES:
        return torch.tensor([True, True, False, True, True, True])
    valid = torch.ones(3, 2, 4, dtype=torch.bool)
    valid[1] = torch.tensor([[True, False, False, True], [False, False, True, True]])
    valid[2] = False
    return valid


def widen(valid, like):
    return valid[:, None].expand_as(like)


@every
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(name, masked):
    loss, written, _ = ALL[name]
    student, teacher = given(name)
    valid = mask(name) if masked else None
    got, want = loss(student, teacher, valid=valid), written(student, teacher, valid=valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@every
@pytest.mark.parametrize('masked', [False, True])
def test_in_blocks_of_one_row(name, masked, monkeypatch):
    loss, _, _ = ALL[name]
    student, teacher = given(name)
    valid = mask(name) if masked else None
    want = loss(student, teacher, valid=valid)
    monkeypatch.setattr(nodes, 'MAX_BLOCK', 1)
    got = loss(student, teacher, valid=valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))
    with torch.no_grad():
        torch.testing.assert_close(loss(student, teacher, valid=valid), want)


def test_no_block_is_larger_than_it_may_be(monkeypatch):
    # 40 x 40 places in 2 images: 10 M similarities, which never stand in memory at once.
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(one, torch.Tensor):
                    largest[0] = max(largest[0], one.numel())
            return out

    monkeypatch.setattr(nodes, 'MAX_BLOCK', 2**16)
    student = torch.randn(2, 3, 40, 40, requires_grad=True)
    with Watch():
        cross_image_kl_loss(student, torch.randn(2, 3, 40, 40)).backward()
        relational_loss(torch.randn(64, 3, requires_grad=True), torch.randn(64, 3)).backward()
    assert 2**15 < largest[0] <= 2**16


@every
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(name, masked):
    loss, _, _ = ALL[name]
    student, teacher = given(name)
    valid = mask(name) if masked else None
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, valid=valid), student)


@every
def test_zero_on_itself_and_positive_otherwise(name):
    loss, _, _ = ALL[name]
    student, teacher = given(name)
    assert loss(student, student).item() == 0
    assert loss(student, teacher).item() > 1e-3


@over_nodes
def test_sets_are_averaged(name):
    loss, _, width = NODES[name]
    student, teacher = torch.randn(4, 5, 3).double(), torch.randn(4, 5, width).double()
    each = torch.stack([loss(s, t) for s, t in zip(student, teacher, strict=True)])
    torch.testing.assert_close(loss(student, teacher), each.mean())


@over_nodes
def test_maps_are_flattened_images(name):
    loss, _, width = NODES[name]
    student, teacher = torch.randn(4, 3, 2, 3), torch.randn(4, width, 2, 3)
    torch.testing.assert_close(loss(student, teacher), loss(student.flatten(1), teacher.flatten(1)))
    last = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    torch.testing.assert_close(loss(*last), loss(student, teacher))
    valid = torch.rand(4, 2, 3) > 0.4
    valid[2] = False
    keep = valid.flatten(1).any(1)
    zeroed = [torch.where(valid[:, None], x, 0).flatten(1)[keep] for x in (student, teacher)]
    if name != 'adjacent':
        torch.testing.assert_close(loss(student, teacher, valid=valid), loss(*zeroed))


def test_similarity_is_blind_to_one_scale():
    student, teacher = given('similarity')
    want = similarity_preserving_loss(student, teacher)
    torch.testing.assert_close(similarity_preserving_loss(-3 * student, teacher), want)
    scaled = student * torch.rand(6, 1).double().add(0.1)
    assert not torch.isclose(similarity_preserving_loss(scaled, teacher), want)


@pytest.mark.parametrize('weights', [(25.0, 0.0), (0.0, 50.0), (25.0, 50.0)])
def test_relations_are_blind_to_scale_rotation_and_shift(weights):
    student, teacher = given('relational')
    loss = functools.partial(relational_loss, distance_weight=weights[0], angle_weight=weights[1])
    rotation = torch.linalg.qr(torch.randn(3, 3).double())[0]
    moved = 4 * student @ rotation + torch.randn(3).double()
    torch.testing.assert_close(loss(moved, teacher), loss(student, teacher))
    assert not torch.isclose(loss(student * torch.tensor([1.0, 2.0, 1.0]), teacher), loss(student, teacher))


def test_relations_keep_their_digits_far_from_the_origin():
    student, teacher = given('relational')
    want = relational_loss(student, teacher)
    got = relational_loss((student + 100).float(), (teacher - 100).float())
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=0)


def test_nodes_that_coincide():
    student, teacher = given('relational')
    student = torch.cat([student.detach()[:3], student.detach()[:3]]).requires_grad_()
    got = relational_loss(student, teacher)
    got.backward()
    assert got.isfinite()
    assert student.grad.isfinite().all()
    same = torch.ones(6, 3, dtype=torch.float64, requires_grad=True)
    relational_loss(same, teacher).backward()
    assert not same.grad.any()


def test_congruence_and_neighbours_are_blind_to_the_scale_of_a_node():
    student, teacher = given('congruence')
    scaled = student * torch.rand(6, 1).double().add(0.1)
    torch.testing.assert_close(
        correlation_congruence_loss(scaled, teacher), correlation_congruence_loss(student, teacher)
    )
    for name in MAPS:
        loss = MAPS[name][0]
        student, teacher = given(name)
        scaled = student * torch.rand(3, 1, 2, 4).double().add(0.1)
        torch.testing.assert_close(loss(scaled, teacher), loss(student, teacher))


def test_order_and_gamma_of_the_kernel():
    student, teacher = given('congruence')
    for gamma, order in ((0.4, 1), (0.4, 3), (1.3, 2)):
        got = correlation_congruence_loss(student, teacher, gamma=gamma, order=order)
        want = reference.correlation_congruence(student, teacher, gamma, order)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize('temperature', [0.1, 1.0])
def test_temperature_of_cross_image(temperature):
    student, teacher = given('cross')
    got = cross_image_kl_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(got, reference.cross_image(student, teacher, temperature))


@every
@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_what_does_not_count_changes_nothing(name, junk):
    loss, _, _ = ALL[name]
    student, teacher = given(name, torch.float32)
    valid = mask(name)
    want = loss(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled = torch.where(widen(valid, student), student.detach(), junk).requires_grad_()
    got = loss(spoiled, torch.where(widen(valid, teacher), teacher, -junk), valid=valid)
    (grad,) = torch.autograd.grad(got, spoiled)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[~widen(valid, grad)].any()
    assert grad.any()


@every
def test_nothing_counts_is_zero_with_a_graph(name):
    loss, _, _ = ALL[name]
    student, teacher = given(name)
    got = loss(student, teacher, valid=torch.zeros_like(mask(name)))
    got.backward()
    assert got.item() == 0
    assert not student.grad.any()


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(name, dtype, scale):
    if name == 'adjacent' and (dtype, scale) == (torch.bfloat16, 'huge'):
        return  # a square of the features themselves: it leaves the range as any squared error does
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    student, teacher = given(name, torch.float32)
    student = ((student / student.abs().max()).detach().to(dtype) * factor).requires_grad_()
    teacher = (teacher / teacher.abs().max()).to(dtype) * factor
    got = ALL[name][0](student, teacher)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    if name != 'adjacent' or scale != 'huge':
        assert student.grad.isfinite().all()


@every
def test_same_number_inside_autocast(name):
    student, teacher = given(name, torch.float32)
    want = ALL[name][0](student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(ALL[name][0](student, teacher), want)


@over_maps
def test_channels_last_and_one_place(name):
    loss = MAPS[name][0]
    student, teacher = given(name, torch.float32)
    last = (x.detach().to(memory_format=torch.channels_last) for x in (student, teacher))
    torch.testing.assert_close(loss(*last), loss(student, teacher).detach())
    one = torch.randn(1, 3, 1, 1, requires_grad=True)
    got = loss(one, torch.randn(1, 5, 1, 1))
    got.backward()
    assert got.item() == 0
    assert one.grad.isfinite().all()


@over_nodes
def test_one_node(name):
    loss, _, width = NODES[name]
    one = torch.randn(1, 3, requires_grad=True)
    got = loss(one, torch.randn(1, width))
    got.backward()
    assert got.item() == pytest.approx(0, abs=1e-12)
    assert one.grad.isfinite().all()


@pytest.mark.parametrize('masked', [False, True])
def test_cells(masked):
    features = torch.randn(2, 3, 4, 6).double()
    valid = torch.rand(2, 4, 6) > 0.3 if masked else None
    if valid is not None:
        valid[0, :2, :3] = False
    got, some = cell_nodes(features, (2, 2), valid)
    for b in range(2):
        for cell in range(4):
            rows, columns = slice(2 * (cell // 2), 2 * (cell // 2) + 2), slice(3 * (cell % 2), 3 * (cell % 2) + 3)
            part = features[b, :, rows, columns].flatten(1)
            keep = torch.ones(6, dtype=torch.bool) if valid is None else valid[b, rows, columns].flatten()
            want = part[:, keep].mean(1) if keep.any() else torch.zeros(3).double()
            torch.testing.assert_close(got[b, cell], want)
            assert some is None or some[b, cell] == keep.any()
    assert cell_nodes(features, (8, 8))[0].shape == (2, 24, 3)
    assert cell_nodes(torch.full((1, 1, 4, 4), 3e38), (1, 1))[0].isfinite().all()


def test_bad_arguments():
    x = torch.zeros(4, 3)
    for loss in (similarity_preserving_loss, relational_loss, correlation_congruence_loss, adjacent_correlation_loss):
        name = loss.__name__
        with pytest.raises(ShapeError, match=rf'{name}: `student` and `teacher` must share the nodes, got \(4, 3\)'):
            loss(x, x[:2])
        with pytest.raises(ShapeError, match=rf'{name}: `student` must have shape \(n, D\)'):
            loss(x[0], x)
        with pytest.raises(ShapeError, match=rf'{name}: `valid` must be boolean of shape \(4,\), got \(3,\)'):
            loss(x, x, valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r'adjacent_correlation_loss: .* must share widths'):
        adjacent_correlation_loss(x, torch.zeros(4, 5))
    with pytest.raises(ConfigError, match='relational_loss: `angle_weight` must be a finite number of at least 0'):
        relational_loss(x, x, angle_weight=-1)
    with pytest.raises(ConfigError, match='`gamma` must be a finite number above 0, got 0'):
        correlation_congruence_loss(x, x, gamma=0)
    with pytest.raises(ConfigError, match='`order` must be an integer of at least 1, got 1.5'):
        correlation_congruence_loss(x, x, order=1.5)
    maps = torch.zeros(2, 3, 4, 5)
    for loss in (local_structure_loss, cross_image_kl_loss):
        name = loss.__name__
        with pytest.raises(ShapeError, match=rf'{name}: .* must share B, H and W, got \(2, 3, 4, 5\) and \(2, 3, 4'):
            loss(maps, maps[..., :1])
        with pytest.raises(ConfigError, match=f'{name}: `temperature` must be a finite number above 0, got -1'):
            loss(maps, maps, temperature=-1)
    with pytest.raises(ConfigError, match='local_structure_loss: `radius` must be an integer of at least 1, got 0'):
        local_structure_loss(maps, maps, radius=0)
