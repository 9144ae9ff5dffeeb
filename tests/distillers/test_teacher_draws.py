"""A teacher that draws random numbers: from a stream of its own, the same for the same step, cached and folded."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.models.decode_heads import FCNHead
from torch import Tensor, nn
from torch.nn import functional

from mmstructkd import randomness
from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers import FrozenTeacher
from mmstructkd.errors import ConfigError
from mmstructkd.randomness import own_stream
from mmstructkd.registry import MODELS
from mmstructkd.taps import Tap
from mmstructkd.teachers.base import TeacherSource
from mmstructkd.teachers.building import build_source
from mmstructkd.teachers.loading import build_network
from mmstructkd.testing import toy_batch, toy_config, toy_distiller, toy_segmentor

CPU = torch.device('cpu')
LOGITS, FEATURE = Tap.parse('decode_head.conv_seg'), Tap.parse('backbone[*]')


class Noisy(FCNHead):
    """A head that is random in eval; subclasses say from which stream."""

    def forward(self, inputs: Any) -> Tensor:
        return self.conv_seg(self.noise(self.convs(self._transform_inputs(inputs))))


@MODELS.register_module()
class DropoutStaysOnHead(Noisy):
    """Monte Carlo dropout."""

    def noise(self, feature: Tensor) -> Tensor:
        return functional.dropout2d(feature, 0.5, training=True)


@MODELS.register_module()
class NumpyHead(Noisy):
    """Noise of numpy's global stream."""

    def noise(self, feature: Tensor) -> Tensor:
        return feature + torch.from_numpy(np.random.standard_normal(tuple(feature.shape))).to(feature)


@MODELS.register_module()
class PythonHead(Noisy):
    """Rows are scaled by numbers of Python's stream."""

    def noise(self, feature: Tensor) -> Tensor:
        return feature * torch.tensor([random.uniform(0.5, 1.5) for _ in feature]).view(-1, 1, 1, 1)


@MODELS.register_module()
class SeldomHead(Noisy):
    """Draws where an image is large only, so that a small probe does not see it."""

    def noise(self, feature: Tensor) -> Tensor:
        return functional.dropout2d(feature, 0.5, training=feature.shape[-1] * feature.shape[-2] > 40)


@MODELS.register_module()
class OwnGeneratorHead(Noisy):
    """Draws from a generator that nobody else can seed."""

    def noise(self, feature: Tensor) -> Tensor:
        if not hasattr(self, 'numbers'):
            self.numbers = np.random.default_rng(0)
        return feature + torch.from_numpy(self.numbers.standard_normal(tuple(feature.shape))).to(feature)


@MODELS.register_module()
class BatchNormalisingHead(Noisy):
    """Normalises by the batch in eval as well: an image's scores depend on the others."""

    def noise(self, feature: Tensor) -> Tensor:
        return functional.batch_norm(feature, None, None, training=True)


def hamburger() -> ConfigDict:
    """A teacher with the head of SegNeXt."""
    plain = toy_segmentor(8)
    head = dict(plain.decode_head, type='LightHamHead', in_channels=[16, 32, 64], in_index=[1, 2, 3])
    for key in ('num_convs', 'concat_input'):
        head.pop(key)
    plain.decode_head = dict(head, ham_channels=16, ham_kwargs=dict(MD_R=4))
    return plain


def noisy(kind: str) -> ConfigDict:
    plain = toy_segmentor(8)
    plain.decode_head.type = f'mmstructkd.{kind}'
    return plain


DRAWING = {
    'hamburger': hamburger,
    'dropout': lambda: noisy('DropoutStaysOnHead'),
    'numpy': lambda: noisy('NumpyHead'),
    'python': lambda: noisy('PythonHead'),
}
every_kind = pytest.mark.parametrize('kind', list(DRAWING))


def build(config: ConfigDict, probe: tuple[int, int] = (64, 128), **options: Any) -> TeacherSource:
    torch.manual_seed(0)
    teacher = build_source(dict(config=config, allow_random=True, **options))
    teacher.attach(MODELS.build(toy_segmentor(4)))
    teacher.probe(torch.zeros(1, 3, *probe), None, [LOGITS, FEATURE])
    return teacher


def show(teacher: TeacherSource, inputs: Tensor) -> Tensor:
    return teacher.observe(inputs, None, [LOGITS])[LOGITS][0]


def streams() -> tuple:
    """Where the global streams stand."""
    _, keys, *rest = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), tuple(rest), random.getstate()


# --- the stream ----------------------------------------------------------------------------------------------


DRAWS = {
    'torch': lambda: torch.rand(3).tolist(),
    'normal': lambda: torch.randn(3).tolist(),
    'numpy': lambda: np.random.rand(3).tolist(),
    'gauss': lambda: [np.random.randn(), random.gauss(0, 1)],
    'python': lambda: [random.random()],
}


@pytest.mark.parametrize('name', list(DRAWS))
def test_a_block_draws_the_same_for_the_same_step_and_leaves_no_trace(name: str) -> None:
    draw = DRAWS[name]
    before = streams()
    found = []
    for step in (3, 3, 4):
        with own_stream(CPU, step, watch=True) as draws:
            found.append(draw())
        assert draws.any
    assert found[0] == found[1] != found[2]
    assert streams() == before

    def fails() -> None:
        with own_stream(CPU):
            draw()
            raise RuntimeError('in the middle')

    with pytest.raises(RuntimeError, match='in the middle'):
        fails()
    assert streams() == before
    with own_stream(CPU, watch=True) as draws:
        pass
    assert not draws.any


def test_of_devices_only_the_one_in_use_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    class Module:
        default_generators = tuple(torch.Generator() for _ in range(3))

        @staticmethod
        def current_device() -> int:
            return 2

    monkeypatch.setattr(torch, 'get_device_module', lambda device: Module)
    for device, used in ((torch.device('cuda', 1), 1), (torch.device('cuda'), 2)):
        for generator in Module.default_generators:
            generator.manual_seed(7)
        states = [generator.get_state() for generator in Module.default_generators]
        with own_stream(device, watch=True) as draws:
            moved = [not torch.equal(g.get_state(), s) for g, s in zip(Module.default_generators, states, strict=True)]
            torch.rand(1, generator=Module.default_generators[used])
        assert draws.any
        assert moved == [place == used for place in range(3)]
        assert all(torch.equal(g.get_state(), s) for g, s in zip(Module.default_generators, states, strict=True))


# --- the teacher ---------------------------------------------------------------------------------------------


@every_kind
def test_the_same_at_the_same_step(kind: str) -> None:
    teacher = build(DRAWING[kind]())
    inputs = toy_batch()['inputs']
    before = streams()
    first, again = show(teacher, inputs), show(teacher, inputs)
    assert torch.equal(first, again)
    teacher.set_progress(5, 10)
    later = show(teacher, inputs)
    assert not torch.equal(later, first)
    assert torch.equal(show(copy.deepcopy(teacher), inputs), later)
    teacher.set_progress(0, 10)
    assert torch.equal(show(teacher, inputs), first)
    assert streams() == before


class Watch(Hook):
    """Notes where the streams stand before each iteration."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.seen.append(streams())


def train(model: ConfigDict, folder: Path, **changes: Any) -> tuple[list[tuple], dict[str, Tensor]]:
    runner = Runner.from_cfg(toy_config(model, folder, **changes))
    watch = Watch()
    runner.register_hook(watch, priority='LOWEST')
    runner.train()
    network = runner.model
    return watch.seen, network.state_dict()


@pytest.mark.parametrize('kind', ['hamburger', 'numpy'])
def test_the_student_draws_what_it_draws_alone(kind: str, tmp_path: Path) -> None:
    """With a term that weighs nothing the student is the one that trains alone, dropout included."""
    terms = dict(
        pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=1e-30))
    )
    teacher = dict(config=DRAWING[kind](), allow_random=True)
    alone = train(toy_segmentor(4), tmp_path / 'alone')
    taught = train(toy_distiller(teacher=teacher, terms=terms), tmp_path / 'taught')
    assert alone[0] == taught[0]
    assert len(alone[0]) == 4
    for name, value in alone[1].items():
        assert torch.allclose(taught[1][name].double(), value.double(), rtol=0, atol=1e-12), name


class Interrupt(Hook):
    """Ends a run after its second iteration."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_sees_the_same_teacher(tmp_path: Path) -> None:
    path = tmp_path / 'teacher.pth'
    torch.save(build_network(hamburger(), 'test').state_dict(), path)
    terms = dict(pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=10.0)))
    model = toy_distiller(teacher=dict(config=hamburger(), checkpoint=str(path)), terms=terms)
    Runner.from_cfg(toy_config(model, tmp_path / 'straight')).train()
    cfg = toy_config(model, tmp_path / 'stopped')
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    first, second = (read_checkpoint(str(tmp_path / n / 'iter_4.pth'))['state_dict'] for n in ('straight', 'stopped'))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# --- what compares, and what is kept -------------------------------------------------------------------------


@every_kind
def test_folding_compares_like_with_like(kind: str) -> None:
    plain, folded = build(DRAWING[kind]()), build(DRAWING[kind](), fuse_conv_bn=True)
    inputs = toy_batch()['inputs']
    assert any(isinstance(module, nn.Identity) for module in folded.network.backbone.modules())
    assert torch.allclose(show(folded, inputs), show(plain, inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', [*DRAWING, 'seldom', 'batch'])
def test_what_is_kept_of_an_image_does_not_depend_on_its_batch(kind: str, tmp_path: Path) -> None:
    """Neither on its place, nor on the other images, nor on the step at which it came first."""
    others = {'seldom': lambda: noisy('SeldomHead'), 'batch': lambda: noisy('BatchNormalisingHead')}
    config = {**DRAWING, **others}[kind]
    images = torch.cat([toy_batch(1, seed=seed)['inputs'] for seed in range(3)])
    kept = []
    for order, steps in (((0, 1, 2), (0,)), ((2, 0, 1), (4,)), ((1,), (2,))):
        cache = dict(folder=str(tmp_path / str(len(kept))), check=1, dtype='fp32')
        teacher = build(config(), probe=(16, 24), cache=cache)
        for step in steps:
            teacher.set_progress(step, 10)
            first = show(teacher, images[list(order)])
        again = show(teacher, images[list(order)])  # from the files, compared with the live teacher
        if kind != 'seldom':  # what was kept before the first draw is kept under another name
            assert teacher.cache.hits == len(order)
        assert torch.equal(again, first)
        kept.append(dict(zip(order, first, strict=True)))
    for place in (0, 1, 2):
        assert torch.equal(kept[0][place], kept[1][place])
    assert torch.equal(kept[0][1], kept[2][1])


@pytest.mark.parametrize('option', ['fuse_conv_bn', 'cache'])
def test_a_stream_that_cannot_be_held_is_named(option: str, tmp_path: Path) -> None:
    value = dict(folder=str(tmp_path)) if option == 'cache' else True
    build(noisy('OwnGeneratorHead'))
    with pytest.raises(ConfigError, match=f'`{option}` must have a teacher that shows the same .*default_rng'):
        build(noisy('OwnGeneratorHead'), **{option: value})


@pytest.mark.parametrize('kind', ['dropout', 'numpy', 'python'])
def test_the_teachers_head_draws_the_same_where_the_student_passes_through_it(kind: str) -> None:
    """A connector that replays it is in the student's graph, and leaves the student's stream alone."""
    terms = dict(
        read=dict(
            tap=dict(student='decode_head.convs', teacher='decode_head.conv_seg'),
            connector=dict(type='mmstructkd.TeacherHeadConnector', head='decode_head.reader', head_channels=16),
            loss=dict(type='mmstructkd.PixelwiseKLLoss'),
        )
    )
    config = DRAWING[kind]()
    teacher = FrozenTeacher(config, allow_random=True)
    head = nn.Sequential()
    head.forward = lambda feature: teacher.network.decode_head.conv_seg(teacher.network.decode_head.noise(feature))
    teacher.network.decode_head.reader = head
    model = MODELS.build(toy_distiller(teacher=teacher, terms=terms)).train()
    connector = model.terms['read'].connectors[0]
    connector.projection.eval()
    feature = torch.randn(2, 8, 6, 8, requires_grad=True)
    before = streams()
    connector.set_progress(3, 10)
    first, again = connector(feature), connector(feature)
    assert streams() == before
    assert torch.equal(first, again)
    first.sum().backward()
    assert feature.grad.any()
    with own_stream(CPU, 3):  # the numbers that the teacher itself draws at this step
        wanted = head(connector.projection(feature))
    assert torch.equal(first, wanted)
    connector.set_progress(4, 10)
    assert not torch.equal(connector(feature), first)


def test_a_plain_teacher_is_run_in_one_batch(tmp_path: Path) -> None:
    teacher = build(toy_segmentor(8), cache=dict(folder=str(tmp_path)))
    sizes: list[int] = []
    teacher.network.backbone.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    show(teacher, toy_batch()['inputs'])
    assert sizes == [2]


def test_the_seed_of_a_step_is_no_small_number() -> None:
    """Configs seed with small numbers: the teacher's are not to be the student's."""
    for step in (0, 1, 2**20):
        torch.manual_seed(step)
        theirs = torch.rand(1)
        with own_stream(CPU, step):
            assert not torch.equal(torch.rand(1), theirs)
    assert randomness._SEEDS == 2**32  # what numpy takes
