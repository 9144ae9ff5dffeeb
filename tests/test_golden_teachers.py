"""Teachers of every kind against values and gradients that the published code gave.

In these cases `student` is whoever learns: the teacher itself, several peers, the rows of two domains.
"""

from __future__ import annotations

import pytest
import torch

from mmstructkd import functional as F
from tests import golden


def case_names(pattern):
    return pytest.mark.parametrize('name', golden.names(pattern))


@case_names('frskd_kl_t*')
def test_own_refined_scores(name):
    case = golden.load(name)
    student = golden.learner(case)
    golden.check(case, student, F.pixelwise_kl_loss(student, case['teacher'], temperature=case['temperature']))


@case_names('prokt_teacher*')
def test_a_teacher_that_follows(name):
    case = golden.load(name)
    student = golden.learner(case)
    weight = case['soft_label_weight']
    loss = F.soft_target_loss(student, case['teacher'], labels=case['labels'], weight=weight)
    golden.check(case, student, loss)


@case_names('prokt_student*')
def test_the_student_of_a_teacher_that_follows(name):
    case = golden.load(name)
    student = golden.learner(case)
    golden.check(case, student, F.pixelwise_kl_loss(student, case['teacher']))
    loss = F.soft_target_loss(student, case['teacher'], labels=case['labels'], weight=case['soft_label_weight'])
    golden.check(case, student, loss)


@case_names('prokt_dual*')
def test_a_teacher_that_follows_by_a_constraint(name):
    case = golden.load(name)
    student = golden.learner(case)
    before = torch.tensor(case['beta'])
    found = F.constrained_soft_target(
        student, case['teacher'], labels=case['labels'], multiplier=before, bound=case['epsilon']
    )
    golden.check(case, student, found.loss)
    golden.close(found.gap, torch.tensor(case['gap']))
    golden.close(F.next_multiplier(before, found.gap, rate=case['beta_lr']), torch.tensor(case['beta_after']))


@case_names('mcl_logits*')
def test_peers_towards_their_mean(name):
    case = golden.load(name)
    peers = golden.learner(case)
    losses = F.mutual_kl_losses(peers, temperature=case['temperature'], towards='mean')
    golden.check(case, peers, torch.stack(losses).sum())


@case_names('uda_kd_source*')
def test_the_student_on_the_source_domain_as_released(name):
    case = golden.load(name)
    student = golden.learner(case)
    settings = dict(labels=case['labels'], weight=case['alpha'], temperature=case['temperature'])
    golden.check(case, student, F.soft_target_loss(student, case['teacher'], reverse=True, **settings))


@case_names('wsl_total*')
def test_weighted_soft_labels(name):
    case = golden.load(name)
    student = golden.learner(case)
    soft = F.weighted_soft_label_loss(
        student, case['teacher'], labels=case['labels'], temperature=case['temperature']
    )
    # A class may well have the number 255 here.
    hard = F.cross_entropy_loss(student, case['labels'], ignore_index=-1)
    golden.check(case, student, hard + case['alpha'] * soft)


@case_names('ctkd_global_epoch*')
def test_one_learned_temperature(name):
    case = golden.load(name)
    student, theta = golden.learner(case)
    turned = F.scale_gradient(theta.squeeze(0), case['reversal'])
    temperature = F.bounded_temperature(turned)
    golden.close(temperature.detach(), torch.tensor(case['temperature']))
    golden.check(case, [student, theta], F.pixelwise_kl_loss(student, case['teacher'], temperature=temperature))


@case_names('ctkd_instance*')
def test_a_temperature_for_each_sample(name):
    case = golden.load(name)
    student, temperature = golden.learner(case)
    loss = F.instance_temperature_kl_loss(student, case['teacher'], temperature=temperature)
    golden.check(case, [student, temperature], loss)


def attention_sum(students, teachers):
    return torch.stack([F.attention_transfer_loss(s, t) for s, t in zip(students, teachers, strict=True)]).sum()


@case_names('frskd_attention*')
def test_own_refined_features(name):
    case = golden.load(name)
    students = golden.learner(case)
    golden.check(case, students, attention_sum(students, case['teacher']))


@case_names('frskd_total*')
def test_own_refined_scores_and_features(name):
    case = golden.load(name)
    students = golden.learner(case)
    soft = F.pixelwise_kl_loss(students[0], case['teacher'][0], temperature=case['temperature'])
    golden.check(case, students, case['alpha'] * soft + case['beta'] * attention_sum(students[1:], case['teacher'][1:]))


@case_names('srd_statistics*')
def test_mean_features(name):
    case = golden.load(name)
    student = golden.learner(case)
    golden.check(case, student, F.spatial_mean_loss(student, case['teacher']))


@case_names('srd_total*')
def test_mean_features_and_the_teachers_classifier(name):
    case = golden.load(name)
    student = golden.learner(case)
    weights = case['connector']
    projected = torch.nn.functional.conv2d(student, weights['Connectors.0.weight'])
    norm = (weights['Connectors.1.weight'], weights['Connectors.1.bias'])
    projected = torch.nn.functional.batch_norm(projected, None, None, *norm, training=True).relu()
    scores = torch.nn.functional.linear(projected.mean((2, 3)), *case['classifier'].values())
    replay = F.feature_mse_loss(scores[..., None, None], case['teacher_logits'][..., None, None])
    golden.check(case, student, F.spatial_mean_loss(projected, case['teacher']) + replay)


@case_names('uda_mmd*')
def test_domains_that_look_alike(name):
    case = golden.load(name)
    source, target = golden.learner(case)
    golden.check(case, [source, target], F.mean_discrepancy_loss(source, target))


@case_names('mcl_*peers*')
def test_mutual_contrast(name):
    case = golden.load(name)
    peers = golden.learner(case)
    parts = F.mutual_contrast_losses(
        peers, labels=case['labels'], temperature=case['tau'], kd_temperature=case['temperature']
    )
    golden.close(torch.stack(parts).detach(), case['parts'])
    loss = 0.1 * parts.within + parts.soft_within + 0.1 * parts.across + parts.soft_across
    golden.check(case, peers, loss)


@case_names('sns_variance*')
def test_variance_of_channels(name):
    case = golden.load(name)
    student = golden.learner(case)
    golden.check(case, student, F.variance_hinge_loss(student))


@case_names('sns_covariance*')
def test_covariance_of_channels(name):
    case = golden.load(name)
    student = golden.learner(case)
    golden.check(case, student, F.covariance_loss(student))
