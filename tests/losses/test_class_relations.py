"""Shells of the losses over classes: InterclassSimilarity, CategorySimilarity, PixelSimilarity, IntraClassVariation."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.connectors import AttentionResidualConnector
from mmstructkd.errors import ConfigError
from mmstructkd.functional import (
    category_similarity_loss,
    interclass_similarity_loss,
    intra_class_variation_loss,
    pixel_similarity_loss,
    present_classes,
)
from mmstructkd.losses import (
    CategorySimilarityLoss,
    InterclassSimilarityLoss,
    IntraClassVariationLoss,
    PixelSimilarityLoss,
)
from mmstructkd.structures import Targets

SHAPE = (2, 4, 3, 5)


def pair():
    return torch.randn(2, *SHAPE).unbind()


def targets():
    """Labels of four times the size; 9 is ignored."""
    labels = torch.randint(0, 4, (2, 12, 20))
    labels[:, :6, 8:] = 9
    valid = torch.ones(2, 12, 20, dtype=torch.bool)
    valid[0, :, :4] = False
    return Targets(labels=labels, valid=valid, ignore_index=9, num_classes=4)


def labelled(loss):
    loss.restrict('labelled')
    return loss


def on_map(given):
    labels = given.labels[:, ::4, ::4]
    return labels, given.valid[:, ::4, ::4] & (labels != 9)


@pytest.mark.parametrize('present', ['teacher', 'labels', 'all'])
def test_interclass_takes_the_classes_that_are_there(present):
    student, teacher = pair()
    teacher[:, 2] -= 10
    given = targets()
    labels, valid = on_map(given)
    labels[labels == 1] = 3
    given.labels[given.labels == 1] = 3
    some = {
        'teacher': present_classes(teacher.argmax(1), 4, valid=valid),
        'labels': present_classes(labels, 4, valid=valid),
    }
    want = interclass_similarity_loss(student, teacher, present=some.get(present), valid=valid)
    got = labelled(InterclassSimilarityLoss(2.0, present=present))(student, teacher, given)
    torch.testing.assert_close(got, 2 * want)
    every = interclass_similarity_loss(student, teacher, valid=valid)
    assert torch.isclose(want, every) == (present == 'all')


def test_the_ignored_label_is_no_class_though_its_pixels_count():
    student, teacher = pair()
    labels = torch.tensor([0, 1, 3]).repeat(2, 5, 1).mT
    given = Targets(labels=labels, ignore_index=3)
    some = torch.tensor([[True, True, False, False]]).expand(2, -1)
    got = InterclassSimilarityLoss(2.0, present='labels')(student, teacher, given)
    torch.testing.assert_close(got, 2 * interclass_similarity_loss(student, teacher, present=some))


def test_interclass_defaults_and_preset():
    student, teacher = pair()
    some = present_classes(teacher.argmax(1), 4)
    want = interclass_similarity_loss(student, teacher, present=some)
    torch.testing.assert_close(InterclassSimilarityLoss()(student, teacher), 20 * want)
    code = InterclassSimilarityLoss(preset='code')
    want = interclass_similarity_loss(student, teacher, mode='released_code')
    torch.testing.assert_close(code(student, teacher), 9500 * want)
    torch.testing.assert_close(InterclassSimilarityLoss(1.0, mode='released_code')(student, teacher), want)
    plain = InterclassSimilarityLoss(1.0, normalize=False, temperature=2.0, present='all')(student, teacher)
    torch.testing.assert_close(plain, interclass_similarity_loss(student, teacher, normalize=False, temperature=2.0))


def test_interclass_refuses():
    with pytest.raises(ConfigError, match="`mode` must be 'released_code' with preset='code', got 'paper'"):
        InterclassSimilarityLoss(preset='code', mode='paper')
    with pytest.raises(ConfigError, match="`present` must be 'all' with mode='released_code', got 'labels'"):
        InterclassSimilarityLoss(mode='released_code', present='labels')
    with pytest.raises(ConfigError, match=r"`present` must be one of \['teacher', 'labels', 'all'\], got 'label'"):
        InterclassSimilarityLoss(present='label')
    with pytest.raises(ConfigError, match="InterclassSimilarityLoss: `present` must not be 'labels' where the batch"):
        InterclassSimilarityLoss(present='labels')(*pair())


def test_category_equals_its_function():
    student, teacher = pair()
    given = targets()
    _, valid = on_map(given)
    want = category_similarity_loss(student, teacher, temperature=2.0, kernel_size=(1, 2), valid=valid)
    got = labelled(CategorySimilarityLoss(3.0, temperature=2.0, kernel_size=(1, 2)))(student, teacher, given)
    torch.testing.assert_close(got, 3 * want)
    torch.testing.assert_close(
        CategorySimilarityLoss()(student, teacher), 10 * category_similarity_loss(student, teacher)
    )
    with pytest.raises(ConfigError, match='CategorySimilarityLoss: `kernel_size` must be an integer above 0'):
        CategorySimilarityLoss(kernel_size=0)


def test_pixel_similarity_equals_its_function():
    student, teacher = pair()
    given = targets()
    _, valid = on_map(given)
    got = labelled(PixelSimilarityLoss())(student, teacher, given)
    torch.testing.assert_close(got, 0.1 * pixel_similarity_loss(student, teacher, valid=valid))


def test_residuals_of_stages_through_the_connector():
    students = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4), torch.randn(2, 6, 4, 4)]
    teachers = [torch.randn(2, 7, 8, 8), torch.randn(2, 9, 8, 8), torch.randn(2, 4, 4, 4)]
    connector = AttentionResidualConnector(in_channels=[3, 5, 6], out_channels=[7, 9, 4])
    made_s, made_t = connector(students, teachers)
    assert [tuple(m.shape) for m in made_s + made_t] == [(2, 1, 4, 4)] * 6
    loss = PixelSimilarityLoss(1.0, residual=True)
    got = torch.stack([loss(s, t) for s, t in zip(made_s, made_t, strict=True)]).mean()
    torch.testing.assert_close(got, pixel_similarity_loss(students, teachers))
    assert AttentionResidualConnector.joint
    assert not list(connector.parameters())
    with pytest.raises(ConfigError, match=r'`in_channels` must list the widths of at least two stages, got \[3\]'):
        AttentionResidualConnector([3], [7])


def test_variation_equals_its_function():
    student, teacher = pair()
    given = targets()
    labels, valid = on_map(given)
    inside = torch.where(valid, labels, 9)
    options = dict(labels=inside, num_classes=4, ignore_index=9)
    want = intra_class_variation_loss(student, teacher, count_ignored=False, **options)
    torch.testing.assert_close(IntraClassVariationLoss()(student, teacher, given), 20 * want)
    torch.testing.assert_close(IntraClassVariationLoss(num_classes=4)(student, teacher, given), 20 * want)


def test_variation_of_the_code_counts_ignored_pixels():
    student, teacher = pair()
    labels = targets().labels
    given = Targets(labels=labels, valid=labels != 9, ignore_index=9, num_classes=4)
    want = intra_class_variation_loss(student, teacher, labels=labels, num_classes=4, ignore_index=9)
    torch.testing.assert_close(IntraClassVariationLoss(preset='code')(student, teacher, given), 200 * want)
    assert not torch.isclose(IntraClassVariationLoss(200.0)(student, teacher, given), 200 * want)


def test_variation_refuses():
    with pytest.raises(ConfigError, match=r'`targets.labels` must be the class of each pixel, got None'):
        IntraClassVariationLoss(num_classes=4)(*pair())
    with pytest.raises(ConfigError, match='`num_classes` must be given where the task does not tell it'):
        IntraClassVariationLoss()(*pair(), Targets(labels=torch.zeros(2, 3, 5, dtype=torch.long)))
    with pytest.raises(ConfigError, match='`num_classes` must be an integer of at least 1, got 0'):
        IntraClassVariationLoss(num_classes=0)
    assert not IntraClassVariationLoss.needs_equal_channels
