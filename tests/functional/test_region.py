from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import box_average, class_centers, intra_class_variation_loss
from tests.reference import region as reference
from tests.reference.divergence import nearest

CLASSES = 3


def pair(dtype=torch.float64, batch=3):
    student = torch.randn(batch, 4, 3, 5).to(dtype).requires_grad_()
    return student, torch.randn(batch, 6, 3, 5).to(dtype)


def labels_of(batch=3):
    """Image 2 has no label at all; class 1 is missing in image 0."""
    labels = torch.randint(0, CLASSES, (batch, 3, 5))
    labels[0][labels[0] == 1] = 2
    labels[:, 0, 1:3] = 255
    labels[1, 2, 4] = CLASSES
    labels[-1] = 255
    return labels


def loss_of(student, teacher, labels, **options):
    return intra_class_variation_loss(student, teacher, labels=labels, num_classes=CLASSES, **options)


@pytest.mark.parametrize('count_ignored', [True, False])
def test_value_and_gradient_equal_reference(count_ignored):
    student, teacher = pair()
    labels = labels_of()
    got = loss_of(student, teacher, labels, count_ignored=count_ignored)
    want = reference.intra_class_variation(student, teacher, labels, CLASSES, count_ignored)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_mask_takes_pixels_out_of_every_mean():
    student, teacher = pair()
    labels, valid = labels_of(), torch.rand(3, 3, 5) > 0.3
    got = loss_of(student, teacher, labels, valid=valid)
    inside = torch.where(valid, labels, 255)
    total = reference.intra_class_variation(student, teacher, inside, CLASSES) * labels.numel()
    torch.testing.assert_close(got, total / valid.sum())


def test_labels_of_the_input_size_are_brought_to_the_map():
    student, teacher = pair()
    labels = torch.randint(0, CLASSES, (3, 12, 20))
    want = reference.intra_class_variation(student, teacher, nearest(labels, (3, 5)), CLASSES)
    torch.testing.assert_close(loss_of(student, teacher, labels), want)


def test_gradcheck():
    student, teacher = pair()
    labels = labels_of()
    assert torch.autograd.gradcheck(lambda s: loss_of(s, teacher, labels), student)


def test_blind_to_scale_and_rotation_of_an_image():
    student, teacher = pair()
    labels = labels_of()
    rotation = torch.linalg.qr(torch.randn(4, 4).double())[0]
    turned = torch.einsum('de,behw->bdhw', rotation, student) * torch.tensor([0.5, 2.0, 3.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(loss_of(turned, teacher, labels), loss_of(student, teacher, labels))
    assert loss_of(turned, student, labels).item() < 1e-20
    assert loss_of(student, teacher, labels) > 0.01


@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_ignored_pixels_change_nothing(junk):
    student, teacher = pair(torch.float32)
    labels = labels_of()
    there = (labels < CLASSES)[:, None]
    want = loss_of(student, teacher, labels)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled = torch.where(there, student.detach(), junk).requires_grad_()
    got = loss_of(spoiled, torch.where(there, teacher, -junk), labels)
    (grad,) = torch.autograd.grad(got, spoiled)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[~there.expand_as(grad)].any()


@pytest.mark.parametrize('count_ignored', [True, False])
def test_nothing_counts_is_zero_with_a_graph(count_ignored):
    student, teacher = pair()
    got = loss_of(student, teacher, torch.full((3, 3, 5), 255), count_ignored=count_ignored)
    got.backward()
    assert got.item() == 0
    assert not student.grad.any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    student = ((2 * torch.rand(2, 4, 3, 5) - 1).to(dtype) * factor).requires_grad_()
    teacher = (2 * torch.rand(2, 6, 3, 5) - 1).to(dtype) * factor
    got = loss_of(student, teacher, labels_of(2))
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert student.grad.isfinite().all()


def test_zero_on_itself_same_in_autocast_and_channels_last():
    student, teacher = pair(torch.float32)
    labels = labels_of()
    want = loss_of(student, teacher, labels)
    assert loss_of(student, student, labels).item() == 0
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss_of(student, teacher, labels), want)
    last = (t.detach().to(memory_format=torch.channels_last) for t in (student, teacher))
    torch.testing.assert_close(loss_of(*last, labels), want.detach())


def test_one_pixel():
    student, teacher = torch.randn(1, 4, 1, 1, requires_grad=True), torch.randn(1, 6, 1, 1)
    got = loss_of(student, teacher, torch.zeros(1, 1, 1, dtype=torch.long))
    got.backward()
    assert got.item() < 1e-12
    assert student.grad.isfinite().all()


def test_centers_equal_reference():
    student, _ = pair()
    labels = labels_of()
    centers, count = class_centers(student, labels, CLASSES)
    for b in range(3):
        for k in range(CLASSES):
            number = int((labels[b] == k).sum())
            assert count[b, k] == number
            want = reference.center(student, labels, b, k) if number else torch.zeros(4).double()
            torch.testing.assert_close(centers[b, k], want)
    assert count[0, 1] == 0
    valid = torch.rand(3, 3, 5) > 0.5
    masked, count = class_centers(student, labels, CLASSES, valid=valid)
    torch.testing.assert_close(masked, class_centers(student, torch.where(valid, labels, 255), CLASSES)[0])
    assert count.sum() == ((labels < CLASSES) & valid).sum()


def test_center_of_large_features_stays_in_range():
    features = torch.full((1, 1, 4, 4), 3e38)
    centers, _ = class_centers(features, torch.zeros(1, 4, 4, dtype=torch.long), 1)
    torch.testing.assert_close(centers.item(), 3e38, rtol=1e-6, atol=0)


@pytest.mark.parametrize('masked', [False, True])
def test_box_average_equals_reference(masked):
    features = torch.randn(2, 3, 4, 6).double().requires_grad_()
    # Stride 8 both ways: whole pixels lie on the reference's lattice.
    size = (32, 48)
    boxes = [torch.tensor([[3.0, 5.0, 20.0, 9.0], [0.0, 0.0, 48.0, 32.0]]), torch.tensor([[40.0, 24.0, 60.0, 40.0]])]
    valid = torch.rand(2, 4, 6) > 0.4 if masked else None
    got, covered = box_average(features, boxes, size, valid=valid)
    want = [reference.box_average(features, box, b, size, valid) for b, some in enumerate(boxes) for box in some]
    torch.testing.assert_close(got, torch.stack(want))
    weight = torch.randn_like(got)
    grads = [torch.autograd.grad((w * weight).sum(), features)[0] for w in (got, torch.stack(want))]
    torch.testing.assert_close(*grads)
    assert covered[:2].all()


def test_empty_boxes():
    features = torch.randn(2, 3, 4, 6, requires_grad=True)
    boxes = [torch.zeros(0, 4), torch.tensor([[5.0, 5.0, 5.0, 9.0], [100.0, 100.0, 120.0, 120.0]])]
    got, covered = box_average(features, boxes, (32, 48))
    got.sum().backward()
    assert got.shape == (2, 3)
    assert not covered.any()
    assert not got.any()
    assert not features.grad.any()


def test_bad_arguments():
    x, labels = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
    name = 'intra_class_variation_loss'
    with pytest.raises(ShapeError, match=rf'{name}: `student` must have shape \(B, D, H, W\), got \(3, 4, 5\)'):
        loss_of(x[0], x, labels)
    with pytest.raises(ShapeError, match=r'must share B, H and W, got \(2, 3, 4, 5\) and \(2, 3, 4, 1\)\. Resize'):
        loss_of(x, x[..., :1], labels)
    with pytest.raises(ShapeError, match=rf'{name}: `labels` must have shape \(B, H, W\) with B = 2'):
        loss_of(x, x, labels[:1])
    with pytest.raises(ConfigError, match=rf'{name}: `num_classes` must be a finite number above 0, got 0'):
        intra_class_variation_loss(x, x, labels=labels, num_classes=0)
    with pytest.raises(ShapeError, match=r'box_average: `boxes` must hold one tensor \(n, 4\) an image for 2 images'):
        box_average(x, [torch.zeros(1, 4)], (8, 8))
