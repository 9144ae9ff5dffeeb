from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.cross_view_similarity import cross_view_similarity_loss, rows_worth_keeping
from tests.functional import checks
from tests.reference import blending as reference


def embeddings(views, dtype=torch.float64):
    student = torch.randn(5 * views, 3, dtype=torch.float64).to(dtype).requires_grad_()
    # The teacher's views resemble each other, though not all of them.
    teacher = torch.randn(5, 1, 4, dtype=torch.float64) + 0.9 * torch.randn(5, views, 4, dtype=torch.float64)
    return student, teacher.flatten(0, 1).to(dtype)


@pytest.mark.parametrize('views', [2, 4])
@pytest.mark.parametrize('keep', [0.0, 0.5, 0.75, 1.0])
def test_value_and_gradient_equal_reference(views, keep):
    student, teacher = embeddings(views)
    got = cross_view_similarity_loss(student, teacher, keep=keep, temperature=0.7, views=views)
    checks.same(got, reference.cross_view(student, teacher, keep, 0.7, views), student)


def test_chosen_rows():
    student, teacher = embeddings(4)
    rows = torch.arange(15) % 3 != 1
    want = reference.cross_view(student, teacher, 1.0, 0.5, 4, rows.tolist())
    checks.same(cross_view_similarity_loss(student, teacher, rows=rows), want, student)
    checks.same(cross_view_similarity_loss(student, teacher, rows=rows.nonzero().flatten()), want, student)
    nothing = cross_view_similarity_loss(student, teacher, rows=torch.zeros(15, dtype=torch.bool))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, student)[0].any()


@pytest.mark.parametrize('keep', [0.0, 0.3, 0.5, 0.9, 1.0])
def test_kept_rows_equal_reference(keep):
    for _ in range(20):
        scores = torch.randint(0, 4, (9, 5)).float()  # many ties
        own = torch.randint(0, 5, (9,))
        got = rows_worth_keeping(scores, own, keep=keep)
        assert got.tolist() == reference.kept(scores.tolist(), own.tolist(), keep)


def test_the_share_is_of_the_wrong_rows():
    scores = torch.zeros(10, 2)
    scores[:, 1] = 1
    for share, number in ((0.0, 0), (0.29, 2), (0.3, 3), (0.9, 9), (1.0, 10)):
        assert rows_worth_keeping(scores, torch.zeros(10, dtype=torch.long), keep=share).sum() == number
    assert rows_worth_keeping(scores, torch.ones(10, dtype=torch.long), keep=0.0).all()


def test_contract():
    student, teacher = embeddings(4)
    assert torch.autograd.gradcheck(lambda s: cross_view_similarity_loss(s, teacher), student)
    checks.teacher_gets_nothing(cross_view_similarity_loss, student, teacher)
    checks.finite_in_half(cross_view_similarity_loss, (8, 3), (8, 4))
    checks.same_under_autocast(cross_view_similarity_loss, *embeddings(4, torch.float32))
    want = cross_view_similarity_loss(student, teacher)
    scale = torch.rand(20, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(cross_view_similarity_loss(scale * student, teacher / scale), want)
    turn, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    assert cross_view_similarity_loss(teacher @ turn, teacher).abs() < 1e-12
    warm = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    got = cross_view_similarity_loss(student, teacher, temperature=warm)
    torch.testing.assert_close(got, want)
    assert torch.autograd.grad(got, warm)[0] != 0


def test_bad_arguments():
    x = torch.zeros(8, 3)
    with pytest.raises(ShapeError, match=r'must have the same 4 rows an image, got \(8, 3\) and \(4, 3\)'):
        cross_view_similarity_loss(x, x[:4])
    with pytest.raises(ShapeError, match=r'must have the same 3 rows an image'):
        cross_view_similarity_loss(x, x, views=3)
    with pytest.raises(ShapeError, match=r'`rows` must have shape \(6,\), got \(8,\)'):
        cross_view_similarity_loss(x, x, rows=torch.ones(8, dtype=torch.bool))
    for bad in (1, 2.0, True):
        with pytest.raises(ConfigError, match='`views` must be an integer of at least 2, got'):
            cross_view_similarity_loss(x, x, views=bad)
    for bad in (-0.1, 1.1):
        with pytest.raises(ConfigError, match='cross_view_similarity_loss: `keep` must'):
            cross_view_similarity_loss(x, x, keep=bad)
    with pytest.raises(ConfigError, match='rows_worth_keeping: `keep` must'):
        rows_worth_keeping(x, torch.zeros(8), keep=2)
    with pytest.raises(ShapeError, match=r'`own` must have shape \(8,\), got \(7,\)'):
        rows_worth_keeping(x, torch.zeros(7))
