from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import (
    memory_kl_loss,
    region_contrast_loss,
    sinkhorn_loss,
    wasserstein_contrast_loss,
)
from mmstructkd.functional.core import nodes
from mmstructkd.functional.core.sampling import draw, hashed_uniform
from tests.reference import contrast as reference

CLASSES = torch.tensor([0, 1, 1, 2, 0])
VALID = torch.tensor([True, True, True, False, True])
MEMORY_CLASSES = torch.tensor([0, 0, 1, 2, 3, 1])
MEMORY_VALID = torch.tensor([True, False, True, True, False, True])

every = pytest.mark.parametrize('name', ['memory', 'region', 'sinkhorn'])


def pair(dtype=torch.float64, number=5):
    return torch.randn(number, 4).to(dtype).requires_grad_(), torch.randn(number, 4).to(dtype)


def score(name, student, teacher, valid=None):
    if name == 'memory':
        keys = torch.linspace(-1, 1, 24).sin().view(6, 4).to(teacher)
        return memory_kl_loss(student, teacher, memory=keys, valid=valid)
    if name == 'region':
        return region_contrast_loss(student, teacher, classes=CLASSES[: student.shape[0]], valid=valid)
    return sinkhorn_loss(student, teacher, valid=valid)


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('kd_temperature', [1.0, 2.0])
def test_memory_equals_reference(masked, kd_temperature, monkeypatch):
    student, teacher = pair()
    memory = torch.randn(6, 4).double()
    options = dict(temperature=0.3, kd_temperature=kd_temperature)
    if masked:
        options.update(valid=VALID, memory_valid=MEMORY_VALID)
    want = reference.memory_kl(student, teacher, memory, **options)
    for block in (2**22, 1):
        monkeypatch.setattr(nodes, 'MAX_BLOCK', block)
        got = memory_kl_loss(student, teacher, memory=memory, **options)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, student), torch.autograd.grad(want, student, retain_graph=True)
        )


def test_memory_without_keys_is_zero_with_a_graph():
    student, teacher = pair()
    nothing = torch.full((6, 4), float('nan')).double()
    for memory, there in ((nothing, torch.zeros(6, dtype=torch.bool)), (nothing[:0], None)):
        got = memory_kl_loss(student, teacher, memory=memory, memory_valid=there)
        (grad,) = torch.autograd.grad(got, student)
        assert got.item() == 0
        assert not grad.any()


@pytest.mark.parametrize('classes', [None, CLASSES])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('with_memory', [False, True])
def test_region_equals_reference(classes, masked, with_memory):
    if with_memory and classes is None:
        return
    student, teacher = pair()
    options, lists = {}, {}
    if classes is not None:
        options['classes'], lists['classes'] = classes, classes.tolist()
    if masked:
        options['valid'] = lists['valid'] = VALID
    if with_memory:
        memory = torch.randn(6, 4).double()
        options.update(memory=memory, memory_classes=MEMORY_CLASSES, memory_valid=MEMORY_VALID)
        lists.update(memory=memory, memory_classes=MEMORY_CLASSES.tolist(), memory_valid=MEMORY_VALID)
    got = region_contrast_loss(student, teacher, temperature=0.5, **options)
    want = reference.region_contrast(student, teacher, 0.5, **lists)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_an_instance_without_negatives_does_not_count():
    student, teacher = pair()
    assert region_contrast_loss(student, teacher, classes=torch.zeros(5, dtype=torch.long)).item() == 0
    alone = region_contrast_loss(student[:1], teacher[:1])
    alone.backward()
    assert alone.item() == 0
    assert not student.grad.any()


def test_teacher_gets_a_gradient_only_on_demand():
    for loss in (region_contrast_loss, sinkhorn_loss):
        student, teacher = pair()
        teacher.requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        loss(student, teacher, detach_teacher=False).backward()
        assert teacher.grad.any()


@pytest.mark.parametrize('epsilon', [0.2, 1.0])
def test_sinkhorn_equals_reference(epsilon):
    student, teacher = pair()
    got = sinkhorn_loss(student, teacher, epsilon=epsilon, iterations=5)
    want = (
        reference.transport(student, teacher, epsilon, 5)
        - reference.transport(student, student, epsilon, 5) / 2
        - reference.transport(teacher, teacher, epsilon, 5) / 2
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_sinkhorn_goes_to_the_best_assignment():
    student, teacher = pair()
    got = sinkhorn_loss(student, teacher, epsilon=0.005, iterations=2000).item()
    assert got == pytest.approx(reference.entropy_free(student, teacher), abs=0.02)


def test_sinkhorn_with_a_mask_equals_the_rest_alone():
    student, teacher = pair()
    got = sinkhorn_loss(student, teacher, valid=VALID)
    torch.testing.assert_close(got, sinkhorn_loss(student[VALID], teacher[VALID]))


def test_sinkhorn_is_blind_to_the_order():
    student, teacher = pair()
    torch.testing.assert_close(sinkhorn_loss(student, teacher[[3, 1, 0, 4, 2]]), sinkhorn_loss(student, teacher))
    assert sinkhorn_loss(student[[3, 1, 0, 4, 2]], student).abs().item() < 1e-12
    assert sinkhorn_loss(student, teacher).item() > 0.01


@pytest.mark.parametrize('masked', [False, True])
def test_wasserstein_equals_reference(masked):
    scores = torch.randn(5, 5).double().requires_grad_()
    valid = VALID if masked else torch.ones(5, dtype=torch.bool)
    here = [i for i in range(5) if valid[i]]
    different = [(i, j) for i in here for j in here if CLASSES[i] != CLASSES[j]]
    joint = [scores[i, i] for i in here if any(i == pair[0] for pair in different)]
    want = sum(scores[p] for p in different) / len(different) - sum(joint) / len(joint)
    got = wasserstein_contrast_loss(scores, classes=CLASSES, valid=valid if masked else None)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(want, scores))
    nothing = wasserstein_contrast_loss(scores, classes=torch.zeros(5, dtype=torch.long))
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, scores)[0].any()


@every
def test_gradcheck(name):
    student, teacher = pair()
    assert torch.autograd.gradcheck(lambda s: score(name, s, teacher, VALID), student)


@every
def test_blind_to_the_scale_of_an_embedding(name):
    student, teacher = pair()
    scaled = student * torch.rand(5, 1).double().add(0.1)
    torch.testing.assert_close(score(name, scaled, teacher), score(name, student, teacher))


@every
@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_what_does_not_count_changes_nothing(name, junk):
    student, teacher = pair(torch.float32)
    want = score(name, student, teacher, VALID)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled = torch.where(VALID[:, None], student.detach(), junk).requires_grad_()
    got = score(name, spoiled, torch.where(VALID[:, None], teacher, -junk), VALID)
    (grad,) = torch.autograd.grad(got, spoiled)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[~VALID].any()


@every
def test_nothing_counts_is_zero_with_a_graph(name):
    student, teacher = pair()
    got = score(name, student, teacher, torch.zeros(5, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert not student.grad.any()
    empty = score(name, student[:0], teacher[:0])
    assert empty.item() == 0
    assert empty.requires_grad


@every
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'one', 'huge'])
def test_finite_in_half_precision(name, dtype, scale):
    factor = {'zero': 0.0, 'one': 1.0, 'huge': torch.finfo(dtype).max}[scale]
    student = ((2 * torch.rand(5, 4) - 1).to(dtype) * factor).requires_grad_()
    teacher = (2 * torch.rand(5, 4) - 1).to(dtype) * factor
    got = score(name, student, teacher)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert student.grad.isfinite().all()


@every
def test_same_number_inside_autocast(name):
    student, teacher = pair(torch.float32)
    want = score(name, student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(score(name, student, teacher), want)


def test_numbers_look_uniform_and_steps_differ():
    numbers = torch.stack([hashed_uniform(torch.arange(20000), step) for step in range(4)])
    assert 0 <= numbers.min() < numbers.max() <= 1
    assert (numbers.mean(1) - 0.5).abs().max() < 0.01
    assert (numbers.std(1) - 12**-0.5).abs().max() < 0.01
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([numbers[0, :-1], numbers[0, 1:]]))[0, 1].abs() < 0.03
    torch.testing.assert_close(hashed_uniform(torch.arange(20000), torch.tensor(2)), numbers[2], rtol=0, atol=0)


def test_draw_takes_candidates_each_once():
    candidates = torch.rand(3, 40) > 0.5
    candidates[1, 3:] = False
    index, good = draw(candidates, 8, 5)
    assert index.shape == good.shape == (3, 8)
    for row, chosen, there in zip(candidates, index, good, strict=True):
        taken = chosen[there]
        assert row[taken].all()
        assert len(set(taken.tolist())) == len(taken) == min(8, int(row.sum()))
    assert not torch.equal(draw(candidates, 8, 6)[0], index)
    assert draw(candidates, 100, 0)[0].shape == (3, 40)


def test_draw_is_fair():
    candidates = torch.ones(10, dtype=torch.bool)
    count = torch.zeros(10)
    for step in range(1000):
        count[draw(candidates, 3, step)[0]] += 1
    assert (count - 300).abs().max() < 75


def test_bad_arguments():
    x = torch.zeros(3, 4)
    with pytest.raises(ShapeError, match=r'memory_kl_loss: `memory` must have width 4, got \(2, 5\)'):
        memory_kl_loss(x, x, memory=torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r'memory_kl_loss: `student` and `teacher` must share n and D'):
        memory_kl_loss(x, x[:2], memory=x)
    with pytest.raises(ConfigError, match='memory_kl_loss: `kd_temperature` must be a finite number above 0, got 0'):
        memory_kl_loss(x, x, memory=x, kd_temperature=0)
    with pytest.raises(ConfigError, match='`memory_classes` and `classes` must be given with a memory, got no and'):
        region_contrast_loss(x, x, memory=x)
    with pytest.raises(ShapeError, match=r'region_contrast_loss: `classes` must have shape \(3,\), got \(2,\)'):
        region_contrast_loss(x, x, classes=torch.zeros(2))
    with pytest.raises(ShapeError, match=r'wasserstein_contrast_loss: `scores` must have shape \(n, n\), got \(3, 4\)'):
        wasserstein_contrast_loss(x)
    with pytest.raises(ConfigError, match='sinkhorn_loss: `iterations` must be an integer of at least 1, got 0'):
        sinkhorn_loss(x, x, iterations=0)
    with pytest.raises(ConfigError, match='sinkhorn_loss: `epsilon` must be a finite number above 0, got 0'):
        sinkhorn_loss(x, x, epsilon=0)
