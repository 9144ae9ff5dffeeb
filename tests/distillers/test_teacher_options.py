"""What makes the teacher cheaper: what each option changes in its outputs, and in the student's gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers import FrozenTeacher, StructuredDistiller
from mmstructkd.errors import ConfigError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.taps import Tap
from mmstructkd.teachers import TeacherGroup, execution
from mmstructkd.teachers import frozen as teacher
from mmstructkd.teachers.building import build_source
from mmstructkd.teachers.folding import fold_batch_norm
from mmstructkd.teachers.loading import build_network
from mmstructkd.testing import toy_batch, toy_config, toy_detector, toy_distiller, toy_segmentor

# Largest deviation of the student's gradient from that with the plain teacher, relative to its norm.
TOLERANCE = {
    'fuse_conv_bn': 1e-4,
    'channels_last': 1e-4,
    'fp32': 0.0,
    'fp16': 0.01,
    'bf16': 0.05,
    'compile': 1e-4,
    'all': 0.05,
}
OPTIONS: dict[str, dict[str, Any]] = {
    'fuse_conv_bn': dict(fuse_conv_bn=True),
    'channels_last': dict(channels_last=True),
    'fp32': dict(dtype='fp32'),
    'fp16': dict(dtype='fp16'),
    'bf16': dict(dtype='bf16'),
    'all': dict(fuse_conv_bn=True, channels_last=True, dtype='bf16'),
}
LOGITS = Tap.parse('decode_head.conv_seg')


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """Checkpoint of a toy segmentor of width 8 whose BatchNorms have seen something."""
    return save_weights(toy_segmentor(8), tmp_path / 'teacher.pth')


def save_weights(config: dict, path: Path) -> str:
    network = build_network(config, 'test')
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    torch.save(network.state_dict(), path)
    return str(path)


def build(weights: str, **options: Any) -> StructuredDistiller:
    torch.manual_seed(0)
    return MODELS.build(toy_distiller(teacher=dict(config=toy_segmentor(8), checkpoint=weights, **options))).train()


def gradients(model: StructuredDistiller) -> torch.Tensor:
    """Gradient of the terms in the student, as one vector."""
    torch.manual_seed(1)
    losses = model(**toy_batch(), mode='loss')
    sum(value for name, value in losses.items() if name.startswith('loss_kd_')).backward()
    return torch.cat([p.grad.flatten() for p in model.student.parameters() if p.grad is not None])


def outputs(model: StructuredDistiller) -> dict[Tap, list[torch.Tensor]]:
    taps = [tap for term in model.terms.values() for tap in term.teacher_taps]
    return model.teacher.observe(**toy_batch(), taps=taps)


def deviation(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize('name', list(OPTIONS))
def test_the_students_gradient_is_that_of_the_plain_teacher(name: str, weights: str) -> None:
    plain, cheap = build(weights), build(weights, **OPTIONS[name])
    seen, expected = outputs(cheap), outputs(plain)
    for tap, tensors in expected.items():
        for one, two in zip(seen[tap], tensors, strict=True):
            assert one.dtype == torch.float32
            assert deviation(one, two) <= TOLERANCE[name]
            # rounding leaves its mark, so the option does something (fp32: nothing to do outside AMP)
            assert name in ('fp32', 'channels_last') or not torch.equal(one, two)
    measured = deviation(gradients(cheap), gradients(plain))
    assert measured <= TOLERANCE[name], f'{name}: {measured:.2e}'


def test_fused_norms_are_gone(weights: str) -> None:
    network = build(weights, fuse_conv_bn=True).teacher.network
    left = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert left
    assert all(name.startswith('auxiliary_head') for name in left)  # which does not run


def test_a_tapped_norm_is_not_folded(weights: str) -> None:
    """A tap means the same with and without the option: before the norm, and behind it."""
    taps = [Tap.parse(text) for text in ('backbone.layer1.0.conv1', 'in:backbone.layer2.0.bn2', 'decode_head.convs')]
    records = []
    for fuse in (False, True):
        teacher = FrozenTeacher(toy_segmentor(8), weights, fuse_conv_bn=fuse)
        teacher.attach(MODELS.build(toy_segmentor(4)))
        batch = toy_batch()
        teacher.probe(batch['inputs'], None, taps)
        records.append(teacher.observe(batch['inputs'], None, taps))
    for tap in taps:
        assert deviation(records[1][tap][0], records[0][tap][0]) < 1e-5
    assert isinstance(teacher.network.backbone.layer1[0].bn1, nn.BatchNorm2d)
    assert isinstance(teacher.network.backbone.layer1[0].bn2, nn.Identity)


def test_a_later_tap_must_leave_what_is_folded_alone(weights: str) -> None:
    teacher = FrozenTeacher(toy_segmentor(8), weights, fuse_conv_bn=True)
    batch = toy_batch()
    teacher.probe(batch['inputs'], None, [LOGITS])
    later = Tap.parse('backbone.layer1.0.bn1')
    message = "got 'backbone.layer1.0.bn1' .*folded into 'backbone.layer1.0.conv1' already.* set fuse_conv_bn=False"
    with pytest.raises(TapError, match=message):
        teacher.probe(batch['inputs'], None, [later])


class Branches(nn.Module):
    """What must not be folded: a norm in front, two norms of one convolution, an output that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.before = ConvModule(4, 4, 3, padding=1, norm_cfg=dict(type='BN'), order=('norm', 'conv', 'act'))
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.third = nn.BatchNorm2d(4)
        self.plain = ConvModule(4, 4, 3, padding=1, norm_cfg=dict(type='BN'))
        self.wider = nn.ConvTranspose2d(4, 6, 2, stride=2)
        self.fourth = nn.BatchNorm2d(6, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        x = self.first(self.shared(x)) + self.second(self.shared(x.flip(1)))
        y = self.read_twice(x)
        return self.fourth(self.wider(self.plain(y + self.third(y))))


def test_folds_only_what_belongs_together() -> None:
    network = Branches().eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 5, 7)
    expected = network(x)
    folded = fold_batch_norm(network, lambda: network(x))
    assert folded == {'plain.bn': 'plain.conv', 'fourth': 'wider'}
    assert torch.allclose(network(x), expected, atol=1e-5)


def test_channels_last_reaches_the_taps(weights: str) -> None:
    model = build(weights, channels_last=True)
    (logits,) = outputs(model)[Tap.parse('decode_head.convs')]
    assert logits.is_contiguous(memory_format=torch.channels_last)
    assert not logits.is_contiguous()


@pytest.mark.parametrize(
    ('options', 'last'),
    [
        (dict(), False),
        (dict(dtype='fp32'), False),
        (dict(dtype='bf16'), True),
        (dict(dtype='fp16'), True),
        (dict(dtype='bf16', channels_last=False), False),
    ],
)
def test_half_precision_takes_the_format_of_its_kernels(options: dict, last: bool, weights: str) -> None:
    (feature,) = outputs(build(weights, **options))[Tap.parse('decode_head.convs')]
    assert feature.is_contiguous(memory_format=torch.channels_last) == last


@pytest.mark.parametrize(('name', 'dtype'), [('bf16', torch.bfloat16), ('fp16', torch.float16)])
def test_low_precision_is_the_teachers_alone(name: str, dtype: torch.dtype, weights: str) -> None:
    model = build(weights, dtype=name)
    seen = []
    outputs(model)
    for module in model.teacher.held_modules()[-1].modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.dtype == dtype
            module.register_forward_hook(lambda m, a, o: seen.append(o.dtype))
    outputs(model)
    assert set(seen) == {dtype}
    # connectors that use a part of the teacher find it in full precision
    assert {p.dtype for p in model.teacher.network.parameters()} == {torch.float32}
    assert all(term.factor == 1 for term in model.terms.values())
    losses = model(**toy_batch(), mode='loss')
    assert all(value.dtype == torch.float32 for key, value in losses.items() if key.startswith('loss_kd'))


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trace as the compiler does, without making machine code, and note each program."""
    made: list[str] = []
    original = torch.compile

    def compiled(module: nn.Module, *, options: dict | None = None, **settings: Any) -> Any:
        def backend(graph: Any, example: Any) -> Any:
            made.append(str(graph.graph))
            return graph.forward

        return original(module, backend=backend, **settings)

    monkeypatch.setattr(torch, 'compile', compiled)
    yield made
    torch._dynamo.reset()


def test_under_amp_the_teacher_follows_unless_told(weights: str) -> None:
    plain, full = build(weights), build(weights, dtype='fp32')
    expected = outputs(plain)[LOGITS][0]
    with torch.autocast('cpu', torch.bfloat16):
        followed = outputs(plain)[LOGITS][0]
        assert torch.equal(followed, followed.bfloat16().float())
        assert not torch.equal(followed, expected)
        assert torch.equal(outputs(full)[LOGITS][0], expected)


@pytest.mark.parametrize('options', [{}, dict(compile=True), dict(cache={}), dict(fuse_conv_bn=True)], ids=str)
@pytest.mark.parametrize('low', [torch.bfloat16, torch.float16])
def test_what_comes_back_is_at_least_float32(
    low: torch.dtype, options: dict, weights: str, tmp_path: Path, traced: list[str]
) -> None:
    """Whatever the student runs in, compiled or not, from a run or from a file."""
    if 'cache' in options:
        options = dict(cache=dict(folder=str(tmp_path / 'cache')))
    model = build(weights, **options)
    with torch.autocast('cpu', low):
        for _ in range(2):
            seen = outputs(model)
            assert {tensor.dtype for tensors in seen.values() for tensor in tensors} == {torch.float32}
    assert bool(traced) == ('compile' in options)
    model.double()
    batch = toy_batch()
    seen = model.teacher.observe(batch['inputs'].double(), batch['data_samples'], [LOGITS])
    assert seen[LOGITS][0].dtype == (torch.float32 if 'cache' in options else torch.float64)


def test_compiled_is_the_same_teacher(weights: str, traced: list[str]) -> None:
    plain, cheap = build(weights), build(weights, compile=True)
    for _ in range(2):
        seen, expected = outputs(cheap), outputs(plain)
        for tap, tensors in expected.items():
            for one, two in zip(seen[tap], tensors, strict=True):
                assert torch.equal(one, two)
    assert len(traced) == 1
    assert deviation(gradients(cheap), gradients(plain)) <= TOLERANCE['compile']
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in cheap.teacher.network.modules())


def test_a_pyramid_compiled_up_to_its_neck(traced: list[str]) -> None:
    teacher = FrozenTeacher(toy_detector('retinanet', 4), allow_random=True, compile=True)
    tap, batch = Tap.parse('neck[*]'), torch.randn(1, 3, 64, 64)
    samples = None
    teacher.probe(batch, samples, [tap])
    seen = teacher.observe(batch, samples, [tap])[tap]
    with torch.no_grad():
        expected = teacher.network.extract_feat(batch)
    assert len(seen) == len(expected) == 5
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))
    assert len(traced) == 1
    assert 'cls' not in traced[0]


@pytest.mark.parametrize('place', ['build', 'run'])
def test_a_compiler_that_fails_is_done_without(place: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(execution, 'print_log', lambda text, logger, level: said.append(text))

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError('no compiler here')

    monkeypatch.setattr(torch, 'compile', fails if place == 'build' else lambda *args, **kwargs: fails)
    plain, cheap = build(weights), build(weights, compile=True)
    assert torch.equal(outputs(cheap)[LOGITS][0], outputs(plain)[LOGITS][0])
    assert not cheap.teacher.compiled
    outputs(cheap)
    (text,) = said  # once
    assert 'goes on without (RuntimeError: no compiler here)' in text


@pytest.mark.slow
def test_compiled_in_earnest(weights: str) -> None:
    plain, cheap = build(weights), build(weights, compile=True, fuse_conv_bn=True)
    seen, expected = outputs(cheap), outputs(plain)
    assert cheap.teacher.compiled
    for tap, tensors in expected.items():
        assert deviation(seen[tap][0], tensors[0]) <= TOLERANCE['compile']


@pytest.mark.parametrize(('options', 'copies'), [({}, 0), (dict(dtype='bf16'), 1), (dict(dtype='fp32'), 0)])
def test_the_networks_that_are_held_are_told(options: dict, copies: int, weights: str) -> None:
    teacher = build(weights, **options).teacher
    group = TeacherGroup(first=teacher, second=teacher)
    model = build(weights, **options)
    outputs(model)
    held = model.teacher.held_modules()
    assert held[0] is model.teacher.network
    assert len(held) == 1 + copies
    assert group.held_modules() == teacher.held_modules()  # each once, however often it is a member


def test_a_moved_or_copied_teacher_keeps_its_options(weights: str) -> None:
    model = build(weights, **OPTIONS['all'])
    before = outputs(model)[LOGITS][0]
    twin = copy.deepcopy(model).to('cpu')
    assert torch.equal(outputs(twin)[LOGITS][0], before)
    assert twin.teacher.held_modules()[-1] is not model.teacher.held_modules()[-1]


# --- every k-th step -----------------------------------------------------------------------------------------


def at_step(model: StructuredDistiller, step: int) -> dict[str, torch.Tensor]:
    for term in model.terms.values():
        term.interval_factor = model.teacher.interval_factor(step)
    torch.manual_seed(1)
    return model(**toy_batch(), mode='loss')


def test_every_kth_step_keeps_the_mean_gradient(weights: str) -> None:
    plain, seldom = build(weights), build(weights, every=3)
    for model in (plain, seldom):
        for module in model.modules():  # three steps on one batch are to be alike
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout2d)):
                module.eval()
    sum(at_step(plain, 0).values())
    losses = at_step(plain, 0)
    expected = sum(v for k, v in losses.items() if 'loss_kd' in k and 'holistic' not in k)
    found = [at_step(seldom, step) for step in range(3)]
    mean = sum(v for step in found for k, v in step.items() if 'loss_kd' in k and 'holistic' not in k) / 3
    first, second = (
        torch.autograd.grad(value, list(model.student.backbone.parameters()), allow_unused=True)
        for value, model in ((expected, plain), (mean, seldom))
    )
    for one, two in zip(first, second, strict=True):
        assert one is two is None or torch.allclose(one, two, rtol=1e-4, atol=1e-7)
    for step in found[1:]:
        assert all(float(v) == 0 for k, v in step.items() if 'loss_kd' in k)


def test_between_the_teacher_rests_and_every_parameter_is_used(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(weights, every=2)
    for term in model.terms.values():
        term.interval_factor = model.teacher.interval_factor(1)
    monkeypatch.setattr(model.teacher, 'observe', None)  # calling it would fail
    model.parse_losses(model(**toy_batch(), mode='loss'))[0].backward()
    assert all(p.grad is not None for p in model.terms.parameters() if p.requires_grad)


class Interrupt(Hook):
    """Ends a run after its second iteration, as ctrl-C would."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == 2:
            raise KeyboardInterrupt


def test_every_goes_on_exactly_after_a_resume(weights: str, tmp_path: Path) -> None:
    model = toy_distiller(teacher=dict(config=toy_segmentor(8), checkpoint=weights, every=3))
    straight = Runner.from_cfg(toy_config(model, tmp_path / 'straight', max_iters=4))
    straight.train()
    logged = straight.message_hub.get_scalar('train/loss_kd_pixel').data[0]
    assert [value != 0 for value in logged] == [True, False, False, True]
    cfg = toy_config(model, tmp_path / 'stopped', max_iters=4)
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    first, second = (read_checkpoint(str(tmp_path / n / 'iter_4.pth')) for n in ('straight', 'stopped'))
    for name, value in first['state_dict'].items():
        assert torch.equal(value, second['state_dict'][name]), name
    for name, value in first['mmstructkd']['terms'].items():
        assert torch.equal(value, second['mmstructkd']['terms'][name]), name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(dtype='bf61'), "`dtype` must be one of .*got 'bf61'. Did you mean 'bf16'"),
        (dict(every=0), '`every` must be a whole number of at least 1, got 0'),
        (dict(every=1.5), '`every` must be a whole number of at least 1, got 1.5'),
        (dict(compile='yes'), "`compile` must be True or False, got 'yes'"),
        (dict(channels_last=1), '`channels_last` must be True or False, got 1'),
        (dict(fuse_conv_bn='yes'), "`fuse_conv_bn` must be True or False, got 'yes'"),
        (dict(compile=dict(mode='default')), "`compile` must be True or False, got {'mode': 'default'}"),
        (dict(compile=None), '`compile` must be True or False, got None'),
        (dict(compile=1), '`compile` must be True or False, got 1'),
        (dict(dtype=torch.bfloat16), '`dtype` must be one of .*got torch.bfloat16'),
        (dict(dtype=['bf16']), r"`dtype` must be one of .*got \['bf16'\]"),
        (dict(dtype=16), '`dtype` must be one of .*got 16'),
        (dict(channels_last='auto'), "`channels_last` must be True or False, got 'auto'"),
        (dict(every=True), '`every` must be a whole number of at least 1, got True'),
        (dict(every='2'), "`every` must be a whole number of at least 1, got '2'"),
        (dict(every=None), '`every` must be a whole number of at least 1, got None'),
        (dict(cache='folder'), "`cache` must be a dict with a `folder`, got 'folder'"),
        (dict(cache=True), '`cache` must be a dict with a `folder`, got True'),
        (dict(cache=['folder']), r"`cache` must be a dict with a `folder`, got \['folder'\]"),
        (dict(cache={}), '`cache` must be a dict with a `folder`, got {}'),
        (dict(cache=dict(folder=None)), '`cache.folder` must be the path of a folder, got None'),
        (dict(cache=dict(folder='')), "`cache.folder` must be the path of a folder, got ''"),
        (dict(cache=dict(folder=3)), '`cache.folder` must be the path of a folder, got 3'),
        (dict(cache=dict(folder='a\0b')), '`cache.folder` must be the path of a folder, got'),
        (dict(cache=dict(folder=b'cache')), "`cache.folder` must be the path of a folder, got b'cache'"),
        (dict(cache=dict(folder='unused', topk=3)), '`cache.topk` must be a dict of numbers by tap, got 3'),
        (dict(cache=dict(folder='unused', topk=['a'])), r"`cache.topk` must be a dict of numbers by tap, got \['a'\]"),
        (dict(cache=dict(folder='unused', topk={3: 1})), '`cache.topk`: `tap` must read .*got 3'),
        (dict(cache=dict(folder='unused', topk={'a': '3'})), "`cache.topk` must give a number of .*'a': '3'"),
        (dict(cache=dict(folder='unused', max_gb='5')), "`cache.max_gb` must be a finite number above 0, got '5'"),
        (dict(cache=dict(folder='unused', check=1.5)), '`cache.check` must be a whole number of at least 0, got 1.5'),
        (dict(cache=dict(folder='unused', tolerance='a')), "`cache.tolerance` must be a finite number .*got 'a'"),
        (dict(cache=dict(folder='unused', dtype=torch.half)), '`cache.dtype` must be one of .*got torch.float16'),
        ({'cache': {'folder': 'unused', 3: 4}}, '`cache` must have only the keys .*got 3'),
    ],
)
def test_refuses_before_anything_is_built(
    options: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher, 'build_network', None)  # calling it would fail
    with pytest.raises(ConfigError, match=f'`teacher` cannot be built. FrozenTeacher: {message}'):
        build_source(dict(config=toy_segmentor(8), allow_random=True, **options))
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_is_an_error_of_the_config(weights: str) -> None:
    with pytest.raises(ConfigError, match="`teacher` cannot be built.*'chanels_last'"):
        build(weights, chanels_last=True)
