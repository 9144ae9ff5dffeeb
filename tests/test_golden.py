"""The losses against values and gradients that the published code gave.

The cases lie in ``$MMSTRUCTKD_GOLDEN`` or in ``../shared/golden`` beside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmstructkd import functional as F

GOLDEN = Path(os.environ.get('MMSTRUCTKD_GOLDEN') or Path(__file__).resolve().parents[2] / 'shared' / 'golden')


def load(name):
    path = GOLDEN / f'{name}.pt'
    if not path.is_file():
        pytest.skip(f'no reference values: {path.name} is not in {GOLDEN} (set MMSTRUCTKD_GOLDEN)')
    case = torch.load(path, weights_only=True)
    return case, case['student'].clone().requires_grad_()


def check(case, student, loss, *, value=True, factor=1.0):
    """Relative 1e-4 in float32, in the value and in the gradient as a whole and entry by entry."""
    (grad,) = torch.autograd.grad(factor * loss, student)
    if value:
        torch.testing.assert_close(loss.detach(), case['loss'].reshape(()), rtol=1e-4, atol=0)
    assert (grad - case['grad']).norm() <= 1e-4 * case['grad'].norm()
    assert (grad - case['grad']).abs().max() <= 1e-4 * case['grad'].abs().max()


def test_pixelwise_tau4():
    case, student = load('kd_pixel_tau4')
    check(case, student, F.pixelwise_kl_loss(student, case['teacher'], temperature=case['tau']))


def test_pixelwise_of_structkd():
    # That code sums the cross-entropy over the batch: another value, B times the gradient.
    case, student = load('structkd_pixelwise')
    loss = F.pixelwise_kl_loss(student, case['teacher'], temperature=1)
    check(case, student, loss, value=False, factor=student.shape[0])
    entropy = -(case['teacher'].softmax(1) * case['teacher'].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(student.shape[0] * (loss + entropy), case['loss'].reshape(()), rtol=1e-4, atol=0)


@pytest.mark.parametrize('form', ['dense', 'closed', None])
@pytest.mark.parametrize('scale', ['0.125', '0.25', '0.5'])
def test_pairwise_of_structkd(scale, form):
    case, student = load(f'structkd_pairwise_pool{scale}')
    kernel = tuple(int(case['pool_scale'] * size) for size in student.shape[-2:])
    loss = F.pairwise_affinity_loss(
        student, case['teacher'], pool='max', kernel_size=kernel, detach_norm=True, form=form
    )
    check(case, student, loss)


@pytest.mark.parametrize('form', ['dense', 'closed', None])
def test_pairwise_of_structkd_without_pooling(form):
    case, student = load('structkd_pairwise_nopool')
    check(case, student, F.pairwise_affinity_loss(student, case['teacher'], kernel_size=1, detach_norm=True, form=form))


@pytest.mark.parametrize('form', ['dense', 'closed', None])
def test_pairwise_of_cirkd(form):
    case, student = load('skd_cirkd')
    check(case, student, F.pairwise_affinity_loss(student, case['teacher'], pool='max', kernel_size=2, form=form))


@pytest.mark.parametrize('name', ['cwd_tau1', 'cwd_tau4'])
def test_channelwise(name):
    case, student = load(name)
    check(case, student, F.channelwise_kl_loss(student, case['teacher'], temperature=case['tau']))


def test_standardized_over_the_batch():
    # PKD halves it.
    case, student = load('pkd')
    check(case, student, 0.5 * F.standardized_mse_loss(student, case['teacher'], over='batch'))


def test_attention_transfer():
    case, student = load('at_p2')
    check(case, student, F.attention_transfer_loss(student, case['teacher'], power=2))


def test_dist():
    case, student = load('dist')
    check(case, student, F.dist_loss(student, case['teacher']))


def test_dist_on_a_map_of_the_rows():
    case, student = load('dist')
    maps = [z.view(2, 2, 4, -1).movedim(-1, 1) for z in (student, case['teacher'])]
    check(case, student, F.dist_loss(*maps))


def test_decoupled():
    case, student = load('dkd')
    check(case, student, F.decoupled_kl_loss(student, case['teacher'], labels=case['target']))


def test_decoupled_on_a_map_of_the_rows():
    case, student = load('dkd')
    maps = [z.view(2, 2, 4, -1).movedim(-1, 1) for z in (student, case['teacher'])]
    check(case, student, F.decoupled_kl_loss(*maps, labels=case['target'].view(2, 2, 4)))


def test_interclass_matrix():
    case, student = load('icsd_kl_matrix')
    case['loss'] = case['loss'].to(student.dtype)
    gap = F.interclass_kl_matrix(student.detach()) - F.interclass_kl_matrix(case['teacher'])
    torch.testing.assert_close(gap, case['matrix_diff'].to(gap.dtype), rtol=1e-4, atol=1e-5)
    classes = student.shape[1]
    loss = F.interclass_similarity_loss(student, case['teacher'], normalize=False) * classes**2
    check(case, student, loss)


def test_interclass_similarity_of_the_released_code():
    case, student = load('icsd_released_code')
    check(case, student, F.interclass_similarity_loss(student, case['teacher'], mode='released_code'))


def test_category_similarity():
    case, student = load('dsd_csd')
    check(case, student, F.category_similarity_loss(student, case['teacher']))


def test_intra_class_variation():
    case, student = load('ifvd')
    loss = F.intra_class_variation_loss(
        student, case['teacher'], labels=case['target'], num_classes=case['num_classes']
    )
    check(case, student, loss)


def test_similarity_preserving():
    case, student = load('sp')
    check(case, student, F.similarity_preserving_loss(student, case['teacher']))


def test_relational():
    case, student = load('rkd_d25_a50')
    check(case, student, F.relational_loss(student, case['teacher']))


def test_adjacent_correlation():
    case, student = load('cc_adjacent')
    check(case, student, F.adjacent_correlation_loss(student, case['teacher']))


def test_cross_image():
    case, student = load('cirkd_minibatch_tau0.1')
    check(case, student, F.cross_image_kl_loss(student, case['teacher'], temperature=case['tau']))
