"""What the teacher gets: its own normalisation, its own padding, and the way back to the student's positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmstructkd.distillers import FrozenTeacher
from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.taps import Tap
from mmstructkd.tasks.batches import synthetic_batch
from mmstructkd.teachers.cache import preprocessing
from mmstructkd.teachers.normalization import InputConversion, cover_input, pad_divisor
from mmstructkd.testing import toy_batch, toy_detector, toy_distiller, toy_segmentor

NECK = Tap.parse('neck[*]')
LOGITS = Tap.parse('decode_head.conv_seg')


def attach(teacher: dict, student: dict) -> tuple[FrozenTeacher, nn.Module]:
    torch.manual_seed(0)
    made, network = FrozenTeacher(teacher, allow_random=True), MODELS.build(student)
    made.attach(network)
    return made, network


def images(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def detection_batch(preprocessor: nn.Module, *sizes: tuple[int, int]) -> dict[str, Any]:
    samples = []
    for size in sizes:
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        sample.gt_instances = InstanceData(bboxes=torch.tensor([[4.0, 4.0, 30.0, 20.0]]), labels=torch.tensor([0]))
        samples.append(sample)
    return preprocessor(dict(inputs=images(*sizes), data_samples=samples), True)


def detector(kind: str, width: int, divisor: int, **changes: Any) -> ConfigDict:
    config = toy_detector(kind, width)
    config.data_preprocessor.update(pad_size_divisor=divisor, **changes)
    return config


# --- padding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize(('of_student', 'of_teacher'), [(1, 32), (32, 1), (16, 64), (24, 32), (32, 32)])
def test_a_detectors_batch_is_what_its_preprocessor_makes(of_student: int, of_teacher: int, wrapped: bool) -> None:
    config = detector('retinanet', 4, of_teacher, pad_value=3, mean=[1.0, 2.0, 3.0])
    if wrapped:
        config.data_preprocessor = dict(
            type='MultiBranchDataPreprocessor', data_preprocessor=dict(config.data_preprocessor, _scope_='mmdet')
        )
    teacher, student = attach(config, detector('retinanet', 2, of_student))
    sizes = ((70, 90), (50, 101))
    given = detection_batch(student.data_preprocessor, *sizes)
    inner = teacher.network.data_preprocessor
    wanted = detection_batch(inner.data_preprocessor if wrapped else inner, *sizes)['inputs']
    made = teacher._convert(given['inputs'], given['data_samples'])
    # what the student has padded stays
    sides = [-(-side // of_teacher) * of_teacher for side in given['inputs'].shape[2:]]
    assert list(made.shape[2:]) == sides
    height, width = (min(one, two) for one, two in zip(sides, wanted.shape[2:], strict=True))
    torch.testing.assert_close(made[..., :height, :width], wanted[..., :height, :width], atol=1e-4, rtol=1e-4)
    assert (made[..., height:, :] == 3).all()
    assert (made[..., width:] == 3).all()


@pytest.mark.parametrize('where', ['size_divisor', 'test_cfg'])
def test_a_segmentors_divisor(where: str) -> None:
    config = toy_segmentor(8)
    config.data_preprocessor.pop('size')
    config.data_preprocessor.update(
        dict(size_divisor=32) if where == 'size_divisor' else dict(size=(48, 64), test_cfg=dict(size_divisor=32))
    )
    teacher, _ = attach(config, toy_segmentor(4))
    batch = toy_batch(size=(50, 70))
    assert teacher._convert(batch['inputs'], batch['data_samples']).shape[2:] == (64, 96)
    teacher.probe(torch.zeros(1, 3, 96, 192), None, [LOGITS])
    seen = teacher.observe(batch['inputs'], batch['data_samples'], [LOGITS])[LOGITS][0]
    assert seen.shape[2:] == (7, 9)  # at stride 8
    with torch.no_grad():
        padded = torch.nn.functional.pad(batch['inputs'], (0, 26, 0, 14))
        wanted = teacher.network(padded, None, mode='tensor')
    torch.testing.assert_close(seen, wanted[:, :, :7, :9])


def test_a_divisor_that_divides_costs_nothing() -> None:
    teacher, _ = attach(detector('retinanet', 4, 32), detector('retinanet', 2, 32))
    inputs = torch.randn(2, 3, 64, 96)
    assert teacher._convert(inputs, None) is inputs
    samples = [object()]
    assert teacher._convert.samples(inputs, samples) is samples


@pytest.mark.parametrize('options', [{}, dict(fuse_conv_bn=True), dict(dtype='bf16')], ids=str)
def test_levels_of_a_pyramid_stand_at_the_students_positions(options: dict) -> None:
    """A spot in the image is at the same place of both maps, and nothing of the padding is left."""
    torch.manual_seed(0)
    student = MODELS.build(detector('retinanet', 2, 1))
    teacher = FrozenTeacher(detector('retinanet', 4, 128), allow_random=True, **options)
    teacher.attach(student)
    size = (72, 200)
    teacher.probe(torch.zeros(1, 3, *size), None, [NECK])
    dark = torch.zeros(1, 3, *size)
    spot = dark.clone()
    spot[:, :, 16:24, 160:168] = 50
    levels = [teacher.observe(batch, None, [NECK])[NECK] for batch in (dark, spot)]
    with torch.no_grad():
        own = student.extract_feat(dark)
    for level, (without, with_spot) in enumerate(zip(*levels, strict=True)):
        assert without.shape[2:] == own[level].shape[2:]
        change = (with_spot - without).abs().sum(dim=(0, 1))
        stride = 8 * 2**level
        if level == 0:
            row, column = divmod(int(change.argmax()), change.shape[1])
            assert (abs(row - 20 // stride), abs(column - 164 // stride)) <= (1, 1)


def test_the_probe_shows_what_a_step_does() -> None:
    terms = dict(pairwise=dict(tap='neck[*]', loss=dict(type='mmstructkd.PairwiseAffinityLoss', max_side=32)))
    student, teacher = detector('retinanet', 2, 1), detector('retinanet', 4, 256)
    config = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    model = MODELS.build(config).train()
    assert all(level.student[2:] == level.teacher[2:] for level in model.terms['pairwise'].levels)
    losses = model(**synthetic_batch(model, (72, 100), 2), mode='loss')
    assert losses['loss_kd_pairwise'] > 0
    model.parse_losses(losses)[0].backward()


def test_regions_stay_where_they_are() -> None:
    """Coordinates are pixels of both inputs: rows of regions are not cut."""
    terms = dict(region=dict(tap='roi_head.bbox_head.fc_cls', loss=dict(type='mmstructkd.PixelwiseKLLoss')))
    student, teacher = detector('faster_rcnn', 2, 1), detector('faster_rcnn', 4, 128)
    config = toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms)
    model = MODELS.build(config).train()
    batch = synthetic_batch(model, (72, 100), 2)
    _, seen = model.observe(batch['inputs'], batch['data_samples'], list(model.terms.values()))
    (shown,) = seen.teacher[model.terms['region'].teacher_taps[0]]
    network = model.teacher.network
    with torch.no_grad():
        padded = torch.nn.functional.pad(batch['inputs'], (0, 28, 0, 56))
        pooled = network.roi_head.bbox_roi_extractor(network.extract_feat(padded)[:4], seen.regions.boxes[0])
        wanted = network.roi_head.bbox_head(pooled)[0]
    torch.testing.assert_close(shown, wanted)


def test_its_samples_name_its_own_padding() -> None:
    teacher, student = attach(detector('retinanet', 4, 64), detector('retinanet', 2, 16))
    batch = detection_batch(student.data_preprocessor, (70, 90), (50, 101))
    before = copy.deepcopy(batch['data_samples'])
    taken: list[Any] = []
    teacher.probe(torch.zeros(1, 3, 64, 128), None, [Tap.parse('bbox_head.retina_cls')])
    teacher.network.register_forward_pre_hook(lambda module, args: taken.append(args[1]))
    teacher.observe(batch['inputs'], batch['data_samples'], [Tap.parse('bbox_head.retina_cls')])
    ((first, second),) = taken
    assert batch['inputs'].shape[2:] == (80, 112)
    assert first.batch_input_shape == second.batch_input_shape == (128, 128)
    assert (first.pad_shape, second.pad_shape) == ((128, 128), (64, 128))
    assert first.img_shape == (70, 90)
    assert torch.equal(first.gt_instances.bboxes, batch['data_samples'][0].gt_instances.bboxes)
    for one, two in zip(batch['data_samples'], before, strict=True):
        assert one.metainfo == two.metainfo
        assert one.batch_input_shape == (80, 112)
    segmentor = toy_segmentor(8)
    segmentor.data_preprocessor.pop('size')
    segmentor.data_preprocessor.size_divisor = 32
    conversion = InputConversion(*(MODELS.build(c).data_preprocessor for c in (toy_segmentor(4), segmentor)))
    seg = toy_batch(size=(50, 70))
    assert [sample.pad_shape for sample in conversion.samples(seg['inputs'], seg['data_samples'])] == [(64, 96)] * 2
    assert seg['data_samples'][0].pad_shape == (50, 70)


@pytest.mark.parametrize(
    ('shape', 'kept'),
    [
        ((2, 7, 64, 96), (2, 7, 50, 70)),
        ((2, 7, 8, 12), (2, 7, 7, 9)),
        ((2, 7, 2, 3), (2, 7, 2, 3)),
        ((2, 7, 1, 1), (2, 7, 1, 1)),
        ((2, 7), (2, 7)),
        ((2, 7, 128, 192), (2, 7, 100, 140)),  # finer than the input
    ],
)
def test_the_part_that_covers_the_input(shape: tuple[int, ...], kept: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    cut = cover_input(tensor, LOGITS, (50, 70), (64, 96))
    assert cut.shape == kept
    assert torch.equal(cut, tensor[tuple(slice(side) for side in kept)])
    assert cover_input(tensor, LOGITS, (64, 96), (64, 96)) is tensor
    assert cover_input(tensor, Tap.parse('roi_head.bbox_head.fc_cls'), (50, 70), (64, 96)) is tensor


@pytest.mark.parametrize('shape', [(2, 96, 7), (6, 2, 100, 32), (2, 7, 6, 6), (2, 7, 3, 8, 12)], ids=str)
def test_what_has_no_known_place_is_refused_by_name(shape: tuple[int, ...]) -> None:
    """Tokens, queries of several layers, a pooled grid, a video."""
    with pytest.raises(ConfigError, match=r"`tap` 'decode_head.conv_seg' must be a map .*pad_size_divisor"):
        cover_input(torch.zeros(shape), LOGITS, (50, 200), (64, 224))


def test_tokens_are_refused_before_the_first_batch() -> None:
    student, teacher = detector('retinanet', 2, 1), detector('retinanet', 4, 128)
    neck = dict(teacher.neck)
    teacher.neck = dict(type='mmstructkd.TokenNeck', neck=dict(neck, _scope_='mmdet'))
    terms = dict(
        tokens=dict(
            tap=dict(student='neck[0]', teacher='neck.tokens'),
            connector=dict(type='mmstructkd.TokenConnector'),
            loss=dict(type='mmstructkd.FeatureMSELoss'),
        )
    )
    with pytest.raises(ConfigError, match=r"`tap` 'neck.tokens' must be a map"):
        MODELS.build(toy_distiller(student=student, teacher=dict(config=teacher, allow_random=True), terms=terms))


@MODELS.register_module()
class TokenNeck(nn.Module):
    """A pyramid whose finest level passes as tokens."""

    def __init__(self, neck: dict) -> None:
        super().__init__()
        self.neck = MODELS.build(neck)
        self.tokens = nn.Identity()

    def forward(self, inputs: Any) -> Any:
        levels = list(self.neck(inputs))
        shape = levels[0].shape
        levels[0] = self.tokens(levels[0].flatten(2).transpose(1, 2)).transpose(1, 2).reshape(shape)
        return tuple(levels)


# --- which preprocessor --------------------------------------------------------------------------------------


def preprocessor(**changes: Any) -> BaseDataPreprocessor:
    config = dict(toy_segmentor(4).data_preprocessor, _scope_='mmseg')
    config.update(changes)
    return MODELS.build(config)


class Wrapper(BaseDataPreprocessor):
    """One around another, as mmdet's for several branches."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.data_preprocessor = inner

    def forward(self, data: dict, training: bool = False) -> dict:
        return self.data_preprocessor(data, training)


@pytest.mark.parametrize('depth', [1, 3])
@pytest.mark.parametrize('side', ['student', 'teacher', 'both'])
def test_a_wrapped_preprocessor_is_the_inner_one(side: str, depth: int) -> None:
    def wrapped(inner: nn.Module) -> nn.Module:
        for _ in range(depth):
            inner = Wrapper(inner)
        return inner

    of_student, of_teacher = preprocessor(), preprocessor(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=False)
    expected = InputConversion(of_student, of_teacher)
    made = InputConversion(
        wrapped(of_student) if side != 'teacher' else of_student,
        wrapped(of_teacher) if side != 'student' else of_teacher,
    )
    inputs = torch.randn(2, 3, 8, 8)
    assert torch.equal(made(inputs, None), expected(inputs, None))
    assert not torch.equal(made(inputs, None), inputs)
    assert preprocessing(wrapped(of_teacher)) == preprocessing(of_teacher)


def test_a_semi_supervised_detector_as_the_teacher_sees_normalised_images() -> None:
    """SoftTeacher: two detectors behind a preprocessor of branches."""
    inner = toy_detector('faster_rcnn', 4)
    config = dict(
        type='SoftTeacher',
        _scope_='mmdet',
        detector=dict(inner),
        data_preprocessor=dict(type='MultiBranchDataPreprocessor', data_preprocessor=dict(inner.data_preprocessor)),
        semi_train_cfg=dict(freeze_teacher=True),
        semi_test_cfg=dict(predict_on='teacher'),
    )
    teacher, _ = attach(config, toy_segmentor(4, data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64))))
    raw = torch.rand(1, 3, 64, 64) * 255
    own = teacher.network.data_preprocessor.data_preprocessor
    torch.testing.assert_close(teacher._convert(raw, None), (raw.flip(1) - own.mean) / own.std, rtol=1e-4, atol=1e-4)


def test_branches_of_a_batch_are_refused_by_name() -> None:
    teacher, _ = attach(toy_segmentor(8), toy_segmentor(4))
    teacher.probe(torch.zeros(1, 3, 64, 64), None, [LOGITS])
    inputs = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ConfigError, match=r"must be one batch of images, got dict of \['sup', 'unsup'\]"):
        teacher.observe(dict(sup=inputs, unsup=inputs), None, [LOGITS])


class PerImage(ImgDataPreprocessor):
    """Each image by its own mean."""

    def forward(self, data: dict, training: bool = False) -> dict:
        return {**data, 'inputs': torch.stack([i.float() - i.float().mean() for i in data['inputs']])}


class Learnt(ImgDataPreprocessor):
    """A scale that is trained."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.scale_of_input = nn.Parameter(torch.ones(1))


class Unit(BaseDataPreprocessor):
    """Divides by 255 and says so nowhere."""

    def forward(self, data: dict, training: bool = False) -> dict:
        return {**data, 'inputs': torch.stack([image.float() / 255 for image in data['inputs']])}


class TwoOfEach(ImgDataPreprocessor):
    """Two views of an image."""

    def forward(self, data: dict, training: bool = False) -> dict:
        data = super().forward(data, training)
        return {**data, 'inputs': [data['inputs'], data['inputs'].flip(-1)]}


class Moods(ImgDataPreprocessor):
    """Needs what nobody gives."""

    def forward(self, data: dict, training: bool = False) -> dict:
        return data['mood']


class Same(ImgDataPreprocessor):
    """A subclass that computes what its base does."""

    def forward(self, data: dict, training: bool = False) -> dict:
        return super().forward(data, training)


SETTINGS = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True)


@pytest.mark.parametrize('side', ['student', 'teacher'])
@pytest.mark.parametrize(
    ('odd', 'reason'),
    [
        (lambda: PerImage(**SETTINGS), 'got PerImage: what it makes of an image is not'),
        (lambda: Learnt(**SETTINGS), 'got Learnt: it has parameters that are learnt'),
        (Unit, 'got Unit: what it makes of an image is not'),
        (lambda: TwoOfEach(**SETTINGS), 'got TwoOfEach: of one image of shape .* it makes list'),
        (lambda: Moods(**SETTINGS), "got Moods: on one image it raises KeyError: 'mood'"),
        (
            lambda: MODELS.build(dict(type='TrackDataPreprocessor', _scope_='mmdet', **SETTINGS)),
            'got TrackDataPreprocessor: on one image it raises',
        ),
    ],
    ids=['per image', 'learnt', 'scale', 'views', 'keys', 'video'],
)
def test_what_cannot_be_inverted_is_refused_by_name(odd: Any, reason: str, side: str) -> None:
    pair = (odd(), preprocessor()) if side == 'student' else (preprocessor(), odd())
    with pytest.raises(ConfigError, match=f'the data preprocessor of the {side} must compute .*{reason}.*subclass of'):
        InputConversion(*pair)


@pytest.mark.parametrize('kind', [PerImage, Same])
def test_where_both_have_the_same_nothing_is_converted(kind: type) -> None:
    """Whatever it computes: the teacher gets what it has learnt from."""
    inputs = torch.randn(1, 3, 8, 8)
    assert InputConversion(kind(**SETTINGS), kind(**SETTINGS))(inputs, None) is inputs
    padded = InputConversion(kind(**SETTINGS, pad_size_divisor=16), kind(**SETTINGS, pad_size_divisor=16))
    assert padded(inputs, None).shape == (1, 3, 16, 16)
    if kind is PerImage:
        for changes in (dict(mean=[0.0, 0.0, 0.0]), dict(pad_size_divisor=16), dict(bgr_to_rgb=False)):
            with pytest.raises(ConfigError, match='got PerImage'):
                InputConversion(kind(**SETTINGS), kind(**{**SETTINGS, **changes}))
    with pytest.raises(ConfigError, match='got Learnt'):
        InputConversion(Learnt(**SETTINGS), Learnt(**SETTINGS))
    zero = dict(SETTINGS, std=[1.0, 0.0, 1.0])
    with pytest.raises(ConfigError, match='`std` must be finite and above 0'):
        InputConversion(kind(**zero), kind(**zero))


@pytest.mark.parametrize('settings', [SETTINGS, {}, dict(mean=[3.0], std=[2.0])], ids=str)
def test_a_subclass_that_does_what_it_says_is_taken(settings: dict) -> None:
    one, two = (InputConversion(kind(**settings), preprocessor()) for kind in (Same, ImgDataPreprocessor))
    inputs = torch.randn(1, 3, 8, 8)
    assert torch.equal(one(inputs, None), two(inputs, None))


def test_a_wrapper_for_test_time_augmentation_is_no_teacher() -> None:
    config = dict(type='SegTTAModel', _scope_='mmseg', module=toy_segmentor(8))
    with pytest.raises(ConfigError, match='`config` must be that of the plain network, got SegTTAModel'):
        attach(config, toy_segmentor(4))


@pytest.mark.parametrize('side', ['student', 'teacher'])
@pytest.mark.parametrize(
    ('values', 'message'),
    [
        (dict(std=[58.0, 0.0, 57.0]), r'`std` must be finite and above 0 in each channel, got \[58.0, 0.0, 57.0\]'),
        (dict(std=[0.0, 0.0, 0.0]), '`std` must be finite and above 0'),
        (dict(std=[58.0, 57.0, float('nan')]), r'`std` must be .* got \[58.0, 57.0, nan\]'),
        (dict(std=[58.0, -57.0, 57.0]), r'`std` must be .* got \[58.0, -57.0, 57.0\]'),
        (dict(std=[58.0, float('inf'), 57.0]), r'`std` must be .* got \[58.0, inf, 57.0\]'),
        (dict(mean=[1.0, float('nan'), 2.0]), r'`mean` must be finite in each channel, got \[1.0, nan, 2.0\]'),
    ],
)
def test_what_cannot_be_divided_by_is_refused_at_build(side: str, values: dict, message: str) -> None:
    """Of the student it would be undone, of the teacher done: both give no numbers."""
    configs = {'student': toy_segmentor(4), 'teacher': toy_segmentor(8)}
    configs[side].data_preprocessor.update(values)
    with pytest.raises(ConfigError, match=f'the data preprocessor of the {side}: {message}'):
        MODELS.build(
            toy_distiller(student=configs['student'], teacher=dict(config=configs['teacher'], allow_random=True))
        )


class Wide(BaseDataPreprocessor):
    """Any number of channels, as mmseg of one line takes it."""

    def __init__(self, channels: int, swaps: bool = False) -> None:
        super().__init__()
        self._enable_normalize, self._channel_conversion = True, swaps
        self.register_buffer('mean', torch.arange(float(channels)).view(-1, 1, 1))
        self.register_buffer('std', torch.ones(channels, 1, 1) + 1)

    def forward(self, data: dict, training: bool = False) -> dict:
        return {**data, 'inputs': torch.stack([(image - self.mean) / self.std for image in data['inputs']])}


def test_other_numbers_of_channels() -> None:
    with pytest.raises(ConfigError, match='as many channels as those of the student, got 4 and 3'):
        InputConversion(preprocessor(), Wide(4))
    with pytest.raises(ConfigError, match='as many channels as those of the student, got 3 and 5'):
        InputConversion(Wide(5), preprocessor())
    conversion = InputConversion(Wide(4), Wide(4))
    inputs = torch.randn(2, 4, 8, 8)
    assert conversion(inputs, None) is inputs
    with pytest.raises(ConfigError, match=r'`inputs` must have the 4 channels of its data preprocessor, got \(2, 3,'):
        conversion(inputs[:, :3], None)
    with pytest.raises(ConfigError, match=r'`inputs` must have the 3 channels of its data preprocessor, got \(2, 1,'):
        InputConversion(preprocessor(), preprocessor())(inputs[:, :1], None)
    grey = [ImgDataPreprocessor(mean=[mean], std=[2.0]) for mean in (1.0, 5.0)]
    assert torch.allclose(InputConversion(*grey)(inputs[:, :1], None), inputs[:, :1] - 2)
    assert not InputConversion(Wide(4), Wide(4, swaps=True)).flip


def test_divisors() -> None:
    assert pad_divisor(BaseDataPreprocessor()) == 1
    assert pad_divisor(ImgDataPreprocessor(pad_size_divisor=32)) == 32
    assert pad_divisor(preprocessor()) == 1
    assert pad_divisor(preprocessor(size=None, size_divisor=24, test_cfg=dict(size_divisor=32))) == 96
    assert pad_divisor(preprocessor(test_cfg=dict(size=(512, 512)))) == 1


def test_the_teachers_batch_augments_are_not_run() -> None:
    config = detector('retinanet', 4, 1, batch_augments=[dict(type='BatchFixedSizePad', size=(256, 256))])
    teacher, _ = attach(config, detector('retinanet', 2, 1))
    inputs = torch.randn(1, 3, 40, 50)
    assert teacher._convert(inputs, None) is inputs
