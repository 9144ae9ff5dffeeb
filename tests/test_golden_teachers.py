"""Teachers of every kind against values and gradients that the published code gave.

In these cases `student` is whoever learns: the teacher itself, several peers, the rows of two domains.
"""

from __future__ import annotations

import fnmatch

import torch

from mmstructkd import functional as F
from mmstructkd.functional.core.scores import label_losses
from tests import golden
from tests.golden import case_names
from tests.reference import refinement


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
    soft = F.weighted_soft_label_loss(student, case['teacher'], labels=case['labels'], temperature=case['temperature'])
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


def check_neck(case, run):
    """Outputs, gradients of inputs and weights, and running statistics of a self-teacher."""
    levels = golden.learner(case)
    weights = {key: value.clone().requires_grad_(key in case['weight_grads']) for key, value in case['weights'].items()}
    out = run(weights, levels)
    for got, want in zip(out, case['outputs'], strict=True):
        golden.close(got.detach(), want)
    loss = torch.stack([x.square().mean() for x in out]).sum()
    golden.close(loss.detach(), case['loss'])
    learned = [weights[key] for key in case['weight_grads']]
    grads = torch.autograd.grad(loss, [*levels, *learned])
    for got, want in zip(grads, case['grad'], strict=False):
        golden.close(got, want)
    # As one vector: what a BatchNorm takes out again has a gradient of 0, but for rounding.
    golden.close(
        torch.cat([grad.flatten() for grad in grads[len(levels) :]]),
        torch.cat([grad.flatten() for grad in case['weight_grads'].values()]),
    )
    for key, want in case['buffers_after'].items():
        if want.is_floating_point():
            golden.close(weights[key], want)


@case_names('frskd_bifpn_seg')
def test_refinement_there_and_back(name):
    check_neck(golden.load(name), lambda weights, levels: refinement.segmentation(weights, levels, last=False))


@case_names('frskd_bifpn_seg_last')
def test_refinement_of_the_last_layer(name):
    check_neck(golden.load(name), lambda weights, levels: refinement.segmentation(weights, levels, last=True))


@case_names('frskd_bifpnc*')
def test_refinement_of_the_classification_code(name):
    check_neck(golden.load(name), refinement.classification)


@case_names('uda_schedule*')
def test_from_adaptation_to_distillation(name):
    case = golden.load(name)
    epochs = case['epochs']
    factors = torch.tensor([F.exponential_factor(k / epochs) for k in range(epochs + 1)])
    golden.close(factors, case['student'])
    golden.close(factors.sum(), case['loss'])


@case_names('hsakd_student*')
def test_class_and_turn_together(name):
    case = golden.load(name)
    students = golden.learner(case)
    assert torch.equal(F.turn_maps(case['images']), case['rotated'])
    assert torch.equal(F.joint_labels(case['target'], ignore_index=-1), case['labels'])
    hard = F.cross_entropy_loss(students[0][::4], case['target'])
    golden.close(hard.detach(), torch.as_tensor(case['loss_cls']))
    soft = [
        F.pixelwise_kl_loss(s, t, temperature=case['temperature'])
        for s, t in zip(students, case['teacher'], strict=True)
    ]
    golden.check(case, students, hard + torch.stack(soft).sum())


@case_names('sskd_student*')
def test_turned_and_upright(name):
    case = golden.load(name)
    scores, embeddings = golden.learner(case)
    scores_t, embeddings_t = case['teacher']
    turned = torch.arange(len(scores)) % 4 != 0
    labels = case['target'].repeat_interleave(3)
    kept = torch.zeros(len(labels), dtype=torch.bool)
    kept[case['distill_index_tf']] = True
    parts = [
        F.cross_entropy_loss(scores[::4], case['target']),
        F.pixelwise_kl_loss(scores[::4], scores_t[::4], temperature=4.0),
        F.pixelwise_kl_loss(scores[turned], scores_t[turned], temperature=4.0, valid=kept),
        F.cross_view_similarity_loss(embeddings, embeddings_t, rows=case['distill_index_ss']),
    ]
    golden.close(torch.stack(parts).detach(), case['parts'])
    loss = 0.1 * parts[0] + 0.9 * parts[1] + 2.7 * parts[2] + 10 * parts[3]
    golden.check(case, [scores, embeddings], loss)
    # As many rows as published; which of those of one rank, a sort decided there.
    near = torch.nn.functional.normalize(embeddings_t).unflatten(0, (-1, 4))
    near = near[:, 1:].flatten(0, 1) @ near[:, 0].mT
    own = torch.arange(near.shape[1]).repeat_interleave(3)
    chosen = F.rows_worth_keeping(near, own)
    rank = (near > near.gather(1, own[:, None])).sum(1)
    assert sorted(rank[chosen].tolist()) == sorted(rank[case['distill_index_ss']].tolist())


def fixed_critics(weights, blended, mixed):
    """The published discriminators: never trained, so constants that the features are pushed through."""
    total = 0.0
    for k, (real, fake) in enumerate(zip(blended, mixed, strict=True)):
        rows = torch.cat([real, fake]).mean((2, 3))
        names = [f'{k}.classifier.{layer}' for layer in (0, 2)]
        for i, layer in enumerate(names):
            rows = torch.nn.functional.linear(rows.relu() if i else rows, *(weights[f'{layer}.{p}'] for p in PARTS))
        half = len(real)
        target = torch.tensor([[1.0, 0.0]] * half + [[0.0, 1.0]] * half)
        total = total + torch.nn.functional.binary_cross_entropy_with_logits(rows, target)
    return total


PARTS = ('weight', 'bias')


@case_names('mixskd_*')
def test_linear_between_images(name):
    case = golden.load(name)
    learners = golden.learner(case)
    stages, labels, batch = case['stages'], case['target'], len(case['target'])
    pairs = dict(index=case['index'], share=case['lam'])
    temperature = case['temperature']
    logits, features = learners[:stages], learners[stages : 2 * stages]
    of_mix, of_mixed = learners[2 * stages :]
    hard = torch.stack([F.cross_entropy_loss(z[:batch], labels) for z in logits]).sum()
    blended_hard = torch.stack(
        [
            F.blended_cross_entropy_loss(z, labels, **pairs)
            for z in [*(stage[batch:] for stage in logits), of_mix, of_mixed]
        ]
    ).sum()
    parts = {'loss_cls': hard, 'loss_mixcls': blended_hard}
    if 'loss_mixcls' not in case['parts']:  # the script for ImageNet adds them up
        parts = {'loss_cls': hard + blended_hard}
    soft = [
        loss
        for z in logits[:-1]
        for loss in F.blended_kl_losses(z[batch:], z[:batch], temperature=temperature, **pairs)
    ]
    plain, mixed = logits[-1][:batch], logits[-1][batch:]
    soft.append(F.pixelwise_kl_loss(F.blend(plain, **pairs), of_mixed, temperature=temperature))
    soft.append(F.pixelwise_kl_loss(mixed, of_mix, temperature=temperature))
    parts['loss_div'] = torch.stack(soft).sum()
    parts['loss_fea'] = torch.stack(
        [F.blended_feature_loss(f[batch:], f[:batch], detach_teacher=False, **pairs) for f in features]
    ).sum()
    blended = [F.blend(f[:batch], **pairs) for f in features]
    parts['loss_gan'] = fixed_critics(case['discriminator'], blended, [f[batch:] for f in features])
    for key, want in case['parts'].items():
        golden.close(parts[key].detach(), want)
    golden.check(case, learners, sum(value for key, value in parts.items() if key != 'loss_mixcls'))


@case_names('cgan_filter_class*')
def test_generated_images_of_a_class(name):
    case = golden.load(name)
    student = golden.learner(case)
    # Above any number of classes, so that no label is ignored.
    errors, other = (label_losses(z, case['given'], ignore_index=-1)[0] for z in (student, case['teacher']))
    kept = F.filter_by_quantile(errors, quantile=case['quantile'], reference=other)
    assert torch.equal(kept.nonzero().flatten(), case['kept'])
    assert torch.equal(student.argmax(1)[kept], case['labels'])
    golden.check(case, student, errors[kept].sum())


@case_names('cgan_filter_regression*')
def test_generated_images_of_a_number(name):
    case = golden.load(name)
    errors = golden.learner(case)
    kept = F.filter_by_quantile(errors, quantile=case['quantile'])
    assert torch.equal(kept.nonzero().flatten(), case['kept'])
    golden.check(case, errors, errors[kept].sum())


def tags_of(case, scores):
    """Only the first labels are tags of a word; the teacher forbids 0 (unknown), start and stop."""
    barred = torch.ones(scores.shape[-1], dtype=torch.bool)
    barred[1 : case['labels'] + 1] = False
    return torch.where(barred, scores - 1e12, scores)


@case_names('structural_chain_*')
def test_chains(name):
    case = golden.load(name)
    scores, transitions = golden.learner(case)
    start, stop = scores.shape[-1] - 2, scores.shape[-1] - 1
    theirs = case['teacher_transitions']
    structure = {}
    if 'independent' not in name:
        structure = dict(teacher_transitions=theirs, teacher_start=theirs[:, start], teacher_end=theirs[stop])
    loss = F.chain_cross_entropy_loss(
        scores,
        tags_of(case, case['teacher']),
        transitions=transitions,
        start=transitions[:, start],
        end=transitions[stop],
        lengths=case['lengths'],
        **structure,
    )
    golden.check(case, [scores, transitions], loss)


@case_names('structural_posterior*')
def test_positions_taught_by_a_chain(name):
    case = golden.load(name)
    student = golden.learner(case)
    rows = case['mask'].bool().flatten()
    marginals = case['teacher'].flatten(0, 1)
    loss = F.pixelwise_kl_loss(student.flatten(0, 1), marginals, temperature=case['temperature'], valid=rows)
    golden.check(case, student, loss * case['mask'].sum() / len(student))
    # What they put in as the teacher is the chain's marginals, at temperature 1.
    last = student.shape[-1] - 1
    barred = torch.ones(last + 1, dtype=torch.bool)
    barred[1 : last - 1] = False
    found = F.chain_marginals(
        torch.where(barred, case['emissions'] - 1e12, case['emissions']),
        case['transitions'],
        start=case['transitions'][:, last - 1],
        end=case['transitions'][last],
        lengths=case['lengths'],
    )
    golden.close(found.nodes.flatten(0, 1)[rows], marginals[rows].softmax(1))


def test_every_case_is_read():
    """No case lies about unread."""
    from tests import test_golden, test_golden_adversarial  # noqa: F401  # they ask for theirs

    cases = {path.stem for path in golden.OWN.glob('*.pt')}
    read = {name for pattern in golden.asked for name in cases if fnmatch.fnmatchcase(name, pattern)}
    assert cases == read
