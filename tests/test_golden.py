"""The losses against values and gradients that the published code gave."""

from __future__ import annotations

import pytest
import torch

from mmstructkd import functional as F
from tests.golden import case_names, check, learner, load


@case_names('kd_pixel_tau4')
def test_pixelwise_tau4(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.pixelwise_kl_loss(student, case['teacher'], temperature=case['tau']))


@case_names('structkd_pixelwise')
def test_pixelwise_of_structkd(name):
    # That code sums the cross-entropy over the batch: another value, B times the gradient.
    case = load(name)
    student = learner(case)
    loss = F.pixelwise_kl_loss(student, case['teacher'], temperature=1)
    check(case, student, loss, value=False, factor=student.shape[0])
    entropy = -(case['teacher'].softmax(1) * case['teacher'].log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(student.shape[0] * (loss + entropy), case['loss'].reshape(()), rtol=1e-4, atol=0)


@pytest.mark.parametrize('form', ['dense', 'closed', None])
@case_names('structkd_pairwise_pool*')
def test_pairwise_of_structkd(name, form):
    case = load(name)
    student = learner(case)
    kernel = tuple(int(case['pool_scale'] * size) for size in student.shape[-2:])
    loss = F.pairwise_affinity_loss(
        student, case['teacher'], pool='max', kernel_size=kernel, detach_norm=True, form=form
    )
    check(case, student, loss)


@pytest.mark.parametrize('form', ['dense', 'closed', None])
@case_names('structkd_pairwise_nopool')
def test_pairwise_of_structkd_without_pooling(name, form):
    case = load(name)
    student = learner(case)
    check(case, student, F.pairwise_affinity_loss(student, case['teacher'], kernel_size=1, detach_norm=True, form=form))


@pytest.mark.parametrize('form', ['dense', 'closed', None])
@case_names('skd_cirkd')
def test_pairwise_of_cirkd(name, form):
    case = load(name)
    student = learner(case)
    check(case, student, F.pairwise_affinity_loss(student, case['teacher'], pool='max', kernel_size=2, form=form))


@case_names('cwd_tau*')
def test_channelwise(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.channelwise_kl_loss(student, case['teacher'], temperature=case['tau']))


@case_names('pkd')
def test_standardized_over_the_batch(name):
    # PKD halves it.
    case = load(name)
    student = learner(case)
    check(case, student, 0.5 * F.standardized_mse_loss(student, case['teacher'], over='batch'))


@case_names('at_p2')
def test_attention_transfer(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.attention_transfer_loss(student, case['teacher'], power=2))


@case_names('dist')
def test_dist(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.dist_loss(student, case['teacher']))


@case_names('dist')
def test_dist_on_a_map_of_the_rows(name):
    case = load(name)
    student = learner(case)
    maps = [z.view(2, 2, 4, -1).movedim(-1, 1) for z in (student, case['teacher'])]
    check(case, student, F.dist_loss(*maps))


@case_names('dkd')
def test_decoupled(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.decoupled_kl_loss(student, case['teacher'], labels=case['target']))


@case_names('dkd')
def test_decoupled_on_a_map_of_the_rows(name):
    case = load(name)
    student = learner(case)
    maps = [z.view(2, 2, 4, -1).movedim(-1, 1) for z in (student, case['teacher'])]
    check(case, student, F.decoupled_kl_loss(*maps, labels=case['target'].view(2, 2, 4)))


@case_names('icsd_kl_matrix')
def test_interclass_matrix(name):
    case = load(name)
    student = learner(case)
    case['loss'] = case['loss'].to(student.dtype)
    gap = F.interclass_kl_matrix(student.detach()) - F.interclass_kl_matrix(case['teacher'])
    torch.testing.assert_close(gap, case['matrix_diff'].to(gap.dtype), rtol=1e-4, atol=1e-5)
    classes = student.shape[1]
    loss = F.interclass_similarity_loss(student, case['teacher'], normalize=False) * classes**2
    check(case, student, loss)


@case_names('icsd_released_code')
def test_interclass_similarity_of_the_released_code(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.interclass_similarity_loss(student, case['teacher'], mode='released_code'))


@case_names('dsd_csd')
def test_category_similarity(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.category_similarity_loss(student, case['teacher']))


@case_names('ifvd')
def test_intra_class_variation(name):
    case = load(name)
    student = learner(case)
    loss = F.intra_class_variation_loss(
        student, case['teacher'], labels=case['target'], num_classes=case['num_classes']
    )
    check(case, student, loss)


@case_names('sp')
def test_similarity_preserving(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.similarity_preserving_loss(student, case['teacher']))


@case_names('rkd_d25_a50')
def test_relational(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.relational_loss(student, case['teacher']))


@case_names('cc_adjacent')
def test_adjacent_correlation(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.adjacent_correlation_loss(student, case['teacher']))


@case_names('cirkd_minibatch_tau0.1')
def test_cross_image(name):
    case = load(name)
    student = learner(case)
    check(case, student, F.cross_image_kl_loss(student, case['teacher'], temperature=case['tau']))
