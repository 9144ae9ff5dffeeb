from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import holistic as module
from mmstructkd.losses.holistic import HolisticLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from tests.reference import adversarial as reference
from tests.reference import depth as reference_depth

CLASSES = 3
TINY = {'base_channels': 2}


def make(channels=CLASSES, size=8, **kwargs):
    critic = {**TINY, **kwargs.pop('critic', {})}
    loss = HolisticLoss(critic=critic, **{'seed': 7, **kwargs})
    probe = torch.zeros(1, channels, size, size)
    loss.bind(probe, probe)
    # The attention starts switched off; open it, so that the tests see it.
    nn.init.constant_(loss.critic.attention3.gamma, 0.5)
    nn.init.constant_(loss.critic.attention4.gamma, -0.5)
    return loss


def maps(batch=2, channels=CLASSES, size=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, batch, channels, size, size, generator=generator, dtype=dtype).unbind()
    return student.requires_grad_(), teacher


def two_steps(loss, student, batch, targets, optimizers):
    """The published order: the student's step, then the critic's on the same maps."""
    image, teacher = batch
    critic, images = loss.critic, targets.images if loss.conditional else None
    ignored = None if targets.valid is None else ~targets.valid.unsqueeze(1)

    def judge(tensor):
        return critic(tensor if ignored is None else tensor.masked_fill(ignored, 0), images)

    map_s, map_t = student(image), teacher
    if loss.softmax:
        map_s, map_t = map_s.softmax(1), map_t.softmax(1)
    optimizers['student'].zero_grad()
    (loss.loss_weight * reference.adversarial_loss(judge(map_s))).backward()
    optimizers['student'].step()

    optimizers['critic'].zero_grad()
    score_t = judge(map_t)
    score_s = judge(map_s.detach())
    objective = reference.critic_loss(score_s, score_t, loss.mode)
    if loss.gradient_penalty_weight:
        u = loss.interpolation_weights(len(image))
        penalty = reference.gradient_penalty(judge, map_s.detach(), map_t, u)
        objective = objective + loss.gradient_penalty_weight * penalty
    (loss.critic_weight * objective).backward()
    optimizers['critic'].step()


def one_backward(loss, student, batch, targets, optimizers):
    image, teacher = batch
    for optimizer in optimizers.values():
        optimizer.zero_grad()
    sum(loss(student(image), teacher, targets).values()).backward()
    for optimizer in optimizers.values():
        optimizer.step()


@pytest.mark.parametrize(
    'kwargs',
    [
        {'mode': 'wgan'},
        {'mode': 'wgan', 'critic': {'batch_norm': False}},
        {'mode': 'hinge'},
        {'mode': 'hinge', 'gradient_penalty_weight': 10.0, 'critic': {'batch_norm': False}},
        {'mode': 'wgan', 'softmax': True, 'conditional': True},
    ],
    ids=['wgan-bn', 'wgan', 'hinge-bn', 'hinge-penalty', 'conditional'],
)
@pytest.mark.parametrize('masked', [False, True])
def test_one_backward_equals_the_published_two_steps(kwargs, masked):
    loss = make(**{'loss_weight': 0.1, **kwargs}).double()
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1)).double()
    pairs = {'one': (loss, student), 'two': (copy.deepcopy(loss), copy.deepcopy(student))}
    first = copy.deepcopy((loss.state_dict(), student.state_dict()))
    optimizers = {
        name: {
            'student': torch.optim.SGD(net.parameters(), lr=1.0, momentum=0.9),
            'critic': torch.optim.Adam(part.critic.parameters(), lr=1e-2, betas=(0.9, 0.99)),
        }
        for name, (part, net) in pairs.items()
    }
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        image = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
        teacher = torch.randn(2, CLASSES, 8, 8, generator=generator, dtype=torch.float64)
        valid = torch.rand(2, 8, 8, generator=generator) > 0.3 if masked else None
        targets = Targets(images=image, valid=valid)
        one_backward(*pairs['one'], (image, teacher), targets, optimizers['one'])
        two_steps(*pairs['two'], (image, teacher), targets, optimizers['two'])
    for start, one, two in zip(first, pairs['one'], pairs['two'], strict=True):
        want = two.state_dict()
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, want[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f'{n}: {m}')
        moved = [name for name, value in want.items() if not torch.equal(value, start[name])]
        assert len(moved) > 0.8 * len(want)


@pytest.mark.parametrize('mode', ['wgan', 'hinge'])
def test_who_gets_gradient_from_what(mode):
    loss = make(mode=mode)
    student, teacher = maps()
    teacher.requires_grad_()
    parts = loss(student, teacher)
    assert set(parts) == {'', 'critic'}

    parameters = dict(loss.critic.named_parameters())
    adversarial = torch.autograd.grad(
        parts[''], [student, teacher, *parameters.values()], retain_graph=True, allow_unused=True
    )
    assert adversarial[0].any()
    assert all(g is None for g in adversarial[1:])

    critic = torch.autograd.grad(parts['critic'], [student, teacher, *parameters.values()], allow_unused=True)
    assert critic[0] is None
    assert critic[1] is None
    # No unused parameter: every one gets a gradient, so that DDP need not search.
    assert all(g is not None and g.isfinite().all() for g in critic[2:])
    moving = {name for name, g in zip(parameters, critic[2:], strict=True) if g.abs().max() > 1e-12}
    assert {name for name in parameters if 'original' in name or 'gamma' in name} <= moving


def test_every_parameter_gets_gradient_while_the_attention_is_off():
    loss = make()
    for attention in (loss.critic.attention3, loss.critic.attention4):
        nn.init.zeros_(attention.gamma)
    sum(loss(*maps()).values()).backward()
    assert all(p.grad is not None for p in loss.parameters())
    assert loss.critic.attention3.gamma.grad.any()


def test_weights_scale_their_own_part():
    student, teacher = maps()
    base = make(loss_weight=1.0, critic_weight=1.0)(student, teacher)
    parts = make(loss_weight=0.25, critic_weight=0.5)(student, teacher)
    torch.testing.assert_close(parts[''], 0.25 * base[''])
    torch.testing.assert_close(parts['critic'], 0.5 * base['critic'])


def test_nothing_outlives_the_backward():
    loss = make(conditional=True)
    student, teacher = maps()
    hidden = student * 1
    watched = weakref.ref(hidden)
    parts = loss(hidden, teacher, Targets(images=torch.randn(2, 3, 16, 16)))
    sum(parts.values()).backward()
    gc.collect()
    gc.disable()
    try:
        del hidden, parts
        assert watched() is None
    finally:
        gc.enable()
    copy.deepcopy(loss)


@pytest.mark.parametrize('kwargs', [{}, {'mode': 'hinge'}, {'softmax': True}, {'critic': {'batch_norm': False}}])
def test_ignored_pixels_change_nothing(kwargs):
    student, teacher = maps()
    valid = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(3)) > 0.4
    targets = Targets(valid=valid)

    def run(student, teacher):
        loss = make(**kwargs)
        student = student.detach().requires_grad_()
        parts = loss(student, teacher, targets)
        sum(parts.values()).backward()
        return parts, student.grad, [p.grad for p in loss.parameters()]

    want_parts, want_grad, want_grads = run(student, teacher)
    other = valid.unsqueeze(1)
    parts, grad, grads = run(
        student.detach().where(other, torch.tensor(99.0)), teacher.where(other, torch.tensor(-7.0))
    )
    assert parts == want_parts
    torch.testing.assert_close(grads, want_grads)
    torch.testing.assert_close(grad, want_grad)
    assert not grad.masked_select(~other).any()
    assert grad.masked_select(other).any()


def test_mask_is_resized_to_the_map():
    loss = make()
    student, teacher = maps()
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :, 16:] = False
    loss(student, teacher, Targets(valid=valid))[''].backward()
    assert not student.grad[..., 4:].any()
    assert student.grad[..., :4].any()


def test_image_without_valid_pixels_leaves_the_means():
    kwargs = {'critic': {'batch_norm': False}}
    student, teacher = maps()
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1] = False
    got = make(**kwargs).eval()(student, teacher, Targets(valid=valid))
    want = make(**kwargs).eval()(student[:1], teacher[:1])
    assert got[''].item() == pytest.approx(want[''].item(), rel=1e-5)
    assert got['critic'].item() == pytest.approx(want['critic'].item(), rel=1e-4)


@pytest.mark.parametrize('mode', ['wgan', 'hinge'])
def test_nothing_valid(mode):
    loss = make(mode=mode)
    student, teacher = maps()
    parts = loss(student, teacher, Targets(valid=torch.zeros(2, 8, 8, dtype=torch.bool)))
    sum(parts.values()).backward()
    assert parts[''].item() == 0
    assert parts['critic'].item() == 0
    assert not student.grad.any()
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


def test_autocast_changes_nothing():
    student, teacher = maps()
    want = make()(student, teacher)
    with torch.autocast('cpu', torch.bfloat16):
        got = make()(student, teacher)
    for name in want:
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name], want[name])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scale', [0.0, 1e-6, 1e4])
def test_finite_in_half(dtype, scale):
    loss = make()
    student, teacher = maps()
    student = (scale * student.detach()).to(dtype).requires_grad_()
    sum(loss(student, (scale * teacher).to(dtype)).values()).backward()
    assert student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())


def test_channels_last():
    student, teacher = maps()
    want = make()(student, teacher)
    last = {'memory_format': torch.channels_last}
    got = make()(student.contiguous(**last), teacher.contiguous(**last))
    torch.testing.assert_close(got, want)


def test_inputs_are_left_as_they_were():
    student, teacher = maps()
    before = student.detach().clone(), teacher.clone()
    make(softmax=True)(student, teacher, Targets(valid=torch.zeros(2, 8, 8, dtype=torch.bool)))
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


def test_depth_maps():
    loss = make(channels=1, size=80)
    student, teacher = maps(channels=1, size=80)
    sum(loss(student, teacher).values()).backward()
    assert student.grad.any()
    assert loss.critic.in_channels == 1


def test_the_global_generator_is_left_alone():
    loss = make()
    before = torch.get_rng_state()
    loss(*maps())
    assert torch.equal(before, torch.get_rng_state())


def test_bind_with_a_seed_is_deterministic_and_silent():
    before = torch.get_rng_state()
    first, second, other = make(), make(), make(seed=8)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.critic.score.weight, other.critic.score.weight)


def test_bind_without_a_seed_follows_the_global_generator():
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(make(seed=None))
    weights = [loss.critic.score.weight for loss in losses]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert losses[0].stream.tolist() == losses[1].stream.tolist() != losses[2].stream.tolist()


def test_a_second_bind_keeps_the_critic():
    loss = make()
    critic = loss.critic
    loss.bind(torch.zeros(1, CLASSES, 4, 4), torch.zeros(1, CLASSES, 4, 4))
    assert loss.critic is critic
    with pytest.raises(ShapeError, match=r'the 3 channels that the critic was built for, got \(1, 5, 4, 4\)'):
        loss.bind(torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 4, 4))


def test_resume_goes_on_exactly():
    loss = make()
    student, teacher = maps()
    for _ in range(3):
        loss(student, teacher)
    resumed = make(seed=99)
    resumed.load_state_dict(loss.state_dict())
    for _ in range(2):
        assert resumed(student, teacher) == loss(student, teacher)
    assert resumed.stream.tolist() == [7, 5]


def test_every_step_has_other_interpolation_weights():
    loss = make()
    first, second = loss.interpolation_weights(4), loss.interpolation_weights(4)
    assert not torch.equal(first, second)
    assert len(set(first.tolist())) == 4
    loss.eval()
    assert torch.equal(loss.interpolation_weights(4), loss.interpolation_weights(4))
    assert not torch.equal(make(seed=8).interpolation_weights(4), first)


def test_processes_share_the_weights_of_their_joint_batch(monkeypatch):
    want = make().interpolation_weights(6)
    for rank in range(2):
        monkeypatch.setattr(module, 'get_dist_info', lambda rank=rank: (rank, 2))
        # mmengine's samplers deal every second image to each of two processes.
        assert torch.equal(make().interpolation_weights(3), want[rank::2])


class _Pair(nn.Module):
    """A student and its loss in one module, for DDP."""

    def __init__(self):
        super().__init__()
        self.loss = make(critic={'batch_norm': False}, loss_weight=0.1)
        torch.manual_seed(0)
        self.student = nn.Conv2d(3, CLASSES, 3)

    def forward(self, image, teacher):
        return sum(self.loss(self.student(image), teacher).values())


def _train(model, rank=0, world_size=1):
    generator = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        image, teacher = torch.randn(2, 4, 3, 8, 8, generator=generator).unbind()
        optimizer.zero_grad()
        model(image[rank::world_size], teacher[rank::world_size, :, 1:-1, 1:-1]).backward()
        optimizer.step()


def _run_process(rank, init, out):
    torch.distributed.init_process_group('gloo', init_method=init, rank=rank, world_size=2)
    model = _Pair()
    _train(nn.parallel.DistributedDataParallel(model), rank, 2)
    if rank == 0:
        torch.save(model.state_dict(), out)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one_with_their_joint_batch(tmp_path):
    out = tmp_path / 'state.pt'
    torch.multiprocessing.spawn(_run_process, args=(f'file://{tmp_path}/rendezvous', str(out)), nprocs=2)
    alone = _Pair()
    start = copy.deepcopy(alone.state_dict())
    _train(alone)
    want = alone.state_dict()
    assert not torch.allclose(want['student.weight'], start['student.weight'], atol=1e-4)
    torch.testing.assert_close(torch.load(out, weights_only=True), want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compiled_is_the_same():
    loss, student, teacher = make(), *maps()
    other = copy.deepcopy(loss)
    compiled = torch.compile(other, backend='aot_eager')
    for _ in range(2):
        want, got = loss(student, teacher), compiled(student, teacher)
        assert want == got
        torch.testing.assert_close(
            torch.autograd.grad(sum(got.values()), [student, *other.parameters()]),
            torch.autograd.grad(sum(want.values()), [student, *loss.parameters()]),
        )


def test_works_without_gradients():
    student, teacher = maps()
    want = make()(student, teacher)
    with torch.no_grad():
        got = make()(student, teacher)
    for name in want:
        assert not got[name].requires_grad
        torch.testing.assert_close(got[name], want[name].detach())


def test_critic_of_ones_own():
    class Mean(nn.Module):
        def __init__(self, in_channels, bias):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(in_channels) / in_channels)
            self.bias = bias

        def forward(self, tensor, images=None):
            return torch.einsum('bchw,c->b', tensor, self.weight) + self.bias

    loss = HolisticLoss(critic={'type': Mean, 'bias': 2.0}, loss_weight=1.0, gradient_penalty_weight=0.0)
    student, teacher = maps()
    loss.bind(student, teacher)
    parts = loss(student, teacher)
    assert parts[''].item() == pytest.approx(-64 * student.mean().item() - 2.0, abs=1e-4)


def test_defaults():
    loss = MODELS.build({'type': 'mmstructkd.HolisticLoss'})
    assert loss.own_optimizer == {'type': 'Adam', 'lr': 4e-4, 'betas': (0.9, 0.99)}
    assert (loss.loss_weight, loss.critic_weight, loss.gradient_penalty_weight) == (1e-3, 0.1, 10.0)
    assert (loss.mode, loss.softmax, loss.conditional, loss.needs_images) == ('wgan', False, False, False)
    assert HolisticLoss(mode='hinge').gradient_penalty_weight == 0
    assert not loss.needs_equal_channels
    assert loss.needs_equal_size


@pytest.mark.parametrize(('preset', 'paper'), [('paper', True), ('code', False)])
def test_presets(preset, paper):
    loss = HolisticLoss(preset=preset, critic=TINY, seed=0)
    assert loss.own_optimizer == {'type': 'SGD', 'lr': 4e-4, 'momentum': 0.9, 'weight_decay': 5e-4}
    assert (loss.loss_weight, loss.critic_weight, loss.gradient_penalty_weight) == (0.1, 0.1, 10.0)
    assert (loss.mode, loss.softmax, loss.conditional, loss.needs_images) == ('wgan', paper, paper, paper)
    probe = torch.zeros(1, CLASSES, 8, 8)
    loss.bind(probe, probe)
    assert loss.critic.image_channels == (3 if paper else 0)
    assert isinstance(loss.critic.input_norm, nn.Identity) == paper
    # Saying the same as the preset is no contradiction.
    HolisticLoss(preset=preset, loss_weight=0.1, softmax=paper, critic={'batch_norm': not paper})


def test_presets_share_no_state():
    first = HolisticLoss(preset='code')
    first.own_optimizer['lr'] = 1.0
    assert HolisticLoss(preset='code').own_optimizer['lr'] == 4e-4
    config = dict(TINY)
    HolisticLoss(preset='code', critic=config)
    assert config == TINY


def depths(batch=3, size=8):
    """Depths of images whose scenes lie 1, 10 and 100 m off; some pixels without a reading."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = (1 + torch.rand(2, batch, 1, size, size, generator=generator)).unbind()
    far = torch.tensor([1.0, 10.0, 100.0])[:batch, None, None, None]
    teacher = far * teacher
    teacher[torch.rand(teacher.shape, generator=generator) < 0.2] = 0
    return (far * student).requires_grad_(), teacher


@pytest.mark.parametrize('normalize', ['depth', 'log_depth'])
@pytest.mark.parametrize('masked', [False, True])
def test_critic_judges_normalized_depth(normalize, masked):
    student, teacher = depths()
    valid = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(5)) > 0.3 if masked else None
    counts = teacher[:, 0] > 0 if valid is None else valid & (teacher[:, 0] > 0)
    got = make(channels=1, normalize=normalize)(student, teacher, Targets(valid=valid))
    maps = [
        reference_depth.normalize(depth[:, 0].detach(), teacher[:, 0], counts, normalize == 'log_depth')[:, None]
        for depth in (student, teacher)
    ]
    want = make(channels=1)(*maps, Targets(valid=counts))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert not torch.isclose(got['critic'], make(channels=1)(student, teacher, Targets(valid=counts))['critic'])
    (grad,) = torch.autograd.grad(got[''], student)
    assert grad[counts[:, None]].any()
    assert not grad[~counts[:, None]].any()


def test_normalized_depth_is_of_one_size_in_every_scene():
    student, teacher = depths()
    want = make(channels=1, normalize='depth')(student, teacher)
    shrunk = torch.tensor([1.0, 0.1, 0.01])[:, None, None, None]
    got = make(channels=1, normalize='depth')(student * shrunk, teacher * shrunk)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    # The student's own scale is no part of that: it can be wrong.
    assert not torch.isclose(make(channels=1, normalize='depth')(2 * student, teacher)[''], want[''])


@pytest.mark.parametrize('normalize', ['depth', 'log_depth'])
@pytest.mark.parametrize('bad', [0.0, float('nan')])
def test_depth_without_a_reading_is_zero_with_a_graph(normalize, bad):
    student, teacher = depths()
    loss = make(channels=1, normalize=normalize)
    parts = loss(student, torch.full_like(teacher, bad))
    sum(parts.values()).backward()
    assert parts[''].item() == parts['critic'].item() == 0
    assert not student.grad.any()
    junk = torch.where(teacher > 0, student.detach(), torch.nan).requires_grad_()
    got = make(channels=1, normalize=normalize)(junk, torch.where(teacher > 0, teacher, bad))
    (grad,) = torch.autograd.grad(got[''], junk)
    assert grad.isfinite().all()
    torch.testing.assert_close(got, make(channels=1, normalize=normalize)(student, teacher))


def test_normalization_that_does_not_fit():
    with pytest.raises(ConfigError, match=r"`normalize` must be one of .*got 'log'"):
        HolisticLoss(normalize='log')
    for kwargs in ({'softmax': True}, {'preset': 'paper'}):
        with pytest.raises(ConfigError, match=r"`normalize` must be left out with softmax=True, got 'depth'"):
            HolisticLoss(normalize='depth', **kwargs)
    with pytest.raises(ShapeError, match=r"must be a depth map, .* for normalize='depth', got \(1, 3, 8, 8\)"):
        make(normalize='depth')
    assert "normalize='depth'" in repr(HolisticLoss(normalize='depth'))


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        ({'preset': 'papr'}, r"`preset` must be one of \['paper', 'code'\], got 'papr'. Did you mean 'paper'"),
        ({'preset': 'code', 'softmax': True}, r"`softmax` must be False with preset='code', got True"),
        ({'preset': 'paper', 'loss_weight': 1.0}, r"`loss_weight` must be 0.1 with preset='paper', got 1.0"),
        ({'preset': 'paper', 'optimizer': {'type': 'Adam'}}, r"`optimizer` must be .*SGD.*got \{'type': 'Adam'\}"),
        ({'preset': 'paper', 'critic': {'batch_norm': True}}, r"critic\['batch_norm'\]` must be False .* got True"),
        ({'preset': 'code', 'critic': {'type': 'Other'}}, r"`critic` must be a SAGANCritic .* got 'Other'"),
        ({'mode': 'wgan-gp'}, r"`mode` must be one of .*got 'wgan-gp'. Did you mean 'wgan'"),
        ({'loss_weight': -1}, r'`loss_weight` must be a finite number of at least 0, got -1'),
        ({'critic_weight': float('nan')}, r'`critic_weight` must be .*got nan'),
        ({'gradient_penalty_weight': -1.0}, r'`gradient_penalty_weight` must be .*got -1.0'),
        ({'optimizer': {'lr': 1.0}}, r"`optimizer` must name its type, got \{'lr': 1.0\}"),
        ({'critic': {'in_channels': 3}}, r"critic\['in_channels'\]` must be left out, got 3"),
        ({'critic': {'image_channels': 3}}, r"critic\['image_channels'\]` must be 0 with conditional=False, got 3"),
        ({'seed': -1}, r'`seed` must be an integer of at least 0 or None, got -1'),
    ],
)
def test_config_errors(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        HolisticLoss(**kwargs)


def test_unknown_argument():
    with pytest.raises(TypeError, match='lambda_d'):
        HolisticLoss(lambda_d=0.1)


def test_shape_errors():
    loss = HolisticLoss(critic=TINY)
    with pytest.raises(ConfigError, match='`bind` must be called'):
        loss(*maps())
    with pytest.raises(ShapeError, match=r'\(1, 3, 4, 4\) and \(1, 5, 4, 4\).*the same classes'):
        loss.bind(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4))
    with pytest.raises(ShapeError, match=r'`student` must have shape \(B, C, H, W\), got \(1, 3, 4\)'):
        loss.bind(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4))
    with pytest.raises(ShapeError, match=r'`targets.images` must be the input.* got None'):
        make(conditional=True)(*maps())
    with pytest.raises(ShapeError, match=r'\(2, 3, 8, 8\) and \(2, 3, 4, 4\)'):
        make()(maps()[0], maps(size=4)[1])
