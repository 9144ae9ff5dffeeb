"""What each stream makes of a batch, against loops over its pixels; and what it leaves as it was."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, PixelData
from torch import Tensor, nn

from mmstructkd.errors import ConfigError
from mmstructkd.randomness import own_stream
from mmstructkd.registry import MODELS
from mmstructkd.streams import DataStream, MixedStream, ScaledStream, Stream, TurnedStream, statistics_kept
from mmstructkd.streams import turned as turned_module
from mmstructkd.structures import Targets
from mmstructkd.tasks.targets import collect_targets
from mmstructkd.teachers.view import ViewTeacher
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor
from tests.teachers.kinds import SCORES, build, frozen, peer

HEIGHT, WIDTH = 4, 6
#: Where the pixel at (y, x) of an image of (h, w) comes from.
SOURCES = {
    'none': lambda y, x, h, w: (y, x),
    'half': lambda y, x, h, w: (h - 1 - y, w - 1 - x),
    'flip': lambda y, x, h, w: (y, w - 1 - x),
    'flip_half': lambda y, x, h, w: (h - 1 - y, x),
}
WHOLE = [(HEIGHT, WIDTH), (HEIGHT, WIDTH)]
PADDED = [(3, 6), (4, 5)]


def batch(sizes: list[tuple[int, int]]) -> tuple[Tensor, list[BaseDataElement], Targets]:
    """Two images whose pixels all differ, with everything that a task may know of them."""
    count = 2 * HEIGHT * WIDTH
    inputs = torch.arange(3.0 * count).view(2, 3, HEIGHT, WIDTH)
    inside = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    for image, (h, w) in enumerate(sizes):
        inside[image, :h, :w] = True
    labels = torch.arange(count).view(2, HEIGHT, WIDTH)
    boxes = (torch.tensor([[1.0, 0.0, 3.0, 2.0]]), torch.tensor([[0.0, 1.0, 2.0, 4.0], [2.0, 2.0, 5.0, 3.0]]))
    targets = Targets(
        labels=labels,
        valid=inside & (labels % 5 > 0),
        num_classes=3,
        images=inputs,
        input_size=(HEIGHT, WIDTH),
        boxes=boxes,
        box_labels=(torch.tensor([1]), torch.tensor([0, 2])),
        depth=labels / 7.0,
        inside=None if sizes == WHOLE else inside,
    )
    samples = []
    for size in sizes:
        sample = BaseDataElement(metainfo=dict(img_shape=size, batch_input_shape=(HEIGHT, WIDTH)))
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, HEIGHT, WIDTH, dtype=torch.long))
        samples.append(sample)
    return inputs, samples, targets


def turned_by_loop(maps: Tensor, turns: tuple[str, ...], sizes: list[tuple[int, int]]) -> Tensor:
    """Each pixel inside an image from where its turn says, padding where it was."""
    rows = []
    for name in turns:
        for image, (h, w) in enumerate(sizes):
            made = maps[image].clone()
            for y in range(h):
                for x in range(w):
                    from_y, from_x = SOURCES[name](y, x, h, w)
                    made[..., y, x] = maps[image, ..., from_y, from_x]
            rows.append(made)
    return torch.stack(rows)


def check_turned(turns: tuple[str, ...], sizes: list[tuple[int, int]]) -> None:
    inputs, samples, targets = batch(sizes)
    made = TurnedStream(turns).make(inputs, samples, targets, {}, 0)
    known = made.targets
    assert torch.equal(made.inputs, turned_by_loop(inputs, turns, sizes))
    assert torch.equal(known.images, made.inputs)
    for name in ('labels', 'valid', 'depth', 'inside'):
        value = getattr(targets, name)
        if value is None:
            assert getattr(known, name) is None
        else:
            assert torch.equal(getattr(known, name), turned_by_loop(value, turns, sizes)), name
    assert len(known.boxes) == len(known.box_labels) == len(made.data_samples) == 2 * len(turns)
    for row, (boxes, box_labels) in enumerate(zip(known.boxes, known.box_labels, strict=True)):
        image, name = row % 2, turns[row // 2]
        assert torch.equal(box_labels, targets.box_labels[image])
        for box, old in zip(boxes.tolist(), targets.boxes[image].int().tolist(), strict=True):
            # The pixels that the old box covers, each where its turn puts it.
            covered = torch.zeros(HEIGHT, WIDTH)
            covered[old[1] : old[3], old[0] : old[2]] = 1
            found = turned_by_loop(covered.expand(2, -1, -1), (name,), sizes)[image].nonzero()
            (y1, x1), (y2, x2) = found.amin(dim=0).tolist(), (found.amax(dim=0) + 1).tolist()
            assert box == [x1, y1, x2, y2], (name, image)


@pytest.mark.parametrize('sizes', [WHOLE, PADDED])
@pytest.mark.parametrize(
    'turns', [('half',), ('flip',), ('flip_half',), ('flip_half', 'half', 'flip'), ('none', 'half')]
)
def test_turned_images_have_what_is_known_turned_with_them(turns: tuple[str, ...], sizes: list) -> None:
    check_turned(turns, sizes)


@pytest.mark.parametrize(
    ('part', 'sizes'),
    [('labels', WHOLE), ('valid', WHOLE), ('depth', PADDED), ('valid', PADDED), ('boxes', WHOLE), ('images', PADDED)],
)
def test_what_is_turned_otherwise_than_the_images_is_noticed(
    part: str, sizes: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check above fails if one of the parts is turned by another way."""
    if part == 'boxes':
        own = TurnedStream._turn_boxes
        monkeypatch.setattr(
            TurnedStream, '_turn_boxes', lambda self, boxes, sizes: own(TurnedStream(['flip']), boxes, sizes)
        )
    else:
        own, victim = TurnedStream._turn, getattr(batch(sizes)[2], part)

        def wrong(self: TurnedStream, value: Tensor | None, sizes: Any) -> Tensor | None:
            hit = value is not None and value.shape == victim.shape and torch.equal(value, victim)
            return own(TurnedStream(['flip']) if hit else self, value, sizes)

        monkeypatch.setattr(TurnedStream, '_turn', wrong)
    with pytest.raises(AssertionError):
        check_turned(('half',), sizes)


def test_the_padding_of_a_turned_image_stays_where_a_network_expects_it() -> None:
    inputs, samples, targets = batch(PADDED)
    made = TurnedStream(['half']).make(inputs, samples, targets, {}, 0)
    assert torch.equal(made.targets.inside, targets.inside)
    assert [sample.img_shape for sample in made.data_samples] == PADDED


@pytest.mark.parametrize('step', [0, 3])
@pytest.mark.parametrize('sizes', [WHOLE, PADDED])
def test_a_blend_is_that_of_each_pixel(step: int, sizes: list) -> None:
    inputs, samples, targets = batch(sizes)
    made = MixedStream(alpha=0.7).make(inputs, samples, targets, {}, step)
    with own_stream(torch.device('cpu'), step):
        share = float(np.random.beta(0.7, 0.7))
        partners = torch.randperm(2).tolist()
    expected = torch.zeros_like(inputs)
    for image in range(2):
        for place in np.ndindex(3, HEIGHT, WIDTH):
            one, other = (inputs[(row, *place)] for row in (image, partners[image]))
            expected[(image, *place)] = share * one + (1 - share) * other
    torch.testing.assert_close(made.inputs, expected)
    assert made.targets.labels is made.targets.depth is made.targets.boxes is None
    for image, (h, w) in enumerate(sizes if made.targets.inside is not None else ()):
        other = sizes[partners[image]]
        for y, x in np.ndindex(HEIGHT, WIDTH):
            both = y < min(h, other[0]) and x < min(w, other[1])
            assert bool(made.targets.inside[image, y, x]) == both


def test_a_blend_is_the_same_for_the_same_step_and_another_for_another() -> None:
    inputs, samples, targets = batch(WHOLE)
    made = [MixedStream().make(inputs, samples, targets, {}, step).inputs for step in (1, 1, 2, 3)]
    assert torch.equal(made[0], made[1])
    assert not all(torch.equal(made[0], one) for one in made[2:])


@pytest.mark.parametrize('scale', [0.5, 2.0])
def test_a_resized_batch_has_its_boxes_and_areas_resized(scale: float) -> None:
    inputs, samples, targets = batch(PADDED)
    made = ScaledStream(scale).make(inputs, samples, targets, {}, 0)
    assert made.inputs.shape[-2:] == (HEIGHT * scale, WIDTH * scale)
    for boxes, old in zip(made.targets.boxes, targets.boxes, strict=True):
        assert boxes.tolist() == [[scale * side for side in box] for box in old.tolist()]
    for sample, (h, w) in zip(made.data_samples, PADDED, strict=True):
        assert sample.img_shape == (round(h * scale), round(w * scale))
        assert sample.batch_input_shape == made.inputs.shape[-2:]
    assert torch.equal(made.targets.labels, targets.labels)


def test_an_image_that_shrinks_by_two_is_its_average() -> None:
    """Bilinear with antialiasing: weights 1 3 3 1 over eight, and those inside alone at the border."""
    line = torch.tensor([0.0, 8.0, 16.0, 0.0, 8.0, 24.0, 0.0, 0.0])
    inputs = line.expand(1, 3, 8, 8).contiguous()
    made = ScaledStream(0.5).make(inputs, None, Targets(), {}, 0).inputs[0, 0, 0]
    weights = (1.0, 3.0, 3.0, 1.0)
    for place, value in enumerate(made.tolist()):
        seen = [(weights[k], line[2 * place - 1 + k].item()) for k in range(4) if 0 <= 2 * place - 1 + k < 8]
        assert value == pytest.approx(sum(w * v for w, v in seen) / sum(w for w, _ in seen), abs=1e-4)


def test_a_view_and_a_stream_are_resized_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, samples, targets = batch(PADDED)
    seen: list[tuple] = []
    teacher = ViewTeacher(scale=0.5)
    teacher._student = [nn.Identity()]
    monkeypatch.setattr(
        'mmstructkd.teachers.view.tapped_forward', lambda net, view, data, *_, **__: seen.append((view, data))
    )
    teacher._look(inputs, samples, (), {})
    made = ScaledStream(0.5).make(inputs, samples, targets, {}, 0)
    assert torch.equal(seen[0][0], made.inputs)
    assert [one.img_shape for one in seen[0][1]] == [one.img_shape for one in made.data_samples]


class Forbidden(BaseDataElement):
    """A sample whose labels must not be read."""

    @property
    def gt_sem_seg(self) -> None:
        raise AssertionError('a label of an unlabelled stream was read')

    gt_depth_map = gt_instances = gt_sem_seg


def test_images_of_another_dataset_come_as_they_are_and_without_labels() -> None:
    inputs, _, targets = batch(WHOLE)
    other = inputs.flip(0)[..., :5] + 1
    samples = [Forbidden(metainfo=dict(img_shape=size)) for size in ((4, 5), (3, 2))]
    made = DataStream().make(inputs, None, targets, dict(inputs=other, data_samples=samples), 0)
    assert torch.equal(made.inputs, other)
    assert made.targets.labels is made.targets.depth is made.targets.boxes is None
    for image, (h, w) in enumerate(((4, 5), (3, 2))):
        for y, x in np.ndindex(4, 5):
            assert bool(made.targets.inside[image, y, x]) == (y < h and x < w)
    with pytest.raises(ConfigError, match='PairedDataset'):
        DataStream().make(inputs, None, targets, {}, 0)


STREAMS: dict[str, dict] = {
    'mixed': dict(type='mmstructkd.MixedStream'),
    'turned': dict(type='mmstructkd.TurnedStream'),
    'scaled': dict(type='mmstructkd.ScaledStream', scale=0.5),
    'data': dict(type='mmstructkd.DataStream', norm='frozen'),
}
SELF = dict(type='mmstructkd.SelfTeacher')
TEACHERS: dict[str, dict] = {
    'frozen': frozen(8),
    'peer': peer(),
    'self': SELF,
    'view': dict(type='mmstructkd.ViewTeacher', flip=True),
    'average': dict(type='mmstructkd.ViewTeacher', flip=True, momentum=0.9),
}


def distiller(teacher: str, stream: str, norm: str = 'frozen', on: Any = 'some') -> Any:
    torch.manual_seed(0)
    settings = dict(STREAMS[stream], norm=norm)
    terms = dict(kd=dict(SCORES['kd'], on=on))
    model = MODELS.build(toy_distiller(teacher=TEACHERS[teacher], streams=dict(some=settings), terms=terms))
    model.init_weights()
    return model.train()


def two_batches() -> dict[str, Any]:
    other = toy_batch(seed=1)
    other['data_samples'] = [Forbidden(metainfo=dict(sample.metainfo)) for sample in other['data_samples']]
    return dict(toy_batch(), some=other)


def statistics(model: Any) -> dict[str, Tensor]:
    """Running statistics of all that trains, the average of the student aside: it does not run."""
    parts = dict(student=model.student, teacher=model.teacher.trained or nn.Module())
    return {
        f'{part}.{name}': value.clone()
        for part, network in parts.items()
        for name, value in network.named_buffers()
        if name.endswith(('running_mean', 'running_var', 'num_batches_tracked'))
    }


@pytest.mark.parametrize('stream', sorted(STREAMS))
@pytest.mark.parametrize('teacher', sorted(TEACHERS))
@pytest.mark.parametrize('norm', ['frozen', 'update'])
def test_what_a_stream_does_to_running_statistics(teacher: str, stream: str, norm: str) -> None:
    """Frozen: all is as after the labelled batch alone; else the student, and whoever trains beside, see it too."""
    without, model = distiller(teacher, stream, norm), distiller(teacher, stream, norm)
    for term in without.terms.values():
        term.factor = 0.0
    for one in (without, model):
        torch.manual_seed(3)
        one(**two_batches(), mode='loss')
    before, after = statistics(without), statistics(model)
    assert before
    moved = {name.split('.')[0] for name, value in before.items() if not torch.equal(value, after[name])}
    trains = {'student', 'teacher'} if teacher in ('peer', 'self') else {'student'}
    assert moved == (set() if norm == 'frozen' else trains)
    assert all(module.training for module in model.student.modules())


@pytest.mark.parametrize('stream', sorted(STREAMS))
@pytest.mark.parametrize('teacher', sorted(TEACHERS))
def test_the_labelled_loss_is_that_of_plain_training_and_no_label_of_a_stream_is_read(
    teacher: str, stream: str
) -> None:
    plain = MODELS.build(toy_segmentor(4))
    model = distiller(teacher, stream, on=['labelled', 'some'])
    plain.load_state_dict(model.state_dict())
    batch_of_both, losses = two_batches(), []
    for network in (plain.train(), model):
        torch.manual_seed(3)
        given = copy.deepcopy(batch_of_both)
        if network is plain:
            given.pop('some')
        losses.append(network(**given, mode='loss'))
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())
    assert losses[1]['loss_kd_kd_some'] > 0
    known = collect_targets(model.student, batch_of_both['inputs'], batch_of_both['data_samples'])
    made = model.streams['some'].make(
        batch_of_both['inputs'], batch_of_both['data_samples'], known, batch_of_both['some'], 0
    )
    assert not any(set(sample.keys()) for sample in made.data_samples)


def test_statistics_of_every_kind_of_layer_are_kept() -> None:
    layers = nn.Sequential(
        nn.BatchNorm2d(3), nn.SyncBatchNorm(3).eval(), nn.InstanceNorm2d(3, track_running_stats=True), nn.Dropout(0.5)
    )
    before = copy.deepcopy(layers.state_dict())
    with statistics_kept(layers):
        layers(torch.randn(2, 3, 4, 4))
        assert [layer.training for layer in layers] == [False, False, False, True]
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    assert [layer.training for layer in layers] == [True, False, True, True]


def test_streams_say_whether_they_have_labels() -> None:
    made: dict[str, Stream] = {name: MODELS.build(dict(config)) for name, config in STREAMS.items()}
    assert {name for name, stream in made.items() if stream.labelled} == {'turned', 'scaled'}
    assert build('mixed').streams['mixed'].norm == 'frozen'
    assert set(turned_module.MIRRORS) == set(SOURCES)
