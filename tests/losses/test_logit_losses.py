"""The shells of losses on class scores: settings, targets, rows, other classes."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import decoupled_kl_loss, weighted_soft_label_loss
from mmstructkd.losses import DecoupledKLLoss, DistLoss, PixelwiseKLLoss, WeightedSoftLabelLoss, ZipfLabelLoss
from mmstructkd.structures import Targets
from tests.reference import divergence
from tests.reference import logits as reference

SHAPE = (3, 4, 2, 5)
LABELLED = [DecoupledKLLoss, WeightedSoftLabelLoss, ZipfLabelLoss]

labelled = pytest.mark.parametrize('kind', LABELLED)


def data():
    student, teacher = torch.randn(2, *SHAPE, dtype=torch.float64).unbind()
    labels = torch.randint(0, 4, (3, 2, 5))
    labels[1, 0] = 9
    valid = torch.rand(3, 2, 5) > 0.2
    return student.clone().requires_grad_(), teacher, Targets(labels=labels, valid=valid, ignore_index=9)


def counts(targets):
    return targets.valid & (targets.labels != targets.ignore_index)


def on_labelled(loss):
    loss.restrict('labelled')
    return loss


def test_dist():
    student, teacher, targets = data()
    loss = DistLoss(3.0, inter_weight=0.5, intra_weight=2.0, temperature=1.5)
    got = loss(student, teacher, targets)
    torch.testing.assert_close(got, 3 * reference.dist(student, teacher, 0.5, 2.0, 1.5, targets.valid))
    got = on_labelled(loss)(student, teacher, targets)
    torch.testing.assert_close(got, 3 * reference.dist(student, teacher, 0.5, 2.0, 1.5, counts(targets)))
    torch.testing.assert_close(DistLoss()(student, teacher), reference.dist(student, teacher, 1.0, 1.0, 1.0))


def test_decoupled():
    student, teacher, targets = data()
    got = DecoupledKLLoss(3.0, alpha=0.5, beta=2.0, temperature=1.5)(student, teacher, targets)
    labels = targets.labels.clamp(max=3)
    torch.testing.assert_close(got, 3 * reference.decoupled(student, teacher, labels, 0.5, 2.0, 1.5, counts(targets)))
    for preset, beta in ((None, 1.0), ('coco', 0.25), ('imagenet', 0.5)):
        got = DecoupledKLLoss(preset=preset)(student, teacher, targets)
        torch.testing.assert_close(got, reference.decoupled(student, teacher, labels, 1.0, beta, 1.0, counts(targets)))
    with pytest.raises(ConfigError, match=r"`beta` must be 0\.25 with preset='coco', got 1"):
        DecoupledKLLoss(preset='coco', beta=1.0)


def test_weighted_soft_label():
    student, teacher, targets = data()
    labels = targets.labels.clamp(max=3)
    got = WeightedSoftLabelLoss(3.0, temperature=1.5)(student, teacher, targets)
    torch.testing.assert_close(got, 3 * reference.weighted_soft_label(student, teacher, labels, 1.5, counts(targets)))
    default = WeightedSoftLabelLoss()(student, teacher, targets)
    torch.testing.assert_close(
        default, 2.5 * reference.weighted_soft_label(student, teacher, labels, 2.0, counts(targets))
    )


def test_zipf():
    student, teacher, targets = data()
    labels = targets.labels.clamp(max=3)
    for voter, votes in (('student', student), ('teacher', teacher)):
        got = ZipfLabelLoss(3.0, kernel_size=3, voter=voter)(student, teacher, targets)
        torch.testing.assert_close(got, 3 * reference.zipf_label(student, votes, labels, 3, counts(targets)))
    default = ZipfLabelLoss()(student, teacher, targets)
    torch.testing.assert_close(default, 0.1 * reference.zipf_label(student, student, labels, 7, counts(targets)))


def test_zipf_takes_nothing_of_the_teacher_but_votes():
    student, teacher, targets = data()
    want = ZipfLabelLoss()(student, teacher, targets)
    assert torch.equal(ZipfLabelLoss()(student, torch.randn_like(teacher), targets), want)
    voted = ZipfLabelLoss(voter='teacher')(student, teacher, targets)
    assert torch.equal(ZipfLabelLoss(voter='teacher')(student, 3 * teacher, targets), voted)


@labelled
def test_the_teachers_class_stands_in_for_labels(kind):
    student, teacher, targets = data()
    own = Targets(labels=teacher.argmax(1), valid=counts(targets))
    want = kind()(student, teacher, own)
    torch.testing.assert_close(on_labelled(kind(target='teacher'))(student, teacher, targets), want)
    everywhere = Targets(labels=teacher.argmax(1), valid=targets.valid)
    torch.testing.assert_close(kind(target='teacher')(student, teacher, targets), kind()(student, teacher, everywhere))
    torch.testing.assert_close(kind(target='teacher')(student, teacher, Targets(valid=counts(targets))), want)
    # A class with the number of the ignored label counts like any other.
    odd = Targets(labels=torch.where(counts(targets), 0, 1), ignore_index=1)
    torch.testing.assert_close(on_labelled(kind(target='teacher'))(student, teacher, odd), want)
    with pytest.raises(
        ConfigError, match=r"`targets\.labels` must be a map of the batch for target='labels', got None"
    ):
        kind()(student, teacher)


@pytest.mark.parametrize('kind', [DecoupledKLLoss, WeightedSoftLabelLoss])
def test_rows_with_labels_of_their_own(kind):
    student, teacher = torch.randn(2, 7, 5).unbind()
    labels = torch.tensor([0, 1, 4, 4, 2, 3, 4])  # 4: the background of a box head of four classes
    got = kind(1.0, temperature=2.0)(student, teacher, Targets(labels=labels, ignore_index=-1, num_classes=4))
    core = {DecoupledKLLoss: decoupled_kl_loss, WeightedSoftLabelLoss: weighted_soft_label_loss}[kind]
    torch.testing.assert_close(got, core(student, teacher, labels=labels, temperature=2.0))
    maps = Targets(labels=torch.zeros(2, 8, 8, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"must be of shape \(7,\) for target='labels', got \(2, 8, 8\)"):
        kind()(student, teacher, maps)
    by_teacher = kind(1.0, temperature=2.0, target='teacher')(student, teacher, maps)
    torch.testing.assert_close(by_teacher, core(student, teacher, labels=teacher.argmax(1), temperature=2.0))


@pytest.mark.parametrize('kind', [PixelwiseKLLoss, DistLoss])
def test_rows_are_not_masked_by_maps(kind):
    student, teacher = torch.randn(2, 7, 5).unbind()
    maps = Targets(labels=torch.full((2, 8, 8), 255), valid=torch.zeros(2, 8, 8, dtype=torch.bool))
    want = kind()(student, teacher)
    assert want > 0.01
    torch.testing.assert_close(kind()(student, teacher, maps), want)
    own = Targets(valid=torch.tensor([True, True, False, True, False, True, True]))
    torch.testing.assert_close(kind()(student, teacher, own), kind()(student[own.valid], teacher[own.valid]))


NUMBERS = [2, 0, 1, 2, 3, -1]


@pytest.mark.parametrize('kind', [PixelwiseKLLoss, DistLoss])
@pytest.mark.parametrize('rows', [False, True])
def test_teacher_of_finer_classes(kind, rows):
    student = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    coarse = reference.mapped(teacher, NUMBERS)
    coarse = coarse / coarse.sum(1, keepdim=True)
    flat = reference.rows_of(student)
    want = kind(temperature=2.0)(flat, coarse.log())
    loss = kind(temperature=2.0, class_map=NUMBERS)
    got = loss(flat, reference.rows_of(teacher)) if rows else loss(student, teacher)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student, retain_graph=True), torch.autograd.grad(want, student))
    assert loss.maps_classes
    assert not kind().maps_classes


@pytest.mark.parametrize('kind', [PixelwiseKLLoss, DistLoss])
def test_teacher_of_the_same_classes_in_another_order(kind):
    student, teacher, targets = data()
    order = [2, 0, 3, 1]
    # Class j of the shuffled teacher is class order[j].
    got = kind(class_map=order)(student, teacher[:, order], targets)
    torch.testing.assert_close(got, kind()(student, teacher, targets))


def test_classes_the_teacher_does_not_know_are_left_out():
    student, teacher, targets = data()
    got = on_labelled(PixelwiseKLLoss(class_map=[3, 1]))(student, teacher[:, :2], targets)
    want = divergence.pixelwise_kl(student[:, [1, 3]], teacher[:, [1, 0]], 1.0, counts(targets))
    torch.testing.assert_close(got, want)
    (grad,) = torch.autograd.grad(got, student)
    assert not grad[:, [0, 2]].any()


def test_bad_class_map():
    student, teacher, _ = data()
    for bad in (3, 'abcd', [0, 1.5], [0, -2], [True, False]):
        with pytest.raises(ConfigError, match='PixelwiseKLLoss: `class_map` must hold for each class of the teacher'):
            PixelwiseKLLoss(class_map=bad)
    with pytest.raises(ConfigError, match=r'`class_map` must map some class, got \[-1, -1\]'):
        PixelwiseKLLoss(class_map=[-1, -1])
    with pytest.raises(ConfigError, match="must have one entry for each of the teacher's 4 classes, got 3"):
        PixelwiseKLLoss(class_map=[0, 1, 2])(student, teacher)
    with pytest.raises(ConfigError, match="must name classes of the student's 4, got 4. The first class is 0"):
        PixelwiseKLLoss(class_map=[0, 1, 2, 4])(student, teacher)


@labelled
def test_bad_target(kind):
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: `target` must be one of .*, got 'label'"):
        kind(target='label')
    assert not kind.needs_equal_channels


def test_bad_arguments():
    with pytest.raises(ConfigError, match='DistLoss: `intra_weight` must be a finite number of at least 0, got -1'):
        DistLoss(intra_weight=-1)
    with pytest.raises(ConfigError, match='DecoupledKLLoss: `beta` must be a finite number of at least 0, got nan'):
        DecoupledKLLoss(beta=float('nan'))
    with pytest.raises(ConfigError, match='ZipfLabelLoss: `kernel_size` must be an odd integer above 0, got 4'):
        ZipfLabelLoss(kernel_size=4)
    with pytest.raises(ConfigError, match="ZipfLabelLoss: `voter` must be one of .*, got 'both'"):
        ZipfLabelLoss(voter='both')
    student, teacher, _ = data()
    with pytest.raises(ShapeError, match=r'must share B, C, H and W, got \(3, 4, 2, 5\) and \(3, 2, 2, 5\)'):
        DistLoss()(student, teacher[:, :2])
