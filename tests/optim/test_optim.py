"""Optimiser parts: the student's settings are those of plain training, the critic's its own."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.optim import AutocastOptimWrapper, CompositeOptimizer
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_distiller, toy_segmentor

SETTINGS = dict(
    type='OptimWrapper',
    constructor='mmstructkd.DistillOptimWrapperConstructor',
    optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-2),
    paramwise_cfg=dict(custom_keys={'decode_head': dict(lr_mult=10.0)}, norm_decay_mult=0.0),
)


def test_student_is_built_as_in_plain_training() -> None:
    model = MODELS.build(toy_distiller())
    wrapper = build_optim_wrapper(model, copy.deepcopy(SETTINGS))
    plain = MODELS.build(toy_segmentor(4))
    settings = {k: v for k, v in copy.deepcopy(SETTINGS).items() if k != 'constructor'}
    expected = build_optim_wrapper(plain, settings).optimizer
    student = wrapper.optimizer.parts[0]
    for group, other in zip(student.param_groups[:-1], expected.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != 'params'} == {k: v for k, v in other.items() if k != 'params'}
        assert [p.shape for p in group['params']] == [p.shape for p in other['params']]
    assert len(student.param_groups) == len(expected.param_groups) + 1  # the connector
    connector = student.param_groups[-1]
    assert set(connector['params']) == set(model.terms['feature'].connectors.parameters())
    assert connector['lr'] == 0.1
    critic = wrapper.optimizer.parts[1]
    assert isinstance(critic, torch.optim.Adam)
    assert critic.param_groups[0]['betas'] == (0.9, 0.99)
    assert set(critic.param_groups[0]['params']) == set(model.terms['holistic'].parameters())


def test_every_parameter_is_in_once() -> None:
    model = MODELS.build(toy_distiller())
    wrapper = build_optim_wrapper(model, copy.deepcopy(SETTINGS))
    params = [p for g in wrapper.optimizer.param_groups for p in g['params']]
    assert len(params) == len(set(params))
    assert set(params) == {p for p in model.parameters() if p.requires_grad}


def test_learnable_temperatures_are_not_decayed() -> None:
    terms = dict(
        pixel=dict(
            tap='decode_head.conv_seg',
            loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=dict(type='mmstructkd.LearnableTemperature')),
        ),
        feature=dict(
            tap='backbone[3]',
            loss=dict(type='mmstructkd.ChannelwiseKLLoss', temperature=dict(type='mmstructkd.LearnableTemperature')),
        ),
    )
    config = toy_distiller()
    config.terms = terms
    model = MODELS.build(config)
    groups = build_optim_wrapper(model, copy.deepcopy(SETTINGS)).optimizer.param_groups
    thetas = {term.loss.temperature.theta for term in model.terms.values()}
    assert set(groups[-1]['params']) == thetas
    assert (groups[-1]['weight_decay'], groups[-1]['lr']) == (0.0, 0.1)
    assert set(groups[-2]['params']) == set(model.terms['feature'].connectors.parameters())
    assert groups[-2]['weight_decay'] == 1e-2


def test_constructor_wants_a_distiller() -> None:
    with pytest.raises(ConfigError, match='must be a StructuredDistiller, got EncoderDecoder'):
        build_optim_wrapper(MODELS.build(toy_segmentor(4)), copy.deepcopy(SETTINGS))


def pair() -> tuple[nn.Linear, nn.Linear, CompositeOptimizer]:
    """Two layers, one with SGD and one with Adam."""
    first, second = nn.Linear(2, 3), nn.Linear(3, 1)
    sgd = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
    adam = torch.optim.Adam(second.parameters(), lr=0.01, betas=(0.5, 0.9))
    return first, second, CompositeOptimizer([sgd, adam])


def steps(first: nn.Linear, second: nn.Linear, optimizers: list, number: int) -> None:
    """Train on fixed data."""
    for step in range(number):
        x = torch.linspace(-1, 1, 8).view(4, 2) * (step + 1)
        for optimizer in optimizers:
            optimizer.zero_grad()
        second(first(x).tanh()).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_steps_like_its_parts() -> None:
    first, second, composite = pair()
    first2, second2 = copy.deepcopy(first), copy.deepcopy(second)
    apart = [
        torch.optim.SGD(first2.parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(second2.parameters(), lr=0.01, betas=(0.5, 0.9)),
    ]
    steps(first, second, [composite], 4)
    steps(first2, second2, apart, 4)
    together, alone = [*first.parameters(), *second.parameters()], [*first2.parameters(), *second2.parameters()]
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q)


def test_resumes_exactly_and_follows_its_groups() -> None:
    first, second, composite = pair()
    steps(first, second, [composite], 2)
    saved = copy.deepcopy(composite.state_dict())
    first2, second2 = copy.deepcopy(first), copy.deepcopy(second)
    again = CompositeOptimizer(
        [
            torch.optim.SGD(first2.parameters(), lr=0.1, momentum=0.9),
            torch.optim.Adam(second2.parameters(), lr=0.01, betas=(0.5, 0.9)),
        ]
    )
    again.load_state_dict(saved)
    for optimizer in (composite, again):
        for group in optimizer.param_groups:
            group['lr'] *= 0.5  # as a scheduler does; a copy of the groups would not reach the parts
    assert [p.param_groups[0]['lr'] for p in again.parts] == [0.05, 0.005]
    steps(first, second, [composite], 3)
    steps(first2, second2, [again], 3)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), first2.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(second.parameters(), second2.parameters(), strict=True))


def test_refuses_the_state_of_another_optimiser() -> None:
    _, _, composite = pair()
    with pytest.raises(CheckpointError, match='must hold 2 parts, got a plain optimiser'):
        composite.load_state_dict(torch.optim.SGD([torch.zeros(1)], lr=0.1).state_dict())


def test_gradient_clipping_sees_both() -> None:
    first, second, composite = pair()
    wrapper = OptimWrapper(composite, clip_grad=dict(max_norm=1e-3))
    second(first(torch.ones(4, 2)).tanh()).square().sum().mul(100).backward()
    wrapper.step()
    norm = torch.cat([p.grad.flatten() for p in [*first.parameters(), *second.parameters()]]).norm()
    assert norm <= 1.01e-3


def test_gradient_scaler_skips_a_step_that_overflowed_and_takes_the_next() -> None:
    """What AmpOptimWrapper does on a GPU, with torch's scaler for the CPU."""
    first, second, composite = pair()
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0, growth_interval=100)
    before = first.weight.clone(), second.weight.clone()
    scaler.scale(second(first(torch.full((4, 2), float('inf'))).tanh()).square().sum() * float('inf')).backward()
    scaler.step(composite)
    scaler.update()
    assert torch.equal(first.weight, before[0])
    assert torch.equal(second.weight, before[1])
    assert scaler.get_scale() == 2.0
    composite.zero_grad()
    first2, second2 = copy.deepcopy(first), copy.deepcopy(second)
    scaler.scale(second(first(torch.ones(4, 2)).tanh()).square().sum()).backward()
    scaler.step(composite)
    plain = torch.optim.SGD(first2.parameters(), lr=0.1, momentum=0.9)
    second2(first2(torch.ones(4, 2)).tanh()).square().sum().backward()
    plain.step()
    assert torch.allclose(first.weight, first2.weight)


def test_autocast_wrapper_runs_the_forward_in_bf16() -> None:
    layer = nn.Linear(2, 2)
    wrapper = AutocastOptimWrapper(optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))
    with wrapper.optim_context(layer):
        assert layer(torch.ones(1, 2)).dtype == torch.bfloat16
    assert layer(torch.ones(1, 2)).dtype == torch.float32
    with pytest.raises(ConfigError, match="`dtype` must be one of .* got 'float16'"):
        AutocastOptimWrapper(dtype='float16', optimizer=torch.optim.SGD(layer.parameters(), lr=0.1))
