"""Temperatures: their values over the training, their gradients, and that every loss takes them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from mmstructkd.errors import ConfigError
from mmstructkd.functional import channelwise_kl_loss, pixelwise_kl_loss
from mmstructkd.losses import ChannelwiseKLLoss, DistillLoss, PixelwiseKLLoss
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.temperatures import (
    ConstantTemperature,
    LearnableTemperature,
    ScheduledTemperature,
    StandardizedTemperature,
    build_temperature,
)
from tests.reference import divergence
from tests.reference import logits as reference

SHAPE = (2, 3, 4, 6)
#: Every registered loss with a temperature, settings that it needs here.
NEEDS = {
    'FocalGlobalLoss': dict.fromkeys(('foreground_weight', 'background_weight', 'attention_weight'), 1.0),
    'InterclassSimilarityLoss': {'present': 'all'},
    'LocalizationKLLoss': {'region': 'all', 'edges': 1},
    'MemoryContrastLoss': {'num_classes': 3, 'seed': 0},
    'PrototypeContrastLoss': {'num_classes': 3, 'seed': 0},
    'RegionContrastLoss': {'num_classes': 3, 'seed': 0},
}
NAMES = sorted(
    name
    for name, kind in MODELS.module_dict.items()
    if isinstance(kind, type) and issubclass(kind, SoftenedLoss) and kind.__module__.startswith('mmstructkd.')
)

every = pytest.mark.parametrize('name', NAMES)


def pair(dtype=torch.float64):
    student, teacher = torch.randn(2, *SHAPE, dtype=dtype).unbind()
    return student.clone().requires_grad_(), teacher


def build(name, temperature):
    """The loss in float64, with what its batch has to know."""
    loss = MODELS.build({'type': f'mmstructkd.{name}', **NEEDS.get(name, {}), 'temperature': temperature})
    loss.bind(torch.zeros(1, *SHAPE[1:]), torch.zeros(1, *SHAPE[1:]))
    loss.double().eval()
    labels = torch.arange(4 * 6).view(1, 4, 6).expand(2, 4, 6) // 3 % 3
    boxes = (torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([[8.0, 4.0, 20.0, 16.0]]))
    targets = Targets(labels=labels, boxes=boxes, box_labels=(torch.ones(1), torch.ones(1)), input_size=(16, 24))

    def score(student, teacher):
        value = loss(student, teacher, targets)
        return value[''] if isinstance(value, dict) else value

    return loss, score


def test_every_loss_with_a_temperature_is_softened():
    takes = {
        name
        for name, kind in MODELS.module_dict.items()
        if isinstance(kind, type)
        and issubclass(kind, DistillLoss)
        and kind.__module__.startswith('mmstructkd.')
        and 'temperature' in kind.__init__.__annotations__
    }
    assert takes >= {'PixelwiseKLLoss', 'ChannelwiseKLLoss', 'DistLoss', 'DecoupledKLLoss', 'BinaryKLLoss'}
    assert takes - set(NAMES) <= WITHOUT_MODULES, 'take a module in place of the number, or say why not'


#: Losses whose temperature is no softening of scores.
WITHOUT_MODULES: set[str] = set()


@every
def test_a_module_equals_its_number(name):
    student, teacher = pair()
    want = build(name, 2.0)[1](student, teacher)
    config = {'type': 'mmstructkd.ConstantTemperature', 'value': 2.0}
    for given in (config, ConstantTemperature(2.0)):
        assert torch.equal(build(name, given)[1](student, teacher), want)
    assert not torch.isclose(build(name, {**config, 'value': 1.0})[1](student, teacher), want)


@every
def test_follows_the_schedule(name):
    student, teacher = pair()
    loss, score = build(name, {'type': 'mmstructkd.ScheduledTemperature', 'start': 4.0, 'final': 2.0})
    torch.testing.assert_close(score(student, teacher), build(name, 4.0)[1](student, teacher))
    loss.temperature.set_progress(100, 100)
    torch.testing.assert_close(score(student, teacher), build(name, 2.0)[1](student, teacher))


@every
def test_learns(name):
    student, teacher = pair()
    loss, score = build(name, {'type': 'mmstructkd.LearnableTemperature', 'low': 0.5, 'span': 2.0, 'end': 4})

    def at(theta):
        return build(name, 0.5 + 2.0 / (1 + math.exp(-theta)))[1](student, teacher).item()

    assert score(student, teacher).item() == pytest.approx(at(1.0))
    # Numerically, by the loss at two temperatures; the factor of the loss is in the graph.
    slope = (at(1.0001) - at(0.9999)) / 2e-4
    assert abs(slope) > 1e-6
    for done, factor in ((0, 0.0), (1, -0.1464466), (2, -0.5), (4, -1.0), (9, -1.0)):
        loss.temperature.set_progress(done, 100)
        grad_theta, grad = torch.autograd.grad(score(student, teacher), (loss.temperature.theta, student))
        assert grad_theta.item() == pytest.approx(factor * slope, rel=1e-4, abs=1e-12)
        assert grad.any()


@every
def test_standardised_where_it_can_be(name):
    kind = MODELS.get(name)
    config = {'type': 'mmstructkd.StandardizedTemperature', 'value': 1.5}
    axes = kind.softened_axes
    if axes is None or name == 'LocalizationKLLoss':
        with pytest.raises(ConfigError, match=f'{name}: `temperature` must be one that leaves the scores as they are'):
            build(name, config)
        return
    student, teacher = pair()
    _, score = build(name, config)
    got = score(student, teacher)
    shape = (2, 1, 4, 6) if axes == 1 else (2, 3, 1, 1)
    scale, shift = 0.2 + torch.rand(shape), torch.randn(shape)
    torch.testing.assert_close(score(scale * student + shift, 3 * scale * teacher - shift), got)
    assert torch.autograd.grad(got, student)[0].any()


def test_standardised_pixels_equal_reference():
    student, teacher = pair(torch.float64)
    rows = [torch.stack([reference.standardized(r) for r in reference.rows_of(z)]) for z in (student, teacher)]
    loss = PixelwiseKLLoss(9.0, temperature={'type': 'mmstructkd.StandardizedTemperature'})
    got, want = loss(student, teacher), 9 * pixelwise_kl_loss(*rows, temperature=2.0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student, retain_graph=True), torch.autograd.grad(want, student))


@pytest.mark.parametrize('kind', [PixelwiseKLLoss, ChannelwiseKLLoss])
def test_standardised_among_what_counts(kind):
    student, teacher = pair(torch.float64)
    valid = torch.rand(2, 4, 6) > 0.3
    loss = kind(temperature={'type': 'mmstructkd.StandardizedTemperature'})
    got = loss(student, teacher, Targets(valid=valid))
    (grad,) = torch.autograd.grad(got, student)
    spoiled = [torch.where(valid[:, None], z.detach(), float('nan')) for z in (student, teacher)]
    spoiled[0].requires_grad_()
    again = loss(*spoiled, Targets(valid=valid))
    torch.testing.assert_close(again, got)
    torch.testing.assert_close(torch.autograd.grad(again, spoiled[0])[0], grad)
    if kind is ChannelwiseKLLoss:
        made = []
        for z in (student.detach(), teacher):
            out = torch.zeros_like(z)
            for b in range(2):
                for c in range(3):
                    out[b, c][valid[b]] = reference.standardized(z[b, c][valid[b]])
            made.append(out)
        torch.testing.assert_close(got, divergence.channelwise_kl(*made, 2.0, valid))
        torch.testing.assert_close(got, channelwise_kl_loss(*made, temperature=2.0, valid=valid))


@pytest.mark.parametrize(('shape', 'middle'), [('linear', 2.5), ('cosine', 2.5), ('exponential', 2.0)])
def test_schedules(shape, middle):
    temperature = ScheduledTemperature(4.0, 1.0, shape=shape, begin=10, end=30)
    values = []
    for step in (0, 10, 15, 20, 30, 99):
        temperature.set_progress(step, 100)
        values.append(temperature.value)
    quarter = {'linear': 3.25, 'cosine': 4 - 3 * (1 - math.cos(math.pi / 4)) / 2, 'exponential': 4 * 0.25**0.25}
    assert values == pytest.approx([4.0, 4.0, quarter[shape], middle, 1.0, 1.0])
    whole = ScheduledTemperature(4.0, 1.0, shape=shape)
    whole.set_progress(50, 100)
    assert whole.value == pytest.approx(middle)


def test_the_curriculum_takes_the_published_share():
    temperature = LearnableTemperature()
    factors = []
    for step in (0, 5, 10, 240):
        temperature.set_progress(step, 240)
        factors.append(temperature.reversal)
    assert factors == pytest.approx([0.0, -0.5, -1.0, -1.0])
    late = LearnableTemperature(begin=100, end=200, by_epoch=True)
    assert late.by_epoch
    late.set_progress(150, 240)
    assert late.reversal == pytest.approx(-0.5)


def test_learns_against_the_student():
    """A step down the reversed gradient makes the loss larger; without the reversal, smaller."""
    student, teacher = pair()
    loss = PixelwiseKLLoss(temperature={'type': 'mmstructkd.LearnableTemperature', 'end': 1})
    loss.temperature.set_progress(1, 10)
    before = loss(student.detach(), teacher)
    before.backward()
    with torch.no_grad():
        loss.temperature.theta -= 0.5 * loss.temperature.theta.grad.sign()
    assert loss(student.detach(), teacher) > before


def test_state_and_copies():
    first, second = LearnableTemperature(), LearnableTemperature(init=0.0)
    assert set(first.state_dict()) == {'theta'}
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.theta, first.theta)
    loss = ChannelwiseKLLoss(temperature=first)
    assert 'temperature.theta' in loss.state_dict()
    first.set_progress(3, 10)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert twin.temperature.reversal == first.reversal
        assert twin.temperature.theta is not first.theta
    assert LearnableTemperature.no_weight_decay == ('theta',)


def test_half_precision_parameters_are_promoted():
    temperature = LearnableTemperature().half()
    student, teacher = pair(torch.float32)
    assert temperature(student, teacher).temperature.dtype == torch.float32


def test_print_outs():
    assert 'temperature=4' in repr(ChannelwiseKLLoss())
    assert 'temperature=LearnableTemperature' in repr(ChannelwiseKLLoss(temperature=LearnableTemperature()))
    assert "shape='linear'" in repr(ScheduledTemperature())


def test_bad_temperatures():
    for bad in (0, -1, float('nan'), 'hot', True, None):
        with pytest.raises(ConfigError, match='X: `temperature` must be a finite number above 0, got'):
            build_temperature('X', bad)
    for bad in ({}, {'value': 3}, nn.Linear(1, 1)):
        with pytest.raises(ConfigError, match='X: `temperature` must be a number above 0 or a registered temperature'):
            build_temperature('X', bad)
    with pytest.raises(ConfigError, match=r"must be one of .*, got 'mmstructkd.LearnedTemperature'.*LearnableTemp"):
        build_temperature('X', {'type': 'mmstructkd.LearnedTemperature'})
    with pytest.raises(ConfigError, match='`temperature` must be a temperature, got ChannelwiseKLLoss'):
        build_temperature('X', {'type': 'mmstructkd.ChannelwiseKLLoss'})
    with pytest.raises(ConfigError, match='X: `temperature` cannot be built.*no_such'):
        build_temperature('X', {'type': 'mmstructkd.ConstantTemperature', 'no_such': 1})


def test_bad_settings():
    with pytest.raises(ConfigError, match='ConstantTemperature: `value` must be a finite number above 0, got 0'):
        ConstantTemperature(0)
    with pytest.raises(ConfigError, match='StandardizedTemperature: `value` must be a finite number above 0, got -1'):
        StandardizedTemperature(-1)
    for name in ('start', 'final'):
        with pytest.raises(ConfigError, match=f'ScheduledTemperature: `{name}` must be a finite number above 0'):
            ScheduledTemperature(**{name: 0})
    with pytest.raises(ConfigError, match="ScheduledTemperature: `shape` must be one of .*, got 'poly'"):
        ScheduledTemperature(shape='poly')
    with pytest.raises(ConfigError, match='ScheduledTemperature: `end` must lie after `begin`=5, got 5'):
        ScheduledTemperature(begin=5, end=5)
    for name in ('low', 'span'):
        with pytest.raises(ConfigError, match=f'LearnableTemperature: `{name}` must be a finite number above 0'):
            LearnableTemperature(**{name: 0})
    with pytest.raises(ConfigError, match='LearnableTemperature: `init` must be a finite number, got nan'):
        LearnableTemperature(init=float('nan'))
