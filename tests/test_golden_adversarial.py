"""The adversarial terms against values that the published code gave."""

from __future__ import annotations

import torch

from mmstructkd.functional.holistic import adversarial_loss, critic_loss
from tests.golden import case_names, learner, load

MODES = {'wgan-gp': 'wgan', 'hinge': 'hinge'}


def check(case, student, loss):
    torch.testing.assert_close(loss.detach().reshape(()), case['loss'].reshape(()), rtol=1e-4, atol=1e-7)
    (grad,) = torch.autograd.grad(loss, student)
    assert (grad - case['grad']).norm() <= 1e-4 * case['grad'].norm()


@case_names('structkd_adv_d_*')
def test_critic(name):
    case = load(name)
    student = learner(case)
    check(case, student, critic_loss(student, case['teacher'], mode=MODES[name.rsplit('_', 1)[1]]))


@case_names('structkd_adv_g_*')
def test_student(name):
    case = load(name)
    student = learner(case)
    check(case, student, adversarial_loss(student, mode=MODES[name.rsplit('_', 1)[1]]))
