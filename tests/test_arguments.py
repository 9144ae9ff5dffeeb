"""Wrong arguments of every registered class: refused with class and argument named, or they work.

Each argument of each class gets every value of a list of what configs get wrong.
A value may be refused, when built or when bound to tensors of a size; then by an
error of this package that names the class and the argument. Or it is taken; then
the object must also do its work on a small input. Nothing else may happen.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import pickle
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from torch import nn

from mmstructkd import registry
from mmstructkd.arguments import check_call, checked
from mmstructkd.connectors import Connector
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.errors import CheckpointError, ConfigError, ShapeError, check_count
from mmstructkd.losses import DistillLoss
from mmstructkd.memories import ClassQueue
from mmstructkd.registry import MODELS
from mmstructkd.streams import Stream
from mmstructkd.structures import Targets
from mmstructkd.taps import Tap
from mmstructkd.teachers import TeacherSource
from mmstructkd.temperatures import Temperature
from mmstructkd.terms.schedule import WeightSchedule
from mmstructkd.testing import toy_batch, toy_distiller, toy_segmentor, toy_terms
from tests.connectors import test_contract as connectors
from tests.losses import test_contract as losses


class Something:
    """What no argument asks for."""

    def __repr__(self):
        return '<something>'


NAN, INF = float('nan'), float('inf')
#: What configs and scripts get wrong.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 10**12, -(10**12), 2**63, 10**400),
    *(0.0, 0.5, 1.0, 1.5, -0.5, 2.0, 1e30, -1e30, NAN, INF, -INF, complex(1, 1)),
    *('', 'x', 'no', 'yes', 'True', '1', '0.5', 'mean', b'x'),
    *([], [1], [1, 2], (1, 1), (1, 2, 3), (0, 1), (-1, 2), (1.5, 2), (2, True), ('1', '2'), [[1, 2], [3, 4]], [None]),
    *([NAN, 1], [1, 1, 1, 1], range(2), {1, 2}),
    *({}, {'type': 'x'}, {'type': 'mmstructkd.PixelwiseKLLoss'}, {'type': None}, {'x': 1}, {1: 2}),
    *(np.float32(0.5), np.float64(NAN), np.int64(2), np.bool_(True), np.array(1), np.array([1, 2])),
    *(torch.tensor(1.0), torch.tensor([1, 2]), torch.zeros(2, 2), Something(), Something, int),
)


def classes() -> dict[str, type]:
    """Every class of this package that a config can name, and those that these are made of."""
    found = {'ClassQueue': ClassQueue, 'WeightSchedule': WeightSchedule}
    for each in vars(registry).values():
        if isinstance(each, registry.Registry):
            each.import_from_location()
            found.update(
                (name, kind)
                for name, kind in each.module_dict.items()
                if isinstance(kind, type) and kind.__module__.startswith('mmstructkd.')
            )
    return found


CLASSES = classes()


NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """The arguments that a class lists by name."""
    return {name: p for name, p in inspect.signature(cls).parameters.items() if p.kind in NAMED}


# --- how each kind of class is built and set to work -----------------------------------------------------------


def use_loss(name: str, loss: nn.Module) -> None:
    noise = losses.INPUTS.get(name, lambda t: t)(torch.zeros(1, *losses.SHAPE[1:]))
    loss.bind(noise, noise)
    student, teacher = losses.pair(name)
    part, total = losses.parts(loss.train(), student, teacher)
    assert part.isfinite(), 'the loss is not finite'
    total.backward()
    assert student.grad.isfinite().all(), 'the gradient is not finite'
    repr(loss)


def use_connector(name: str, connector: nn.Module) -> None:
    if getattr(connector, 'needs_teacher', False):
        connector.attach(connectors.Network().requires_grad_(False).eval())
    students, teachers = connectors.inputs(name)
    out = connectors.connect(connector, students, teachers)
    assert connectors.total(*out).isfinite()
    repr(connector)


def connector_settings(name: str) -> dict[str, Any]:
    students, teachers = connectors.SHAPES.get(name, connectors.PYRAMID)
    widths = [[s[-1] if len(s) == 3 else s[1] for s in shapes] for shapes in (students, teachers)]
    if not CLASSES[name].joint:
        widths = [w[0] for w in widths]
    return {'in_channels': widths[0], 'out_channels': widths[1], **connectors.SMALL.get(name, {})}


def use_temperature(temperature: Temperature) -> None:
    if hasattr(temperature, 'set_progress'):
        temperature.set_progress(3, 10)
    scores = torch.randn(2, 3, 4, 4)
    made = temperature(scores, scores)
    assert torch.as_tensor(made.temperature).isfinite().all()
    assert (made.student / made.temperature).isfinite().all()
    repr(temperature)


def use_critic(critic: nn.Module) -> None:
    image = torch.randn(1, critic.image_channels, 65, 65) if critic.image_channels else None
    assert critic(torch.randn(1, critic.in_channels, 65, 65), image).isfinite().all()
    repr(critic)


def use_depth_loss(loss: nn.Module) -> None:
    bins = type(loss).__name__ == 'DepthBinLoss'
    prediction = (1 + torch.rand(2, 8 if bins else 1, 4, 4)).requires_grad_()
    if bins:
        value = loss(prediction, torch.randint(0, 8, (2, 4, 4)), torch.ones(2, 4, 4, dtype=torch.bool))
    else:
        value = loss(prediction, 1 + torch.rand(2, 1, 4, 4))
    assert value.isfinite()
    value.backward()
    assert prediction.grad.isfinite().all()
    repr(loss)


def use_backbone(backbone: nn.Module) -> None:
    assert backbone.eval()(torch.zeros(1, 3, 32, 32)) is not None


def use_head(head: nn.Module) -> None:
    sample = SegDataSample(metainfo=dict(img_shape=(8, 8)))
    sample.set_data(
        {'gt_depth_map': PixelData(data=head.min_depth + (head.max_depth - head.min_depth) * torch.rand(1, 8, 8))}
    )
    found = head.loss([torch.randn(1, 6, 8, 8)], [sample], None)
    assert all(value.isfinite() for value in found.values())
    repr(head)


def use_turn_head(head: nn.Module) -> None:
    sample = SegDataSample(metainfo=dict(img_shape=(8, 8), turn=head.turns[0]))
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, 8, 8, dtype=torch.long))
    found = head.loss([torch.randn(1, 6, 8, 8)], [sample], None)
    assert all(value.isfinite() for value in found.values())
    repr(head)


def use_queue(queue: ClassQueue) -> None:
    keys = torch.randn(queue.num_classes, 2, queue.channels)
    queue.push(keys, torch.ones(queue.num_classes, 2, dtype=torch.bool))
    queue.sample(2, torch.tensor(0))


def use_schedule(schedule: WeightSchedule) -> None:
    for step in (0, 1, 5, 9):
        factor = schedule.factor(step, 10)
        assert math.isfinite(factor)
        assert factor >= 0


def use_teacher(teacher: TeacherSource) -> None:
    student, batch, taps = MODELS.build(toy_segmentor(2)), toy_batch(1, (32, 32)), [Tap.parse('backbone[1]')]
    teacher.attach(student)
    teacher.probe(batch['inputs'], batch['data_samples'], taps)
    assert teacher.interval_factor(0) >= 1
    (seen,) = teacher.observe(batch['inputs'], batch['data_samples'], taps)[taps[0]]
    assert seen.isfinite().all()
    teacher.provenance()


def use_beside(teacher: TeacherSource) -> None:
    """Whatever a teacher needs, a distiller gives it."""
    use_model(StructuredDistiller(student=toy_segmentor(2), teacher=teacher, terms=copy.deepcopy(ONE_TERM)).train())


def use_blend(teacher: TeacherSource) -> None:
    terms = dict(a=dict(copy.deepcopy(ONE_TERM)['a'], on='mixed'))
    streams = dict(mixed=dict(type='mmstructkd.MixedStream'))
    use_model(StructuredDistiller(student=toy_segmentor(2), teacher=teacher, terms=terms, streams=streams).train())


def use_mean(teacher: TeacherSource) -> None:
    terms = copy.deepcopy(ONE_TERM)
    terms['a']['tap'] = dict(student='decode_head.conv_seg', teacher='mean.decode_head.conv_seg')
    members = dict(a=SMALL_TEACHER, b=SMALL_TEACHER, mean=teacher)
    use_model(StructuredDistiller(student=toy_segmentor(2), teachers=members, terms=terms).train())


def use_group(teacher: TeacherSource) -> None:
    terms = copy.deepcopy(ONE_TERM)
    terms['a']['tap'] = dict(student='decode_head.conv_seg', teacher='a.decode_head.conv_seg')
    use_model(StructuredDistiller(student=toy_segmentor(2), teacher=teacher, terms=terms).train())


def use_neck(neck: nn.Module) -> None:
    out = neck([torch.randn(2, width, 16 >> level, 16 >> level) for level, width in enumerate(neck.widths)])
    assert all(level.isfinite().all() for level in out)


def use_fusion_neck(neck: nn.Module) -> None:
    sizes = [16 >> level for level in range(len(neck.widths))]
    out = neck(
        [[torch.randn(2, width, n, n) for width in widths] for widths, n in zip(neck.widths, sizes, strict=True)]
    )
    assert all(level.isfinite().all() for level in out)


def use_stream(stream: Stream) -> None:
    batch = toy_batch(2, (32, 32))
    others = {'inputs': batch['inputs'], 'data_samples': batch['data_samples']}
    made = stream.make(batch['inputs'], batch['data_samples'], Targets(), others, 0)
    assert made.inputs.isfinite().all()


def use_dataset(dataset: Any) -> None:
    assert len(dataset) > 0
    dataset[0]


def use_model(model: nn.Module) -> None:
    losses = model(**toy_batch(1, (32, 32)), mode='loss')
    assert losses['loss_kd_a'].isfinite()


def use_augmentation(step: Any) -> None:
    step({'img': np.zeros((4, 4, 3), np.uint8), 'img_path': 'a.png'})


def use_turn(step: Any) -> None:
    sample = SegDataSample()
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, 4, 4, dtype=torch.long))
    made = step(dict(inputs=torch.zeros(3, 4, 4), data_samples=sample))
    assert made['data_samples'].turn in step.turns


def use_constructor(constructor: Any) -> None:
    constructor(MODELS.build(toy_distiller(student=toy_segmentor(2), teacher=SMALL_TEACHER, terms=ONE_TERM)))


def nothing(_: Any) -> None:
    return None


SMALL_TEACHER = dict(config=toy_segmentor(2), allow_random=True)
ONE_TERM = {'a': toy_terms()['pixel']}
SCENES = dict(type='mmstructkd.SceneSegDataset', num_scenes=2, size=(16, 16))
FOLDERS = dict(img_path='img', depth_map_path='ann')
#: Of classes that have no family: their settings (``{}`` in a string is a folder of images), and what they must do.
ALONE: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    'SAGANCritic': (dict(in_channels=3, base_channels=2), use_critic),
    'DepthL1Loss': ({}, use_depth_loss),
    'DepthSILogLoss': ({}, use_depth_loss),
    'DepthBinLoss': ({}, use_depth_loss),
    'DepthRegressionHead': (dict(in_channels=6, channels=4, in_index=0), use_head),
    'DepthClassificationHead': (dict(in_channels=6, channels=4, in_index=0, num_bins=8), use_head),
    'JointTurnHead': (dict(num_classes=8, in_channels=6, channels=4, in_index=0), use_turn_head),
    'EfficientNetLite': (dict(num_stages=2, out_indices=(0, 1)), use_backbone),
    'ClassQueue': (dict(num_classes=3, capacity=4, channels=2), use_queue),
    'WeightSchedule': ({}, use_schedule),
    'FrozenTeacher': (SMALL_TEACHER, use_teacher),
    'PeerTeacher': (dict(config=toy_segmentor(2)), use_beside),
    'RouteTeacher': (dict(config=toy_segmentor(2), route=[dict(checkpoint='{}/net.pth')]), use_beside),
    'SelfTeacher': ({}, use_beside),
    'ViewTeacher': (dict(flip=True), use_beside),
    'BlendTeacher': (dict(stream='mixed'), use_blend),
    'TeacherMean': (dict(of=dict(a=0.5, b=0.5)), use_mean),
    'TeacherGroup': (dict(a=SMALL_TEACHER), use_group),
    'ResidualBackbone': (dict(base=toy_segmentor(2).backbone, assistant=toy_segmentor(2).backbone), use_backbone),
    'RefinementNeck': (dict(in_channels=[4, 4]), use_neck),
    'FusionNeck': (dict(in_channels=[[4, 4], [4, 4]]), use_fusion_neck),
    'DataStream': ({}, use_stream),
    'MixedStream': ({}, use_stream),
    'TurnedStream': ({}, use_stream),
    'ScaledStream': (dict(scale=0.5), use_stream),
    'ImageFolderDataset': (dict(data_root='{}/img'), use_dataset),
    'PairedDataset': (dict(dataset=SCENES, unlabelled=SCENES), use_dataset),
    'SceneSegDataset': (dict(num_scenes=2, size=(16, 16)), use_dataset),
    'SceneDepthDataset': (dict(num_scenes=2, size=(16, 16)), use_dataset),
    'SceneDetDataset': (dict(num_scenes=2, size=(16, 16)), use_dataset),
    'CamVidDataset': (dict(data_root='{}', data_prefix=dict(img_path='img', seg_map_path='ann')), use_dataset),
    'DepthFolderDataset': (dict(data_root='{}', data_prefix=FOLDERS), use_dataset),
    'KITTIEigenDataset': (dict(data_root='{}', data_prefix=FOLDERS, ann_file='list.txt'), use_dataset),
    'StructuredDistiller': (dict(student=toy_segmentor(2), teacher=SMALL_TEACHER, terms=ONE_TERM), use_model),
    'TurnView': ({}, use_turn),
    'FiniteAugmentation': (dict(transforms=[]), use_augmentation),
    'DistillOptimWrapperConstructor': (
        dict(optim_wrapper_cfg=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))),
        use_constructor,
    ),
}


def recipe(name: str) -> tuple[dict[str, Any], Callable[[Any], None]] | None:
    """Settings with which a class can be built, and what its object must do; ``None``: not known."""
    cls = CLASSES[name]
    if issubclass(cls, DistillLoss):
        return losses.SMALL.get(name, {}), functools.partial(use_loss, name)
    if issubclass(cls, Connector):
        return connector_settings(name), functools.partial(use_connector, name)
    if issubclass(cls, Temperature):
        return {}, use_temperature
    if name in ALONE:
        return ALONE[name]
    needed = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.kind in NAMED]
    return None if needed else ({}, nothing)


#: Classes whose further arguments are names that a user chooses.
NAMES_ARE_FREE = ('PairedDataset', 'TeacherGroup')
#: Who speaks for a class besides itself.
OWNERS = {
    'StructuredDistiller': ('term ',),
    'PeerTeacher': ('term ',),
    'RouteTeacher': ('FrozenTeacher',),
    'DistillOptimWrapperConstructor': ('StructuredDistiller: `optim_wrapper`',),
}


def build(name: str, folder: Any, changes: dict[str, Any]) -> Any:
    return CLASSES[name](**{**placed(recipe(name)[0], folder), **changes})


def placed(value: Any, folder: Any) -> Any:
    """Settings with ``{}`` in their strings replaced by a folder; each time a copy."""
    if isinstance(value, str):
        return value.replace('{}', str(folder))
    if isinstance(value, dict):
        return type(value)({key: placed(inner, folder) for key, inner in value.items()})
    return [placed(inner, folder) for inner in value] if isinstance(value, list) else value


def verdict(name: str, argument: str, value: Any, folder: Any) -> str:
    """Try a value: ``refused``, ``taken``, or what is wrong."""
    torch.manual_seed(0)
    try:
        made = build(name, folder, {argument: value})
    except Exception as err:
        return refusal(name, argument, err)
    try:
        recipe(name)[1](made)
    except Exception as err:
        told = refusal(name, argument, err)
        return told if told == 'refused' else f'taken, then {told}'
    return 'taken'


def refusal(name: str, argument: str, err: Exception) -> str:
    if isinstance(err, CheckpointError):
        return 'refused'  # it names the file
    if not isinstance(err, (ConfigError, ShapeError)):
        return f'deep: {type(err).__name__}: {str(err)[:150]}'
    stem = re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', name).lower()
    told = str(err)
    owners = (name, stem, *OWNERS.get(name, ()))
    arguments = (argument, argument.removesuffix('_cfg'))
    if not any(owner in told for owner in owners) or not any(re.search(rf'\b{a}\b', told) for a in arguments):
        return f'unnamed: {told[:150]}'
    return 'refused'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two images with labels, and a list of them."""
    root = tmp_path_factory.mktemp('data')
    for place in ('img', 'ann'):
        (root / place).mkdir()
    for name in ('a', 'b'):
        Image.new('RGB', (8, 8)).save(root / 'img' / f'{name}.jpg')
        Image.new('L', (8, 8)).save(root / 'ann' / f'{name}.png')
    torch.save(MODELS.build(toy_segmentor(2)).state_dict(), root / 'net.pth')
    (root / 'list.txt').write_text('a.jpg a.png 1.0\nb.jpg b.png 1.0\n')
    return root


@pytest.fixture(autouse=True)
def _quiet_scope(monkeypatch):
    DefaultScope.get_instance('arguments', scope_name='mmseg')
    MMLogger.get_instance('mmengine', log_level='CRITICAL')
    monkeypatch.setattr(
        torch, 'compile', lambda function, **_: function
    )  # what it makes of a network is tested elsewhere


every = pytest.mark.parametrize('name', sorted(CLASSES))


@every
def test_a_wrong_argument_is_refused_by_name_or_works(name, folder):
    """What the values of :data:`VALUES` do as each argument of each class: 0 deep failures, 0 accepted and broken."""
    if recipe(name) is None:
        pytest.fail(f'{name}: tell in ALONE how it is built, so that its arguments can be tried')
    faults = {}
    for argument in arguments_of(CLASSES[name]):
        for value in VALUES:
            found = verdict(name, argument, value, folder)
            if found not in ('refused', 'taken'):
                faults[f'{argument}={value!r:.40}'] = found
    assert not faults, '\n'.join(f'{key}: {value}' for key, value in faults.items())


def test_the_fuzz_is_not_idle(folder):
    """Both answers occur, and what must be taken is."""
    assert sum(len(arguments_of(cls)) for cls in CLASSES.values()) * len(VALUES) > 15_000
    assert verdict('PixelwiseKLLoss', 'temperature', 2.0, folder) == 'taken'
    assert verdict('PixelwiseKLLoss', 'temperature', '2.0', folder) == 'refused'
    assert verdict('ClassQueue', 'channels', 3, folder) == 'taken'


def flags() -> list[tuple[str, str]]:
    """Each argument of each class whose annotation is a flag."""
    return [
        (name, argument)
        for name, cls in sorted(CLASSES.items())
        for argument, parameter in arguments_of(cls).items()
        if re.fullmatch(r'(bool|bool \| None|Optional\[bool\])', _written(parameter.annotation))
    ]


def _written(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, '__name__', str(annotation))


@pytest.mark.parametrize(('name', 'argument'), flags())
def test_a_flag_is_true_or_false_and_nothing_else(name, argument, folder):
    for wrong in ('no', 'False', 'yes', '', 0, 1, 1.0, [], np.bool_(True), torch.tensor(True)):
        with pytest.raises(ConfigError, match=f'{name}: `{argument}` must be True or False, got'):
            build(name, folder, {argument: wrong})


def test_flags_of_all_kinds_are_found():
    assert {
        ('FrozenTeacher', 'trust_checkpoint'),
        ('FrozenTeacher', 'allow_random'),
        ('HolisticLoss', 'softmax'),
        ('HolisticLoss', 'conditional'),
        ('PairwiseAffinityLoss', 'detach_norm'),
        ('SAGANCritic', 'batch_norm'),
        ('ScheduledTemperature', 'by_epoch'),
        ('WeightSchedule', 'by_epoch'),
        ('SceneSegDataset', 'cache'),
        ('LoadSceneAnnotations', 'with_depth'),
    } <= set(flags())


@every
def test_an_unknown_argument_is_told_with_the_nearest(name, folder):
    known = [argument for argument in arguments_of(CLASSES[name]) if len(argument) > 5]
    if name == 'WeightSchedule':  # a dataclass; what configs give it goes through from_config
        return
    if name in NAMES_ARE_FREE:
        with pytest.raises(ConfigError, match=r'no_such_argument` must'):
            build(name, folder, {'no_such_argument': 1})
        return
    with pytest.raises(ConfigError, match=f"{name}: .*'no_such_argument'"):
        build(name, folder, {'no_such_argument': 1})
    for argument in known:
        typo = argument[:-2] + argument[-1] + argument[-2] + 's'
        with pytest.raises(TypeError, match=f"{name}: .*'{typo}'.*{argument}"):
            build(name, folder, {typo: 1})


# --- the mechanism -------------------------------------------------------------------------------------------------


@checked
class Blur(nn.Module):
    """Blur."""

    def __init__(
        self,
        radius: int,
        *,
        size: tuple[int, int] | None = None,
        edge: Literal['zero', 'mirror'] = 'zero',
        names: Sequence[str] = (),
        table: dict[str, float] | None = None,
        soft: bool = False,
        strength: float = None,  # noqa: RUF013  # as old code writes an optional one
        unknown: NoSuchType = 1,  # noqa: F821
    ) -> None:
        """Make."""
        super().__init__()
        check_count('Blur', 'radius', radius)
        self.radius, self.size, self.edge, self.soft = radius, size, edge, soft


class SubBlur(Blur):
    pass


@checked
class Twice(Blur):
    def __init__(self, times: int = 2, **kwargs: Any) -> None:
        super().__init__(radius=1, **kwargs)
        self.times = times


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(radius='1'), "Blur: `radius` must be an integer of at least 1, got '1'"),  # the constructor's own words
        (dict(size=(1, 2, 3)), r'Blur: `size` must be 2 integers or None, got \(1, 2, 3\)'),
        (dict(size=3), '`size` must be 2 integers or None, got 3'),
        (dict(size=(1, 2.0)), r'`size` must be 2 integers or None, got \(1, 2.0\)'),
        (dict(edge='zer'), "`edge` must be one of 'zero', 'mirror', got 'zer'"),
        (dict(names='ab'), "`names` must be a list of strings, got 'ab'"),
        (dict(names=['a', 1]), r"`names` must be a list of strings, got \['a', 1\]"),
        (dict(table=[1]), r'`table` must be a dict or None, got \[1\]'),
        (dict(table={'a': 'b'}), '`table` must be a dict or None, got'),
        (dict(soft=1), '`soft` must be True or False, got 1'),
        (dict(strength=NAN), '`strength` must be a finite number, got nan'),
        (dict(strength=10**400), '`strength` must be a finite number, got 1'),
        (dict(radiu=1), "an argument must be one that it takes, got 'radiu'. Did you mean 'radius'"),
    ],
)
@pytest.mark.parametrize('cls', [Blur, SubBlur])
def test_kinds(cls, changes, message):
    with pytest.raises(
        ConfigError, match=message.replace('Blur:', f'{cls.__name__}:') if 'own' in message else message
    ):
        cls(**{'radius': 1, **changes})


def test_what_is_right_passes():
    made = Blur(2, size=[3, 4], edge='mirror', names=('a',), table={'a': 1}, soft=True, strength=None, unknown='x')
    assert (made.radius, made.size, made.soft) == (2, [3, 4], True)
    assert Blur(2, strength=np.float32(0.5)).radius == 2
    assert Twice(times=3, soft=True).soft is True


def test_names_that_are_missing_or_double():
    with pytest.raises(TypeError, match='Blur: `radius` must be given, got only `soft`'):
        Blur(soft=True)
    with pytest.raises(TypeError, match='Blur: `radius` must be given once, got 1 and 2'):
        Blur(1, radius=2)
    with pytest.raises(TypeError, match='Blur: there must be at most 1 arguments without a name'):
        Blur(1, 2)


def test_a_subclass_that_hands_its_arguments_on():
    with pytest.raises(ConfigError, match="Twice: `times` must be an integer, got '2'"):
        Twice(times='2')
    with pytest.raises(ConfigError, match="Twice: `soft` must be True or False, got 'no'"):
        Twice(soft='no')
    with pytest.raises(TypeError, match="Twice: .* got 'sof'. Did you mean 'soft'"):
        Twice(sof=True)


def test_the_constructor_keeps_its_face():
    assert list(inspect.signature(Blur).parameters)[:3] == ['radius', 'size', 'edge']
    assert inspect.signature(Blur).parameters['edge'].default == 'zero'
    assert Blur.__init__.__doc__ == 'Make.'
    assert Blur.__init__.__qualname__ == 'Blur.__init__'
    twin = copy.deepcopy(Blur(3))
    assert pickle.loads(pickle.dumps(twin)).radius == 3


def test_a_refused_flag_stops_before_the_constructor_runs():
    seen = []

    @checked
    class Reader:
        def __init__(self, path: str, trust: bool = False) -> None:
            seen.append(path)

    with pytest.raises(ConfigError, match="Reader: `trust` must be True or False, got 'no'"):
        Reader('x', trust='no')
    assert seen == []


def test_what_the_constructor_tripped_over_is_the_cause():
    @checked
    class Sized:
        def __init__(self, size: int) -> None:
            self.half = size // 2

    with pytest.raises(ConfigError, match='Sized: `size`') as caught:
        Sized('large')
    assert isinstance(caught.value.__cause__, TypeError)


def test_a_registered_class_of_others_is_held_to_its_annotations(monkeypatch):
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))

    @MODELS.register_module()
    class PlugInLoss(DistillLoss):
        def __init__(self, loss_weight: float = 1.0, sharp: bool = False) -> None:
            super().__init__(loss_weight)

    assert MODELS.build(dict(type='mmstructkd.PlugInLoss', sharp=True)).loss_weight == 1
    with pytest.raises(ConfigError, match="PlugInLoss: `sharp` must be True or False, got 'no'"):
        MODELS.build(dict(type='mmstructkd.PlugInLoss', sharp='no'))
    with pytest.raises(TypeError, match="PlugInLoss: .*'shrap'. Did you mean 'sharp'"):
        MODELS.build(dict(type='mmstructkd.PlugInLoss', shrap=True))


def test_a_function_can_be_registered(monkeypatch):
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))

    def make_loss(weight: float = 2.0) -> nn.Module:
        return CLASSES['FeatureMSELoss'](weight)

    assert MODELS.register_module(module=make_loss) is make_loss
    assert MODELS.build(dict(type='mmstructkd.make_loss')).loss_weight == 2


def test_checking_is_cheap():
    Blur(1)
    start = time.process_time()
    for _ in range(200):
        check_call('Blur', Blur, (1,), dict(soft=True))
    assert time.process_time() - start < 0.2
