"""ProKT's dual form: a term that is held below a bound by a multiplier that is learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.teachers.constraint import Constraint
from mmstructkd.testing import toy_batch, toy_config, toy_depth_estimator, toy_detector, toy_distiller
from tests import golden
from tests.golden import case_names
from tests.teachers.kinds import KL, SCORES, build, model_of, peer
from tests.test_host_sync import Watch


@case_names('prokt_dual*')
def test_the_published_multiplier(name: str) -> None:
    case = golden.load(name)
    constraint = Constraint(bound=case['epsilon'], rate=case['beta_lr'], start=case['beta'])
    constraint(torch.tensor(case['gap'] + case['epsilon'], requires_grad=True))
    golden.close(constraint.multiplier, torch.tensor(case['beta_after']))


@pytest.mark.parametrize('losses', [[3.0, 2.0, 0.5], [0.0, 0.0, 9.0], [0.2, 0.2, 0.2]])
def test_value_gradient_and_multiplier_are_those_of_a_loop(losses: list[float]) -> None:
    constraint, b = Constraint(bound=0.4, rate=0.5, start=0.3), 0.3
    for number in losses:
        loss = torch.tensor(number, requires_grad=True)
        held = constraint(loss)
        held.backward()
        assert held.item() == pytest.approx(b * (number - 0.4), abs=1e-6)
        assert loss.grad.item() == pytest.approx(b, abs=1e-6)
        b = max(0.0, b + 0.5 * (number - 0.4))
        assert constraint.multiplier.item() == pytest.approx(b, abs=1e-6)


def test_it_stands_still_where_nothing_is_learned() -> None:
    constraint = Constraint(rate=0.5)
    constraint.eval()(torch.tensor(3.0, requires_grad=True))
    with torch.no_grad():
        constraint.train()(torch.tensor(3.0))
    assert constraint.multiplier == 1


def gradients(model: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
    total.backward()
    return {name: p.grad for name, p in model.companion.named_parameters()}


@pytest.mark.parametrize('start', [0.0, 0.5, 2.0])
def test_the_peer_is_pulled_by_the_multiplier(start: float) -> None:
    """Its gradient is that of a peer whose term has the multiplier as its weight."""
    bound = dict(back=dict(tap='decode_head.conv_seg', loss=KL))
    fixed = dict(back=dict(tap='decode_head.conv_seg', loss=dict(KL, loss_weight=start)))
    found = []
    for teacher in (peer(terms=bound, constraints=dict(back=dict(start=start))), peer(terms=fixed)):
        torch.manual_seed(0)
        model = MODELS.build(toy_distiller(teacher=teacher, terms=SCORES))
        model.init_weights()
        found.append(gradients(model.train()))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], msg=name)


def test_it_is_logged_saved_and_silent_with_its_term(tmp_path: Path) -> None:
    runner = Runner.from_cfg(toy_config(model_of('peer_with_constraint'), tmp_path, max_iters=2))
    runner.train()
    logged = runner.message_hub.get_scalar('train/teacher_multiplier_back').data[0]
    assert logged[0] == 1
    assert logged[1] != 1
    state = runner.model.training_state()['companion']
    assert state['constraints.back.multiplier'] not in (1, logged[1])
    model = build('peer_with_constraint')
    model.teacher.terms['back'].factor = 0.0
    losses = model(**toy_batch(), mode='loss')
    assert losses['teacher_loss_kd_back'] == 0
    assert model.companion.constraints['back'].multiplier == 1


def test_the_host_does_not_wait_for_it() -> None:
    constraint = Constraint()
    with Watch() as watch:
        constraint(torch.tensor(3.0, requires_grad=True))
    assert watch.found == []


@pytest.mark.parametrize('task', ['depth', 'det'])
def test_other_tasks(task: str, tmp_path: Path) -> None:
    student = toy_depth_estimator(4) if task == 'depth' else toy_detector('fcos', 4)
    term = dict(tap='neck[*]', loss=dict(type='mmstructkd.AttentionTransferLoss'))
    if task == 'depth':
        term = dict(tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1'))
    teacher = dict(
        type='mmstructkd.PeerTeacher', config=student, terms=dict(back=term), constraints=dict(back=dict(bound=0.01))
    )
    model = toy_distiller(student=student, teacher=teacher, terms=dict(kd=term))
    runner = Runner.from_cfg(toy_config(model, tmp_path, max_iters=2, task=task))
    runner.train()
    assert runner.model.companion.constraints['back'].multiplier != 1


def test_both_networks_begin_with_all_classes_alike() -> None:
    model = build('peer_with_constraint')
    for network in (model.student, model.teacher.network):
        assert not any(p.any() for p in network.decode_head.conv_seg.parameters())
    losses = model(**toy_batch(), mode='loss')
    assert losses['loss_kd_kd'].item() == pytest.approx(0.0, abs=1e-6)
    assert losses['decode.loss_ce'].item() == pytest.approx(float(torch.tensor(10.0).log()) * 46 / 48, rel=1e-3)


MISTAKES = [
    (dict(constraints=dict(bak=dict())), "`constraints` must name terms of its own, got 'bak'.*'back'"),
    (dict(constraints=dict(back=dict(epsilon=1.0))), r"must have only the keys .*got 'epsilon'"),
    (dict(constraints=dict(back=dict(rate=0))), "term 'back': Constraint: `rate` must be a finite number above 0"),
    (dict(constraints=dict(back=1.0)), '`constraints` must be a dict of dicts'),
    (dict(zero_classifier='yes'), "`zero_classifier` must be True or False, got 'yes'"),
]


@pytest.mark.parametrize(('changes', 'match'), MISTAKES)
def test_mistakes(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        MODELS.build(toy_distiller(teacher=peer(**copy.deepcopy(changes)), terms=SCORES))


@pytest.mark.parametrize('make', [lambda: toy_depth_estimator(4), lambda: toy_detector('fcos', 4)])
def test_a_network_without_classes_has_no_classifier_to_zero(make: Any) -> None:
    student = make()
    teacher = dict(type='mmstructkd.PeerTeacher', config=student, zero_classifier=True)
    term = dict(tap='backbone[*]', loss=dict(type='mmstructkd.AttentionTransferLoss'))
    with pytest.raises(ConfigError, match='must be False for a network without a layer `decode_head.conv_seg`'):
        MODELS.build(toy_distiller(student=student, teacher=teacher, terms=dict(kd=term)))
