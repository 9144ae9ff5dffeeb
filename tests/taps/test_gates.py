"""Gates: values stay, no gradient passes, a tap at the gate sees what is before it, and nothing learns from nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from torch import nn

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import ConfigError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.taps import Capture, Gates, Tap, before_gate
from mmstructkd.testing import (
    toy_batch,
    toy_config,
    toy_depth_estimator,
    toy_detector,
    toy_distiller,
    toy_segmentor,
    toy_terms,
)
from tests.comparison import assert_same
from tests.teachers.test_kinds import Interrupt

ATTENTION = dict(type='mmstructkd.AttentionTransferLoss', loss_weight=100.0)
LOCAL = dict(local=dict(tap=['backbone[0]', 'backbone[1]', 'backbone[3]'], loss=ATTENTION))
GATES = ['backbone.layer1', 'backbone.layer2']


def built(gates: Any = GATES, terms: Any = LOCAL, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return MODELS.build(toy_distiller(gates=gates, terms=terms, **changes)).train()


def gradients(model: nn.Module, key: str = '', seed: int = 3) -> dict[str, torch.Tensor]:
    """Gradients of the student, of all losses or of those whose key contains ``key``."""
    torch.manual_seed(seed)
    losses = model(**toy_batch(), mode='loss')
    total = sum(value for name, value in losses.items() if 'loss' in name and key in name)
    names, parameters = zip(*model.student.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: torch.zeros(()) if grad is None else grad for name, grad in zip(names, found, strict=True)}


def learns(grads: dict[str, torch.Tensor]) -> set[str]:
    """Parts in which a gradient is not 0; a stage of the backbone is one."""
    parts = {
        name: '.'.join(name.split('.')[:2]) if name.startswith('backbone') else name.split('.')[0] for name in grads
    }
    return {part for name, part in parts.items() if bool(grads[name].ne(0).any())}


BEFORE = {'backbone.stem', 'backbone.layer1', 'backbone.layer2'}
BEHIND = {'backbone.layer3', 'backbone.layer4', 'decode_head', 'auxiliary_head'}


def test_the_task_trains_what_lies_behind_the_last_gate_only() -> None:
    model = built()
    assert learns(gradients(model, 'loss_ce')) == BEHIND
    assert learns(gradients(built(gates=()), 'loss_ce')) == BEFORE | BEHIND
    assert learns(gradients(model)) == BEFORE | BEHIND


def test_values_are_those_without_gates() -> None:
    losses = []
    for gates in (GATES, ()):
        model = built(gates)
        torch.manual_seed(3)
        losses.append(model(**toy_batch(), mode='loss'))
    assert_same(losses[0], losses[1])


@pytest.mark.parametrize('level', [0, 1])
def test_a_stage_gets_the_gradient_of_its_own_terms(level: int) -> None:
    """However the tap names the place; a reference cuts the graph by hand."""
    grads = []
    for tap in (f'backbone[{level}]', f'backbone.layer{level + 1}', f'in:backbone.layer{level + 2}'):
        terms = {f'local{place}': dict(tap=f'backbone[{place}]', loss=ATTENTION) for place in (0, 1)}
        terms[f'local{level}'] = dict(tap=dict(student=tap, teacher=f'backbone[{level}]'), loss=ATTENTION)
        grads.append(gradients(built(terms=terms), f'loss_kd_local{level}'))
    assert learns(grads[0]) == {f'backbone.layer{level + 1}'} | ({'backbone.stem'} if level == 0 else set())
    assert_same(grads[0], grads[1])
    assert_same(grads[0], grads[2])
    model = built()
    batch = toy_batch()
    backbone = model.student.backbone
    with torch.no_grad():
        maps = model.teacher.network.backbone(batch['inputs'])
    out = backbone.maxpool(backbone.stem(batch['inputs']))
    for place in range(level + 1):
        out = getattr(backbone, f'layer{place + 1}')(out.detach() if place else out)
    loss = MODELS.build(ATTENTION)
    value = loss(out, maps[level], Targets())
    stage = dict(getattr(backbone, f'layer{level + 1}').named_parameters(prefix=f'backbone.layer{level + 1}'))
    for name, grad in zip(stage, torch.autograd.grad(value, list(stage.values())), strict=True):
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('silent', [False, True])
def test_every_trained_parameter_has_a_gradient(silent: bool) -> None:
    """With terms on and off: two processes need not look for unused parameters."""
    model = built()
    for term in model.terms.values():
        term.factor = 0.0 if silent else 1.0
    total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
    total.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ('student', 'gates', 'terms', 'task'),
    [
        (toy_segmentor(4), GATES, LOCAL, 'seg'),
        (toy_depth_estimator(4), ['backbone.layer1'], dict(local=dict(tap='backbone[0]', loss=ATTENTION)), 'depth'),
        (toy_detector('fcos', 4), ['neck'], dict(local=dict(tap='neck[*]', loss=ATTENTION)), 'det'),
    ],
    ids=['seg', 'depth', 'det'],
)
def test_a_run_and_its_resumption(student: dict, gates: list, terms: dict, task: str, tmp_path: Path) -> None:
    teacher = dict(config=copy.deepcopy(student), allow_random=True)
    model = toy_distiller(student=student, teacher=teacher, gates=gates, terms=terms)
    Runner.from_cfg(toy_config(model, tmp_path / 'straight', task=task)).train()
    cfg = toy_config(model, tmp_path / 'stopped', task=task)
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    cfg.resume = True
    runner = Runner.from_cfg(cfg)
    runner.train()
    first, second = (read_checkpoint(str(tmp_path / name / 'iter_4.pth')) for name in ('straight', 'stopped'))
    MODELS.build(copy.deepcopy(student)).load_state_dict(first['state_dict'], strict=True)
    assert_same(first['state_dict'], second['state_dict'])
    assert_same(first['optimizer'], second['optimizer'])
    assert not any(module._forward_hooks for module in runner.model.student.modules())


def test_gates_hold_on_a_stream_as_well() -> None:
    terms = {name: dict(tap=f'backbone[{place}]', loss=ATTENTION) for place, name in enumerate(('a', 'b'))}
    terms['deep'] = dict(tap='backbone[3]', loss=ATTENTION, on='turned')
    model = built(terms=terms, streams=dict(turned=dict(type='mmstructkd.TurnedStream', turns=['half'])))
    assert learns(gradients(model, 'loss_kd_deep_turned')) == {'backbone.layer3', 'backbone.layer4'}


def test_several_outputs_and_what_is_not_trained() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {'a': [self.inner(x), x], 'b': (self.inner(x), None)}

    network = nn.Sequential(Two())
    x = torch.randn(1, 2)
    with Gates(network, ['0']) as gates, Capture(network, [Tap('0', keys=('a', 0))]) as capture:
        made = network(x)
    assert before_gate(made['a'][1]) is x
    assert made['b'][1] is None
    for gated in (made['a'][0], made['b'][0]):
        assert before_gate(gated) is not gated
        assert torch.equal(gated, before_gate(gated))
        grad = torch.autograd.grad(gated.sum(), network[0].inner.weight, retain_graph=True)[0]
        assert grad.eq(0).all()
    (seen,) = capture.records[Tap('0', keys=('a', 0))]
    assert torch.autograd.grad(seen.sum(), network[0].inner.weight)[0].ne(0).any()
    assert len(gates.passed['0']) == 2
    assert not network[0]._forward_hooks


SCORES = dict(kd=toy_terms()['pixel'])
HEAD = dict(SCORES, a=dict(tap='decode_head.convs', loss=ATTENTION))


@pytest.mark.parametrize(
    ('gates', 'terms', 'match'),
    [
        (GATES, SCORES, "tapped between each gate and the one before it, got 'backbone.layer1'"),
        (
            GATES,
            dict(a=dict(tap='backbone[0]', loss=ATTENTION), **SCORES),
            "before it, got 'backbone.layer2'.*layer2.0",
        ),
        (GATES, dict(a=dict(tap='backbone[1]', loss=ATTENTION), **SCORES), "before it, got 'backbone.layer1'.*stem"),
        (['decode_head.convs'], dict(a=dict(tap='backbone[3]', loss=ATTENTION)), r"pass.*got 'decode_head.convs'"),
        (['decode_head.convs', 'decode_head.dropout'], HEAD, "behind the gate before, got 'decode_head.dropout'"),
        (['decode_head.convs'], SCORES, "before it, got 'decode_head.convs'.*decode_head.convs.0"),
        (['backbone.layer9'], LOCAL, "must name a module of EncoderDecoder, got 'backbone.layer9'"),
        (['backbone.layer1', 'backbone.layer1'], LOCAL, 'each once'),
        ('backbone.layer1', LOCAL, '`gates` must be a list'),
        ([1], LOCAL, '`gates` must be a list'),
    ],
)
def test_mistakes_are_errors_at_build(gates: Any, terms: dict, match: str) -> None:
    with pytest.raises((ConfigError, TapError), match=match):
        built(gates, terms)


def test_a_gate_behind_which_everything_is_frozen_is_no_gate() -> None:
    student = toy_segmentor(4)
    student.backbone.frozen_stages = 1
    with pytest.raises(ConfigError, match=r"something that is trained before.*got 'backbone.layer1'"):
        built(['backbone.layer1'], LOCAL, student=student)
