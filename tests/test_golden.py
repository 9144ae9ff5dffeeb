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
