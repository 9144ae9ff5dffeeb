from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.nodes import unit_vectors
from mmstructkd.functional.prototype_contrast import mutual_contrast_losses, prototype_contrast_loss
from tests.functional import checks
from tests.reference import feature_pairs as reference
from tests.reference.region import center

LABELS = torch.tensor([0, 2, 0, 1, 2, 0, 1])
VALID = torch.tensor([True, True, True, True, False, True, True])


def peers(count, dtype=torch.float64):
    return [unit_vectors(torch.randn(7, 3, dtype=torch.float64), 1).to(dtype).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize('count', [2, 3])
@pytest.mark.parametrize('masked', [False, True])
def test_parts_and_gradients_equal_reference(count, masked):
    embeddings = peers(count)
    # Without row 4 its class has one member: no anchor, yet a key.
    valid = VALID if masked else None
    got = mutual_contrast_losses(embeddings, labels=LABELS, temperature=0.5, kd_temperature=2.0, valid=valid)
    kept = [list(e[VALID] if masked else e) for e in embeddings]
    classes = (LABELS[VALID] if masked else LABELS).tolist()
    want = reference.mutual_contrast(kept, classes, 0.5, 2.0)
    for part, wanted in zip(got, want, strict=True):
        checks.same(part, wanted, *embeddings)


def test_gradcheck():
    one, two = peers(2)

    def hard(a, b):
        parts = mutual_contrast_losses([a, b], labels=LABELS, temperature=0.5, valid=VALID)
        return parts.within + parts.across

    assert torch.autograd.gradcheck(hard, (one, two))


def test_soft_parts_learn_from_each_other_but_not_the_target():
    one, two = peers(2)
    parts = mutual_contrast_losses([one, one], labels=LABELS)
    torch.testing.assert_close(parts.soft_within.item(), 0.0, atol=1e-12, rtol=0)
    # Alike, yet not 0: rows of a symmetric matrix are its columns.
    torch.testing.assert_close(parts.soft_across.item(), 0.0, atol=1e-12, rtol=0)
    parts = mutual_contrast_losses([one, two], labels=LABELS)
    assert parts.soft_within > 0
    assert parts.soft_across > 0


def test_the_order_of_peers_and_rows_does_not_matter():
    embeddings = peers(3)
    want = torch.stack(mutual_contrast_losses(embeddings, labels=LABELS))
    torch.testing.assert_close(torch.stack(mutual_contrast_losses(embeddings[::-1], labels=LABELS)), want)
    order = torch.randperm(7)
    got = torch.stack(mutual_contrast_losses([e[order] for e in embeddings], labels=LABELS[order]))
    torch.testing.assert_close(got, want)


def test_no_anchor_is_zero_with_a_graph():
    embeddings = peers(2)
    alone = mutual_contrast_losses(embeddings, labels=torch.arange(7))
    assert alone.within == 0
    assert alone.across == 0
    assert alone.soft_within > 0
    nobody = mutual_contrast_losses(embeddings, labels=LABELS, valid=torch.zeros(7, dtype=torch.bool))
    for part in nobody:
        grads = torch.autograd.grad(part, embeddings, retain_graph=True)
        assert part == 0
        assert not any(grad.any() for grad in grads)


def test_what_does_not_count_changes_nothing():
    embeddings = peers(2)
    want = torch.stack(mutual_contrast_losses(embeddings, labels=LABELS, valid=VALID))
    for junk in (1e4, float('inf'), float('nan')):
        spoiled = [torch.where(VALID[:, None], e.detach(), junk).requires_grad_() for e in embeddings]
        got = torch.stack(mutual_contrast_losses(spoiled, labels=torch.where(VALID, LABELS, 0), valid=VALID))
        torch.testing.assert_close(got, want)
        for grad in torch.autograd.grad(got.sum(), spoiled):
            assert not grad[~VALID].any()
            assert grad.isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    embeddings = peers(2, dtype)
    parts = mutual_contrast_losses(embeddings, labels=LABELS, temperature=0.01)
    assert all(part.dtype == torch.float32 and part.isfinite() for part in parts)
    assert all(g.isfinite().all() for g in torch.autograd.grad(torch.stack(parts).sum(), embeddings))
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(
            torch.stack(mutual_contrast_losses(embeddings, labels=LABELS, temperature=0.01)), torch.stack(parts)
        )


MAPS = torch.tensor([[[0, 1, 1], [0, 9, 1]], [[1, 1, 2], [2, 2, 1]]])


def maps():
    student, teacher = (torch.randn(2, 4, 2, 3, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def centres(features):
    """Classes 0 and 1 in the first image, 1 and 2 in the second, of length 1."""
    found = [center(features, MAPS, b, k) for b, k in ((0, 0), (0, 1), (1, 1), (1, 2))]
    return [row / (row**2).sum().sqrt() for row in found]


@pytest.mark.parametrize('soft_weight', [0.0, 10.0])
def test_prototypes_equal_reference(soft_weight):
    student, teacher = maps()
    got = prototype_contrast_loss(
        student,
        teacher,
        labels=MAPS,
        num_classes=3,
        temperature=0.4,
        kd_temperature=2.0,
        soft_weight=soft_weight,
        ignore_index=9,
    )
    one, other, classes = centres(student), centres(teacher), [0, 1, 1, 2]
    want = reference.contrast(one, one, classes, 0.4) + reference.contrast(one, other, classes, 0.4)
    own, theirs = reference.likeness(one, one, 0.4), reference.likeness(other, other, 0.4)
    across, back = reference.likeness(one, other, 0.4), reference.likeness(other, one, 0.4)
    soft = reference.row_divergence(own, theirs, 2.0) + reference.row_divergence(across, back, 2.0)
    checks.same(got, want + soft_weight * soft, student)


@pytest.mark.parametrize('weights', [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0.1, 0.2, 3, 4)])
def test_each_part_of_the_prototypes_has_its_weight(weights):
    student, teacher = maps()
    settings = dict(labels=MAPS, num_classes=3, temperature=0.4, kd_temperature=2.0, ignore_index=9)
    one, other, classes = centres(student), centres(teacher), [0, 1, 1, 2]
    own, theirs = reference.likeness(one, one, 0.4), reference.likeness(other, other, 0.4)
    across, back = reference.likeness(one, other, 0.4), reference.likeness(other, one, 0.4)
    parts = (
        reference.contrast(one, one, classes, 0.4),
        reference.contrast(one, other, classes, 0.4),
        reference.row_divergence(own, theirs, 2.0),
        reference.row_divergence(across, back, 2.0),
    )
    want = sum(weight * part for weight, part in zip(weights, parts, strict=True))
    checks.same(prototype_contrast_loss(student, teacher, weights=weights, **settings), want, student)


def test_prototypes_keep_their_promises():
    def loss(student, teacher, **kwargs):
        labels = torch.tensor([[[0, 1, 1], [0, 2, 1]], [[1, 1, 2], [2, 2, 1]]])
        return prototype_contrast_loss(student, teacher, labels=labels, num_classes=3, soft_weight=1.0, **kwargs)

    student, teacher = maps()
    assert torch.autograd.gradcheck(
        lambda s: prototype_contrast_loss(s, teacher, labels=MAPS, num_classes=3, ignore_index=9), student
    )
    valid = torch.tensor([[[True, True, True], [False, True, True]], [[True, True, True], [False, True, False]]])
    checks.teacher_gets_nothing(loss, student, teacher)
    checks.ignored_changes_nothing(loss, student.detach().float().requires_grad_(), teacher.float(), valid)
    checks.nothing_counts_is_zero(loss, student, teacher, valid)
    checks.finite_in_half(loss, (2, 4, 2, 3))
    checks.same_under_autocast(loss, student.detach().float(), teacher.float())
    torch.testing.assert_close(loss(3 * student, teacher / 5), loss(student, teacher))


def test_bad_arguments():
    e, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(ShapeError, match='`embeddings` must be those of at least 2 peers, got 1'):
        mutual_contrast_losses([e], labels=labels)
    with pytest.raises(ShapeError, match=r'must share n and D, got \[\(4, 3\), \(4, 2\)\]'):
        mutual_contrast_losses([e, e[:, :2]], labels=labels)
    with pytest.raises(ShapeError, match=r'`labels` must have shape \(4,\), got \(3,\)'):
        mutual_contrast_losses([e, e], labels=labels[:3])
    with pytest.raises(ShapeError, match=r'`embeddings` must have shape \(n, D\), got \(4, 3, 1\)'):
        mutual_contrast_losses([e[..., None], e], labels=labels)
    with pytest.raises(ConfigError, match='`kd_temperature` must be a finite number above 0'):
        mutual_contrast_losses([e, e], labels=labels, kd_temperature=0)
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match='prototype_contrast_loss: .* must share B, D, H and W'):
        prototype_contrast_loss(x, x[:, :2], labels=torch.zeros(2, 4, 5), num_classes=2)
    with pytest.raises(ConfigError, match='`num_classes` must be an integer above 0, got 0'):
        prototype_contrast_loss(x, x, labels=torch.zeros(2, 4, 5), num_classes=0)
    with pytest.raises(ConfigError, match='`soft_weight` must be a finite number of at least 0'):
        prototype_contrast_loss(x, x, labels=torch.zeros(2, 4, 5), num_classes=2, soft_weight=-1)
    with pytest.raises(ConfigError, match='`weights` must be four numbers'):
        prototype_contrast_loss(x, x, labels=torch.zeros(2, 4, 5), num_classes=2, weights=(1, 1))
