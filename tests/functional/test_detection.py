from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import binary_kl_loss, edge_confidence, inside_boxes, localization_kl_loss
from tests.reference import detection as reference
from tests.reference.logits import probabilities

SHAPE = (3, 12, 2, 5)
LOSSES = [localization_kl_loss, binary_kl_loss]
#: Which setting splits the channels of a map.
SPLIT = {localization_kl_loss: 'edges', binary_kl_loss: 'anchors'}

both = pytest.mark.parametrize('loss', LOSSES)


def pair(dtype=torch.float64, shape=SHAPE):
    student, teacher = (2 * torch.randn(2, *shape)).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher.clone()


def mask():
    """Image 0 whole, image 1 in part, image 2 not at all."""
    valid = torch.ones(3, 2, 5, dtype=torch.bool)
    valid[1] = torch.tensor([[True, False, False, True, True], [False, False, True, False, False]])
    valid[2] = False
    return valid


@pytest.mark.parametrize('temperature', [1.0, 10.0])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(('edges', 'weighted', 'bins', 'reduction'), [
    (4, False, 'sum', 'mean'),
    (4, True, 'mean', 'sum'),
    (1, True, 'sum', 'mean'),
    (3, False, 'mean', 'mean'),
])  # fmt: skip
def test_localization_equals_reference(temperature, masked, edges, weighted, bins, reduction):
    student, teacher = pair()
    valid = mask() if masked else None
    weights = torch.rand(3, 2, 5, dtype=torch.float64) if weighted else None
    got = localization_kl_loss(
        student,
        teacher,
        temperature=temperature,
        edges=edges,
        weights=weights,
        valid=valid,
        bin_reduction=bins,
        reduction=reduction,
    )
    want = reference.localization_kl(
        student, teacher, temperature, edges, weights, valid, bins == 'mean', reduction == 'sum'
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_localization_of_rows_is_that_of_the_map():
    student, teacher = pair()
    rows = [z.view(3, 4, 3, 2, 5).permute(0, 3, 4, 1, 2).reshape(-1, 3) for z in (student, teacher)]
    want = localization_kl_loss(student, teacher)
    torch.testing.assert_close(localization_kl_loss(*rows), want)
    valid = mask()[..., None].expand(3, 2, 5, 4).flatten()
    want = localization_kl_loss(student, teacher, valid=mask())
    torch.testing.assert_close(localization_kl_loss(*rows, valid=valid), want)


def test_localization_in_the_published_scale():
    """GFL's head as published: mean over bins times T squared, weighted, summed over positives, over 4 edges."""
    student, teacher = pair(shape=(2, 68, 3, 3))
    positives = torch.rand(2, 3, 3) > 0.5
    score = torch.rand(2, 3, 3, dtype=torch.float64)
    flat_s, flat_t = (z.permute(0, 2, 3, 1).reshape(-1, 68)[positives.flatten()] for z in (student, teacher))
    rows_s, rows_t = flat_s.reshape(-1, 17), flat_t.reshape(-1, 17)
    per_edge = (
        torch.nn.functional.kl_div((rows_s / 10).log_softmax(1), (rows_t / 10).softmax(1), reduction='none').mean(1)
        * 100
    )
    weight = score[positives][:, None].expand(-1, 4).reshape(-1)
    want = (per_edge * weight).sum() / 4
    got = localization_kl_loss(student, teacher, weights=score, valid=positives, bin_reduction='mean', reduction='sum')
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize('temperature', [1.0, 3.0])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('anchors', [1, 3])
@pytest.mark.parametrize('normalizer', ['weights', 'positions', 7.0])
def test_binary_equals_reference(temperature, masked, anchors, normalizer):
    student, teacher = pair()
    valid = mask() if masked else None
    got = binary_kl_loss(student, teacher, temperature=temperature, anchors=anchors, normalizer=normalizer, valid=valid)
    want = reference.binary_kl(student, teacher, temperature, anchors, normalizer, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))
    if normalizer == 7.0:
        count = torch.tensor(7.0)
        again = binary_kl_loss(
            student, teacher, temperature=temperature, anchors=anchors, normalizer=count, valid=valid
        )
        torch.testing.assert_close(again, want)


def test_binary_of_rows_is_that_of_the_map():
    student, teacher = pair()
    rows = [z.movedim(1, -1).reshape(-1, 12) for z in (student, teacher)]
    got = binary_kl_loss(*rows, temperature=2.0, valid=mask().flatten())
    torch.testing.assert_close(got, binary_kl_loss(student, teacher, temperature=2.0, valid=mask()))


def test_binary_divides_by_at_least_one():
    student, teacher = pair()
    few = [binary_kl_loss(student, teacher, normalizer=n) for n in (0, 1, torch.tensor(0.0))]
    torch.testing.assert_close(few[0], few[1])
    torch.testing.assert_close(few[2], few[1])


def test_binary_looks_where_the_teacher_is_sure():
    # Both positions differ as much; the one where the teacher sees nothing hardly counts.
    teacher = torch.tensor([[[[6.0, -6.0]]]])
    sure, unsure = (teacher + torch.tensor(gap) for gap in ([[[[-4.0, 0.0]]]], [[[[0.0, 4.0]]]]))
    assert binary_kl_loss(sure, teacher) > 100 * binary_kl_loss(unsure, teacher)


@both
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(loss, masked):
    student, teacher = pair()
    valid = mask() if masked else None
    number = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: loss(s, teacher, temperature=t, valid=valid), (student, number))


@both
def test_default_temperature(loss):
    student, teacher = pair()
    default = {localization_kl_loss: 10.0, binary_kl_loss: 1.0}[loss]
    torch.testing.assert_close(loss(student, teacher), loss(student, teacher, temperature=default))
    assert not torch.isclose(loss(student, teacher), loss(student, teacher, temperature=2.0))


@both
def test_zero_on_itself_and_positive_otherwise(loss):
    student, teacher = pair()
    assert loss(teacher, teacher).item() == 0
    assert loss(student, teacher).item() > 0.01


def test_localization_is_blind_to_a_shift_of_an_edge():
    student, teacher = pair()
    shift = torch.randn(3, 4, 1, 2, 5, dtype=torch.float64).expand(3, 4, 3, 2, 5).reshape(SHAPE)
    torch.testing.assert_close(localization_kl_loss(student + shift, teacher), localization_kl_loss(student, teacher))
    other = student + torch.randn(3, 12, 1, 1, dtype=torch.float64)
    assert not torch.isclose(localization_kl_loss(other, teacher), localization_kl_loss(student, teacher))
    assert not torch.isclose(binary_kl_loss(student + shift, teacher), binary_kl_loss(student, teacher))


@both
@pytest.mark.parametrize('junk', [1e4, float('nan'), float('inf')])
def test_ignored_positions_change_nothing(loss, junk):
    student, teacher = pair(torch.float32)
    valid = mask()
    number = torch.tensor(2.0, requires_grad=True)
    want = loss(student, teacher, temperature=number, valid=valid)
    want_grads = torch.autograd.grad(want, (student, number))
    spoiled_s = torch.where(valid[:, None], student.detach(), junk).requires_grad_()
    spoiled_t = torch.where(valid[:, None], teacher, -junk)
    got = loss(spoiled_s, spoiled_t, temperature=number, valid=valid)
    grads = torch.autograd.grad(got, (spoiled_s, number))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads, want_grads)


@both
def test_nothing_counts_is_zero_with_a_graph(loss):
    student, teacher = pair()
    got = loss(student, teacher, valid=torch.zeros(3, 2, 5, dtype=torch.bool))
    got.backward()
    assert got.item() == 0
    assert student.grad is not None
    assert not student.grad.any()


@both
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(loss, dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    student = ((2 * torch.rand(SHAPE) - 1).to(dtype) * factor).requires_grad_()
    teacher = (2 * torch.rand(SHAPE) - 1).to(dtype) * factor
    got = loss(student, teacher)
    got.backward()
    assert got.dtype == torch.float32
    assert got.isfinite()
    assert student.grad.isfinite().all()


@both
def test_same_number_inside_autocast_and_channels_last(loss):
    student, teacher = pair(torch.float32)
    want = loss(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(student, teacher), want)
    last = [z.to(memory_format=torch.channels_last) for z in (student, teacher)]
    torch.testing.assert_close(loss(*last), want)


@both
def test_one_position(loss):
    student = torch.randn(1, 8, 1, 1, requires_grad=True)
    got = loss(student, torch.randn(1, 8, 1, 1))
    got.backward()
    assert got.isfinite()
    assert student.grad.any()


@both
def test_bad_arguments(loss):
    name, x = loss.__name__, torch.zeros(2, 4, 4, 5)
    with pytest.raises(ShapeError, match=rf'{name}: `student` must have shape .*, got \(4, 4, 5\)'):
        loss(x[0], x)
    with pytest.raises(ShapeError, match=r'must share their shape, got \(2, 4, 4, 5\) and \(2, 4, 4, 1\)'):
        loss(x, x[..., :1])
    with pytest.raises(ShapeError, match=r'`valid` must have shape \(B, H, W\) with B = 2, got \(1, 4, 5\)'):
        loss(x, x, valid=torch.ones(1, 4, 5, dtype=torch.bool))
    with pytest.raises(ConfigError, match='`temperature` must be a finite number above 0, got 0'):
        loss(x, x, temperature=0)
    with pytest.raises(ShapeError, match=r'`student` must .*multiple of 3 channels.*, got \(2, 4, 4, 5\)'):
        loss(x, x, **{SPLIT[loss]: 3})
    for bad in (0, 1.0, True):
        with pytest.raises(ConfigError, match=f'`{SPLIT[loss]}` must be an integer above 0, got {bad}'):
            loss(x, x, **{SPLIT[loss]: bad})


def test_bad_choices():
    x = torch.zeros(2, 4, 4, 5)
    with pytest.raises(ConfigError, match=r"`normalizer` must be one of .*, got 'weight'\. Did you mean 'weights'"):
        binary_kl_loss(x, x, normalizer='weight')
    with pytest.raises(ConfigError, match="`bin_reduction` must be one of .*, got 'max'"):
        localization_kl_loss(x, x, bin_reduction='max')
    with pytest.raises(ConfigError, match="`reduction` must be one of .*, got 'none'"):
        localization_kl_loss(x, x, reduction='none')
    with pytest.raises(ShapeError, match=r'`weights` must have shape \(2, 4, 5\), .* got \(2, 4\)'):
        localization_kl_loss(x, x, weights=torch.ones(2, 4))


def test_edge_confidence():
    logits = torch.randn(2, 12, 3, 2, dtype=torch.float64)
    want = [sum(max(probabilities(edge, 1.0)) for edge in position) / 4 for position in reference.edges_of(logits, 4)]
    torch.testing.assert_close(edge_confidence(logits).flatten(), torch.stack(want))
    assert not edge_confidence(logits.requires_grad_()).requires_grad


@pytest.mark.parametrize(('size', 'input_size'), [((4, 5), (32, 40)), ((3, 7), (32, 40)), ((1, 1), (5, 9))])
def test_inside_boxes_equals_reference(size, input_size):
    boxes = [
        [[0.0, 0.0, 12.0, 20.0], [30.5, 10.0, 39.0, 31.0]],
        [],
        [[4.0, 4.0, 4.0, 4.0], [-10.0, 20.0, 100.0, 100.0]],
    ]
    given = [torch.tensor(image).reshape(-1, 4) for image in boxes]
    assert torch.equal(inside_boxes(given, size, input_size), reference.inside_boxes(boxes, size, input_size))


def test_bad_boxes():
    with pytest.raises(ShapeError, match=r'`boxes` must hold tensors of shape \(n, 4\), got \(3, 5\)'):
        inside_boxes([torch.zeros(3, 5)], (2, 2), (8, 8))
