"""Whether a file's weights are the teacher's: which keys, under which prefix, and whether the values can be true."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from mmstructkd.distillers import FrozenTeacher
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.teachers import loading
from mmstructkd.teachers.loading import build_network, load_student, load_weights
from mmstructkd.testing import toy_config, toy_segmentor

State = dict[str, Tensor]
KERNEL = 'backbone.layer1.0.conv1.weight'
VARIANCE = 'backbone.layer1.0.bn1.running_var'


@pytest.fixture(scope='module')
def original() -> State:
    torch.manual_seed(0)
    return {key: value.clone() for key, value in build_network(toy_segmentor(4), 'test').state_dict().items()}


@pytest.fixture
def state(original: State) -> State:
    """A state of the toy segmentor to be spoilt."""
    return {key: value.clone() for key, value in original.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / 'teacher.pth'


def refusal(content: Any, path: Path, **arguments: Any) -> str:
    torch.save(content, path)
    with pytest.raises(CheckpointError) as info:
        FrozenTeacher(toy_segmentor(4), str(path), **arguments)
    assert str(path) in str(info.value)
    return str(info.value)


# --- prefixes ------------------------------------------------------------------------------------------------

PREFIXES = ['teacher.', 'student.', 'architecture.', 'model.', 'ema_', 'ema_model.module.', '_orig_mod.', 'net.module.']


@pytest.mark.parametrize('prefix', PREFIXES)
def test_a_prefix_is_named_in_one_line_and_can_be_taken(state: State, path: Path, prefix: str) -> None:
    count = sum(not key.endswith('num_batches_tracked') for key in state)
    text = refusal({'state_dict': {prefix + key: value for key, value in state.items()}}, path)
    assert len(text.splitlines()) == 1
    assert len(text) < 400
    assert f'lie under {prefix!r} ({count} of {count} keys). Set prefix={prefix!r} in `teacher`' in text
    for given in {prefix, prefix.rstrip('.')}:
        teacher = FrozenTeacher(toy_segmentor(4), str(path), prefix=given)
        assert all(torch.equal(value, state[key]) for key, value in teacher.network.state_dict().items())
        assert teacher.provenance()['prefix'] == given


def test_every_part_that_fits_is_named(original: State, path: Path) -> None:
    """A SoftTeacher holds both networks, of one architecture."""
    content = {
        f'{part}.{key}': value + (part == 'teacher')
        for part in ('student', 'teacher')
        for key, value in original.items()
    }
    text = refusal(content, path)
    assert "'student.' (" in text
    assert "and 'teacher.' (" in text
    teacher = FrozenTeacher(toy_segmentor(4), str(path), prefix='teacher.')
    assert torch.equal(teacher.network.state_dict()[KERNEL], original[KERNEL] + 1)


def test_what_else_lies_beside_the_part_does_not_matter(state: State, path: Path) -> None:
    """mmrazor keeps connectors beside the student and a teacher of another width."""
    other = build_network(toy_segmentor(6), 'test').state_dict()
    content = {f'architecture.{key}': value for key, value in state.items()}
    content |= {f'teacher.{key}': value for key, value in other.items()}
    content |= {'distiller.connectors.a.weight': torch.ones(1)}
    torch.save({'state_dict': content}, path)
    FrozenTeacher(toy_segmentor(4), str(path), prefix='architecture')
    text = refusal({'state_dict': content}, path, prefix='teacher.')
    assert 'of another shape' in text
    assert 'unexpected' not in text.partition('\n')[2]


def test_nearly_all_is_enough_for_the_prefix(state: State, path: Path) -> None:
    content = {f'student.{key}': value for key, value in list(state.items())[:-3]}
    assert "lie under 'student.'" in refusal(content, path)
    assert '2 missing' in refusal(content, path, prefix='student.').partition('\n')[0]


def test_ddp_is_taken_as_it_is(state: State, path: Path) -> None:
    torch.save({f'module.{key}': value for key, value in state.items()}, path)
    FrozenTeacher(toy_segmentor(4), str(path))
    torch.save({f'module.student.{key}': value for key, value in state.items()}, path)
    FrozenTeacher(toy_segmentor(4), str(path), prefix='student.')


def test_averages_of_mmcv_beside_the_weights_are_named(state: State, path: Path) -> None:
    """Its EMA hook leaves a copy of each parameter, with underscores, among the weights."""
    copies = {f'ema_{key.replace(".", "_")}': value for key, value in state.items() if key.endswith('.weight')}
    text = refusal({'state_dict': {**state, **copies}}, path)
    assert len(text.splitlines()) == 1
    assert f"with {len(copies)} more ({len(copies)} under 'ema_'" in text
    assert 'Save it without them' in text
    only = {f'ema_{key.replace(".", "_")}': value for key, value in state.items()}
    assert "lie under 'ema_'" in refusal(only, path)
    teacher = FrozenTeacher(toy_segmentor(4), str(path), prefix='ema_')
    assert torch.equal(teacher.network.state_dict()[KERNEL], state[KERNEL])


def test_a_prefix_that_is_not_there(state: State, path: Path) -> None:
    torch.save({f'teacher.{key}': value for key, value in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"`prefix` must be .*got 'techer\.'. Did you mean 'teacher\.'"):
        FrozenTeacher(toy_segmentor(4), str(path), prefix='techer.')
    for prefix in (3, ['teacher.'], True):
        with pytest.raises(ConfigError, match='`prefix` must be a string'):
            FrozenTeacher(toy_segmentor(4), str(path), prefix=prefix)


def test_tools_say_what_to_do_about_a_prefix(state: State, path: Path) -> None:
    torch.save({f'student.{key}': value for key, value in state.items()}, path)
    cfg = Config(dict(model=toy_segmentor(4), default_scope='mmseg'))
    with pytest.raises(CheckpointError, match=r"lie under 'student\.'.*Save that part without its prefix"):
        load_student(cfg, str(path), owner='tool')


def lenient(tmp_path: Path, content: dict, use: str) -> None:
    torch.save(content, tmp_path / 'student.pth')
    changes: dict[str, Any] = dict(load_from=str(tmp_path / 'student.pth'), resume=use == 'resume', max_iters=3)
    runner = Runner.from_cfg(toy_config(toy_segmentor(4), tmp_path / 'work', **changes))
    runner.load_or_resume() if use == 'test' else runner.train()


@pytest.mark.parametrize('use', ['train', 'resume', 'test'])
@pytest.mark.parametrize('prefix', ['student.', 'ema_', 'architecture.'])
def test_a_runner_does_not_go_on_with_random_weights(state: State, tmp_path: Path, use: str, prefix: str) -> None:
    content = {'state_dict': {prefix + key: value for key, value in state.items()}, 'meta': {'iter': 1, 'epoch': 0}}
    with pytest.raises(CheckpointError, match=rf"student\.pth', where they lie under '{prefix}'") as info:
        lenient(tmp_path, content, use)
    assert len(str(info.value).splitlines()) == 1
    assert 'Save that part without its prefix' in str(info.value)


def test_a_runner_finds_no_weights(state: State, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="student.pth' with tensors under 'model' only"):
        lenient(tmp_path, {'model': state}, 'test')


def test_a_runner_stays_lenient_with_the_rest(state: State, tmp_path: Path) -> None:
    """A part of a network, another head, or weights that the network itself renames."""
    lenient(tmp_path, {f'module.{key}': value for key, value in state.items()}, 'test')
    lenient(tmp_path, {key: value for key, value in state.items() if key.startswith('backbone.')}, 'test')
    lenient(tmp_path, {key.removeprefix('backbone.'): value for key, value in state.items()}, 'test')


# --- other keys ----------------------------------------------------------------------------------------------


def test_long_lists_are_cut(path: Path) -> None:
    state = build_network(toy_segmentor(4, backbone=dict(toy_segmentor(4).backbone, depth=50)), 'test').state_dict()
    text = refusal(state, path)
    assert len(text.splitlines()) < 25
    assert '... and ' in text
    text = refusal({'unrelated.weight': torch.ones(1)}, path)
    assert len(text.splitlines()) < 12
    assert 'more missing' in text
    assert '  unexpected: unrelated.weight (1,)' in text


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (lambda s: {'model': s, 'epoch': 3}, "tensors under 'model' only"),
        (lambda s: {'teacher': s, 'student': s}, "tensors under 'teacher' and 'student' only"),
        (lambda s: {'state_dict': None, 'meta': {}}, 'no tensor under its keys state_dict, meta'),
        (lambda s: {'state_dict': [1, 2]}, 'no tensor'),
        (lambda s: {'state_dict': {'model': s}}, 'no tensor'),
        (lambda s: {}, 'no tensor'),
        (lambda s: {key: value.numpy() for key, value in s.items()}, r'no tensor under its keys .* more'),
    ],
)
def test_weights_elsewhere_are_found(state: State, path: Path, content: Callable, message: str) -> None:
    torch.save(content(state), path)
    with pytest.raises(CheckpointError, match=message) as info:
        FrozenTeacher(toy_segmentor(4), str(path))
    assert len(str(info.value).splitlines()) == 1


def test_keys_that_are_no_names(state: State, path: Path) -> None:
    assert 'unexpected: 3 (1,)' in refusal({3: torch.ones(1), **dict(list(state.items())[5:])}, path)


def test_a_parameter_at_the_root_is_compared_too(path: Path) -> None:
    network = nn.Linear(2, 2)
    torch.save({'weight': torch.ones(3, 2), 'bias': torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=r'shape: weight is \(3, 2\), must be \(2, 2\)'):
        load_weights(network, str(path), owner='test')


def test_what_stays_random_is_said(state: State, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(loading, 'print_log', lambda text, *args, **kwargs: said.append(text))
    state.pop(KERNEL)
    torch.save(state, path)
    FrozenTeacher(toy_segmentor(4), str(path), allow_random=True)
    assert f'of {len(state) + 1} tensors {len(state)} come from' in said[0]


# --- values --------------------------------------------------------------------------------------------------


def flipped(value: Tensor, bit: int) -> Tensor:
    """One bit of the first number the other way."""
    words = value.flatten().clone().view(torch.int32)
    words[0] ^= 1 << bit
    return words.view(torch.float32).view(value.shape)


def put(value: Tensor, number: float) -> Tensor:
    value = value.clone()
    value.flatten()[0] = number
    return value


WRONG: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    'a NaN': (KERNEL, lambda v: put(v, float('nan')), r'is not finite \(1 of 144 values\)'),
    'an infinity': (KERNEL, lambda v: put(v, float('-inf')), 'is not finite'),
    'all NaN': (KERNEL, lambda v: torch.full_like(v, float('nan')), r'\(144 of 144 values\)'),
    'a flipped bit': (KERNEL, lambda v: flipped(v, 30), r'is as large as \S+e\+\d+ \(above 1e\+06\)'),
    'a large number': (KERNEL, lambda v: put(v, 4.9e36), r'is as large as 4\.9e\+36'),
    'int32': (KERNEL, lambda v: v.to(torch.int32), 'is int32, not floating'),
    'uint8': (KERNEL, lambda v: v.to(torch.uint8), 'is uint8, not floating'),
    'bool': (KERNEL, lambda v: v > 0, 'is bool, not floating'),
    'complex': (KERNEL, lambda v: v.to(torch.complex64), 'is complex64, not real'),
    'sparse': (KERNEL, lambda v: v.to_sparse(), 'is no plain tensor'),
    'quantized': (KERNEL, lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), 'is no plain tensor'),
    'infinite variance': (VARIANCE, lambda v: put(v, float('inf')), 'is not finite'),
    'NaN variance': (VARIANCE, lambda v: put(v, float('nan')), 'is not finite'),
    'negative variance': (VARIANCE, lambda v: put(v, -1e-3), r'is a variance below 0 \(-0\.001\)'),
    'huge variance': (VARIANCE, lambda v: put(v, 1e13), r'above 1e\+12'),
}


@pytest.mark.parametrize('name', WRONG)
@pytest.mark.parametrize('allow_random', [False, True])
def test_values_that_no_training_leaves(state: State, path: Path, name: str, allow_random: bool) -> None:
    key, change, message = WRONG[name]
    state[key] = change(state[key])
    torch.save({'state_dict': state}, path)
    with pytest.raises(CheckpointError, match=rf'FrozenTeacher: `checkpoint` must .*{key} .*{message}') as info:
        FrozenTeacher(toy_segmentor(4), str(path), allow_random=allow_random)
    assert str(path) in str(info.value)
    assert len(str(info.value).splitlines()) == 1


def test_many_wrong_tensors_are_counted(state: State, path: Path) -> None:
    text = refusal(
        {key: value * float('nan') if value.is_floating_point() else value for key, value in state.items()}, path
    )
    floating = sum(value.is_floating_point() for value in state.values())
    assert f'and {floating - 5} more' in text


@pytest.mark.parametrize('part', ['', 'backbone.', 'decode_head.'])
def test_a_part_of_zeros_is_dead(state: State, path: Path, part: str) -> None:
    text = refusal({k: v * 0 if k.startswith(part) else v for k, v in state.items()}, path)
    assert f'{part.rstrip(".") or "backbone"} is all zero' in text


def test_a_tensor_of_zeros_is_not(state: State, path: Path) -> None:
    for key in (KERNEL, 'decode_head.conv_seg.bias', 'backbone.layer1.0.bn2.weight', VARIANCE):
        state[key].zero_()
    torch.save(state, path)
    FrozenTeacher(toy_segmentor(4), str(path))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_width_is_taken(state: State, path: Path, dtype: torch.dtype) -> None:
    torch.save({k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}, path)
    teacher = FrozenTeacher(toy_segmentor(4), str(path))
    assert torch.equal(teacher.network.state_dict()[KERNEL], state[KERNEL].to(dtype).float())


def test_large_but_true_values_are_taken(state: State, path: Path) -> None:
    """What a folded convolution, or a first layer on images of 0..255, may have."""
    state[KERNEL] = put(state[KERNEL], 9e4)
    state[VARIANCE] = put(state[VARIANCE], 1e9)
    torch.save(state, path)
    FrozenTeacher(toy_segmentor(4), str(path))


class Masked(nn.Module):
    """Has a mask with infinities, whole numbers, and an empty buffer among its state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer('mask', torch.tensor([[0.0, float('-inf')], [0.0, 0.0]]))
        self.register_buffer('index', torch.arange(4))
        self.register_buffer('none', torch.zeros(0))
        self.spectrum = nn.Parameter(torch.ones(2, dtype=torch.complex64))


def test_what_the_network_itself_has_is_no_damage(path: Path) -> None:
    network = Masked()
    torch.save(network.state_dict(), path)
    load_weights(Masked(), str(path), owner='test')
    network.mask[1, 1] = float('-inf')
    torch.save(network.state_dict(), path)
    with pytest.raises(CheckpointError, match=r'mask is not finite \(1 of 4 values\)'):
        load_weights(Masked(), str(path), owner='test')


def test_students_are_looked_at_as_well(state: State, path: Path) -> None:
    state[KERNEL] = put(state[KERNEL], float('nan'))
    torch.save(state, path)
    with pytest.raises(CheckpointError, match='tool: `checkpoint` must hold the weights of a trained network'):
        load_student(Config(dict(model=toy_segmentor(4), default_scope='mmseg')), str(path), owner='tool')
