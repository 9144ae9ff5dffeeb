from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.chain_marginals import chain_cross_entropy_loss, chain_marginals
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from tests.functional import checks
from tests.reference import marginals as reference

LENGTHS = torch.tensor([4, 2, 1])


def chain(dtype=torch.float64):
    parts = [torch.randn(3, 4, 3), torch.randn(3, 3), torch.randn(3), torch.randn(3)]
    return [part.to(dtype).requires_grad_() for part in parts]


def names(parts, prefix=''):
    return {f'{prefix}{name}': part for name, part in zip(('transitions', 'start', 'end'), parts, strict=True)}


@pytest.mark.parametrize('temperature', [1.0, 2.5])
@pytest.mark.parametrize('lengths', [None, LENGTHS])
def test_marginals_and_gradients_equal_reference(temperature, lengths):
    scores, *rest = chain()
    got = chain_marginals(scores, **names(rest), lengths=lengths, temperature=temperature)
    weights = [torch.randn_like(part) for part in got]
    total, wanted = 0.0, 0.0
    for b in range(3):
        length = 4 if lengths is None else int(lengths[b])
        want = reference.marginals(scores[b, :length], *rest, temperature=temperature)
        torch.testing.assert_close(got.nodes[b, :length], want[0])
        torch.testing.assert_close(got.pairs[b, : length - 1], want[1])
        torch.testing.assert_close(got.log_partition[b], want[2])
        assert not got.nodes[b, length:].any()
        assert not got.pairs[b, length - 1 :].any()
        wanted = wanted + (want[0] * weights[0][b, :length]).sum() + (want[1] * weights[1][b, : length - 1]).sum()
        wanted = wanted + want[2] * weights[2][b]
    total = sum((part * weight).sum() for part, weight in zip(got, weights, strict=True))
    checks.same(total, wanted, scores, *rest)


def test_marginals_agree_with_each_other():
    scores, *rest = chain()
    nodes, pairs, _ = chain_marginals(scores, **names(rest), lengths=torch.tensor([4, 4, 3]))
    torch.testing.assert_close(nodes.sum(2)[:2], torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(pairs[:2].sum(3), nodes[:2, 1:])
    torch.testing.assert_close(pairs[:2].sum(2), nodes[:2, :-1])


@pytest.mark.parametrize('structured', [True, False])
@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('lengths', [None, LENGTHS])
def test_loss_and_gradients_equal_reference(structured, temperature, lengths):
    student, *rest = chain()
    teacher, *theirs = chain()
    extra = names(theirs, 'teacher_') if structured else {}
    got = chain_cross_entropy_loss(student, teacher, **names(rest), **extra, lengths=lengths, temperature=temperature)
    want = 0.0
    nothing = [torch.zeros_like(part) for part in theirs]
    for b in range(3):
        length = 4 if lengths is None else int(lengths[b])
        own, other = (student[b, :length], *rest), (teacher[b, :length], *(theirs if structured else nothing))
        want = want + reference.cross_entropy(own, other, temperature) / 3
    checks.same(got, want, student, *rest)
    for part in (teacher, *theirs):
        assert torch.autograd.grad(got, part, allow_unused=True, retain_graph=True) == (None,)


def test_gradcheck():
    student, *rest = chain()
    teacher, *theirs = chain()

    def loss(scores, transitions, start, end):
        parts = names((transitions, start, end))
        return chain_cross_entropy_loss(scores, teacher, **parts, **names(theirs, 'teacher_'), lengths=LENGTHS)

    assert torch.autograd.gradcheck(loss, (student, *rest))


def test_without_structure_it_is_the_cross_entropy_of_positions():
    student, teacher = (torch.randn(3, 4, 5, dtype=torch.float64) for _ in range(2))
    got = chain_cross_entropy_loss(student, teacher, transitions=torch.zeros(5, 5, dtype=torch.float64))
    rows = [z.flatten(0, 1) for z in (student, teacher)]
    entropy = -(rows[1].softmax(1) * rows[1].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(got, 4 * (pixelwise_kl_loss(*rows) + entropy))


def test_gradient_is_zero_on_itself():
    scores, *rest = chain()
    got = chain_cross_entropy_loss(scores, scores, **names(rest), **names(rest, 'teacher_'), temperature=2.0)
    assert got > 0
    for grad in torch.autograd.grad(got, [scores, *rest]):
        assert grad.abs().max() < 1e-12


def test_forbidden_labels():
    for low in (-1e12, -torch.inf):
        scores, transitions, start, end = chain(torch.float32)
        banned = scores.detach().clone()
        banned[..., 2] = low
        banned.requires_grad_()
        nodes, pairs, log_partition = chain_marginals(banned, transitions, start=start, end=end)
        assert not nodes[..., 2].any()
        assert not pairs[:, :, 2].any()
        want = chain_marginals(scores[..., :2], transitions[:2, :2], start=start[:2], end=end[:2])
        torch.testing.assert_close(nodes[..., :2], want.nodes)
        torch.testing.assert_close(log_partition, want.log_partition)
        # A student may forbid what the teacher does: no cost, no NaN.
        got = chain_cross_entropy_loss(banned, banned.detach(), transitions=transitions)
        assert got.isfinite()
        for grad in torch.autograd.grad(got, [banned, transitions]):
            assert grad.isfinite().all()


def test_what_stands_behind_the_end_changes_nothing():
    student, *rest = chain()
    teacher = chain()[0]
    want = chain_cross_entropy_loss(student, teacher, **names(rest), lengths=LENGTHS)
    want_grads = torch.autograd.grad(want, [student, *rest])
    there = (torch.arange(4) < LENGTHS[:, None])[..., None]
    for junk in (1e4, float('inf'), float('nan')):
        spoiled = torch.where(there, student.detach(), junk).requires_grad_()
        got = chain_cross_entropy_loss(spoiled, torch.where(there, teacher, junk), **names(rest), lengths=LENGTHS)
        torch.testing.assert_close(got, want)
        for grad, wanted in zip(torch.autograd.grad(got, [spoiled, *rest]), want_grads, strict=True):
            torch.testing.assert_close(grad, wanted)


def test_empty_chains_do_not_count():
    student, *rest = chain()
    teacher = chain()[0]
    some = chain_cross_entropy_loss(student, teacher, **names(rest), lengths=torch.tensor([4, 0, 1]))
    kept = chain_cross_entropy_loss(student[[0, 2]], teacher[[0, 2]], **names(rest), lengths=torch.tensor([4, 1]))
    torch.testing.assert_close(some, kept)
    none = chain_cross_entropy_loss(student, teacher, **names(rest), lengths=torch.zeros(3, dtype=torch.long))
    assert none == 0
    assert not torch.autograd.grad(none, student)[0].any()
    empty = chain_marginals(student, rest[0], lengths=torch.zeros(3, dtype=torch.long))
    assert not empty.nodes.any()
    assert not empty.log_partition.any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [0.0, 1.0, 1e4])
def test_half_precision_and_autocast(dtype, scale):
    student, teacher = ((scale * torch.randn(3, 4, 3)).to(dtype).requires_grad_() for _ in range(2))
    transitions = torch.randn(3, 3, dtype=dtype)
    got = chain_cross_entropy_loss(student, teacher, transitions=transitions, teacher_transitions=transitions)
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert torch.autograd.grad(got, student)[0].isfinite().all()
    with torch.autocast('cpu', torch.bfloat16):
        again = chain_cross_entropy_loss(student, teacher, transitions=transitions, teacher_transitions=transitions)
        assert torch.equal(again, got)


def test_bad_arguments():
    x, step = torch.zeros(2, 4, 3), torch.zeros(3, 3)
    with pytest.raises(ShapeError, match=r'chain_marginals: `scores` must have shape \(B, N, K\), got \(4, 3\)'):
        chain_marginals(x[0], step)
    with pytest.raises(ShapeError, match=r'`transitions` must have shape \(3, 3\), got \(2, 3\)'):
        chain_marginals(x, step[:2])
    with pytest.raises(ShapeError, match=r'`end` must have shape \(3,\), got \(2,\)'):
        chain_marginals(x, step, end=torch.zeros(2))
    with pytest.raises(ShapeError, match=r'`lengths` must have shape \(2,\), got \(3,\)'):
        chain_marginals(x, step, lengths=torch.ones(3))
    with pytest.raises(ShapeError, match=r'chain_cross_entropy_loss: `teacher_transitions` must have shape'):
        chain_cross_entropy_loss(x, x, transitions=step, teacher_transitions=step[:2])
    with pytest.raises(ShapeError, match='must share B, N and K'):
        chain_cross_entropy_loss(x, x[:1], transitions=step)
    with pytest.raises(ConfigError, match='`teacher_transitions` must be given with `teacher_start`'):
        chain_cross_entropy_loss(x, x, transitions=step, teacher_start=torch.zeros(3))
    with pytest.raises(ConfigError, match='`temperature` must be a finite number above 0'):
        chain_marginals(x, step, temperature=0)


def test_what_is_not_a_number_shows():
    for place in ('student', 'teacher'):
        parts = {'student': torch.zeros(2, 3, 4), 'teacher': torch.zeros(2, 3, 4)}
        parts[place][1, 1, 2] = float('nan')
        step = torch.zeros(4, 4)
        assert chain_cross_entropy_loss(*parts.values(), transitions=step, teacher_transitions=step).isnan()
        assert chain_cross_entropy_loss(*parts.values(), transitions=step).isnan()
