from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import (
    box_average,
    cell_nodes,
    class_centers,
    region_contrast_loss,
    sinkhorn_loss,
    unit_vectors,
    wasserstein_contrast_loss,
)
from mmstructkd.losses import RegionContrastLoss
from mmstructkd.losses.region_contrast import LipschitzCritic
from mmstructkd.structures import Targets


def build(mode='nce', **options):
    loss = RegionContrastLoss(1.0, mode=mode, **{'num_classes': 3, 'channels': 8, 'seed': 0, **options})
    loss.bind(torch.zeros(1, 4, 6, 5), torch.zeros(1, 7, 6, 5))
    return loss


def batch(images=2):
    labels = torch.randint(0, 4, (images, 6, 5))
    labels[labels == 3] = 255
    boxes = tuple(torch.tensor([[0.0, 0.0, 12.0, 9.0], [5.0, 4.0, 20.0, 24.0]]) + b for b in range(images))
    given = Targets(
        labels=labels,
        valid=labels != 255,
        boxes=boxes,
        box_labels=tuple(torch.tensor([b % 3, 2]) for b in range(images)),
        input_size=(24, 20),
    )
    return torch.randn(images, 4, 6, 5), torch.randn(images, 7, 6, 5), given


def regions(kind, tensor, targets):
    valid = targets.valid
    if kind == 'classes':
        centers, count = class_centers(tensor, targets.labels, 3)
        return centers.flatten(0, 1), torch.arange(3).repeat(len(tensor)), (count > 0).flatten()
    if kind == 'boxes':
        made, covered = box_average(tensor, targets.boxes, (24, 20), valid=valid)
        return made, torch.cat(targets.box_labels), covered
    cells, some = cell_nodes(tensor, (2, 2), valid)
    return cells.flatten(0, 1), None, some.flatten()


@pytest.mark.parametrize('kind', ['classes', 'boxes', 'cells'])
@pytest.mark.parametrize('mode', ['nce', 'wasserstein'])
def test_value_is_that_of_the_functions(mode, kind):
    loss = build(mode, regions=kind, grid=2, temperature=0.5, local_weight=0.3).eval()
    student, teacher, targets = batch()
    region_s, classes, valid = regions(kind, student, targets)
    made_s, made_t = loss.embed_student(region_s), loss.embed_teacher(regions(kind, teacher, targets)[0])
    if mode == 'nce':
        want = region_contrast_loss(made_s, made_t, classes=classes, valid=valid, temperature=0.5)
    else:
        scores = loss.critic(unit_vectors(made_s, 1), unit_vectors(made_t, 1))
        want = wasserstein_contrast_loss(scores, classes=classes, valid=valid)
        want = want + 0.3 * sinkhorn_loss(made_s, made_t, valid=valid)
    torch.testing.assert_close(loss(student, teacher, targets), want)
    assert want.item() != 0


@pytest.mark.parametrize('kind', ['classes', 'boxes'])
def test_the_queue_adds_negatives_of_earlier_batches(kind):
    loss = build(regions=kind, temperature=0.5).train()
    student, teacher, targets = batch()
    first = loss(student, teacher, targets)
    held = int(loss.queue.filled.sum())
    region_t, classes, valid = regions(kind, teacher, targets)
    if kind == 'classes':
        assert held == valid.sum()
        for k in range(3):
            want = region_t.view(2, 3, 7)[:, k][valid.view(2, 3)[:, k]]
            torch.testing.assert_close(loss.queue.keys[k, : loss.queue.filled[k]], want)
    else:
        assert held == len(classes[valid].unique())
        torch.testing.assert_close(loss.queue.keys[2, 0], region_t[valid & (classes == 2)].mean(0))
    second = loss(student, teacher, targets)
    keys, there = loss.queue.sample(loss.queue_keys, 1)
    region_s, _, _ = regions(kind, student, targets)
    alone = region_contrast_loss(
        loss.embed_student(region_s), loss.embed_teacher(region_t), classes=classes, valid=valid, temperature=0.5
    )
    torch.testing.assert_close(first, alone)
    assert second > first
    assert there.any()
    assert keys.shape[1] == loss.queue_keys


@pytest.mark.parametrize('mode', ['nce', 'wasserstein'])
def test_every_parameter_learns_and_the_teacher_does_not(mode):
    loss = build(mode).train()
    student, teacher, targets = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher, targets).backward()
    assert teacher.grad is None
    assert student.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in loss.parameters())
    assert all(p.grad.any() for p in loss.parameters() if p.dim() > 1)


@pytest.mark.parametrize('mode', ['nce', 'wasserstein'])
def test_training_brings_matching_regions_together(mode):
    loss = build(mode, temperature=0.5).train()
    student, teacher, targets = batch()
    student.requires_grad_()
    optimizer = torch.optim.Adam([student, *loss.parameters()], lr=0.02)
    values = []
    for _ in range(40):
        value = loss(student, teacher, targets)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] - 0.1


def test_no_boxes_is_zero_with_a_graph():
    for mode in ('nce', 'wasserstein'):
        loss = build(mode, regions='boxes').train()
        student, teacher, _ = batch()
        empty = Targets(
            boxes=(torch.zeros(0, 4),) * 2, box_labels=(torch.zeros(0, dtype=torch.long),) * 2, input_size=(24, 20)
        )
        value = loss(student.requires_grad_(), teacher, empty)
        value.backward()
        assert value.item() == 0
        assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())
        assert not student.grad.any()


def test_at_most_so_many_regions():
    loss = build(max_instances=3).eval()
    student, teacher, targets = batch(4)
    student.requires_grad_()
    loss(student, teacher, targets).backward()
    _, _, valid = regions('classes', student, targets)
    assert valid.sum() > 3
    touched = class_centers((student.grad.abs().sum(1, keepdim=True) > 0).float(), targets.labels, 3)[0] > 0
    assert 2 <= touched.sum() <= 3


def test_resume_is_exact_and_nothing_moves_in_eval_mode():
    for mode in ('nce', 'wasserstein'):
        first, second = build(mode).train(), build(mode, seed=1).train()
        for _ in range(2):
            first(*batch())
        second.load_state_dict(first.state_dict(), strict=True)
        given = batch()
        assert torch.equal(first(*given), second(*given))
        before = {k: v.clone() for k, v in first.state_dict().items()}
        first.eval()(*given)
        assert all(torch.equal(v, before[k]) for k, v in first.state_dict().items())


def test_the_critic_has_slope_at_most_one():
    critic = LipschitzCritic(5, hidden=16).train()
    with torch.no_grad():
        critic.weight.mul_(30)
        critic.score.mul_(30)
    for _ in range(50):
        critic(torch.randn(2, 5), torch.randn(2, 5))
    first, second = torch.randn(2, 400, 10).double().unbind()
    critic = critic.double().eval()
    gap = [critic(x[:, :5], x[:, 5:]).diagonal() for x in (first, second)]
    slope = (gap[0] - gap[1]).abs() / (first - second).norm(dim=1)
    assert slope.max() <= 1 + 1e-3
    assert slope.max() > 0.05


def test_the_critic_scores_all_pairs():
    critic = LipschitzCritic(3, hidden=4).eval()
    student, teacher = torch.randn(2, 3), torch.randn(5, 3)
    scores = critic(student, teacher)
    weight = critic.weight / torch.linalg.matrix_norm(critic.weight, 2)
    for i in range(2):
        for j in range(5):
            hidden = torch.relu(weight @ torch.cat([student[i], teacher[j]]) + critic.bias)
            want = (hidden * critic.score).sum() / critic.score.norm()
            torch.testing.assert_close(scores[i, j], want, rtol=1e-2, atol=1e-3)


def test_refuses():
    student, teacher, targets = batch()
    with pytest.raises(ConfigError, match="`num_classes` must be given for regions='classes' with queue_size=64"):
        RegionContrastLoss()
    with pytest.raises(ConfigError, match="`targets.labels` must be the class of each pixel for regions='classes'"):
        build()(student, teacher)
    with pytest.raises(ConfigError, match=r'`targets.boxes`, `box_labels` and `input_size` must be given'):
        build(regions='boxes')(student, teacher)
    with pytest.raises(ConfigError, match='RegionContrastLoss: `bind` must be called before the loss'):
        RegionContrastLoss(num_classes=3)(student, teacher, targets)
    with pytest.raises(ShapeError, match=r'must have the widths \(4, 7\) .* got \(7, 7\)'):
        build()(teacher, teacher, targets)
    with pytest.raises(ConfigError, match=r"`mode` must be one of \['nce', 'wasserstein'\], got 'crd'"):
        RegionContrastLoss(num_classes=3, mode='crd')
    with pytest.raises(ConfigError, match='`queue_size` must be an integer of at least 0, got -1'):
        RegionContrastLoss(num_classes=3, queue_size=-1)
    assert RegionContrastLoss(regions='cells').queue_size == 0
    assert not RegionContrastLoss.needs_equal_channels
