from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.blending import blend, blended_cross_entropy_loss, blended_feature_loss, blended_kl_losses
from mmstructkd.functional.cross_entropy import cross_entropy_loss
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss
from tests.functional import checks
from tests.reference import blending as reference

INDEX = torch.tensor([2, 0, 1])
LABELS = torch.randint(0, 4, (3, 2, 5), generator=torch.Generator().manual_seed(1))
#: One for all, as a number and as a tensor, and one an image.
SHARES = {'number': 0.3, 'tensor': torch.tensor(0.3), 'images': torch.tensor([0.3, 0.9, 0.5], dtype=torch.float64)}
each = pytest.mark.parametrize('share', SHARES)


def shares_of(share):
    return [float(SHARES[share])] * 3 if share != 'images' else SHARES[share].tolist()


@each
def test_blend_equals_reference(share):
    values, _ = checks.pair()
    got = blend(values, index=INDEX, share=SHARES[share])
    torch.testing.assert_close(got, reference.blend(values, INDEX.tolist(), shares_of(share)))
    assert torch.autograd.gradcheck(lambda v: blend(v, index=INDEX, share=SHARES[share]), values)
    assert blend(values.half(), index=INDEX, share=SHARES[share]).dtype == torch.float16


@each
@pytest.mark.parametrize('masked', [False, True])
def test_cross_entropy_equals_reference(share, masked):
    student, _ = checks.pair()
    valid = checks.VALID if masked else None
    labels = LABELS.clone()
    labels[0, 0] = 255
    got = blended_cross_entropy_loss(student, labels, index=INDEX, share=SHARES[share], valid=valid)
    want = reference.blended_cross_entropy(student, labels, INDEX.tolist(), shares_of(share), valid)
    checks.same(got, want, student)


def test_cross_entropy_at_the_ends():
    student, _ = checks.pair()
    whole = blended_cross_entropy_loss(student, LABELS, index=INDEX, share=1.0)
    torch.testing.assert_close(whole, cross_entropy_loss(student, LABELS))
    none = blended_cross_entropy_loss(student, LABELS, index=INDEX, share=0.0)
    torch.testing.assert_close(none, cross_entropy_loss(student, LABELS[INDEX]))


@each
@pytest.mark.parametrize('masked', [False, True])
def test_divergences_equal_reference(share, masked):
    mixed, plain = checks.pair()
    plain.requires_grad_()
    valid = checks.VALID if masked else None
    got = blended_kl_losses(mixed, plain, index=INDEX, share=SHARES[share], temperature=2.0, valid=valid)
    blended = reference.blend(plain, INDEX.tolist(), shares_of(share))
    counts = None if valid is None else valid & valid[INDEX]
    checks.same(got.blend, pixelwise_kl_loss(blended, mixed, temperature=2.0, valid=counts), plain)
    checks.same(got.mixed, pixelwise_kl_loss(mixed, blended, temperature=2.0, valid=counts), mixed)
    assert torch.autograd.grad(got.blend, mixed, allow_unused=True) == (None,)
    assert torch.autograd.grad(got.mixed, plain, allow_unused=True) == (None,)


@each
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('detach', [False, True])
def test_feature_distance_equals_reference(share, masked, detach):
    student, teacher = checks.pair()
    teacher.requires_grad_()
    valid = checks.VALID if masked else None
    got = blended_feature_loss(student, teacher, index=INDEX, share=SHARES[share], detach_teacher=detach, valid=valid)
    want = reference.blended_mse(student, teacher, INDEX.tolist(), shares_of(share), valid)
    checks.same(got, want, *([student] if detach else [student, teacher]))
    if detach:
        assert torch.autograd.grad(got, teacher, allow_unused=True) == (None,)


def features(student, teacher, **kwargs):
    return blended_feature_loss(student, teacher, index=INDEX, share=0.3, **kwargs)


def scores(student, teacher, **kwargs):
    return blended_kl_losses(student, teacher, index=INDEX, share=0.3, **kwargs).mixed


def labels(student, teacher, **kwargs):
    return blended_cross_entropy_loss(student, LABELS, index=INDEX, share=0.3, **kwargs)


@pytest.mark.parametrize('loss', [features, scores, labels])
def test_contract(loss):
    student, teacher = checks.pair()
    valid = torch.ones_like(checks.VALID)
    valid[1, 0, 1:3] = False
    valid[0, 1, 4] = False
    both = valid if loss is labels else valid & valid[INDEX]
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, valid=valid), student)
    checks.teacher_gets_nothing(loss, student, teacher)
    checks.nothing_counts_is_zero(loss, student, teacher, valid)
    checks.finite_in_half(loss, most=1e15 if loss is features else 1.0)
    checks.same_under_autocast(loss, *checks.pair(torch.float32))
    want = loss(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    for junk in (1e4, float('inf'), float('nan')):
        spoiled = torch.where(both[:, None], student.detach(), junk).requires_grad_()
        got = loss(spoiled, torch.where(valid[:, None], teacher, junk), valid=valid)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, spoiled)[0], want_grad)


def test_a_linear_network_pays_nothing():
    plain, _ = checks.pair()
    mixed = blend(plain, index=INDEX, share=0.3)
    assert features(mixed, plain) == 0
    assert scores(mixed, plain).abs() < 1e-12


def test_rows_of_images():
    rows, labels = torch.randn(3, 4), torch.tensor([1, 255, 3])
    got = blended_cross_entropy_loss(rows, labels, index=INDEX, share=0.3)
    maps = blended_cross_entropy_loss(rows[..., None, None], labels[:, None, None], index=INDEX, share=0.3)
    torch.testing.assert_close(got, maps)
    one, two = (blended_kl_losses(z, z.flip(0), index=INDEX, share=0.3) for z in (rows, rows[..., None, None]))
    torch.testing.assert_close(one, two)


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    index = torch.tensor([1, 0])
    with pytest.raises(ShapeError, match=r'blend: `index` must have shape \(2,\), got \(3,\)'):
        blend(x, index=INDEX, share=0.5)
    for bad in (-0.1, 1.5):
        with pytest.raises(ConfigError, match='blend: `share` must'):
            blend(x, index=index, share=bad)
    with pytest.raises(ShapeError, match=r'`share` must be a number or one an image, got shape \(3,\)'):
        blend(x, index=index, share=torch.zeros(3))
    with pytest.raises(ShapeError, match='`mixed` and `plain` must share one shape'):
        blended_kl_losses(x, x[:, :2], index=index, share=0.5)
    with pytest.raises(ShapeError, match='blended_feature_loss: .* must share B, D, H and W'):
        blended_feature_loss(x, x[:, :2], index=index, share=0.5)
    with pytest.raises(ShapeError, match=r'blended_cross_entropy_loss: `student` must have shape'):
        blended_cross_entropy_loss(x[0], torch.zeros(2, 4, 5), index=index, share=0.5)


def test_one_channel_is_a_sigmoid():
    mixed, plain = torch.randn(3, 1, 2, 5), torch.randn(3, 1, 2, 5)
    pairs = [torch.cat([torch.zeros_like(z), z], dim=1) for z in (mixed, plain)]
    one, two = (torch.stack(blended_kl_losses(*z, index=INDEX, share=0.3)) for z in ((mixed, plain), pairs))
    torch.testing.assert_close(one, two)
    labels = LABELS % 2
    one, two = (blended_cross_entropy_loss(z, labels, index=INDEX, share=0.3) for z in (mixed, pairs[0]))
    torch.testing.assert_close(one, two)
