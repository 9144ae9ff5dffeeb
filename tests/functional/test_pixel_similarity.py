from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ShapeError
from mmstructkd.functional import attention_residuals, pixel_similarity_loss


def stages(dtype=torch.float64, widths=(3, 4, 2), sizes=((4, 6), (4, 6), (2, 3))):
    return [torch.randn(2, w, *s).to(dtype).requires_grad_() for w, s in zip(widths, sizes, strict=True)]


def length_one(values):
    return values / values.pow(2).sum().sqrt()


def reference_residuals(features, size, valid=None):
    """Image by image, place by place."""
    batch = features[0].shape[0]
    maps = []
    for feature in features:
        images = []
        high, wide = feature.shape[2] // size[0], feature.shape[3] // size[1]
        for b in range(batch):
            places = []
            for y in range(size[0]):
                for x in range(size[1]):
                    cells = [
                        feature[b, :, v, u].pow(2).mean() * (1 if valid is None or valid[b, v, u] else 0)
                        for v in range(y * high, (y + 1) * high)
                        for u in range(x * wide, (x + 1) * wide)
                    ]
                    places.append(sum(cells) / len(cells))
            images.append(length_one(torch.stack(places)))
        maps.append(images)
    if len(maps) == 1:
        return maps
    return [
        [length_one(maps[m][b] - maps[n][b]) for b in range(batch)]
        for n in range(len(maps) - 1)
        for m in range(n + 1, len(maps))
    ]


def reference_loss(students, teachers, size):
    total, count = 0, 0
    residuals = zip(reference_residuals(students, size), reference_residuals(teachers, size), strict=True)
    for res_s, res_t in residuals:
        for s, t in zip(res_s, res_t, strict=True):
            total = total + (s - t.detach()).pow(2).sum()
            count += 1
    return total / count


@pytest.mark.parametrize('number', [1, 2, 3])
def test_value_and_gradient_equal_reference(number):
    students, teachers = stages()[:number], stages(widths=(5, 2, 6))[:number]
    size = tuple(students[-1].shape[2:])
    got = pixel_similarity_loss(students, teachers)
    want = reference_loss(students, teachers, size)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, students), torch.autograd.grad(want, students))


def test_residuals_in_order_and_of_length_one():
    features = stages()
    got = attention_residuals(features)
    assert [tuple(r.shape) for r in got] == [(2, 1, 2, 3)] * 3
    for residual, want in zip(got, reference_residuals(features, (2, 3)), strict=True):
        torch.testing.assert_close(residual.flatten(1), torch.stack(want))
        torch.testing.assert_close(residual.flatten(1).norm(dim=1), torch.ones(2).double())


def test_residual_maps_give_the_same_loss():
    students, teachers = stages(), stages(widths=(5, 2, 6))
    want = pixel_similarity_loss(students, teachers)
    got = pixel_similarity_loss(attention_residuals(students), attention_residuals(teachers), residual=True)
    torch.testing.assert_close(got, want)


def test_gradcheck():
    students, teachers = stages(), stages()
    assert torch.autograd.gradcheck(lambda *s: pixel_similarity_loss(list(s), teachers), tuple(students))


def test_teacher_gets_no_gradient():
    students, teachers = stages(), stages()
    pixel_similarity_loss(students, teachers).backward()
    assert all(t.grad is None for t in teachers)
    assert all(s.grad.any() for s in students)


def test_blind_to_the_scale_of_a_stage_of_an_image():
    students, teachers = stages(), stages()
    scaled = [s * torch.rand(2, 1, 1, 1).double().add(0.5) for s in students]
    want = pixel_similarity_loss(students, teachers)
    torch.testing.assert_close(pixel_similarity_loss(scaled, teachers), want)
    assert pixel_similarity_loss(scaled, students).item() < 1e-20
    assert want > 0.1


def test_equal_stages_have_no_residual():
    one = stages()[0]
    got = pixel_similarity_loss([one, one.detach()], stages()[:2])
    (grad,) = torch.autograd.grad(got, one)
    torch.testing.assert_close(got.item(), 1.0)
    assert grad.isfinite().all()


@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_ignored_positions_change_nothing(junk):
    student, teacher = (s.detach() for s in stages(torch.float32)[:2])
    valid = torch.rand(2, 4, 6) > 0.4
    values, grads = [], []
    for fill in (0.0, junk):
        given = torch.where(valid[:, None], student, fill).requires_grad_()
        got = pixel_similarity_loss(given, torch.where(valid[:, None], teacher, -fill), valid=valid)
        values.append(got)
        grads.append(torch.autograd.grad(got, given)[0])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*grads)
    assert grads[1].any()
    want = reference_residuals([student.double()], (4, 6), valid)[0]
    torch.testing.assert_close(attention_residuals([student], valid=valid)[0].flatten(1).double(), torch.stack(want))


def test_nothing_counts_is_zero_with_a_graph():
    students = stages()
    got = pixel_similarity_loss(students, stages(), valid=torch.zeros(2, 4, 6, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert not any(s.grad.any() for s in students)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    students, teachers = ([(2 * torch.rand(2, 3, 4, 5) - 1).to(dtype) * factor for _ in range(2)] for _ in range(2))
    students = [s.requires_grad_() for s in students]
    got = pixel_similarity_loss(students, teachers)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert all(s.grad.isfinite().all() for s in students)


def test_same_number_inside_autocast():
    students, teachers = stages(torch.float32), stages(torch.float32)
    want = pixel_similarity_loss(students, teachers)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(pixel_similarity_loss(students, teachers), want)


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match='`student` must hold at least one map, got none'):
        pixel_similarity_loss([], [])
    with pytest.raises(ShapeError, match=r'as many maps of the same images, got \[\(2, 3, 4, 5\)\] and \[\(2, 3'):
        pixel_similarity_loss([x], [x, x])
    with pytest.raises(ShapeError, match='maps of the same images'):
        attention_residuals([x, x[:1]])
    with pytest.raises(ShapeError, match=r'must be residual maps \(B, 1, H, W\) of one size .* got \(2, 3, 4, 5\)'):
        pixel_similarity_loss(x, x, residual=True)
    with pytest.raises(ShapeError, match=r'`teacher` must have shape \(B, D, H, W\), got \(3, 4, 5\)'):
        pixel_similarity_loss(x, x[0])
