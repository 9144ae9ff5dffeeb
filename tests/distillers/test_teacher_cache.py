"""Teacher outputs on disk: used only for what they were made of, whole or absent, bounded, the same each time."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.taps import Tap
from mmstructkd.teachers.base import TeacherSource
from mmstructkd.teachers.building import build_source
from mmstructkd.teachers.cache import TeacherCache
from mmstructkd.teachers.loading import build_network
from mmstructkd.teachers.tap_store import MAGIC, PackedTensor, TapStore, pack_tensor, unpack_tensor
from mmstructkd.testing import toy_batch, toy_config, toy_detector, toy_distiller, toy_segmentor, toy_terms

LOGITS, FEATURE = Tap.parse('decode_head.conv_seg'), Tap.parse('backbone[*]')
CPU = torch.device('cpu')
ROOT = Path(__file__).parents[2]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """Checkpoint of a toy segmentor of width 8."""
    torch.save(build_network(toy_segmentor(8), 'test').state_dict(), tmp_path / 'teacher.pth')
    return str(tmp_path / 'teacher.pth')


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / 'cache'


def build(weights: str, folder: Path | None, *, teacher: dict | None = None, **cache: Any) -> TeacherSource:
    """A teacher that was probed at the logits and the backbone."""
    options = {} if folder is None else dict(cache=dict(folder=str(folder), check=0, **cache))
    made = build_source(dict(config=toy_segmentor(8), checkpoint=weights, **options, **(teacher or {})))
    made.attach(MODELS.build(toy_segmentor(4)))
    made.probe(torch.zeros(1, 3, 64, 128), None, [LOGITS, FEATURE])
    return made


def batch(*names: str, seed: int = 0, size: tuple[int, int] = (48, 64)) -> dict[str, Any]:
    """Images that are the same wherever their name is."""
    made = [toy_batch(1, size=size, seed=seed + sum(map(ord, name))) for name in names]
    samples = [one['data_samples'][0] for one in made]
    for name, sample in zip(names, samples, strict=True):
        sample.set_metainfo(dict(img_path=f'{name}.png'))
    return dict(inputs=torch.cat([one['inputs'] for one in made]), data_samples=samples)


@contextlib.contextmanager
def runs(teacher: TeacherSource) -> Iterator[list[int]]:
    """How many images each run of the network gets."""
    seen: list[int] = []
    handle = teacher.network.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    yield seen
    handle.remove()


def show(teacher: TeacherSource, data: dict[str, Any], taps: tuple[Tap, ...] = (LOGITS, FEATURE)) -> list[torch.Tensor]:
    records = teacher.observe(data['inputs'], data['data_samples'], taps)
    return [tensor for tap in taps for tensor in records[tap]]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob('??/*'))


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).norm() / second.norm())


def test_a_hit_is_what_the_miss_was_and_the_network_rests(weights: str, folder: Path) -> None:
    teacher, live = build(weights, folder), build(weights, None)
    with runs(teacher) as seen:
        first = show(teacher, batch('a', 'b'))
        second = show(teacher, batch('a', 'b'))
    assert seen == [2]
    assert len(first) == 5
    for one, two, true in zip(first, second, show(live, batch('a', 'b')), strict=True):
        assert torch.equal(one, two)
        assert one.dtype == torch.float32
        assert not torch.equal(one, true)  # it is fp16
        assert distance(one, true) < 1e-3
    assert len(files(folder)) == 4  # two images, two taps
    assert (teacher.cache.hits, teacher.cache.misses) == (2, 2)
    # a new process of the same run, in another order
    teacher = build(weights, folder)
    with runs(teacher) as seen:
        again = show(teacher, batch('b', 'a'))
    assert not seen
    assert all(torch.equal(one, two.flip(0)) for one, two in zip(again, first, strict=True))


def test_only_the_misses_run(weights: str, folder: Path) -> None:
    teacher = build(weights, folder)
    with runs(teacher) as seen:
        (first, *_) = show(teacher, batch('a', 'b'))
        (mixed, *_) = show(teacher, batch('c', 'b', 'd'))
    assert seen == [2, 2]
    assert torch.equal(mixed[1], first[1])
    fresh = show(build(weights, None), batch('c', 'b', 'd'))[0]
    assert distance(mixed, fresh) < 1e-3
    # an image of which one tap is missing is a miss; the other tap's file stays
    files(folder)[0].unlink()
    with runs(teacher) as seen:
        show(teacher, batch('a', 'b', 'c', 'd'))
        show(teacher, batch('a', 'b', 'c', 'd'), taps=(LOGITS,))
    assert seen == [1]


def test_with_a_compiler_the_whole_batch_runs(weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of it would be another size, to be compiled anew."""
    monkeypatch.setattr(torch, 'compile', lambda module, **settings: module)
    teacher = build(weights, folder, teacher=dict(compile=True))
    show(teacher, batch('a'))
    sizes = []
    execution = teacher.wrapped._execution
    original = execution.run
    monkeypatch.setattr(execution, 'run', lambda n, x, *a, **k: sizes.append(len(x)) or original(n, x, *a, **k))
    mixed = show(teacher, batch('a', 'b'))[0]
    assert sizes == [2]
    assert distance(mixed, show(build(weights, None), batch('a', 'b'))[0]) < 1e-3


@pytest.mark.parametrize(
    'change',
    ['pixels', 'sample', 'view', 'padded', 'size', 'weights', 'option', 'normalisation', 'config', 'autocast', 'form'],
)
def test_whatever_decides_the_tensor_is_in_the_key(change: str, weights: str, folder: Path, tmp_path: Path) -> None:
    data = batch('a')
    show(build(weights, folder), data)
    count = len(files(folder))
    teacher: TeacherSource | None = None
    context: Any = contextlib.nullcontext()
    if change == 'pixels':
        data['inputs'][0, 0, 0, 0] += 1e-3
    elif change == 'sample':
        data['data_samples'][0].set_metainfo(dict(img_path='other.png'))
    elif change == 'view':
        data['data_samples'][0].set_metainfo(dict(augmentation_view=dict(view=1, views=2, seed=0, pixels='f')))
    elif change == 'padded':
        data['inputs'] = torch.nn.functional.pad(data['inputs'], (0, 8))
    elif change == 'size':
        data['data_samples'][0].set_metainfo(dict(img_shape=(40, 64)))
    elif change == 'weights':
        saved = torch.load(weights, weights_only=True)
        saved['decode_head.conv_seg.bias'][0] += 1e-3
        torch.save(saved, weights)
    elif change == 'option':
        teacher = build(weights, folder, teacher=dict(fuse_conv_bn=True))
    elif change == 'autocast':
        context = torch.autocast('cpu', torch.bfloat16)
    elif change == 'form':
        teacher = build(weights, folder, dtype='bf16')
    else:
        config = toy_segmentor(8)
        if change == 'normalisation':
            config.data_preprocessor.mean = [1.0, 2.0, 3.0]
        else:
            config.backbone.dilations = (1, 1, 1, 1)
        teacher = build_source(dict(config=config, checkpoint=weights, cache=dict(folder=str(folder), check=0)))
        teacher.attach(MODELS.build(toy_segmentor(4)))
        teacher.probe(torch.zeros(1, 3, 64, 128), None, [LOGITS, FEATURE])
    teacher = teacher or build(weights, folder)
    with context, runs(teacher) as seen:
        show(teacher, data)
    assert seen == [1]
    assert len(files(folder)) == 2 * count


def test_of_a_recorded_view_the_pixels_are_not_read_again(weights: str, folder: Path) -> None:
    """The worker has hashed them; the normalised input may differ by rounding between devices."""
    data = batch('a')
    data['data_samples'][0].set_metainfo(dict(augmentation_view=dict(view=1, views=2, seed=0, pixels='f')))
    teacher = build(weights, folder)
    show(teacher, data)
    data['inputs'] += 1e-6
    with runs(teacher) as seen:
        show(teacher, data)
    assert not seen


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty', 'pickle', 'header'])
def test_a_damaged_file_is_absent(damage: str, weights: str, folder: Path, tmp_path: Path) -> None:
    teacher = build(weights, folder)
    expected = show(teacher, batch('a'), taps=(LOGITS,))[0]
    (path,) = files(folder)
    content = bytearray(path.read_bytes())
    if damage == 'cut':
        content = content[:-7]
    elif damage == 'flipped':
        content[-9] ^= 4
    elif damage == 'empty':
        content = bytearray()
    elif damage == 'pickle':
        content = bytearray(pickle.dumps(Payload(str(tmp_path / 'ran'))))
    else:
        content[20] ^= 255
    path.write_bytes(content)
    with runs(teacher) as seen:
        assert torch.equal(show(teacher, batch('a'), taps=(LOGITS,))[0], expected)
        show(teacher, batch('a'), taps=(LOGITS,))
    assert seen == [1]  # and then it is whole again
    assert not (tmp_path / 'ran').exists()


JUNK = [None, True, -1, 0, 1, 2, 3, 7, 300, 2**31, 2**63, 10**400, -0.5, 0.0, 1.5, 4.0, 1e300, float('nan')]
JUNK += [float('inf'), '', 'float32', 'float16', 'uint8', 'int16', 'int64', 'bool', [], {}, [1], [[1]], {'a': 1}]


def places_of(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested lists and dicts."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places_of(value[key], (*path, key))


def mutated(head: dict, generator: random.Random) -> dict:
    """Another head: one entry replaced, dropped, doubled or swapped with its neighbour."""
    head = copy.deepcopy(head)
    *path, key = generator.choice([place for place in places_of(head) if place[0] != 'about'])
    holder: Any = head
    for step in path:
        holder = holder[step]
    action = generator.choice(['junk', 'junk', 'junk', 'drop', 'double', 'swap', 'more', 'less'])
    number = isinstance(holder[key], int)
    if action == 'drop':
        del holder[key]
    elif action == 'double' and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    elif action == 'swap' and isinstance(holder, list):
        holder[key], holder[key - 1] = holder[key - 1], holder[key]
    elif action in ('more', 'less') and number:
        holder[key] = holder[key] * 2 if action == 'more' else holder[key] // 2
    else:
        holder[key] = copy.deepcopy(generator.choice(JUNK))
    return head


def written(head: Any, body: bytes, *, right: bool = True) -> bytes:
    """A file of that content whose checksum is right (or that of the arrays alone)."""
    checksum = zlib.crc32(body, zlib.crc32(json.dumps(head).encode()) if right else 0)
    whole = {**head, 'checksum': checksum} if isinstance(head, dict) else head
    return MAGIC + json.dumps(whole).encode() + b'\n' + body


def parts_of(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    end = content.index(b'\n', len(MAGIC))
    head = json.loads(content[len(MAGIC) : end])
    head.pop('checksum')
    return head, content[end + 1 :]


@pytest.mark.parametrize('known', [True, False], ids=['seen', 'fresh'])
@pytest.mark.parametrize('topk', [None, 3])
def test_a_crafted_file_is_absent(topk: int | None, known: bool, weights: str, folder: Path) -> None:
    """300 heads that say something else, each with a checksum that is right: nothing raises, no shape is wrong."""
    options = {} if topk is None else dict(topk={'decode_head.conv_seg': topk})
    teacher, data = build(weights, folder, **options), batch('a')
    expected = show(teacher, data)
    originals = {path: path.read_bytes() for path in files(folder)}
    generator, absent = random.Random(0), 0
    for round in range(300):
        path = generator.choice(sorted(originals))
        head, body = parts_of(path)
        assert written(head, body) == originals[path]
        path.write_bytes(written(mutated(head, generator), body))
        if not known:  # nothing but a probe has been seen
            teacher.cache = TeacherCache(str(folder), check=0, **options)
            teacher.probe(torch.zeros(1, 3, 64, 128), None, [LOGITS, FEATURE])
        misses = teacher.cache.misses
        seen = show(teacher, data)
        assert [tensor.shape for tensor in seen] == [tensor.shape for tensor in expected], round
        absent += teacher.cache.misses - misses
        if teacher.cache.misses > misses:
            assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))
        for one, content in originals.items():
            one.write_bytes(content)
    # the rest are heads that came out the same, or a power of two as the scale
    assert absent > 250


@pytest.mark.parametrize(
    'content',
    [
        b'[]',
        b'{}',
        b'null',
        b'7',
        b'"text"',
        b'[' * 100_000,
        b'{"tensors": 1, "bytes": 0, "checksum": 0}',
        b'1' * 5000,
        b'\xff\xfe',
    ],
    ids=range(9),
)
def test_a_head_that_is_none_is_absent(content: bytes, weights: str, folder: Path) -> None:
    teacher = build(weights, folder)
    expected = show(teacher, batch('a'), taps=(LOGITS,))[0]
    (path,) = files(folder)
    path.write_bytes(MAGIC + content + b'\n')
    with runs(teacher) as seen:
        assert torch.equal(show(teacher, batch('a'), taps=(LOGITS,))[0], expected)
    assert seen == [1]


@pytest.mark.parametrize('place', [-1, 10, 30_000])
def test_classes_that_do_not_exist_are_absent(place: int, weights: str, folder: Path) -> None:
    teacher = build(weights, folder, topk={'decode_head.conv_seg': 3})
    expected = show(teacher, batch('a'), taps=(LOGITS,))[0]
    (path,) = files(folder)
    (stored,) = teacher.cache.store.read(path.stem)
    places = stored.arrays[1].to(torch.int16)
    places[0, 0, 0, 0] = place
    crafted = PackedTensor((stored.arrays[0], places, stored.arrays[2]), stored.scale, stored.classes)
    teacher.cache.store.write(path.stem, [crafted], {})
    with runs(teacher) as seen:
        assert torch.equal(show(teacher, batch('a'), taps=(LOGITS,))[0], expected)
    assert seen == [1]


@pytest.mark.parametrize('known', [True, False], ids=['seen', 'fresh'])
@pytest.mark.parametrize(
    'shape', [(1, 10, 8, 6), (1, 10, 3, 16), (1, 5, 6, 8), (1, 10, 48), (2, 10, 6, 8), (1, 10, 6, 9), (1, 10, 7, 8)]
)
def test_whole_files_of_other_shapes_are_absent(
    shape: tuple[int, ...], known: bool, weights: str, folder: Path
) -> None:
    teacher = build(weights, folder)
    expected = show(teacher, batch('a', 'b'), taps=(LOGITS,))[0]
    assert expected.shape == (2, 10, 6, 8)
    path = files(folder)[0]
    teacher.cache.store.write(path.stem, [PackedTensor((torch.zeros(shape).half(),))], {})
    teacher = teacher if known else build(weights, folder)
    with runs(teacher) as seen:
        assert torch.equal(show(teacher, batch('a', 'b'), taps=(LOGITS,))[0], expected)
        show(teacher, batch('a', 'b'), taps=(LOGITS,))
    assert seen in ([1], [2])  # where two files differ neither is believed
    for stored in (
        [],
        [pack_tensor(torch.zeros(1, 10, 6, 8), 'fp16')] * 2,
        [pack_tensor(torch.zeros(1, 10, 6, 8), 'fp32')],
    ):
        teacher.cache.store.write(path.stem, stored, {})
        assert torch.equal(show(teacher, batch('a', 'b'), taps=(LOGITS,))[0], expected)


def plausible(weights: str, folder: Path, *names: str) -> TeacherSource:
    """A fresh teacher that was probed at a small size, and files of a shape that it may take for right."""
    show(build(weights, folder), batch(*names, size=(50, 70)), taps=(LOGITS,))
    fresh = build(weights, folder)
    fresh.probe(torch.zeros(1, 3, 16, 24), None, [LOGITS, FEATURE])
    for path in files(folder):
        fresh.cache.store.write(path.stem, [pack_tensor(torch.zeros(1, 10, 6, 8), 'fp16')], {})
    return fresh


def test_files_that_agree_on_a_shape_yield_to_a_run(weights: str, folder: Path) -> None:
    """What is known to be wrong as soon as one image is computed is computed as well."""
    fresh = plausible(weights, folder, 'a', 'b')
    with runs(fresh) as seen:
        shown = show(fresh, batch('a', 'b', 'c', size=(50, 70)), taps=(LOGITS,))[0]
    assert seen == [1, 3]
    assert shown.shape == (3, 10, 7, 9)
    assert all(image.any() for image in shown)


def test_a_process_that_compares_finds_other_shapes(weights: str, folder: Path) -> None:
    fresh = plausible(weights, folder, 'a')
    fresh.cache._checks = 1
    shown = show(fresh, batch('a', size=(50, 70)), taps=(LOGITS,))[0]
    assert shown.shape == (1, 10, 7, 9)
    assert torch.equal(shown, show(build(weights, folder), batch('a', size=(50, 70)), taps=(LOGITS,))[0])


@pytest.mark.parametrize('wanted', ['seen', 'fresh'])
def test_inputs_of_many_sizes_are_found_again(wanted: str, weights: str, folder: Path) -> None:
    """Nothing that is right is turned away: of maps, not even before the first run."""
    teacher = build(weights, folder)
    sizes = [(48, 64), (50, 70), (64, 64), (33, 97), (96, 40)]
    for size in sizes:
        show(teacher, batch('a', size=size))
    teacher = teacher if wanted == 'seen' else build(weights, folder)
    with runs(teacher) as seen:
        for size in sizes:
            show(teacher, batch('a', size=size))
    assert not seen


def test_the_head_is_covered_by_the_checksum(weights: str, folder: Path) -> None:
    teacher = build(weights, folder)
    expected = show(teacher, batch('a'), taps=(LOGITS,))[0]
    (path,) = files(folder)
    head, body = parts_of(path)
    head['tensors'][0]['scale'] = 2.0
    path.write_bytes(written(head, body, right=False))
    assert torch.equal(show(teacher, batch('a'), taps=(LOGITS,))[0], expected)
    assert teacher.cache.misses == 2


@pytest.mark.parametrize('classes', [5, 256, 257, 40_000])
def test_any_number_of_classes(classes: int, folder: Path) -> None:
    logits = torch.randn(1, classes, 2, 3)
    logits[:, -1] = 9.0
    store = TapStore(str(folder), 1.0)
    store.write('ab' * 20, [pack_tensor(logits, 'fp32', topk=2)], {})
    (stored,) = store.read('ab' * 20)
    assert stored.shape == (1, classes, 2, 3)
    assert torch.equal(unpack_tensor(stored, CPU).topk(2, dim=1).indices, logits.topk(2, dim=1).indices)


class Payload:
    """Runs code when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (Path(self.path),)


def test_a_crash_leaves_no_half_file(weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = build(weights, folder)
    monkeypatch.setattr(Path, 'replace', lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        show(teacher, batch('a'))
    monkeypatch.undo()
    assert not files(folder)
    with runs(teacher) as seen:
        show(teacher, batch('a'))
    assert seen == [1]
    assert [path.suffix for path in files(folder)].count('.tap') == 2


def test_the_folder_stays_within_its_bound(weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show(build(weights, folder), batch('a'))
    one = sum(path.stat().st_size for path in files(folder))
    limit = 2.5 * one / 1e9
    teacher = build(weights, folder, max_gb=limit)
    with runs(teacher) as seen:
        for _ in range(2):
            for name in 'bcd':
                show(teacher, batch(name))
    assert sum(path.stat().st_size for path in files(folder)) <= limit * 1e9
    assert seen == [1, 1, 1, 1, 1]  # b is found again; c has room for one of its taps
    assert teacher.cache.store.full
    # of a distributed run each process takes its share of what is free
    for path in files(folder):
        path.unlink()
    monkeypatch.setattr('mmstructkd.teachers.tap_store.get_dist_info', lambda: (0, 2))
    store = TapStore(str(folder), 10 * one / 1e9)
    part = pack_tensor(torch.zeros(1, 4, 8, 8), 'fp32')
    written = sum(store.write(f'{number:040x}', [part], {}) for number in range(10_000))
    assert 0 < written < 10_000
    assert sum(path.stat().st_size for path in files(folder)) <= 10 * one


def test_a_full_disk_is_no_reason_to_stop(weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = build(weights, folder)

    def fails(self: Path, target: Path) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'replace', fails)
    shown = show(teacher, batch('a'))
    assert teacher.cache.store.full
    assert not files(folder)
    monkeypatch.undo()
    assert torch.equal(show(teacher, batch('a'))[0], shown[0])


WRITER = """
import sys, torch
from mmstructkd.teachers.tap_store import MAGIC, PackedTensor, TapStore, pack_tensor, unpack_tensor
from mmstructkd.teachers.cache import TeacherCache
store = TapStore(sys.argv[1], 1.0)
for round in range(30):
    for number in range(5):
        tensor = torch.full((1, 64, 32, 32), float(number))
        found = store.read(f'{number:040x}')
        assert found is None or torch.equal(unpack_tensor(found[0], torch.device('cpu')), tensor), number
        store.write(f'{number:040x}', [pack_tensor(tensor, 'fp16')], {})
"""


def test_several_processes_write_and_read_the_same_files(folder: Path) -> None:
    command = [sys.executable, '-c', WRITER, str(folder)]
    processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.wait(timeout=300) == 0, process.stderr.read()
        process.stderr.close()
    assert len(files(folder)) == 5


# --- how it is stored ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(('dtype', 'tolerance'), [('fp32', 0.0), ('fp16', 5e-4), ('bf16', 4e-3)])
@pytest.mark.parametrize('size', [1e-3, 1.0, 1e7])
def test_precision(dtype: str, tolerance: float, size: float) -> None:
    tensor = torch.randn(1, 5, 7, 3) * size
    assert distance(unpack_tensor(pack_tensor(tensor, dtype), CPU), tensor) <= tolerance


def test_the_largest_scores_keep_their_probability() -> None:
    logits = 4 * torch.randn(1, 20, 6, 5)
    stored = pack_tensor(logits, 'fp32', topk=4)
    wide = unpack_tensor(stored, CPU)
    values, places = logits.topk(4, dim=1)
    assert torch.equal(wide.gather(1, places), values)
    probability, kept = logits.softmax(1), wide.softmax(1)
    torch.testing.assert_close(kept.gather(1, places), probability.gather(1, places))
    torch.testing.assert_close(kept.sum(1), torch.ones(1, 6, 5))
    assert sum(array.numel() * array.element_size() for array in stored.arrays) < logits.numel() * 4 / 2


def test_topk_of_a_tap(weights: str, folder: Path) -> None:
    teacher = build(weights, folder, topk={'decode_head.conv_seg': 3})
    first, *features = show(teacher, batch('a', 'b'))
    again, *_ = show(teacher, batch('a', 'b'))
    live, *full = show(build(weights, None), batch('a', 'b'))
    assert torch.equal(first, again)
    assert torch.equal(first.topk(3, dim=1).indices, live.half().topk(3, dim=1).indices)
    assert all(distance(one, two) < 1e-3 for one, two in zip(features, full, strict=True))


@pytest.mark.parametrize(('dtype', 'tolerance'), [('fp16', 0.01), ('bf16', 0.05), ('fp32', 1e-4)])
def test_the_students_gradient_is_that_of_the_live_teacher(
    dtype: str, tolerance: float, weights: str, folder: Path
) -> None:
    gradients = []
    for cache in (None, dict(folder=str(folder), dtype=dtype)):
        torch.manual_seed(0)
        teacher = dict(config=toy_segmentor(8), checkpoint=weights, cache=cache)
        model: StructuredDistiller = MODELS.build(toy_distiller(teacher=teacher)).train()
        for _ in range(2):  # the second time from the files
            state = copy.deepcopy(model.terms.state_dict())
            model.zero_grad()
            torch.manual_seed(1)
            losses = model(**toy_batch(), mode='loss')
            sum(value for name, value in losses.items() if name.startswith('loss_kd_')).backward()
            found = torch.cat([p.grad.flatten() for p in model.student.parameters() if p.grad is not None])
            model.terms.load_state_dict(state)
        gradients.append(found)
    assert model.teacher.cache.hits == 2
    assert distance(gradients[1], gradients[0]) <= tolerance


# --- what is refused -----------------------------------------------------------------------------------------


def test_the_first_hits_are_compared_with_the_live_teacher(weights: str, folder: Path) -> None:
    show(build(weights, folder), batch('a'))
    teacher = build(weights, folder)
    teacher.cache._checks = 1
    with runs(teacher) as seen:
        for _ in range(3):
            show(teacher, batch('a'))
    assert seen == [1]
    for path in files(folder):  # whole files, of something else
        tensors = teacher.cache.store.read(path.stem)
        other = [pack_tensor(torch.randn_like(unpack_tensor(tensor, CPU)), 'fp16') for tensor in tensors]
        teacher.cache.store.write(path.stem, other, {})
    teacher.cache._checks = 1
    with pytest.raises(CheckpointError, match='must agree with the live teacher to 0.05, got a relative difference of'):
        show(teacher, batch('a'))


@pytest.mark.parametrize(
    ('cache', 'message'),
    [
        (dict(dtype='fp8'), '`cache.dtype` must be one of'),
        (dict(max_gb=0), '`cache.max_gb` must be'),
        (dict(check=-1), '`cache.check` must be a whole number'),
        (dict(topk={'decode_head.conv_seg': 0}), '`cache.topk` must give a number of at least 1'),
        (dict(topk={'decode_head.conv_seg': 10}), r'below the number of classes .* got 10 for \(1, 10, '),
        (dict(topk={'decode_head.conv_sg': 3}), "got 'decode_head.conv_sg'. Did you mean 'decode_head.conv_seg'"),
        (dict(max_bytes=3), "got 'max_bytes'"),
        (dict(folder='/dev/null/cache'), '`cache.folder` must be a folder that can be written to'),
    ],
)
def test_refuses(cache: dict, message: str, weights: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        MODELS.build(
            toy_distiller(
                teacher=dict(config=toy_segmentor(8), checkpoint=weights, cache={'folder': str(folder), **cache})
            )
        )


def test_regions_of_the_student_are_not_cached(folder: Path) -> None:
    terms = dict(region=dict(tap='roi_head.bbox_head.fc_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss')))
    teacher = dict(config=toy_detector('faster_rcnn', 4), allow_random=True, cache=dict(folder=str(folder)))
    with pytest.raises(ConfigError, match='must be left out where a RoI head is tapped'):
        MODELS.build(toy_distiller(student=toy_detector('faster_rcnn', 2), teacher=teacher, terms=terms))


def test_batches_that_are_augmented_are_refused(folder: Path) -> None:
    student = toy_detector('fcos', 2)
    student.data_preprocessor.batch_augments = [
        dict(type='BatchSyncRandomResize', random_size_range=(64, 128), size_divisor=32, interval=1)
    ]
    teacher = dict(config=toy_detector('fcos', 4), allow_random=True, cache=dict(folder=str(folder)))
    terms = dict(feature=dict(tap='neck[*]', loss=dict(type='mmstructkd.ChannelwiseKLLoss')))
    with pytest.raises(ConfigError, match="batch_augments \\['BatchSyncRandomResize'\\]"):
        MODELS.build(toy_distiller(student=student, teacher=teacher, terms=terms))


# --- runs ----------------------------------------------------------------------------------------------------


def config(
    weights: str, folder: Path, work_dir: Path, task: str = 'seg', views: int | None = 2, **changes: Any
) -> Config:
    """A run on four scenes."""
    terms = toy_terms()
    if task == 'det':
        terms = dict(feature=dict(tap='neck[*]', loss=dict(type='mmstructkd.ChannelwiseKLLoss')))
        model = toy_distiller(
            student=toy_detector('retinanet', 2),
            teacher=dict(config=toy_detector('retinanet', 4), checkpoint=weights, cache=dict(folder=str(folder))),
            terms=terms,
        )
    else:
        teacher = dict(config=toy_segmentor(8), checkpoint=weights, cache=dict(folder=str(folder)))
        model = toy_distiller(teacher=teacher, terms=terms)
    cfg = toy_config(model, work_dir, task=task, **changes)
    dataset = cfg.train_dataloader.dataset
    dataset.num_scenes = 4
    if views is not None:
        steps = list(dataset.pipeline)
        random = next(place for place, step in enumerate(steps) if step['type'] == 'RandomFlip')
        finite = dict(type='mmstructkd.FiniteAugmentation', views=views, transforms=steps[random:])
        dataset.pipeline = [*steps[:random], finite]
    return cfg


def train(cfg: Config) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


@pytest.fixture
def detector(tmp_path: Path) -> str:
    torch.save(build_network(toy_detector('retinanet', 4), 'test').state_dict(), tmp_path / 'detector.pth')
    return str(tmp_path / 'detector.pth')


@pytest.mark.parametrize('task', ['seg', 'det'])
def test_a_naive_cache_is_refused_before_the_first_batch(
    task: str, weights: str, detector: str, folder: Path, tmp_path: Path
) -> None:
    cfg = config(detector if task == 'det' else weights, folder, tmp_path / 'run', task, views=None)
    runner = Runner.from_cfg(cfg)
    drawn = 'RandomFlip, PhotoMetricDistortion' if task == 'seg' else 'RandomFlip'
    with pytest.raises(ConfigError, match=f'got {drawn}, drawn anew each time.*mmstructkd.FiniteAugmentation'):
        runner.train()
    assert runner.iter == 0
    assert not files(folder)


def test_a_pipeline_without_random_steps_needs_nothing(weights: str, folder: Path, tmp_path: Path) -> None:
    cfg = config(weights, folder, tmp_path / 'run', views=None)
    cfg.train_dataloader.dataset.pipeline = [
        step for step in cfg.train_dataloader.dataset.pipeline if 'Random' not in step.type and 'Photo' not in step.type
    ]
    runner = train(cfg)
    assert runner.model.teacher.cache.misses == 4
    assert runner.model.teacher.cache.hits == 4


@pytest.mark.parametrize(('task', 'workers'), [('seg', 2), ('det', 0)])
def test_finite_views_are_found_again(
    task: str, workers: int, weights: str, detector: str, folder: Path, tmp_path: Path
) -> None:
    """In the same run, and all of them in the next."""
    cfg = config(detector if task == 'det' else weights, folder, tmp_path / 'run', task, max_iters=6)
    cfg.train_dataloader.num_workers = workers
    first = train(cfg).model.teacher.cache
    assert first.hits + first.misses == 12
    assert 4 < first.misses <= 8  # four scenes, two views
    made = len(files(folder))
    assert made == first.misses * (3 if task == 'seg' else 1)
    cfg.work_dir = str(tmp_path / 'again')
    second = train(cfg)
    assert second.model.teacher.cache.misses == 0
    assert len(files(folder)) == made


class Interrupt(Hook):
    """Ends a run after its second iteration, as ctrl-C would."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_reads_what_was_written(weights: str, tmp_path: Path) -> None:
    train(config(weights, tmp_path / 'one', tmp_path / 'straight'))
    cfg = config(weights, tmp_path / 'two', tmp_path / 'stopped')
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    cfg.resume = True
    resumed = train(cfg)
    assert resumed.model.teacher.cache.misses < 4
    first, second = (read_checkpoint(str(tmp_path / n / 'iter_4.pth')) for n in ('straight', 'stopped'))
    for name, value in first['state_dict'].items():
        assert torch.equal(value, second['state_dict'][name]), name
