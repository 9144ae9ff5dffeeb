"""Which pixels count: from labels, masks and both, and what is done with the others."""

from __future__ import annotations

import pytest
import torch

from mmstructkd.errors import ShapeError
from mmstructkd.functional.core.valid import labelled_pixels, valid_entries, zero_elsewhere


@pytest.mark.parametrize('shape', [(6,), (2, 3)], ids=['rows', 'more axes'])
def test_entries_are_all_there_unless_a_mask_says_otherwise(shape):
    like = torch.zeros(*shape, 4)
    assert valid_entries('x', shape, None, like=like).all()
    mask = torch.rand(shape) > 0.5
    assert torch.equal(valid_entries('x', shape, mask, like=like), mask)


@pytest.mark.parametrize('mask', [torch.ones(3), torch.ones(2, dtype=torch.bool), torch.ones(3, 1, dtype=torch.bool)])
def test_a_mask_of_entries_that_does_not_fit_is_refused(mask):
    with pytest.raises(ShapeError, match=r'x: `rows_valid` must be boolean of shape \(3,\), got \('):
        valid_entries('x', (3,), mask, like=torch.zeros(3), name='rows_valid')


@pytest.mark.parametrize('masked', [False, True])
def test_labels_that_are_no_class_do_not_count(masked):
    labels = torch.tensor([[[0, 1, 2], [3, -1, 255]]])
    valid = torch.tensor([[[False, True, True], [True, True, True]]]) if masked else None
    classes, there = labelled_pixels('x', torch.zeros(1, 5, 2, 3), labels, num_classes=3, ignore_index=2, valid=valid)
    want = torch.tensor([[[not masked, True, False], [False, False, False]]])
    assert torch.equal(there, want)
    assert torch.equal(classes, torch.tensor([[[0, 1, 0], [0, 0, 0]]]))


def test_labels_come_to_the_grid_and_rows_stay_rows():
    labels = torch.tensor([[0, 1]]).repeat_interleave(4, dim=1).expand(8, 8)[None]
    classes, there = labelled_pixels('x', torch.zeros(1, 3, 2, 2), labels, num_classes=2)
    assert there.all()
    assert classes.tolist() == [[[0, 1], [0, 1]]]
    classes, there = labelled_pixels('x', torch.zeros(3, 4), torch.tensor([1, 255, 0]), num_classes=2)
    assert classes.tolist() == [1, 0, 0]
    assert there.tolist() == [True, False, True]


@pytest.mark.parametrize('shape', [(2, 3), (2, 3, 4), (2, 3, 2, 2)])
def test_what_does_not_count_is_zero_also_in_the_gradient(shape):
    values = torch.randn(shape)
    valid = torch.rand(shape[:1] + shape[2:]) > 0.5
    spoiled = torch.where(valid.unsqueeze(1), values, torch.nan).requires_grad_()
    kept = zero_elsewhere(spoiled, valid)
    kept.square().sum().backward()
    assert torch.equal(kept.detach(), torch.where(valid.unsqueeze(1), values, 0))
    assert torch.equal(spoiled.grad, 2 * kept.detach())
    assert zero_elsewhere(values, None) is values
