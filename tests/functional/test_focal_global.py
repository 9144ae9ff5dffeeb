from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import box_masks, focal_attention, focal_feature_loss
from mmstructkd.functional.core import boxes as module
from tests.reference import boxes as reference

SIZE, INPUT = (5, 7), (40, 56)
SHAPE = (4, 3, *SIZE)
WEIGHTS = {'foreground_weight': 0.7, 'background_weight': 0.3, 'attention_weight': 0.2}


def some_boxes(dtype=torch.float32):
    """A batch of unequal numbers: overlapping ones, none, one on borders of cells, the whole image."""
    overlapping = [[3.0, 2.0, 30.0, 31.0], [10.0, 9.0, 20.5, 17.0], [18.0, 1.0, 50.0, 12.0], [12.0, 10.0, 13.0, 11.0]]
    return [
        torch.tensor(overlapping, dtype=dtype),
        torch.zeros(0, 4, dtype=dtype),
        torch.tensor([[16.0, 8.0, 24.0, 16.0], [49.0, 33.0, 56.0, 40.0]], dtype=dtype),
        torch.tensor([[0.0, 0.0, 56.0, 40.0]], dtype=dtype),
    ]


def mask():
    """Padding at the right, at the bottom, none, and an image that does not count."""
    valid = torch.ones(4, *SIZE, dtype=torch.bool)
    valid[0, :, 4:] = False
    valid[1, 3:] = False
    valid[3] = False
    return valid


def pair(dtype=torch.float64, shape=SHAPE):
    student, teacher = torch.randn(2, *shape).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher.clone()


def focal(student, teacher, boxes=None, **kwargs):
    boxes = some_boxes() if boxes is None else boxes
    return focal_feature_loss(student, teacher, boxes=boxes, input_size=INPUT, **{**WEIGHTS, **kwargs})


# Masks


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('size', [SIZE, (1, 1), (3, 11), (40, 56)])
def test_masks_equal_the_loop_over_boxes(size, masked):
    valid = torch.rand(4, *size) > 0.4 if masked else None
    got = box_masks(some_boxes(), size, input_size=INPUT, valid=valid)
    want = reference.masks(some_boxes(), size, INPUT, valid)
    torch.testing.assert_close(got, tuple(w.float() for w in want))


@pytest.mark.parametrize('block', [1, 100, 250])
def test_blocks_of_boxes_change_nothing(monkeypatch, block):
    want = box_masks(some_boxes(), SIZE, input_size=INPUT)
    monkeypatch.setattr(module, 'MAX_BLOCK', block)
    torch.testing.assert_close(box_masks(some_boxes(), SIZE, input_size=INPUT), want, rtol=0, atol=0)


def test_smallest_box_wins_in_any_order():
    large, small = [0.0, 0.0, 47.0, 31.0], [16.0, 8.0, 23.0, 15.0]
    one, two = (box_masks([torch.tensor(b)], SIZE, input_size=INPUT)[0] for b in ([large, small], [small, large]))
    torch.testing.assert_close(one, two)
    assert one[0, 1, 2].item() == pytest.approx(1 / 4)
    assert one[0, 0, 0].item() == pytest.approx(1 / (5 * 7))


def test_edges_are_rounded_outwards_and_included():
    # Columns 16..24 of 56 pixels on 7 cells: 2 to 3; rows 8..17 of 40 on 5: 1 to 3.
    foreground, _ = box_masks([torch.tensor([[16.0, 8.0, 24.0, 17.0]])], SIZE, input_size=INPUT)
    want = torch.zeros(5, 7)
    want[1:4, 2:4] = 1 / 6
    torch.testing.assert_close(foreground[0], want)


@pytest.mark.parametrize(('cells', 'pixels'), [(25, 100), (49, 343), (42, 1344), (10, 30)])
def test_an_edge_on_the_border_of_a_cell_stays_there(cells, pixels):
    # 29 * 7 / 343 * 49 is a little more than 29: division before multiplication would take one cell more.
    for cell in range(1, cells):
        edge = torch.tensor([[0.0, 0.0, cell * pixels // cells, pixels]])
        foreground, _ = box_masks([edge], (1, cells), input_size=(pixels, pixels))
        assert (foreground > 0).sum() == cell + 1


def test_masks_sum_to_the_boxes_and_to_one():
    boxes = [torch.tensor([[16.0, 8.0, 23.0, 15.0], [40.0, 24.0, 47.0, 31.0]])]
    foreground, background = box_masks(boxes, SIZE, input_size=INPUT)
    torch.testing.assert_close(foreground.sum().item(), 2.0)
    torch.testing.assert_close(background.sum().item(), 1.0)
    assert not ((foreground > 0) & (background > 0)).any()


def test_images_without_boxes():
    none = [torch.zeros(0, 4)] * 3
    foreground, background = box_masks(none, SIZE, input_size=INPUT)
    assert not foreground.any()
    torch.testing.assert_close(background, torch.full((3, *SIZE), 1 / 35))


def test_boxes_carry_no_graph_and_may_be_integers_or_reversed():
    boxes = [torch.tensor([[16.0, 8.0, 23.0, 15.0]]).requires_grad_()]
    assert not box_masks(boxes, SIZE, input_size=INPUT)[0].requires_grad
    integers = box_masks([boxes[0].detach().long()], SIZE, input_size=INPUT)[0]
    torch.testing.assert_close(integers, box_masks(boxes, SIZE, input_size=INPUT)[0])
    reversed_box = [torch.tensor([[50.0, 30.0, 10.0, 8.0]])]
    assert box_masks(reversed_box, SIZE, input_size=INPUT)[0].isfinite().all()


def test_bad_boxes():
    with pytest.raises(ConfigError, match='box_masks: `boxes` must be one tensor for each image, got Tensor'):
        box_masks(torch.zeros(2, 4), SIZE, input_size=INPUT)
    with pytest.raises(
        ShapeError, match=r'box_masks: `boxes` must have shape \(n, 4\) each, got \[\(0,\)\]\. Give one'
    ):
        box_masks([torch.zeros(0)], SIZE, input_size=INPUT)
    with pytest.raises(
        ConfigError, match=r'box_masks: `input_size` must be two integers \(h, w\) above 0, got \(0, 4\)'
    ):
        box_masks(some_boxes(), SIZE, input_size=(0, 4))
    with pytest.raises(ShapeError, match=r'box_masks: `valid` must have shape \(B, H, W\) with B = 4, got \(1, 5, 7\)'):
        box_masks(some_boxes(), SIZE, input_size=INPUT, valid=mask()[:1])
    student, teacher = pair()
    with pytest.raises(ShapeError, match='focal_feature_loss: `boxes` must be those of 4 images, got 3'):
        focal(student, teacher, boxes=some_boxes()[:3])


# Attention


@pytest.mark.parametrize('temperature', [0.5, 2.0])
@pytest.mark.parametrize('masked', [False, True])
def test_attention_equals_reference(masked, temperature):
    student, _ = pair()
    valid = mask() if masked else None
    positions, channels = focal_attention(student, temperature=temperature, valid=valid)
    for b, places in enumerate(reference.places_of(SHAPE, valid)):
        if places:
            want_positions, want_channels = reference.attention(student[b], temperature, places)
            got = torch.stack([positions[b, y, x] for y, x in places])
            torch.testing.assert_close(got, torch.stack(want_positions))
            torch.testing.assert_close(channels[b], torch.stack(want_channels))
            torch.testing.assert_close(positions[b].sum().item(), float(len(places)))
        else:
            assert not positions[b].any()
    if masked:
        assert not positions[~valid].any()


# Focal loss


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('temperature', [0.5, 0.8])
def test_value_and_gradient_equal_the_loop_over_boxes(masked, temperature):
    student, teacher = pair()
    valid = mask() if masked else None
    got = focal(student, teacher, temperature=temperature, valid=valid)
    want = reference.focal_feature(student, teacher, some_boxes(), INPUT, (0.7, 0.3, 0.2), temperature, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@pytest.mark.parametrize('part', range(3))
def test_each_part_has_its_weight(part):
    student, teacher = pair()
    weights = [0.0, 0.0, 0.0]
    weights[part] = 2.0
    got = focal(student, teacher, **dict(zip(WEIGHTS, weights, strict=True)))
    want = reference.focal_feature(student, teacher, some_boxes(), INPUT, tuple(weights), 0.5)
    torch.testing.assert_close(got, want)
    assert got.item() > 0.1


def test_default_weights():
    student, teacher = pair()
    got = focal_feature_loss(student, teacher, boxes=some_boxes(), input_size=INPUT)
    want = reference.focal_feature(student, teacher, some_boxes(), INPUT, (1e-3, 5e-4, 5e-4), 0.5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(masked):
    student, teacher = pair(shape=(4, 2, *SIZE))
    valid = mask() if masked else None
    assert torch.autograd.gradcheck(lambda s: focal(s, teacher, valid=valid), student)


def test_batch_is_the_mean_of_its_images():
    student, teacher = pair()
    images = [focal(student[b : b + 1], teacher[b : b + 1], boxes=some_boxes()[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(focal(student, teacher), torch.stack(images).mean())


def test_zero_on_itself_and_teacher_without_gradient():
    student, teacher = pair()
    assert focal(teacher, teacher).item() == 0
    focal(student, teacher.requires_grad_()).backward()
    assert teacher.grad is None
    assert student.grad.any()


def test_a_difference_inside_a_box_counts_by_its_box_and_outside_by_the_background():
    box = [torch.tensor([[16.0, 8.0, 23.0, 15.0]])]
    teacher = torch.ones(1, 3, *SIZE)
    for place, want in (((1, 2), 0.7 / 4), ((4, 6), 0.3 / 31)):
        student = teacher.clone()
        student[0, 0, place[0], place[1]] += 2
        got = focal(student, teacher, boxes=box, attention_weight=0)
        torch.testing.assert_close(got.item(), 4 * want)


@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_padding_never_counts(junk):
    student, teacher = pair(torch.float32)
    valid = mask()
    want = focal(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled_s = torch.where(valid[:, None], student.detach(), junk).requires_grad_()
    got = focal(spoiled_s, torch.where(valid[:, None], teacher, -junk), valid=valid)
    (grad,) = torch.autograd.grad(got, spoiled_s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[(~valid)[:, None].expand_as(grad)].any()
    # Nor does the number of padded columns: the same image, cut, with its own input size.
    cut = focal_feature_loss(
        student[:1, ..., :4], teacher[:1, ..., :4], boxes=some_boxes()[:1], input_size=(40, 32), **WEIGHTS
    )
    torch.testing.assert_close(focal(student[:1], teacher[:1], boxes=some_boxes()[:1], valid=valid[:1]), cut)


def test_nothing_counts_is_zero_with_a_graph():
    student, teacher = pair()
    got = focal(student, teacher, valid=torch.zeros(4, *SIZE, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_at_every_scale(dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': min(info.max, 1e15)}[scale]
    student = ((2 * torch.rand(SHAPE) - 1) * factor).to(dtype).requires_grad_()
    teacher = ((2 * torch.rand(SHAPE) - 1) * factor).to(dtype)
    got = focal_feature_loss(student, teacher, boxes=some_boxes(), input_size=INPUT)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert student.grad.isfinite().all()


def test_channels_last_and_autocast_and_wide_boxes():
    student, teacher = pair(torch.float32)
    want = focal(student, teacher)
    last = (x.detach().to(memory_format=torch.channels_last) for x in (student, teacher))
    torch.testing.assert_close(focal(*last), want.detach())
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(focal(student, teacher), want)
    wide = focal(student, teacher, boxes=some_boxes(torch.float64))
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, want)


def test_one_pixel_and_one_image():
    student, teacher = pair(shape=(1, 3, 1, 1))
    got = focal(student, teacher, boxes=some_boxes()[:1])
    assert torch.autograd.grad(got, student)[0].isfinite().all()
    assert got.item() > 0


def test_bad_arguments():
    student, teacher = pair()
    with pytest.raises(ShapeError, match=r'focal_feature_loss: `student` must have shape \(B, D, H, W\)'):
        focal(student[0], teacher)
    with pytest.raises(ShapeError, match=r'must share B, D, H and W, got \(4, 3, 5, 7\) and \(4, 2, 5, 7\)'):
        focal(student, teacher[:, :2])
    for name in WEIGHTS:
        with pytest.raises(ConfigError, match=f'focal_feature_loss: `{name}` must be a finite number of at least 0'):
            focal(student, teacher, **{name: -1})
    with pytest.raises(ConfigError, match='focal_feature_loss: `temperature` must be a finite number above 0, got 0'):
        focal(student, teacher, temperature=0)
