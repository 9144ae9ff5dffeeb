from __future__ import annotations

import copy

import pytest
import torch

from mmstructkd import functional as F
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import (
    DepthRegressionLoss,
    GradientMatchingLoss,
    OrdinalRelationLoss,
    ScaleShiftInvariantLoss,
    VirtualNormalLoss,
)
from mmstructkd.losses import depth_base as module
from mmstructkd.structures import Targets
from tests.reference import depth as reference
from tests.reference import divergence

SHAPE = (3, 1, 5, 7)
KINDS = [DepthRegressionLoss, ScaleShiftInvariantLoss, GradientMatchingLoss, OrdinalRelationLoss, VirtualNormalLoss]
every = pytest.mark.parametrize('kind', KINDS, ids=lambda k: k.__name__)
sampled = pytest.mark.parametrize('kind', [OrdinalRelationLoss, VirtualNormalLoss], ids=lambda k: k.__name__)


def pair():
    """Depths from 1 to 9 m; some pixels without a reading of the teacher."""
    student, teacher = (1 + 8 * torch.rand(2, *SHAPE, dtype=torch.float64)).unbind()
    teacher[torch.rand(SHAPE) < 0.2] = 0
    return student.requires_grad_(), teacher


def truth():
    """Ground truth of four times the size, half of it without a reading."""
    depth = 1 + 8 * torch.rand(3, 20, 28)
    return torch.where(torch.rand(3, 20, 28) < 0.6, depth, 0)


def plain(kind, student, teacher, valid, loss):
    """The loss by its reference, on the pixels of ``valid``."""
    student, teacher = student[:, 0], teacher[:, 0]
    if kind is DepthRegressionLoss:
        return reference.l1(student, teacher, valid)
    if kind is ScaleShiftInvariantLoss:
        return reference.scale_shift_invariant(student, teacher, valid)
    if kind is GradientMatchingLoss:
        return reference.gradient_matching(student, teacher, valid, 4)
    count, arity = (80, 2) if kind is OrdinalRelationLoss else (400, 3)
    places = F.draw_positions(loss.stream, torch.arange(3), count=count, arity=arity, size=35)
    if kind is OrdinalRelationLoss:
        return reference.ordinal_relation(student, teacher, valid, places)
    return reference.virtual_normal(student, teacher, valid, places, (3.5 * 3**0.5,) * 2, 0.6, 30.0)[0]


def make(kind, **kwargs):
    few = {OrdinalRelationLoss: {'num_pairs': 80}, VirtualNormalLoss: {'num_triplets': 400}}
    return kind(**few.get(kind, {}), **kwargs)


@every
@pytest.mark.parametrize('where', ['all', 'labelled', 'unlabelled'])
def test_equals_reference_where_it_shall_teach(kind, where):
    student, teacher = pair()
    depth = truth()
    valid = torch.rand(3, 20, 28) > 0.2
    counts = (teacher[:, 0] > 1.5) & (teacher[:, 0] < 8) & divergence.nearest(valid, (5, 7))
    near = divergence.nearest(depth, (5, 7))
    labelled = (near >= 1.5) & (near <= 8)
    counts = {'all': counts, 'labelled': counts & labelled, 'unlabelled': counts & ~labelled}[where]
    loss = make(kind, loss_weight=3.0, where=where, min_depth=1.5, max_depth=8.0)
    want = 3 * plain(kind, student, teacher, counts, loss)
    got = loss(student, teacher, Targets(depth=depth, valid=valid))
    assert got.item() > 0
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@every
def test_defaults_teach_everywhere_the_teacher_reads(kind):
    student, teacher = pair()
    loss = make(kind)
    torch.testing.assert_close(loss(student, teacher), plain(kind, student, teacher, teacher[:, 0] > 0, make(kind)))
    assert loss.loss_weight == 1.0
    assert not loss.needs_equal_channels
    assert loss.needs_equal_size
    assert loss.tasks == ('depth',)


@every
def test_padding_is_left_out_though_the_teacher_sees_depth_there(kind):
    student, teacher = pair()
    valid = torch.ones(3, 5, 7, dtype=torch.bool)
    valid[..., 5:] = False
    got = make(kind)(student, teacher, Targets(valid=valid))
    (grad,) = torch.autograd.grad(got, student)
    assert not grad[..., 5:].any()
    assert grad[..., :5].any()


def test_silog():
    student, teacher = pair()
    counts = teacher[:, 0] > 0
    for kwargs, args in [({}, (0.5, False)), ({'variance_weight': 0.85, 'root': True}, (0.85, True))]:
        got = DepthRegressionLoss(kind='silog', **kwargs)(student, teacher)
        torch.testing.assert_close(got, reference.silog(student[:, 0], teacher[:, 0], counts, *args))


def test_robust_and_aligned():
    student, teacher = pair()
    counts = teacher[:, 0] > 0
    maps = student[:, 0], teacher[:, 0], counts
    robust = ScaleShiftInvariantLoss(robust=True)(student, teacher)
    torch.testing.assert_close(robust, reference.scale_shift_invariant(*maps, robust=True))
    aligned = GradientMatchingLoss(scales=2, align=True)(student, teacher)
    torch.testing.assert_close(aligned, reference.gradient_matching(*maps, 2, align=True))


@every
def test_the_host_never_waits_for_a_value(kind):
    # Tensors without values: whatever asks for one raises.
    loss = make(kind, where='labelled', max_depth=80.0).to('meta')
    student, teacher, depth = torch.ones(3, *SHAPE, device='meta').unbind()
    valid = torch.ones(3, 5, 7, dtype=torch.bool, device='meta')
    student.requires_grad_()
    loss(student, teacher, Targets(depth=depth[:, 0], valid=valid)).backward()
    assert student.grad is not None


@every
def test_ground_truth_that_is_not_there(kind):
    student, teacher = pair()
    name = kind.__name__
    with pytest.raises(ConfigError, match=rf"{name}: `targets.depth` must be given for where='labelled', got None"):
        make(kind, where='labelled')(student, teacher)


@sampled
def test_every_step_draws_anew_and_eval_does_not(kind):
    student, teacher = pair()
    loss = make(kind)
    first, second = loss(student, teacher), loss(student, teacher)
    assert not torch.equal(first, second)
    assert loss.stream.tolist() == [0, 2]
    loss.eval()
    assert torch.equal(loss(student, teacher), loss(student, teacher))
    assert loss.stream.tolist() == [0, 2]
    assert torch.equal(make(kind).eval()(student, teacher), first)


@sampled
def test_resume_goes_on_exactly(kind):
    student, teacher = pair()
    loss = make(kind, seed=7)
    for _ in range(3):
        loss(student, teacher)
    resumed = make(kind)
    resumed.load_state_dict(loss.state_dict())
    twin = copy.deepcopy(loss)
    for _ in range(2):
        want = loss(student, teacher)
        assert torch.equal(resumed(student, teacher), want)
        assert torch.equal(twin(student, teacher), want)
    assert resumed.stream.tolist() == [7, 5]


@sampled
def test_the_global_generator_is_left_alone(kind):
    student, teacher = pair()
    before = torch.get_rng_state()
    first = make(kind)(student, teacher)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    assert torch.equal(make(kind)(student, teacher), first)
    assert not torch.equal(make(kind, seed=1)(student, teacher), first)


@sampled
def test_processes_share_the_draws_of_their_joint_batch(kind, monkeypatch):
    loss = make(kind)
    want = loss.draw(torch.zeros(6, 1, 5, 7), 10, 3)
    for rank in range(2):
        monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, 2))
        # mmengine's samplers deal every second image to each of two processes.
        assert torch.equal(make(kind).draw(torch.zeros(3, 1, 5, 7), 10, 3), want[rank::2])


def test_focal_length_is_in_pixels_of_the_input():
    student, teacher = pair()
    want = VirtualNormalLoss(focal_length=(6.0, 5.0)).eval()(student, teacher)
    loss = VirtualNormalLoss(focal_length=(24.0, 10.0)).eval()
    # The input is four times as wide and twice as high as the map.
    torch.testing.assert_close(loss(student, teacher, Targets(input_size=(10, 28))), want)
    assert not torch.isclose(loss(student, teacher), want)
    one = VirtualNormalLoss(focal_length=24.0).eval()(student, teacher, Targets(input_size=(20, 28)))
    torch.testing.assert_close(one, VirtualNormalLoss(focal_length=6.0).eval()(student, teacher))


@every
def test_bin_logits_are_refused(kind):
    with pytest.raises(ShapeError, match=r'\(2, 40, 4, 4\).*Tap the depth map; logits over depth bins'):
        make(kind)(torch.ones(2, 40, 4, 4), torch.ones(2, 40, 4, 4))


@every
@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        ({'where': 'label'}, r"`where` must be one of .*got 'label'. Did you mean 'labelled'"),
        ({'min_depth': -1}, r'`min_depth` must be a finite number of at least 0, got -1'),
        ({'min_depth': 5.0, 'max_depth': 5.0}, r'`max_depth` must be above min_depth=5.0, got 5.0. .*metres'),
        ({'max_depth': float('inf')}, r'`max_depth` must be a finite number, got inf'),
    ],
)
def test_bad_limits(kind, kwargs, match):
    with pytest.raises(ConfigError, match=f'{kind.__name__}: {match}'):
        make(kind, **kwargs)


@pytest.mark.parametrize(
    ('kind', 'kwargs', 'match'),
    [
        (DepthRegressionLoss, {'kind': 'l2'}, r"`kind` must be one of \['l1', 'silog'\], got 'l2'"),
        (DepthRegressionLoss, {'variance_weight': 2}, r'`variance_weight` must be at most 1, got 2'),
        (DepthRegressionLoss, {'eps': 0}, r'`eps` must be a finite number above 0, got 0'),
        (ScaleShiftInvariantLoss, {'eps': 0}, r'`eps` must be a finite number above 0, got 0'),
        (GradientMatchingLoss, {'scales': 0}, r'`scales` must be an integer of at least 1, got 0'),
        (GradientMatchingLoss, {'eps': 0}, r'`eps` must be'),
        (OrdinalRelationLoss, {'num_pairs': 0}, r'`num_pairs` must be an integer of at least 1, got 0'),
        (OrdinalRelationLoss, {'ratio_threshold': -1}, r'`ratio_threshold` must be .*got -1'),
        (OrdinalRelationLoss, {'eps': 0}, r'`eps` must be'),
        (OrdinalRelationLoss, {'seed': -1}, r'`seed` must be an integer of at least 0, got -1'),
        (VirtualNormalLoss, {'seed': 1.5}, r'`seed` must be an integer of at least 0, got 1.5'),
        (VirtualNormalLoss, {'num_triplets': True}, r'`num_triplets` must be an integer of at least 1, got True'),
        (VirtualNormalLoss, {'focal_length': -1}, r'`focal_length` must be a finite number above 0, got -1'),
        (VirtualNormalLoss, {'field_of_view': 190}, r'`field_of_view` must be below 180 degrees, got 190'),
        (VirtualNormalLoss, {'min_angle': 60}, r'`min_angle` must be below 60 degrees, got 60'),
        (VirtualNormalLoss, {'min_distance': -1}, r'`min_distance` must be .*got -1'),
    ],
)
def test_bad_settings(kind, kwargs, match):
    with pytest.raises(ConfigError, match=f'{kind.__name__}: {match}'):
        kind(**kwargs)


def test_print_outs_show_the_settings():
    assert "kind='silog', variance_weight=0.5, root=False" in repr(DepthRegressionLoss(kind='silog'))
    assert 'min_depth=0, max_depth=9.0' in repr(DepthRegressionLoss(max_depth=9))
    assert 'focal_length=(5.0, 5.0)' in repr(VirtualNormalLoss(focal_length=5))
    assert 'field_of_view=60' in repr(VirtualNormalLoss())
    assert 'num_pairs=5000' in repr(OrdinalRelationLoss())
    assert 'scales=4, align=False' in repr(GradientMatchingLoss())
    assert 'robust=True' in repr(ScaleShiftInvariantLoss(robust=True))
