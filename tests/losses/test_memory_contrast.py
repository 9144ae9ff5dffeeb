from __future__ import annotations

import copy

import pytest
import torch

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import class_centers, memory_kl_loss, unit_vectors
from mmstructkd.losses import MemoryContrastLoss
from mmstructkd.structures import Targets

SMALL = dict(num_classes=3, pixel_capacity=40, region_capacity=8, pixels_per_image=4, seed=0)


def build(**options):
    loss = MemoryContrastLoss(**{**SMALL, **options})
    loss.bind(torch.zeros(1, 4, 6, 5), torch.zeros(1, 7, 6, 5))
    return loss


def batch(images=2):
    labels = torch.randint(0, 4, (images, 6, 5))
    labels[labels == 3] = 255
    # The teacher's first channel tells the class.
    teacher = torch.randn(images, 7, 6, 5)
    teacher[:, 0] = 20.0 * (labels + 1)
    return torch.randn(images, 4, 6, 5), teacher, Targets(labels=labels, valid=labels != 255)


def direction(teacher):
    return unit_vectors(teacher, 1)


def test_every_pixel_goes_to_its_own_class():
    loss = build().train()
    seen = {k: [] for k in range(3)}
    for _ in range(3):
        student, teacher, targets = batch()
        loss(student, teacher, targets)
        units = direction(teacher).movedim(1, -1)
        for k in range(3):
            seen[k].append(units[targets.labels == k])
    for k in range(3):
        kept = loss.pixels.keys[k, : loss.pixels.filled[k]]
        assert len(kept) == 3 * 2 * 4
        known = torch.cat(seen[k])
        nearest = torch.cdist(kept, known).amin(1)
        assert nearest.max() < 1e-3
        assert len(kept.unique(dim=0)) == len(kept)


def test_regions_are_means_of_unit_features():
    loss = build().train()
    student, teacher, targets = batch()
    loss(student, teacher, targets)
    centers, count = class_centers(direction(teacher), targets.labels, 3)
    assert count.all()
    want = unit_vectors(centers, 2).transpose(0, 1)
    torch.testing.assert_close(loss.regions.keys[:, :2], want)
    assert loss.regions.filled.tolist() == [2, 2, 2]


def test_value_is_the_two_terms_over_what_is_filled():
    loss = build(pixel_weight=2.0, region_weight=3.0, max_anchors=0, temperature=0.5)
    student, teacher, targets = batch()
    loss.train()(student, teacher, targets)
    before = copy.deepcopy(loss)
    student, teacher, targets = batch()
    got = loss.eval()(student, teacher, targets)
    keep = (targets.labels != 255).flatten()
    zeroed = torch.where((targets.labels != 255)[:, None], student, 0)
    anchors_s = before.projection.eval()(zeroed).movedim(1, -1).flatten(0, 2)[keep]
    anchors_t = direction(teacher).movedim(1, -1).flatten(0, 2)[keep]
    # All slots fit into a draw, so that only the batch's own pixels are drawn at random.
    units = torch.where((targets.labels != 255)[:, None], direction(teacher), 0)
    own, there = before._pixels_of(units, targets.labels, targets.valid)
    pixels = [before.pixels.keys[k, : before.pixels.filled[k]] for k in range(3)] + [own[there]]
    centers, _ = class_centers(units, targets.labels, 3)
    regions = [before.regions.keys[k, : before.regions.filled[k]] for k in range(3)] + [centers.flatten(0, 1)]
    want = sum(
        weight * memory_kl_loss(anchors_s, anchors_t, memory=torch.cat(keys), temperature=0.5)
        for weight, keys in ((2.0, pixels), (3.0, regions))
    )
    torch.testing.assert_close(got, 0.1 * want)


def test_nothing_moves_in_eval_mode():
    loss = build().eval()
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    first = loss(*(given := batch()))
    assert first > 0
    assert torch.equal(loss(*given), first)
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())


def test_gradient_to_student_and_projection_alone():
    loss = build().train()
    student, teacher, targets = batch()
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher, targets).backward()
    assert teacher.grad is None
    assert not student.grad[(targets.labels == 255)[:, None].expand_as(student)].any()
    assert student.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters() if p.dim() > 1)


def test_a_batch_without_labels_leaves_the_queues_alone_and_keeps_the_graph():
    loss = build().train()
    student, teacher, _ = batch()
    value = loss(student, teacher, Targets(labels=torch.full((2, 6, 5), 255)))
    value.backward()
    assert value.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())
    assert not loss.pixels.filled.any()
    assert loss.step == 1


def test_nan_at_ignored_pixels_goes_nowhere():
    loss = build().train()
    student, teacher, targets = batch()
    ignored = (targets.labels == 255)[:, None]
    value = loss(student.masked_fill(ignored, float('nan')), teacher.masked_fill(ignored, float('nan')), targets)
    assert value.isfinite()
    assert all(v.isfinite().all() for v in loss.state_dict().values())


def test_resume_is_exact():
    first = build().train()
    for _ in range(2):
        first(*batch())
    second = build(seed=1).train()
    second.load_state_dict(first.state_dict(), strict=True)
    for _ in range(2):
        given = batch()
        assert torch.equal(first(*given), second(*given))
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_the_run_s_random_numbers_stay():
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    loss = build().train()
    state = torch.get_rng_state()
    student, teacher, targets = batch()
    torch.set_rng_state(state)
    loss(student, teacher, targets)
    assert torch.equal(torch.rand(2), want)


def test_fewer_anchors():
    loss = build(max_anchors=5).eval()
    student, teacher, targets = batch()
    student.requires_grad_()
    loss(student, teacher, targets).backward()
    touched = student.grad.abs().sum(1) > 0
    assert touched.sum() == 5


def test_preset_of_the_code():
    loss = MemoryContrastLoss(num_classes=19, preset='code')
    assert (loss.loss_weight, loss.pixel_capacity, loss.region_capacity, loss.max_anchors) == (0.1, 20000, 2000, 0)
    with pytest.raises(ConfigError, match="`pixel_capacity` must be 20000 with preset='code', got 10"):
        MemoryContrastLoss(num_classes=19, preset='code', pixel_capacity=10)


def test_refuses():
    student, teacher, targets = batch()
    with pytest.raises(ConfigError, match='MemoryContrastLoss: `bind` must be called before the loss'):
        MemoryContrastLoss(**SMALL)(student, teacher, targets)
    with pytest.raises(ConfigError, match=r'`targets.labels` must be the class of each pixel, got None'):
        build()(student, teacher)
    with pytest.raises(ShapeError, match=r'must have the widths \(4, 7\) .* got \(7, 7\)'):
        build()(teacher, teacher, targets)
    with pytest.raises(ConfigError, match='`max_anchors` must be an integer of at least 0, got -1'):
        MemoryContrastLoss(num_classes=3, max_anchors=-1)
    with pytest.raises(ConfigError, match='`pixel_keys` must be an integer of at least 1, got 0'):
        MemoryContrastLoss(num_classes=3, pixel_keys=0)
    with pytest.raises(ConfigError, match='`seed` must be an integer of at least 0 or None, got -1'):
        MemoryContrastLoss(num_classes=3, seed=-1)
    loss = build()
    projection = loss.projection
    loss.bind(student, teacher)
    assert loss.projection is projection
    assert not loss.needs_equal_channels
