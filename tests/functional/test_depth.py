from __future__ import annotations

import math

import pytest
import torch

from mmstructkd import functional as F
from mmstructkd.errors import ConfigError, ShapeError
from tests.reference import depth as reference

SHAPE = (3, 1, 5, 7)
FOCAL = (6.0, 5.0)


def pair(dtype=torch.float64, shape=SHAPE):
    """Depths from 1 to 9 m."""
    student, teacher = (1 + 8 * torch.rand(2, *shape, dtype=torch.float64)).to(dtype).unbind()
    return student.clone().requires_grad_(), teacher.clone()


def mask():
    """Image 0 whole, image 1 in part, image 2 not at all."""
    valid = torch.ones(3, 5, 7, dtype=torch.bool)
    valid[1] = torch.rand(5, 7) > 0.4
    valid[2] = False
    return valid


def places(arity, count=60, batch=3, size=35):
    return torch.randint(0, size, (batch, count, arity), generator=torch.Generator().manual_seed(arity))


#: name -> (function, the same by the reference on (B, H, W) with a mask)
CASES = {
    'l1': (F.depth_l1_loss, reference.l1),
    'silog': (F.silog_loss, lambda s, t, v: reference.silog(s, t, v, 0.5)),
    'silog-0': (
        lambda s, t, **k: F.silog_loss(s, t, variance_weight=0, **k),
        lambda s, t, v: reference.silog(s, t, v, 0.0),
    ),
    'silog-root': (
        lambda s, t, **k: F.silog_loss(s, t, variance_weight=0.85, root=True, **k),
        lambda s, t, v: reference.silog(s, t, v, 0.85, root=True),
    ),
    'silog-eps': (
        lambda s, t, **k: F.silog_loss(s, t, eps=4.0, **k),
        lambda s, t, v: reference.silog(s, t, v, 0.5, eps=4.0),
    ),
    'scale-shift': (F.scale_shift_invariant_loss, reference.scale_shift_invariant),
    'scale-shift-robust': (
        lambda s, t, **k: F.scale_shift_invariant_loss(s, t, robust=True, **k),
        lambda s, t, v: reference.scale_shift_invariant(s, t, v, robust=True),
    ),
    'gradient': (F.gradient_matching_loss, lambda s, t, v: reference.gradient_matching(s, t, v, 4)),
    'gradient-1': (
        lambda s, t, **k: F.gradient_matching_loss(s, t, scales=1, **k),
        lambda s, t, v: reference.gradient_matching(s, t, v, 1),
    ),
    'gradient-aligned': (
        lambda s, t, **k: F.gradient_matching_loss(s, t, scales=2, align=True, **k),
        lambda s, t, v: reference.gradient_matching(s, t, v, 2, align=True),
    ),
    'ordinal': (
        lambda s, t, **k: F.ordinal_relation_loss(s, t, pairs=places(2, batch=len(s)), ratio_threshold=0.3, **k),
        lambda s, t, v: reference.ordinal_relation(s, t, v, places(2, batch=len(s)), threshold=0.3),
    ),
    'normal': (
        lambda s, t, **k: F.virtual_normal_loss(
            s, t, triplets=places(3, batch=len(s)), focal_length=FOCAL, min_angle=15.0, **k
        ),
        lambda s, t, v: reference.virtual_normal(s, t, v, places(3, batch=len(s)), FOCAL, 0.6, 15.0)[0],
    ),
}
every = pytest.mark.parametrize('name', CASES)
#: One of each function, with its defaults (places drawn where it draws).
DEFAULTS = [
    F.depth_l1_loss,
    F.silog_loss,
    F.scale_shift_invariant_loss,
    F.gradient_matching_loss,
    F.ordinal_relation_loss,
    F.virtual_normal_loss,
]
functions = pytest.mark.parametrize('loss', DEFAULTS, ids=lambda f: f.__name__)


@every
@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(name, masked):
    loss, expected = CASES[name]
    student, teacher = pair()
    valid = mask() if masked else None
    got = loss(student, teacher, valid=valid)
    want = expected(student[:, 0], teacher[:, 0], torch.ones(3, 5, 7, dtype=torch.bool) if valid is None else valid)
    assert got.item() > 0
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@every
@pytest.mark.parametrize('masked', [False, True])
def test_gradcheck(name, masked):
    student, teacher = pair(shape=(3, 1, 5, 7))
    valid = mask() if masked else None
    assert torch.autograd.gradcheck(lambda s: CASES[name][0](s, teacher, valid=valid), student)


def test_reference_of_normals_meets_every_case():
    # Rejected for each of the reasons, and counted: else the comparison above would be hollow.
    _, teacher = pair()
    whole = torch.ones(3, 5, 7, dtype=torch.bool)
    counted = [
        reference.virtual_normal(teacher[:, 0], teacher[:, 0], valid, places(3), FOCAL, distance, angle)[1]
        for valid, distance, angle in [(whole, 0, 0), (whole, 3.0, 0), (whole, 0.6, 15.0), (mask(), 0.6, 15.0)]
    ]
    assert 180 >= counted[0] > counted[1] > 0
    assert counted[0] > counted[2] > counted[3] > 10


@functions
@pytest.mark.parametrize('bad', [0.0, -3.0, float('nan'), float('inf')])
def test_pixels_without_a_reading_of_the_teacher_change_nothing(loss, bad):
    student, teacher = pair()
    valid = mask()
    want = loss(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    got = loss(student, torch.where(valid[:, None], teacher, bad))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student)[0], want_grad)


@functions
@pytest.mark.parametrize('junk', [1e4, 0.0, -7.0, float('nan'), float('inf')])
def test_ignored_pixels_change_nothing(loss, junk):
    student, teacher = pair(torch.float32)
    valid = mask()
    want = loss(student, teacher, valid=valid)
    (want_grad,) = torch.autograd.grad(want, student)
    spoiled = torch.where(valid[:, None], student.detach(), junk).requires_grad_()
    got = loss(spoiled, torch.where(valid[:, None], teacher, 3.0), valid=valid)
    (grad,) = torch.autograd.grad(got, spoiled)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad)
    assert not grad[(~valid)[:, None]].any()


@functions
def test_nothing_counts_is_zero_with_a_graph(loss):
    student, teacher = pair()
    for nothing in (
        loss(student, teacher, valid=torch.zeros(3, 5, 7, dtype=torch.bool)),
        loss(student, torch.zeros_like(teacher)),
    ):
        (grad,) = torch.autograd.grad(nothing, student)
        assert nothing.item() == 0
        assert not grad.any()


@functions
def test_a_prediction_of_the_student_counts_whatever_it_is(loss):
    student, teacher = pair(torch.float32)
    wrong = student.detach().clone()
    wrong[:, :, 0] = 0.0
    wrong[:, :, 1] = -2.0
    wrong.requires_grad_()
    got = loss(wrong, teacher)
    (grad,) = torch.autograd.grad(got, wrong)
    assert got.isfinite()
    assert grad.isfinite().all()
    assert grad[:, :, :2].any()
    assert loss(torch.full_like(teacher, float('nan')), teacher).isnan()


@pytest.mark.parametrize('loss', [F.silog_loss, F.ordinal_relation_loss, F.depth_l1_loss])
def test_a_prediction_below_zero_is_pushed_up(loss):
    _, teacher = pair()
    student = teacher.clone()
    student[:, :, 0] = -1.0
    student.requires_grad_()
    (grad,) = torch.autograd.grad(loss(student, teacher), student)
    assert grad[:, :, 0].sum() < 0


@functions
def test_maps_without_a_channel_axis(loss):
    student, teacher = pair()
    assert torch.equal(loss(student[:, 0], teacher[:, 0]), loss(student, teacher))
    assert torch.equal(loss(student[:, 0], teacher), loss(student, teacher))


@functions
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', ['zero', 'tiny', 'one', 'huge'])
def test_finite_in_half_precision(loss, dtype, scale):
    info = torch.finfo(dtype)
    factor = {'zero': 0.0, 'tiny': info.tiny, 'one': 1.0, 'huge': info.max}[scale]
    shape = (2, 1, 5, 7)
    student = (torch.rand(shape).to(dtype) * factor).requires_grad_()
    for teacher in (torch.rand(shape).to(dtype) * factor, 1 + torch.rand(shape).to(dtype)):
        got = loss(student, teacher)
        (grad,) = torch.autograd.grad(got, student)
        assert got.dtype == torch.float32
        assert got.isfinite()
        assert grad.isfinite().all()


@functions
def test_flat_maps(loss):
    student = torch.full((2, 1, 4, 4), 2.0, requires_grad=True)
    for teacher in (torch.full((2, 1, 4, 4), 3.0), 1 + torch.rand(2, 1, 4, 4)):
        got = loss(student, teacher)
        assert got.isfinite()
        assert torch.autograd.grad(got, student)[0].isfinite().all()


@functions
def test_same_number_inside_autocast(loss):
    student, teacher = pair(torch.float32)
    want = loss(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(loss(student, teacher), want)


@functions
def test_channels_last_and_strided(loss):
    student, teacher = pair()
    last = loss(student.expand(3, 4, 5, 7).to(memory_format=torch.channels_last)[:, :1], teacher)
    torch.testing.assert_close(last, loss(student, teacher))


@functions
@pytest.mark.parametrize('shape', [(1, 1, 1, 1), (2, 1, 1, 1), (1, 1, 1, 5), (2, 1, 3, 1)])
def test_small_maps(loss, shape):
    student, teacher = pair(shape=shape)
    got = loss(student, teacher)
    assert got.isfinite()
    assert torch.autograd.grad(got, student)[0].isfinite().all()


@functions
def test_mask_of_the_input_size_is_brought_to_the_map(loss):
    student, teacher = pair()
    valid = mask()
    large = valid.repeat_interleave(4, 1).repeat_interleave(4, 2)
    torch.testing.assert_close(loss(student, teacher, valid=large), loss(student, teacher, valid=valid))


@functions
def test_the_host_never_waits_for_a_value(loss):
    # Tensors without values: whatever asks for one raises.
    student = torch.ones(SHAPE, device='meta', requires_grad=True)
    valid = torch.ones(3, 5, 7, dtype=torch.bool, device='meta')
    got = loss(student, torch.ones(SHAPE, device='meta'), valid=valid)
    assert torch.autograd.grad(got, student)[0].shape == SHAPE


@functions
def test_teacher_gets_no_gradient(loss):
    student, teacher = pair()
    teacher.requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize('loss', [f for f in DEFAULTS if f is not F.ordinal_relation_loss])
def test_zero_on_itself_and_positive_otherwise(loss):
    student, teacher = pair()
    assert loss(teacher.clone().requires_grad_(), teacher).item() < 1e-12
    assert loss(student, teacher).item() > 0.01


def test_root_has_a_finite_slope_at_zero():
    _, teacher = pair()
    student = teacher.clone().requires_grad_()
    got = F.silog_loss(student, teacher, root=True)
    assert got.item() == 0
    assert not torch.autograd.grad(got, student)[0].any()
    near = (teacher * (1 + 1e-9)).requires_grad_()
    (grad,) = torch.autograd.grad(F.silog_loss(near, teacher, root=True), near)
    assert grad.isfinite().all()
    assert 0 < grad.norm() < 1


def factor():
    return torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)[:, None, None, None]


@pytest.mark.parametrize(
    ('loss', 'scaling', 'shift'),
    [
        (F.depth_l1_loss, False, False),
        (F.silog_loss, False, False),
        (lambda s, t: F.silog_loss(s, t, variance_weight=1.0), True, False),
        (F.scale_shift_invariant_loss, True, True),
        (lambda s, t: F.scale_shift_invariant_loss(s, t, robust=True), True, True),
        (F.gradient_matching_loss, False, True),
        (lambda s, t: F.gradient_matching_loss(s, t, align=True), True, True),
        (F.ordinal_relation_loss, True, False),
        (F.virtual_normal_loss, True, False),
    ],
    ids=['l1', 'silog', 'silog-1', 'scale-shift', 'robust', 'gradient', 'aligned', 'ordinal', 'normal'],
)
def test_invariances(loss, scaling, shift):
    student, teacher = pair()
    want = loss(student, teacher)
    assert torch.isclose(loss(student * factor(), teacher), want, rtol=1e-6) == scaling
    assert torch.isclose(loss(student + factor(), teacher), want, rtol=1e-6) == shift


def test_least_squares_cannot_tell_a_map_from_its_negative_the_robust_form_can():
    _, teacher = pair()
    negative = 20 - teacher
    assert F.scale_shift_invariant_loss(negative, teacher).item() < 1e-12
    assert F.scale_shift_invariant_loss(negative, teacher, robust=True).item() > 0.5


def test_least_squares_is_the_least():
    student, teacher = pair(shape=(1, 1, 4, 5))
    best = F.scale_shift_invariant_loss(student, teacher).item()
    design = torch.stack([student.detach().flatten(), torch.ones(20, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(design, teacher.flatten()[:, None]).solution
    assert best == pytest.approx(((design @ solution)[:, 0] - teacher.flatten()).square().mean().item())


def test_robust_form_bears_an_outlier():
    _, teacher = pair(shape=(1, 1, 8, 8))
    student = 0.5 * teacher + 1
    spoiled = student.clone()
    spoiled[0, 0, 0, 0] = 100.0
    rest = torch.ones(1, 8, 8, dtype=torch.bool)
    rest[0, 0, 0] = False

    def damage(robust):
        aligned = F.scale_shift_invariant_loss(spoiled, teacher, robust=robust)
        return (aligned / F.scale_shift_invariant_loss(torch.rand_like(student), teacher, robust=robust)).item()

    assert damage(robust=False) > 0.9
    assert F.scale_shift_invariant_loss(spoiled, teacher, robust=True, valid=rest).item() < 1e-9


@pytest.mark.parametrize(
    'loss', [F.depth_l1_loss, F.silog_loss, F.scale_shift_invariant_loss, F.gradient_matching_loss]
)
def test_batch_is_the_mean_of_its_images(loss):
    student, teacher = pair()
    images = torch.stack([loss(student[b : b + 1], teacher[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(loss(student, teacher), images.mean())


def test_scales_without_a_pair_leave_the_mean():
    student, teacher = pair(shape=(2, 1, 2, 3))
    torch.testing.assert_close(
        F.gradient_matching_loss(student, teacher, scales=8), F.gradient_matching_loss(student, teacher, scales=2)
    )


@pytest.mark.parametrize('wrong', [False, True])
def test_ordinal_gradient_orders_a_pair(wrong):
    teacher = torch.tensor([[[2.0, 4.0]]])
    student = torch.tensor([[[4.0, 2.0] if wrong else [2.0, 4.0]]], requires_grad=True)
    got = F.ordinal_relation_loss(student, teacher, pairs=torch.tensor([[[0, 1]]]))
    (grad,) = torch.autograd.grad(got, student)
    assert got.item() == pytest.approx(math.log(1 + 2 ** (1 if wrong else -1)))
    assert grad[0, 0, 0] > 0 > grad[0, 0, 1]


@pytest.mark.parametrize(('far', 'equal'), [(2.059, True), (2.061, False)])
def test_ordinal_threshold_is_a_ratio(far, equal):
    student, pairs = torch.tensor([[[2.0, 8.0]]]), torch.tensor([[[0, 1], [1, 0]]])
    got = F.ordinal_relation_loss(student, torch.tensor([[[2.0, far]]]), pairs=pairs).item()
    assert got == pytest.approx(math.log(4) ** 2 if equal else math.log(1 + 1 / 4))


def test_a_pair_of_one_pixel_does_not_count():
    student, teacher = pair(shape=(1, 1, 1, 2))
    alone = F.ordinal_relation_loss(student, teacher, pairs=torch.tensor([[[0, 1]]]))
    both = F.ordinal_relation_loss(student, teacher, pairs=torch.tensor([[[0, 1], [1, 1], [0, 0]]]))
    torch.testing.assert_close(both, alone)


def plane(normal, height=6, width=8, focal=7.0, distance=5.0):
    """Depth of the plane n . P = distance through a pinhole."""
    rows, columns = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing='ij'
    )
    rays = torch.stack([(columns - (width - 1) / 2) / focal, (rows - (height - 1) / 2) / focal, torch.ones_like(rows)])
    normal = torch.tensor(normal, dtype=torch.float64)
    return (distance / torch.einsum('c,chw->hw', normal / normal.norm(), rays))[None, None]


def test_normals_of_planes_are_known():
    first, second = [0.0, 0.0, 1.0], [0.0, 0.6, 0.8]
    got = F.virtual_normal_loss(plane(second), plane(first), focal_length=7.0)
    # Every triplet of a plane has the plane's normal: |0.6| + |0.8 - 1|.
    assert got.item() == pytest.approx(0.8)
    other_lens = F.virtual_normal_loss(plane(second), plane(first), focal_length=9.0).item()
    assert abs(other_lens - 0.8) > 0.01
    moved = F.virtual_normal_loss(plane(second, distance=9.0), plane(second), focal_length=7.0)
    assert moved.item() < 1e-9


def test_field_of_view_gives_the_focal_length():
    student, teacher = pair()
    want = F.virtual_normal_loss(student, teacher, focal_length=3.5 / math.tan(math.radians(25)))
    torch.testing.assert_close(F.virtual_normal_loss(student, teacher, field_of_view=50.0), want)
    torch.testing.assert_close(
        F.virtual_normal_loss(student, teacher),
        F.virtual_normal_loss(student, teacher, focal_length=(3.5 * 3**0.5, 3.5 * 3**0.5)),
    )


def test_points_of_the_student_on_a_line_have_no_normal():
    teacher = plane([0.0, 0.0, 1.0], distance=20.0)
    triplets = torch.tensor([[[0, 4, 40]]])
    student = torch.zeros_like(teacher).requires_grad_()
    got = F.virtual_normal_loss(student, teacher, triplets=triplets, focal_length=7.0)
    assert got.item() == pytest.approx(1.0)
    assert torch.autograd.grad(got, student)[0].isfinite().all()


@pytest.mark.parametrize(
    ('kwargs', 'counted'),
    [({}, True), ({'min_distance': 11.5}, False), ({'min_angle': 46.0}, False), ({'min_angle': 44.0}, True)],
)
def test_triangles_that_do_not_count(kwargs, counted):
    # 0-1-2 / 3-4-5 of a wall at 10 m, 10 m a pixel: a right angle with two of 45 degrees.
    teacher = torch.full((1, 1, 2, 3), 10.0)
    student = teacher + torch.rand(1, 1, 2, 3)
    got = F.virtual_normal_loss(student, teacher, triplets=torch.tensor([[[0, 1, 3]]]), focal_length=1.0, **kwargs)
    assert (got.item() > 0) == counted
    collinear = torch.tensor([[[0, 1, 2], [0, 0, 4]]])
    for angle in (0.0, 1.0):
        none = F.virtual_normal_loss(
            student, teacher, triplets=collinear, focal_length=1.0, min_angle=angle, min_distance=0.0
        )
        assert none.item() == 0 or angle == 0


@pytest.mark.parametrize('loss', [F.ordinal_relation_loss, F.virtual_normal_loss])
def test_draws_follow_the_seed_alone(loss):
    student, teacher = pair()
    before = torch.get_rng_state()
    first = loss(student, teacher)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(loss(student, teacher), first)
    assert not torch.equal(loss(student, teacher, seed=1), first)


def test_more_draws_come_near_to_all_pairs():
    student, teacher = pair(shape=(1, 1, 3, 4))
    pairs = torch.tensor([[[i, j] for i in range(12) for j in range(12)]])
    want = F.ordinal_relation_loss(student, teacher, pairs=pairs)
    got = F.ordinal_relation_loss(student, teacher, num_pairs=100000)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)


@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('masked', [False, True])
def test_normalize_depth(log, masked):
    student, teacher = pair()
    valid = mask() if masked else None
    got = F.normalize_depth(student, teacher, log=log, valid=valid)
    whole = torch.ones(3, 5, 7, dtype=torch.bool) if valid is None else valid
    want = reference.normalize(student[:, 0].detach(), teacher[:, 0], whole, log)
    assert got.shape == student.shape
    torch.testing.assert_close(got[:, 0].detach(), want)
    itself = F.normalize_depth(teacher, teacher, log=log, valid=valid)
    for image, counts in zip(itself[:, 0], whole, strict=True):
        if counts.any():
            known = image[counts]
            assert abs(known.mean().item()) < 1e-12
            assert (known.max() - known.min()).item() == pytest.approx(1.0)
    (grad,) = torch.autograd.grad(got.sum(), student)
    assert grad[whole[:, None]].all()
    assert not grad[~whole[:, None]].any()


def test_normalize_depth_of_flat_and_empty_maps():
    flat = torch.full((2, 3, 3), 2.0)
    assert not F.normalize_depth(flat, flat).any()
    assert F.normalize_depth(flat + 1, flat).isfinite().all()
    assert not F.normalize_depth(flat, torch.zeros(2, 3, 3)).any()


def test_readings_and_their_limits():
    depth = torch.tensor([[[0.0, -1.0, 0.5, 2.0, 80.0, 81.0, float('nan'), float('inf')]]])
    assert F.depth_readings(depth)[0, 0].tolist() == [False, False, True, True, True, True, False, False]
    limited = F.depth_readings(depth[:, None], min_depth=1.0, max_depth=80.0)
    assert limited[0, 0].tolist() == [False, False, False, True, True, False, False, False]


@pytest.mark.parametrize('loss', [*DEFAULTS, F.normalize_depth], ids=lambda f: f.__name__)
def test_bad_maps(loss):
    name = loss.__name__
    x = torch.ones(2, 1, 4, 5)
    first, second = ('depth', 'reference') if loss is F.normalize_depth else ('student', 'teacher')
    with pytest.raises(ShapeError, match=rf'{name}: `{first}` must have shape \(B, 1, H, W\) or .*got \(2, 3, 4, 5\)'):
        loss(x.expand(2, 3, 4, 5), x)
    with pytest.raises(ShapeError, match=rf'{name}: `{second}` must have shape .*got \(4, 5\). Tap the depth map'):
        loss(x, x[0, 0])
    with pytest.raises(ShapeError, match=r'must share B, H and W, got \(2, 4, 5\) and \(2, 4, 4\)\. Resize'):
        loss(x, x[..., :4])
    with pytest.raises(ShapeError, match=rf'{name}: `valid` must have shape \(B, H, W\) with B = 2, got \(1, 4, 5\)'):
        loss(x, x, valid=torch.ones(1, 4, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    ('loss', 'kwargs', 'match'),
    [
        (F.silog_loss, {'variance_weight': -0.1}, r'`variance_weight` must be .* at least 0, got -0.1'),
        (F.silog_loss, {'variance_weight': 1.5}, r'`variance_weight` must be at most 1, got 1.5'),
        (F.silog_loss, {'eps': 0}, r'`eps` must be a finite number above 0, got 0'),
        (F.scale_shift_invariant_loss, {'eps': -1}, r'`eps` must be a finite number above 0, got -1'),
        (F.gradient_matching_loss, {'scales': 0}, r'`scales` must be an integer of at least 1, got 0'),
        (F.gradient_matching_loss, {'scales': 2.0}, r'`scales` must be an integer of at least 1, got 2.0'),
        (F.gradient_matching_loss, {'eps': 0}, r'`eps` must be'),
        (F.ordinal_relation_loss, {'num_pairs': 0}, r'`num_pairs` must be an integer of at least 1, got 0'),
        (F.ordinal_relation_loss, {'ratio_threshold': -1}, r'`ratio_threshold` must be .* at least 0, got -1'),
        (F.ordinal_relation_loss, {'seed': -1}, r'`seed` must be .* at least 0, got -1'),
        (F.virtual_normal_loss, {'num_triplets': True}, r'`num_triplets` must be an integer .* got True'),
        (F.virtual_normal_loss, {'focal_length': 0}, r'`focal_length` must be a finite number above 0, got 0'),
        (F.virtual_normal_loss, {'focal_length': (1.0,)}, r'`focal_length` must be one number or \(f_x, f_y\)'),
        (F.virtual_normal_loss, {'field_of_view': 180}, r'`field_of_view` must be below 180 degrees, got 180'),
        (F.virtual_normal_loss, {'min_angle': 60}, r'`min_angle` must be below 60 degrees, got 60'),
        (F.virtual_normal_loss, {'min_distance': -1}, r'`min_distance` must be .* at least 0, got -1'),
        (F.normalize_depth, {'eps': 0}, r'`eps` must be'),
    ],
)
def test_bad_numbers(loss, kwargs, match):
    x = torch.ones(2, 1, 4, 5)
    with pytest.raises(ConfigError, match=f'{loss.__name__}: {match}'):
        loss(x, x, **kwargs)


@pytest.mark.parametrize(
    ('loss', 'name', 'arity'), [(F.ordinal_relation_loss, 'pairs', 2), (F.virtual_normal_loss, 'triplets', 3)]
)
def test_bad_places(loss, name, arity):
    x = torch.ones(2, 1, 4, 5)
    for bad in (
        torch.zeros(2, 5, arity + 1, dtype=torch.int64),
        torch.zeros(1, 5, arity, dtype=torch.int64),
        torch.zeros(2, 5, arity),
    ):
        with pytest.raises(ShapeError, match=rf'`{name}` must be int64 of shape \(B, K, {arity}\) with B = 2, got'):
            loss(x, x, **{name: bad})
