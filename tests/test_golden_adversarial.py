"""The adversarial terms against values that the published code gave."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from mmstructkd.functional.adversarial import adversarial_loss, critic_loss

GOLDEN = Path(os.environ.get('MMSTRUCTKD_GOLDEN') or Path(__file__).resolve().parents[2] / 'shared' / 'golden')


def load(name):
    path = GOLDEN / f'{name}.pt'
    if not path.is_file():
        pytest.skip(f'no reference values: {path.name} is not in {GOLDEN} (set MMSTRUCTKD_GOLDEN)')
    case = torch.load(path, weights_only=True)
    return case, case['student'].clone().requires_grad_()


def check(case, student, loss):
    torch.testing.assert_close(loss.detach().reshape(()), case['loss'].reshape(()), rtol=1e-4, atol=1e-7)
    (grad,) = torch.autograd.grad(loss, student)
    assert (grad - case['grad']).norm() <= 1e-4 * case['grad'].norm()


@pytest.mark.parametrize(('name', 'mode'), [('wgan-gp', 'wgan'), ('hinge', 'hinge')])
def test_critic(name, mode):
    case, student = load(f'structkd_adv_d_{name}')
    check(case, student, critic_loss(student, case['teacher'], mode=mode))


@pytest.mark.parametrize(('name', 'mode'), [('wgan-gp', 'wgan'), ('hinge', 'hinge')])
def test_student(name, mode):
    case, student = load(f'structkd_adv_g_{name}')
    check(case, student, adversarial_loss(student, mode=mode))
