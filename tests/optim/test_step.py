"""The step: parts are clipped apart, what is not used rests, and nothing is taken that is not finite."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import mmengine.optim.optimizer.amp_optimizer_wrapper as amp
import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

import mmstructkd.optim.step as module
from mmstructkd.errors import ConfigError
from mmstructkd.optim import CompositeOptimizer, DistillStep, for_distiller
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor, toy_terms
from tests.test_host_sync import Watch

SGD = dict(type='SGD', lr=1.0, momentum=0.9, weight_decay=0.1)


@pytest.fixture(autouse=True)
def scaler_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``AmpOptimWrapper`` with torch's scaler for the CPU."""
    monkeypatch.setattr(amp, 'is_cuda_available', lambda: True)
    monkeypatch.setattr(amp, 'GradScaler', functools.partial(torch.amp.GradScaler, 'cpu'))


@pytest.fixture
def own_wrapper() -> Iterator[str]:
    """A wrapper of somebody's own that clips by the mean of the gradients' sizes."""

    class MeanClipped(OptimWrapper):
        def _clip_grad(self) -> None:
            grads = [p.grad for g in self.optimizer.param_groups for p in g['params'] if p.grad is not None]
            mean = torch.cat([grad.flatten() for grad in grads]).abs().mean()
            self.message_hub.update_scalar('train/grad_mean', float(mean))
            for grad in grads:
                grad.mul_(self.clip_grad_kwargs['max_norm'] / mean)

    OPTIM_WRAPPERS.register_module(module=MeanClipped, name='MeanClipped')
    yield 'MeanClipped'
    OPTIM_WRAPPERS.module_dict.pop('MeanClipped')


def distiller(terms: dict | None = None, **changes: Any) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    config = toy_distiller(**changes)
    if terms is not None:
        config.terms = terms
    for network in (config.student, config.teacher.config):
        network.decode_head.dropout_ratio = network.auxiliary_head.dropout_ratio = 0.0
    return MODELS.build(config).train()


def wrapped(model: nn.Module, kind: str = 'OptimWrapper', optimizer: dict = SGD, **settings: Any) -> OptimWrapper:
    """The wrapper that a run has."""
    config = dict(type=kind, optimizer=dict(optimizer), **settings)
    return build_optim_wrapper(model, for_distiller(copy.deepcopy(config), model))


def step(model: nn.Module, wrapper: OptimWrapper, seed: int = 0) -> dict[str, torch.Tensor]:
    """One training step, as the loop makes it."""
    torch.manual_seed(seed)
    with wrapper.optim_context(model):
        losses = model(**toy_batch(seed=seed), mode='loss')
    total, logged = model.parse_losses(losses)
    wrapper.update_params(total)
    return logged


def values(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def moved(before: dict[str, torch.Tensor], network: nn.Module) -> torch.Tensor:
    """Norm of the update."""
    return torch.cat([(p.detach() - before[name]).flatten() for name, p in network.named_parameters()]).norm()


# --- clipping -----------------------------------------------------------------------------------------------------

KINDS = ['OptimWrapper', 'AmpOptimWrapper', 'mmstructkd.AutocastOptimWrapper']


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'clip', [dict(max_norm=0.1), dict(type='value', clip_value=1e-3), dict(max_norm=0.1, norm_type=1)]
)
def test_the_students_step_depends_on_no_other_part(kind: str, clip: dict) -> None:
    """On no critic's weight, and on no connector's gradient."""
    students, critics = [], []
    for weight, factor in ((0, 1), (0.1, 1), (1, 1), (10, 1), (0.1, 1000)):
        terms = toy_terms()
        terms['holistic']['loss'].update(critic_weight=weight, seed=0)
        model = distiller(terms)
        wrapper = wrapped(model, kind, dict(type='SGD', lr=1.0), clip_grad=dict(clip))
        for parameter in model.terms['feature'].connectors.parameters():
            parameter.register_hook(lambda grad, factor=factor: grad * factor)
        before, critic = values(model.student), values(model.terms['holistic'])
        step(model, wrapper)
        students.append(values(model.student))
        critics.append(float(moved(critic, model.terms['holistic'])))
        if clip == dict(max_norm=0.1):
            assert float(moved(before, model.student)) == pytest.approx(0.1, rel=1e-3)
    assert all(same(student, students[0]) for student in students)
    assert critics[0] == 0  # of weight 0 it does not learn
    assert all(critics[1:])


@pytest.mark.parametrize('kind', KINDS)
def test_the_students_clipping_and_its_log_are_those_of_plain_training(kind: str) -> None:
    clip, optimizer = dict(max_norm=0.1), dict(SGD, lr=0.1)
    terms = {name: dict(term, loss=dict(term['loss'], loss_weight=0.0)) for name, term in toy_terms().items()}
    model = distiller(terms)
    plain = copy.deepcopy(model.student)
    other = build_optim_wrapper(plain, dict(type=kind, optimizer=optimizer, clip_grad=dict(clip)))
    wrapper = wrapped(model, kind, optimizer, clip_grad=dict(clip))
    for number in range(3):
        step(plain, other, number)
        norm = other.message_hub.get_scalar('train/grad_norm').current()
        step(model, wrapper, number)
        assert wrapper.message_hub.get_scalar('train/grad_norm').current() == norm
    assert same(values(model.student), values(plain))
    assert all(torch.equal(b, c) for b, c in zip(model.student.buffers(), plain.buffers(), strict=True))


def test_each_part_has_a_norm_of_its_own() -> None:
    model = distiller()
    wrapper = wrapped(model, optimizer=dict(type='SGD', lr=1.0), clip_grad=dict(max_norm=1e-3))
    feature = values(model.terms['feature'])
    step(model, wrapper)
    assert float(moved(feature, model.terms['feature'])) == pytest.approx(1e-3, rel=1e-2)
    assert wrapper.message_hub.get_scalar('train/grad_norm').current() > 1e-2  # of the student, before


def test_a_wrapper_with_a_clipping_of_its_own_keeps_it(own_wrapper: str) -> None:
    model = distiller()
    wrapper = wrapped(model, own_wrapper, dict(type='SGD', lr=1.0), clip_grad=dict(max_norm=1e-3))
    before = values(model.student)
    step(model, wrapper)
    sizes = torch.cat([(p.detach() - before[n]).abs().flatten() for n, p in model.student.named_parameters()])
    assert float(sizes.mean()) == pytest.approx(1e-3, rel=1e-2)
    assert len(wrapper.message_hub.get_scalar('train/grad_mean').data[0]) == 1


# --- rest ---------------------------------------------------------------------------------------------------------


def states(wrapper: OptimWrapper, network: nn.Module) -> list[torch.Tensor]:
    """Momenta, second moments and counters of a network's parameters."""
    held = wrapper.optimizer.state
    return [value.clone() for p in network.parameters() for value in held.get(p, {}).values() if torch.is_tensor(value)]


@pytest.mark.parametrize('optimizer', [SGD, dict(type='AdamW', lr=0.1, weight_decay=0.1)], ids=['sgd', 'adamw'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('off', ['factor', 'interval_factor'])
def test_what_is_not_used_stands_still(optimizer: dict, kind: str, off: str) -> None:
    """A schedule that is off, and a teacher that is asked every k-th time."""
    model = distiller()
    model.terms['holistic'].loss.own_optimizer = dict(optimizer)
    wrapper = wrapped(model, kind, optimizer, clip_grad=dict(max_norm=1.0))
    step(model, wrapper)
    before, held = values(model.terms), [state for term in model.terms.values() for state in states(wrapper, term)]
    assert held
    student = values(model.student)
    for term in model.terms.values():
        setattr(term, off, 0.0)
    for number in (1, 2):
        step(model, wrapper, number)
    assert same(values(model.terms), before)
    after = [state for term in model.terms.values() for state in states(wrapper, term)]
    assert all(torch.equal(a, b) for a, b in zip(held, after, strict=True))
    assert moved(student, model.student) > 0
    for term in model.terms.values():
        setattr(term, off, 1.0)
    step(model, wrapper, 3)
    for name in ('feature', 'holistic'):
        assert moved({n.removeprefix(f'{name}.'): v for n, v in before.items()}, model.terms[name]) > 0


def test_one_term_rests_while_another_moves() -> None:
    terms = toy_terms()
    terms['second'] = copy.deepcopy(terms['feature'])
    model = distiller(terms)
    wrapper = wrapped(model)
    step(model, wrapper)
    first, second = values(model.terms['feature']), values(model.terms['second'])
    model.terms['feature'].factor = 0.0
    step(model, wrapper, 1)
    assert same(values(model.terms['feature']), first)
    assert moved(second, model.terms['second']) > 0


@pytest.mark.parametrize('used', [(True, False), (False, True), (False, False)])
def test_a_window_of_accumulation_counts_as_a_whole(used: tuple[bool, bool]) -> None:
    model = distiller()
    wrapper = wrapped(model, accumulative_counts=2)
    for number in (0, 1):
        step(model, wrapper, number)
    before = values(model.terms)
    for number, active in enumerate(used):
        for term in model.terms.values():
            term.factor = float(active)
        step(model, wrapper, 2 + number)
    assert same(values(model.terms), before) == (not any(used))


def test_idle_parameters_are_still_in_the_backward_pass() -> None:
    """So that DDP waits for none, and without `find_unused_parameters`."""
    model = distiller()
    wrapper = wrapped(model, accumulative_counts=2)
    for term in model.terms.values():
        term.factor = 0.0
    step(model, wrapper)
    assert all(p.grad is not None for p in model.terms.parameters() if p.requires_grad)


def test_an_optimiser_at_rest_is_not_stepped() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    calls: list[int] = []
    parts = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (first, second)]
    for number, part in enumerate(parts):
        part.register_step_pre_hook(lambda *a, number=number: calls.append(number))
    composite = CompositeOptimizer(parts)
    first(torch.ones(1, 2)).sum().backward()
    composite.step()
    second(torch.ones(1, 2)).sum().backward()
    composite.step()
    assert calls == [0, 0, 1]


def test_a_group_that_is_added_later_is_stepped() -> None:
    model = distiller()
    wrapper = wrapped(model, clip_grad=dict(max_norm=1.0))
    late = nn.Parameter(torch.ones(2))
    wrapper.optimizer.add_param_group({'params': [late]})
    late.grad = torch.ones(2)
    step(model, wrapper)
    assert bool((late < 1).all())
    assert wrapper.optimizer.param_groups[-1]['lr'] == 4e-4  # the critic's own group is still the last


# --- finite -------------------------------------------------------------------------------------------------------


def spoil(parameter: nn.Parameter, value: float = float('nan')) -> None:
    parameter.register_hook(lambda grad: torch.full_like(grad, value))


NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('kind', ['OptimWrapper', 'mmstructkd.AutocastOptimWrapper'])
@pytest.mark.parametrize(
    ('place', 'value', 'message'),
    [
        (
            'student.decode_head.conv_seg.weight',
            NAN,
            r'the gradient of decode_head.conv_seg.weight \(nan\).*Side: student. All',
        ),
        (
            'student.backbone.layer1.0.conv1.weight',
            INF,
            r'the gradient of backbone.layer1.0.conv1.weight \(inf\).*Side: student. All',
        ),
        (
            'student.backbone.layer1.0.conv1.weight',
            1e30,
            r'the gradient of backbone.layer1.0.conv1.weight \(inf\).*Side: student. All',
        ),
        (
            'terms.feature.connectors.0',
            NAN,
            r"the gradient of term 'feature': connectors.0\S* \(nan\).*Side: connector of term 'feature'",
        ),
        (
            'terms.holistic.losses.0.critic',
            INF,
            r"the gradient of term 'holistic': losses.0.critic\S* \(inf\).*Side: critic of term 'holistic'",
        ),
    ],
)
def test_a_gradient_that_is_not_finite_is_not_taken(kind: str, place: str, value: float, message: str) -> None:
    model = distiller()
    wrapper = wrapped(model, kind, clip_grad=dict(max_norm=1.0))
    step(model, wrapper)
    before = values(model)
    spoil(next(p for name, p in model.named_parameters() if name.startswith(place)), value)
    with pytest.raises(FloatingPointError, match=f'this step: {message}'):
        step(model, wrapper, 1)
    assert same(values(model), before)
    assert model.last_step is None


def test_the_loss_whose_gradient_it_is_is_named() -> None:
    model = distiller()

    def compute(student: torch.Tensor, teacher: torch.Tensor, targets: Any) -> torch.Tensor:
        return (student * 0).square().sum().sqrt()  # 0, with the gradient inf * 0

    model.terms['pairwise'].loss.compute = compute
    with pytest.raises(FloatingPointError, match=r"losses are \(.*Side: loss.* of term 'pairwise' are finite"):
        step(model, wrapped(model))


def test_running_statistics_count() -> None:
    model = distiller()
    wrapper = wrapped(model)
    norm = model.student.backbone.layer4[0].bn1

    def spread(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        module.running_var = torch.full_like(module.running_var, INF)

    norm.register_forward_hook(spread)
    with pytest.raises(
        FloatingPointError, match=r'backbone.layer4.0.bn1.running_var \(inf\) in the running statistics'
    ):
        step(model, wrapper)


def test_a_constant_may_be_infinite() -> None:
    model = distiller()
    model.student.register_buffer('mask', torch.tensor([0.0, -INF]))
    step(model, wrapped(model))


def test_accumulation_stops_at_the_batch() -> None:
    model = distiller()
    wrapper = wrapped(model, accumulative_counts=3)
    step(model, wrapper)
    model.teacher.network.decode_head.conv_seg.register_forward_hook(lambda module, args, output: output * NAN)
    with pytest.raises(FloatingPointError, match="loss_kd_pixel is nan.*Side: teacher. term 'pixel'"):
        step(model, wrapper, 1)


# --- where reading waits ------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, '_free_to_read', lambda tensor: False)


@pytest.mark.usefixtures('as_on_an_accelerator')
@pytest.mark.parametrize('bad', [False, True], ids=['sound', 'bad'])
def test_the_check_does_not_wait_and_a_bad_step_does_no_harm(bad: bool) -> None:
    model = distiller()
    model.terms['holistic'].loss.own_optimizer = dict(SGD)  # Adam reads its step counter, on a CPU
    wrapper = wrapped(model, clip_grad=dict(max_norm=1.0))
    step(model, wrapper)
    wrapper.check_last_step()
    if bad:
        spoil(model.student.decode_head.conv_seg.weight)
    with Watch() as watch:
        step(model, wrapper, 1)
    assert not watch.own
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert model.last_step is not None  # until the verdict is read
    if bad:
        with pytest.raises(FloatingPointError, match='the gradient of decode_head.conv_seg.weight'):
            wrapper.check_last_step()
    else:
        wrapper.check_last_step()
    assert model.last_step is None


@pytest.mark.usefixtures('as_on_an_accelerator')
def test_an_unread_verdict_is_read_at_the_next_step() -> None:
    model = distiller()
    wrapper = wrapped(model)
    spoil(model.student.decode_head.conv_seg.weight)
    step(model, wrapper)
    with pytest.raises(FloatingPointError, match='the gradient of decode_head.conv_seg.weight'):
        step(model, wrapper, 1)


@pytest.mark.usefixtures('as_on_an_accelerator')
def test_sound_steps_are_the_same_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for free in (False, True):
        monkeypatch.setattr(module, '_free_to_read', lambda tensor, free=free: free)
        model = distiller()
        wrapper = wrapped(model, clip_grad=dict(max_norm=0.1))
        for number in range(2):
            step(model, wrapper, number)
            wrapper.check_last_step()
        found.append(values(model))
    assert same(*found)


# --- scalers ------------------------------------------------------------------------------------------------------


def overflow(model: nn.Module) -> Callable[[bool], None]:
    """A switch for gradients that overflow."""
    on = [False]
    weight = model.student.decode_head.conv_seg.weight
    weight.register_hook(lambda grad: grad * INF if on[0] else grad)
    return lambda value: on.__setitem__(0, value)


@pytest.mark.parametrize('clip', [None, dict(max_norm=0.1)])
def test_a_scaler_goes_on_skipping(clip: dict | None) -> None:
    model = distiller()
    wrapper = wrapped(model, 'AmpOptimWrapper', loss_scale=dict(init_scale=4.0), clip_grad=clip)
    switch = overflow(model)
    step(model, wrapper)
    before = values(model)
    switch(True)
    step(model, wrapper, 1)
    assert same(values(model), before)
    assert wrapper.loss_scaler.get_scale() == 2.0
    switch(False)
    step(model, wrapper, 2)
    assert not same(values(model), before)


def test_a_scale_that_collapses_is_an_error() -> None:
    model = distiller()
    wrapper = wrapped(model, 'AmpOptimWrapper', loss_scale=dict(init_scale=2.0**-18))
    overflow(model)(True)
    step(model, wrapper)
    step(model, wrapper, 1)
    step(model, wrapper, 2)
    with pytest.raises(FloatingPointError, match=r'4 updates in a row were left out .* at a loss scale of 4\.77e-07'):
        step(model, wrapper, 3)


def test_a_fixed_scale_that_never_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'PATIENCE', 3)
    model = distiller()
    wrapper = wrapped(model, 'AmpOptimWrapper', loss_scale=8.0)
    switch = overflow(model)
    for bad in (True, True, False, True, True):  # never three in a row
        switch(bad)
        step(model, wrapper)
    with pytest.raises(FloatingPointError, match='3 updates in a row were left out.*the gradient of decode_head'):
        step(model, wrapper)


@pytest.mark.parametrize('free', [True, False])
def test_a_loss_that_is_not_finite_is_none_of_the_scalers_business(monkeypatch: pytest.MonkeyPatch, free: bool) -> None:
    monkeypatch.setattr(module, '_free_to_read', lambda tensor: free)
    model = distiller()
    wrapper = wrapped(model, 'AmpOptimWrapper')
    model.teacher.network.decode_head.conv_seg.register_forward_hook(lambda module, args, output: output * NAN)

    def run() -> None:
        step(model, wrapper)
        wrapper.check_last_step()

    with pytest.raises(FloatingPointError, match='loss_kd_pixel is nan.*Side: teacher'):
        run()


# --- what can be extended -----------------------------------------------------------------------------------------


def test_the_wrapper_stays_of_its_class() -> None:
    model = distiller()
    wrapper = wrapped(model, 'AmpOptimWrapper')
    assert isinstance(wrapper, DistillStep)
    assert isinstance(wrapper, amp.AmpOptimWrapper)
    assert type(wrapper).__name__ == 'DistillAmpOptimWrapper'
    assert type(wrapped(model, 'AmpOptimWrapper')) is type(wrapper)


@pytest.mark.parametrize('in_a_dict', [False, True])
def test_a_built_wrapper_is_extended(in_a_dict: bool) -> None:
    terms = {name: term for name, term in toy_terms().items() if name != 'holistic'}
    model = distiller(terms)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = dict(optimizer=optimizer) if in_a_dict else OptimWrapper(optimizer)
    wrapper = for_distiller(settings, model)
    assert isinstance(wrapper, DistillStep)
    step(model, wrapper)


def test_a_built_wrapper_must_train_the_terms() -> None:
    terms = {name: term for name, term in toy_terms().items() if name != 'holistic'}
    model = distiller(terms)
    with pytest.raises(ConfigError, match="term 'feature': `optim_wrapper` must train what the term trains"):
        for_distiller(OptimWrapper(torch.optim.SGD(model.student.parameters(), lr=0.1)), model)
    model = distiller()
    with pytest.raises(ConfigError, match="term 'holistic': its own `optimizer` must be built with the rest"):
        for_distiller(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)), model)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(student=dict(type='OptimWrapper')), "must be a dict with the key 'optimizer', got \\['student'\\]"),
        ([1], 'must be a dict with the key .*, got list'),
        (
            dict(optimizer=SGD, constructor='DefaultOptimWrapperConstructor', base_constructor='Other'),
            "must name one constructor for the student, got constructor='Default.*' and base_constructor='Other'",
        ),
        (
            dict(optimizer=SGD, base_constructor='DefaultOptimWraperConstructor'),
            "`base_constructor` must name a registered class, got 'DefaultOptimWraperConstructor'. "
            "Did you mean 'DefaultOptimWrapperConstructor'",
        ),
        (
            dict(optimizer=SGD, constructor='LayerDecay'),
            "`constructor` must name a registered class, got 'LayerDecay'",
        ),
        (
            dict(optimizer=SGD, base_constructor='mmstructkd.DistillOptimWrapperConstructor'),
            '`base_constructor` must be that of the plain student',
        ),
    ],
)
def test_other_settings_are_refused_by_name(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        for_distiller(settings, distiller())


@pytest.mark.parametrize(
    'settings',
    [
        dict(base_constructor='mmseg.LearningRateDecayOptimizerConstructor'),
        dict(constructor='mmseg.LearningRateDecayOptimizerConstructor'),
        dict(
            constructor='mmstructkd.DistillOptimWrapperConstructor',
            base_constructor='mmseg.LearningRateDecayOptimizerConstructor',
        ),
    ],
)
def test_the_students_constructor_is_used_however_it_is_given(settings: dict) -> None:
    model = distiller()
    paramwise = dict(decay_rate=0.5, decay_type='layer_wise', num_layers=4)

    class Backbone(type(model.student.backbone)):
        pass

    Backbone.__name__ = 'ConvNeXt'  # what that constructor asks for
    model.student.backbone.__class__ = Backbone
    wrapper = wrapped(model, paramwise_cfg=paramwise, **settings)
    groups = wrapper.optimizer.parts[0].param_groups
    assert ['lr_scale' in group for group in groups] == [True] * (len(groups) - 1) + [False]
    assert all(len(group['param_names']) == len(group['params']) for group in groups)
    step(model, wrapper)
    wrapper.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    step(model, wrapper, 1)


@pytest.mark.parametrize(
    ('optimizer', 'message'),
    [
        (
            dict(type='SDG', lr=0.1),
            r"`optim_wrapper`\['optimizer'\]: `type` must name .* got 'SDG'. Did you mean 'SGD'",
        ),
        (dict(type='SGD', lr=0.1, momentun=0.9), r'`optim_wrapper` must be one that can be built.*momentun'),
        (dict(type='SGD', lr=-1.0), r'`optim_wrapper` must be one that can be built.*Invalid learning rate'),
        (dict(lr=0.1), r"`optim_wrapper`\['optimizer'\] must be a dict with a `type`"),
    ],
)
def test_typos_of_the_students_optimiser(optimizer: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wrapped(distiller(), optimizer=optimizer)


def test_typos_of_the_wrapper() -> None:
    with pytest.raises(ConfigError, match="`type` must name a registered class, got 'AmpOptimWraper'. Did you mean"):
        wrapped(distiller(), 'AmpOptimWraper')
    with pytest.raises(ConfigError, match='`optim_wrapper` must be one that can be built.*clip_gard'):
        wrapped(distiller(), clip_gard=dict(max_norm=1.0))


@pytest.mark.parametrize(
    ('optimizer', 'message'),
    [
        (
            dict(type='Adma', lr=1e-4),
            r"optimizer\['type'\]` must name a registered class, got 'Adma'. Did you mean .*'Adam'",
        ),
        (dict(type='Adam', lr=1e-4, beta=(0.9, 0.99)), "only arguments of Adam, got 'beta'. Did you mean 'betas'"),
        (dict(type='SGD', lr=-1.0), 'must be one that can be built, got .* Invalid learning rate'),
        (dict(type='Adam', lr=1e-4, betas=(0.9, 1.5)), 'must be one that can be built, got .* Invalid beta'),
        (dict(type='Adam', lr=1e-4, params=[]), r"optimizer\['params'\]` must be left out"),
    ],
)
def test_typos_of_a_critics_optimiser_name_the_term(optimizer: dict, message: str) -> None:
    terms = toy_terms()
    terms['holistic']['loss']['optimizer'] = optimizer
    with pytest.raises(ConfigError, match=f"term 'holistic': .*{message}"):
        distiller(terms)


def test_plain_networks_are_refused() -> None:
    with pytest.raises(ConfigError, match='must be a StructuredDistiller'):
        build_optim_wrapper(
            MODELS.build(toy_segmentor(4)),
            dict(type='OptimWrapper', constructor='mmstructkd.DistillOptimWrapperConstructor', optimizer=SGD),
        )
