"""Shells of the losses over nodes and places: what is a node, and which settings arrive."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ConfigError
from mmstructkd.functional import (
    adjacent_correlation_loss,
    cell_nodes,
    class_centers,
    correlation_congruence_loss,
    cross_image_kl_loss,
    local_structure_loss,
    pool_nodes,
    relational_loss,
    similarity_preserving_loss,
)
from mmstructkd.losses import (
    CorrelationCongruenceLoss,
    CrossImageKLLoss,
    LocalStructureLoss,
    RelationalLoss,
    SimilarityPreservingLoss,
)
from mmstructkd.structures import Targets

OVER_NODES = {
    RelationalLoss: relational_loss,
    CorrelationCongruenceLoss: correlation_congruence_loss,
    SimilarityPreservingLoss: similarity_preserving_loss,
}

each = pytest.mark.parametrize('shell', OVER_NODES)


def pair(width=3):
    return torch.randn(2, 4, 6, 8), torch.randn(2, width, 6, 8)


def targets():
    labels = torch.randint(0, 4, (2, 12, 16))
    labels[:, 3:7, 5:9] = 9
    return Targets(labels=labels, valid=labels != 9, ignore_index=9, num_classes=4)


def on_map(given):
    return given.valid[:, ::2, ::2]


@each
def test_cells(shell):
    student, teacher = pair()
    given = targets()
    nodes_s, counts = cell_nodes(student, (2, 3), on_map(given))
    nodes_t, _ = cell_nodes(teacher, (2, 3), on_map(given))
    got = shell(2.0, nodes='cells', grid=(2, 3))(student, teacher, given)
    torch.testing.assert_close(got, 2 * OVER_NODES[shell](nodes_s, nodes_t, valid=counts))


@each
def test_classes(shell):
    student, teacher = pair()
    given = targets()
    given.labels[0][given.labels[0] == 2] = 1
    labels = given.labels[:, ::2, ::2]
    nodes_s, count = class_centers(student, labels, 4, ignore_index=9)
    nodes_t, _ = class_centers(teacher, labels, 4, ignore_index=9)
    want = OVER_NODES[shell](nodes_s, nodes_t, valid=count > 0)
    torch.testing.assert_close(shell(1.0, nodes='classes')(student, teacher, given), want)
    torch.testing.assert_close(shell(1.0, nodes='classes', num_classes=4)(student, teacher, given), want)
    with pytest.raises(ConfigError, match="must be known for nodes='classes', got no labels and 4 classes"):
        shell(nodes='classes', num_classes=4)(student, teacher)


@each
def test_images_and_rows(shell):
    student, teacher = pair()
    given = targets()
    want = OVER_NODES[shell](student, teacher, valid=on_map(given))
    torch.testing.assert_close(shell(1.0, nodes='images')(student, teacher, given), want)
    rows_s, rows_t = torch.randn(7, 4), torch.randn(7, 3)
    torch.testing.assert_close(shell(1.0)(rows_s, rows_t, given), OVER_NODES[shell](rows_s, rows_t))


@each
def test_widths_may_differ_and_bad_nodes_are_refused(shell):
    assert not shell().needs_equal_channels
    with pytest.raises(ConfigError, match=r"`nodes` must be one of \['cells', 'classes', 'images'\], got 'cell'"):
        shell(nodes='cell')
    with pytest.raises(ConfigError, match=f'{shell.__name__}: `grid` must be an integer above 0 or two of them'):
        shell(grid=0)
    with pytest.raises(ConfigError, match=f'{shell.__name__}: `num_classes` must be an integer of at least 1'):
        shell(num_classes=0)


def test_defaults():
    student, teacher = pair()
    cells = [cell_nodes(x, (8, 8))[0] for x in (student, teacher)]
    torch.testing.assert_close(RelationalLoss()(student, teacher), relational_loss(*cells))
    torch.testing.assert_close(CorrelationCongruenceLoss()(student, teacher), correlation_congruence_loss(*cells))
    want = similarity_preserving_loss(student, teacher)
    torch.testing.assert_close(SimilarityPreservingLoss()(student, teacher), want)
    torch.testing.assert_close(SimilarityPreservingLoss(preset='code')(student, teacher), 3000 * want)


def test_weights_of_relations():
    student, teacher = torch.randn(5, 4), torch.randn(5, 3)
    got = RelationalLoss(distance_weight=1.0, angle_weight=0.0)(student, teacher)
    torch.testing.assert_close(got, relational_loss(student, teacher, distance_weight=1, angle_weight=0))
    with pytest.raises(ConfigError, match='RelationalLoss: `distance_weight` must be a finite number of at least 0'):
        RelationalLoss(distance_weight=-1)


def test_modes_of_congruence():
    student, teacher = pair(4)
    loss = CorrelationCongruenceLoss(1.0, gamma=1.0, order=3, nodes='images')
    want = correlation_congruence_loss(student, teacher, gamma=1.0, order=3)
    torch.testing.assert_close(loss(student, teacher), want)
    code = CorrelationCongruenceLoss(preset='code')
    assert code.needs_equal_channels
    torch.testing.assert_close(code(student, teacher), 0.02 * adjacent_correlation_loss(student, teacher))
    with pytest.raises(ConfigError, match=r"`mode` must be one of \['kernel', 'adjacent'\], got 'kernal'"):
        CorrelationCongruenceLoss(mode='kernal')
    with pytest.raises(ConfigError, match='CorrelationCongruenceLoss: `order` must be an integer of at least 1'):
        CorrelationCongruenceLoss(order=0)


def test_local_structure_equals_its_function():
    student, teacher = pair()
    given = targets()
    want = local_structure_loss(student, teacher, radius=2, temperature=0.5, include_self=False, valid=on_map(given))
    got = LocalStructureLoss(2.0, radius=2, temperature=0.5, include_self=False)(student, teacher, given)
    torch.testing.assert_close(got, 2 * want)
    torch.testing.assert_close(LocalStructureLoss()(student, teacher), local_structure_loss(student, teacher))
    assert not LocalStructureLoss.needs_equal_channels
    with pytest.raises(ConfigError, match='LocalStructureLoss: `radius` must be an integer of at least 1, got 0'):
        LocalStructureLoss(radius=0)


def test_cross_image_pools_large_maps():
    student, teacher = pair()
    given = targets()
    nodes_s, counts = pool_nodes(student, 3, on_map(given))
    nodes_t, _ = pool_nodes(teacher, 3, on_map(given))
    want = cross_image_kl_loss(nodes_s, nodes_t, temperature=0.5, valid=counts)
    for options in ({'max_positions': 6}, {'max_positions': 11}, {'kernel_size': 3}):
        got = CrossImageKLLoss(2.0, temperature=0.5, **options)(student, teacher, given)
        torch.testing.assert_close(got, 2 * want)
    small = CrossImageKLLoss(1.0)(student, teacher, given)
    torch.testing.assert_close(small, cross_image_kl_loss(student, teacher, valid=on_map(given)))


@pytest.mark.parametrize(
    ('size', 'limit', 'side'),
    [((64, 128), 2048, 2), ((65, 129), 2048, 3), ((64, 128), 8192, 1), ((1, 5000), 2048, 3), ((7, 7), 1, 7)],
)
def test_smallest_patch_that_fits(size, limit, side):
    assert CrossImageKLLoss(max_positions=limit)._kernel_at(*size) == (side, side)


def test_cross_image_refuses():
    with pytest.raises(ConfigError, match='CrossImageKLLoss: `max_positions` must be an integer of at least 1, got 0'):
        CrossImageKLLoss(max_positions=0)
    with pytest.raises(ConfigError, match='CrossImageKLLoss: `temperature` must be a finite number above 0, got 0'):
        CrossImageKLLoss(temperature=0)
