from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.spatial_mean import spatial_mean_loss
from tests.functional import checks
from tests.reference import feature_pairs as reference


@pytest.mark.parametrize('masked', [False, True])
def test_value_and_gradient_equal_reference(masked):
    student, teacher = checks.pair()
    valid = checks.VALID if masked else None
    got = spatial_mean_loss(student, teacher, valid=valid)
    checks.same(got, reference.spatial_mean(student, teacher, valid), student)
    assert torch.autograd.gradcheck(lambda s: spatial_mean_loss(s, teacher, valid=valid), student)


def test_contract():
    checks.teacher_gets_nothing(spatial_mean_loss, *checks.pair())
    checks.ignored_changes_nothing(spatial_mean_loss, *checks.pair(torch.float32), checks.VALID)
    checks.nothing_counts_is_zero(spatial_mean_loss, *checks.pair(), checks.VALID)
    checks.finite_in_half(spatial_mean_loss, most=1e15)
    checks.same_under_autocast(spatial_mean_loss, *checks.pair(torch.float32))


def test_sizes_may_differ_and_places_do_not_matter():
    student, teacher = checks.pair(other=(3, 4, 3, 1))
    want = (student.mean((2, 3)) - teacher.mean((2, 3))).square().mean()
    torch.testing.assert_close(spatial_mean_loss(student, teacher), want)
    shuffled = student.flatten(2)[:, :, torch.randperm(10)].view_as(student)
    torch.testing.assert_close(spatial_mean_loss(shuffled, teacher), want)
    valid = torch.tensor([True, False, False])[:, None, None].expand(3, 6, 10)
    got = spatial_mean_loss(student, teacher, valid=valid)
    torch.testing.assert_close(got, spatial_mean_loss(student[:1], teacher[:1]))


def test_the_mean_of_large_features_stays_in_range():
    large = torch.full((1, 1, 100, 100), 1e37)
    assert spatial_mean_loss(large, large) == 0


def test_bad_arguments():
    x = torch.zeros(2, 3, 4, 5)
    with pytest.raises(ShapeError, match=r'spatial_mean_loss: .* must share B and D, got \(2, 3, 4, 5\) and \(2, 2'):
        spatial_mean_loss(x, x[:, :2])
    with pytest.raises(ShapeError, match=r'`student` must have shape \(B, D, H, W\), got \(2, 3\)'):
        spatial_mean_loss(x[..., 0, 0], x)
    with pytest.raises(ConfigError, match='`mask` must be boolean'):
        spatial_mean_loss(x, x, valid=torch.ones(2, 8, 8))


def test_an_image_counts_where_both_maps_have_a_position():
    student, teacher = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 1, 1)
    # The one position of the teacher's map is that of the first pixel.
    valid = torch.tensor([[[False, False], [False, True]], [[True, False], [False, False]]])
    assert spatial_mean_loss(student * torch.tensor([9.0, 2.0]).view(2, 1, 1, 1), teacher, valid=valid) == 4
    assert spatial_mean_loss(student, teacher, valid=valid & ~valid[1]) == 0
