"""A temperature for each position or image: values, gradients, which losses take it, and a run."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import PixelwiseKLLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.temperatures import InstanceTemperature, Softened, Temperature
from mmstructkd.testing import toy_batch, toy_distiller
from tests import test_golden_teachers as published
from tests.reference import soft_target as reference
from tests.temperatures.test_temperatures import NAMES, NEEDS
from tests.test_host_sync import Watch

golden = published.golden
SHAPE = (2, 3, 4, 6)
#: Whose own temperatures each loss takes.
TAKES = {
    'PixelwiseKLLoss': {'position', 'image'},
    'DecoupledKLLoss': {'position', 'image'},
    'WeightedSoftLabelLoss': {'position', 'image'},
    'BinaryKLLoss': {'position', 'image'},
    'ChannelwiseKLLoss': {'image'},
}
taking = [(name, per) for name, pers in TAKES.items() for per in sorted(pers)]


class Given(Temperature):
    """Gives what it was given."""

    def __init__(self, value, per):
        super().__init__()
        self.value, self.per = value, per

    def forward(self, student, teacher, *, dim=1, valid=None):
        return Softened(student, teacher, self.value)


def make(name, temperature):
    return MODELS.build({'type': f'mmstructkd.{name}', **NEEDS.get(name, {}), 'temperature': temperature})


def pair(dtype=torch.float64):
    student, teacher = torch.randn(2, *SHAPE, dtype=dtype).unbind()
    return student.clone().requires_grad_(), teacher


def targets(valid=None):
    labels = torch.arange(4 * 6).view(1, 4, 6).expand(2, 4, 6) // 3 % 3
    return Targets(labels=labels, valid=valid, boxes=(torch.zeros(1, 4),) * 2, input_size=(16, 24))


@published.case_names('ctkd_instance*')
def test_published_through_the_registered_loss(name):
    case = golden.load(name)
    student, temperature = golden.learner(case)
    loss = PixelwiseKLLoss(temperature=Given(temperature, 'position'))
    golden.check(case, [student, temperature], loss(student, case['teacher']))


@pytest.mark.parametrize(('name', 'per'), taking)
@pytest.mark.parametrize('masked', [False, True])
def test_each_position_alone_equals_the_loss_of_it_with_a_number(name, per, masked):
    """Loop over images, or positions, each at its own number; their mean, weighed as the loss weighs them."""
    torch.manual_seed(0)
    student, teacher = pair()
    valid = torch.rand(2, 4, 6) > 0.3 if masked else None
    shape = (2, 1, 4, 6) if per == 'position' else (2, 1, 1, 1)
    own = (1 + 3 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    known = targets(valid)
    got = make(name, Given(own, per))(student, teacher, known)
    total, weight = 0.0, 0.0
    columns = [(b, (slice(None), slice(None))) for b in range(2)]
    if per == 'position':
        columns = [(b, (slice(y, y + 1), slice(x, x + 1))) for b in range(2) for y in range(4) for x in range(6)]
    for b, (rows, cols) in columns:
        counted = None if valid is None else valid[b : b + 1, rows, cols]
        one = [z[b : b + 1, :, rows, cols] for z in (student, teacher)]
        number = own[b, 0, 0, 0] if per == 'image' else own[b, 0, rows, cols].squeeze()
        part = Targets(labels=known.labels[b : b + 1, rows, cols], valid=counted)
        share = torch.ones(()) if counted is None else counted.sum()
        if name == 'BinaryKLLoss':
            best = one[1].sigmoid().amax(1)
            share = (best if counted is None else best * counted).sum()
        elif name == 'ChannelwiseKLLoss':
            share = torch.ones(())
        elif counted is None:
            share = torch.tensor(float(one[0][0, 0].numel()))
        if share > 0:
            loss = MODELS.build({'type': f'mmstructkd.{name}', 'temperature': 1.0})
            loss.temperature = Given(number, 'all')
            total = total + share * loss(*one, part)
            weight = weight + share
    want = total / weight
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(value, (student, own), retain_graph=True) for value in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('per', ['position', 'image'])
def test_taken_or_refused_with_the_reason_when_built(name, per):
    torch.manual_seed(0)
    config = dict(type='mmstructkd.InstanceTemperature', hidden=4, per=per)
    if per not in TAKES.get(name, ()):
        with pytest.raises(
            ConfigError, match=rf'{name}: `temperature` must be one for .* got InstanceTemperature with'
        ):
            make(name, config)
        return
    loss = make(name, config)
    student, teacher = pair(torch.float32)
    loss.bind(torch.zeros(1, *SHAPE[1:]), torch.zeros(1, *SHAPE[1:]))
    loss.temperature.set_progress(1, 1)
    loss(student, teacher, targets()).backward()
    assert student.grad.any()
    # Each parameter, as DDP needs; the reversal makes the step an ascent.
    assert all(p.grad is not None for p in loss.parameters())
    assert loss.temperature.out_weight.grad.any()


@pytest.mark.parametrize('per', ['position', 'image'])
@pytest.mark.parametrize('masked', [False, True])
def test_equals_loops(per, masked):
    torch.manual_seed(0)
    student, teacher = pair()
    valid = torch.rand(2, 4, 6) > 0.3 if masked else None
    loss = PixelwiseKLLoss(temperature=InstanceTemperature(hidden=5, per=per, low=2.0, span=3.0)).double()
    loss.bind(student, teacher)
    loss.double()
    temperature = loss.temperature
    temperature.set_progress(1, 1)
    weights = [getattr(temperature, name) for name in temperature.no_weight_decay]
    w1, b1, w2, b2 = weights
    hidden = torch.zeros(2, 5, 4, 6, dtype=torch.float64)
    for b in range(2):
        for y in range(4):
            for x in range(6):
                both = torch.cat([student.detach()[b, :, y, x], teacher[b, :, y, x]])
                hidden[b, :, y, x] = (w1 @ both + b1).clamp(min=0)
    if per == 'image':
        mean = torch.zeros(2, 5, 1, 1, dtype=torch.float64)
        for b in range(2):
            inside = torch.ones(4, 6, dtype=torch.bool) if valid is None else valid[b]
            mean[b, :, 0, 0] = hidden[b][:, inside].mean(1)
        hidden = mean.expand(2, 5, 4, 6)
    own = 2 + 3 * torch.sigmoid(torch.einsum('oc,bchw->bohw', w2, hidden) + b2)
    want = reference.instance_temperature(student, teacher, own.flatten(), valid)
    got = loss(student, teacher, Targets(valid=valid))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, student, retain_graph=True), torch.autograd.grad(want, student, retain_graph=True)
    )
    mine, theirs = (torch.autograd.grad(value, weights) for value in (got, want))
    torch.testing.assert_close(mine, tuple(-g for g in theirs))  # reversed


def test_the_reversal_follows_the_training():
    student, teacher = pair(torch.float32)
    temperature = InstanceTemperature(hidden=4, end=4)
    loss = PixelwiseKLLoss(temperature=temperature)
    loss.bind(student, teacher)
    slopes = []
    for done in (0, 2, 4):
        temperature.set_progress(done, 100)
        slopes.append(torch.autograd.grad(loss(student, teacher), temperature.out_bias)[0].item())
    assert slopes[0] == 0
    assert slopes[1] == pytest.approx(slopes[2] / 2)
    assert slopes[2] != 0


def test_bounded_whatever_the_scores():
    temperature = InstanceTemperature(hidden=4)
    for scale in (0.0, 1.0, 1e30, float('inf')):
        scores = torch.randn(2, 3, 4, 6) * scale
        made = temperature(scores.nan_to_num(), -scores.nan_to_num()).temperature
        assert made.shape == (2, 1, 4, 6)
        assert ((made >= 1) & (made <= 21)).all()
    rows = InstanceTemperature(hidden=4)
    assert rows(torch.zeros(7, 3), torch.zeros(7, 3)).temperature.shape == (7, 1)
    assert InstanceTemperature()(torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)).temperature.mean() > 14


@pytest.mark.parametrize('name', [name for name in TAKES if name != 'ChannelwiseKLLoss'])
@pytest.mark.parametrize('per', ['position', 'image'])
def test_what_does_not_count_reaches_nothing(name, per):
    torch.manual_seed(0)
    student, teacher = pair(torch.float32)
    valid = torch.rand(2, 4, 6) > 0.3
    loss = make(name, dict(type='mmstructkd.InstanceTemperature', hidden=4, per=per))
    loss.bind(student, teacher)
    loss.temperature.set_progress(1, 1)
    results = []
    for fill in (0.0, float('nan')):
        spoiled = [torch.where(valid[:, None], z.detach(), fill) for z in (student, teacher)]
        spoiled[0].requires_grad_()
        value = loss(*spoiled, targets(valid))
        results.append((value, *torch.autograd.grad(value, (spoiled[0], *loss.parameters()))))
    torch.testing.assert_close(*results)
    nothing = loss(student, teacher, targets(torch.zeros(2, 4, 6, dtype=torch.bool)))
    assert nothing == 0
    nothing.backward()


def test_two_classes_and_impossible_ones():
    one, two = torch.randn(2, 1, 4, 6, requires_grad=True), torch.randn(2, 2, 4, 6)
    loss = PixelwiseKLLoss(temperature=InstanceTemperature(hidden=4))
    loss.bind(one, two)
    loss(one, two).backward()
    assert one.grad.any()
    student, teacher = pair(torch.float32)
    loss = PixelwiseKLLoss(temperature=InstanceTemperature(hidden=4), class_map=[0, 1, 2, 2])
    wide = torch.cat([teacher, torch.full((2, 1, 4, 6), -torch.inf)], 1)
    loss.bind(student, wide)
    value = loss(student, wide)
    value.backward()
    assert value.isfinite()
    assert all(p.grad.isfinite().all() for p in (student, *loss.parameters()))


def test_rows_belong_to_no_image():
    loss = PixelwiseKLLoss(temperature=InstanceTemperature(per='image'))
    with pytest.raises(ConfigError, match="`per` must be 'position' for rows"):
        loss.bind(torch.zeros(5, 3), torch.zeros(5, 3))


def test_copies_state_and_width():
    loss = PixelwiseKLLoss(temperature=InstanceTemperature(hidden=4))
    student, teacher = pair(torch.float32)
    loss.bind(student, teacher)
    names = [f'temperature.{name}' for name in InstanceTemperature.no_weight_decay]
    assert list(loss.state_dict()) == names
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(student, teacher), loss(student, teacher))
    with pytest.raises(ShapeError, match='must have 6 channels together'):
        loss(student[:, :2], teacher[:, :2])
    assert "per='position'" in repr(InstanceTemperature())


def test_functions_refuse_other_shapes():
    student, teacher = pair()
    for shape in ((2, 3, 1, 1), (2, 4, 6), (1, 1, 1, 1), (2,)):
        for name in TAKES:
            with pytest.raises(ShapeError, match='`temperature` must'):
                make(name, Given(torch.ones(shape), 'image'))(student, teacher, targets())


def test_trains_in_a_distiller_without_weight_decay():
    term = dict(
        tap='decode_head.conv_seg',
        loss=dict(type='mmstructkd.PixelwiseKLLoss', temperature=dict(type='mmstructkd.InstanceTemperature', hidden=4)),
    )
    model = MODELS.build(toy_distiller(terms=dict(kd=term))).train()
    wrapper = dict(optimizer=dict(type='AdamW', lr=0.1, weight_decay=0.5), type='OptimWrapper')
    optimiser = build_optim_wrapper(model, dict(wrapper, constructor='mmstructkd.DistillOptimWrapperConstructor'))
    temperature = model.terms['kd'].loss.temperature
    mine = {id(p) for p in temperature.parameters()}
    groups = [group for group in optimiser.optimizer.param_groups if mine & {id(p) for p in group['params']}]
    assert len(mine) == 4
    assert all(group['weight_decay'] == 0 for group in groups)
    temperature.set_progress(1, 1)
    before = copy.deepcopy(temperature.state_dict())
    losses = model(**toy_batch(), mode='loss')
    total, _ = model.parse_losses(losses)
    optimiser.update_params(total)
    assert all((before[name] != value).any() for name, value in temperature.state_dict().items())
    assert not any('temperature' in key for key in model.state_dict())
    assert any('hidden_weight' in key for key in model.training_state()['terms'])


@pytest.mark.parametrize(('name', 'per'), taking)
def test_the_host_does_not_wait(name, per):
    loss = make(name, dict(type='mmstructkd.InstanceTemperature', hidden=4, per=per))
    student, teacher = pair(torch.float32)
    loss.bind(student, teacher)
    valid = torch.rand(2, 4, 6) > 0.3
    for step in range(2):
        with Watch() as watch:
            loss(student, teacher, targets(valid)).backward()
        assert step == 0 or not watch.own


@pytest.mark.parametrize('name', sorted(TAKES))
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(name, dtype):
    torch.manual_seed(0)
    loss = make(name, dict(type='mmstructkd.InstanceTemperature', hidden=4, per='image'))
    student, teacher = (z.detach().to(dtype).requires_grad_() for z in pair(torch.float32))
    loss.bind(student, teacher)
    want = loss(student.float(), teacher.float(), targets())
    got = loss(student, teacher, targets())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(loss(student.float(), teacher.float(), targets()), want, rtol=1e-4, atol=1e-6)
    assert got.dtype == torch.float32
