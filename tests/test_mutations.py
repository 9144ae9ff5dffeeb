"""Mutated configs: each mistake fails before the first batch, named, and none passes in silence.

Valid distilling configs of the three tasks, with all kinds of keys, are walked
over: every key is misspelled and dropped, every value gets another kind, sign,
nesting or name, neighbours are exchanged. A mutation must be refused by an error
of this package that names the term (where it lies in one) and what is wrong in
it. The few mutations that leave a right config are listed with their reason.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmstructkd.errors import CheckpointError, ConfigError, ShapeError
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_segmentor

NAN, INF = float('nan'), float('inf')

SEGMENTATION = dict(
    type='mmstructkd.StructuredDistiller',
    student=toy_segmentor(2),
    teacher=dict(
        config=toy_segmentor(3),
        allow_random=True,
        trust_checkpoint=False,
        channels_last=False,
        dtype='fp32',
        every=2,
    ),
    terms=dict(
        pixel=dict(
            tap='decode_head.conv_seg',
            loss=dict(
                type='mmstructkd.PixelwiseKLLoss',
                loss_weight=2.0,
                temperature=dict(
                    type='mmstructkd.ScheduledTemperature',
                    start=4.0,
                    final=1.0,
                    shape='cosine',
                    begin=1,
                    end=3,
                    by_epoch=False,
                ),
            ),
            schedule=dict(type='linear', begin=1, end=4, start_factor=0.5, end_factor=2.0, by_epoch=False),
        ),
        pairwise=dict(
            tap=dict(student=['backbone[1]', 'backbone[2]'], teacher=['backbone[1]', 'backbone[2]']),
            match='order',
            where='inside',
            connector=[
                dict(type='mmstructkd.ConvConnector', kernel_size=3, norm_cfg=dict(type='BN', eps=1e-4)),
                dict(type='mmstructkd.PoolConnector', pool='avg', max_nodes=16),
            ],
            loss=dict(type='mmstructkd.PairwiseAffinityLoss', pool='max', kernel_size=(2, 2), detach_norm=True),
            schedule=dict(type='step', milestones=[2, 3], gamma=0.5),
        ),
        feature=dict(
            tap='backbone[3]',
            connector=dict(type='mmstructkd.DeepProjectorConnector', expansion=1),
            loss=dict(type='mmstructkd.StandardizedMSELoss', over='image', half=False, eps=1e-5),
            schedule=dict(type='ramp_up', begin=0, end_factor=1.5),
        ),
        memory=dict(
            tap='decode_head.convs',
            loss=dict(
                type='mmstructkd.MemoryContrastLoss',
                num_classes=10,
                temperature=dict(type='mmstructkd.LearnableTemperature', low=0.5, span=2.0, init=0.0, end=4),
                kd_temperature=1.0,
                pixel_capacity=4,
                region_capacity=2,
                pixels_per_image=2,
                pixel_keys=20,
                region_keys=10,
                max_anchors=50,
                norm_cfg=dict(type='BN', momentum=0.1),
                seed=0,
            ),
        ),
        regions=dict(
            tap='decode_head.convs',
            loss=dict(
                type='mmstructkd.RegionContrastLoss',
                mode='nce',
                regions='classes',
                num_classes=10,
                channels=4,
                queue_size=4,
                queue_keys=2,
                grid=4,
                seed=0,
            ),
        ),
        holistic=dict(
            tap='decode_head.conv_seg',
            loss=dict(
                type='mmstructkd.HolisticLoss',
                critic=dict(
                    type='mmstructkd.SAGANCritic', base_channels=2, batch_norm=False, max_side=65, size=(64, 64)
                ),
                mode='hinge',
                critic_weight=0.5,
                gradient_penalty_weight=0.0,
                softmax=True,
                conditional=True,
                optimizer=dict(type='Adam', lr=1e-3, betas=(0.5, 0.9), weight_decay=0.0, amsgrad=False),
                seed=1,
            ),
        ),
    ),
)

DEPTH = dict(
    type='mmstructkd.StructuredDistiller',
    student=toy_depth_estimator(2),
    teacher=dict(config=toy_depth_estimator(3), allow_random=True, fuse_conv_bn=False),
    terms=dict(
        gradient=dict(
            tap='decode_head.to_depth',
            loss=dict(
                type='mmstructkd.GradientMatchingLoss', loss_weight=0.5, scales=2, align=True, eps=1e-2, where='inside'
            ),
        ),
        ordinal=dict(
            tap='decode_head.to_depth',
            loss=dict(type='mmstructkd.OrdinalRelationLoss', num_pairs=50, seed=3, min_depth=0.5, max_depth=20.0),
            schedule=dict(type='cosine', start_factor=0.1, end=3),
        ),
        normals=dict(
            tap='decode_head.to_depth',
            loss=dict(type='mmstructkd.VirtualNormalLoss', num_triplets=50, focal_length=(60.0, 60.0), min_angle=20.0),
        ),
        critic=dict(
            tap='decode_head.to_depth',
            loss=dict(type='mmstructkd.HolisticLoss', critic=dict(base_channels=2), normalize='depth', seed=0),
        ),
    ),
)
DETECTION = dict(
    type='mmstructkd.StructuredDistiller',
    student=toy_detector('gfl', 2),
    teacher=dict(config=toy_detector('gfl', 3), allow_random=True),
    terms=dict(
        boxes=dict(
            tap='bbox_head.gfl_reg',
            loss=dict(type='mmstructkd.LocalizationKLLoss', region='all', edges=4, temperature=2.0, reduction='mean'),
        ),
        scores=dict(
            tap='bbox_head.gfl_cls',
            loss=dict(type='mmstructkd.BinaryKLLoss', anchors=1, normalizer='weights', loss_weight=1.0),
        ),
        necks=dict(
            tap=dict(student='neck[:3]', teacher='neck[:3]'),
            match='stride',
            connector=dict(type='mmstructkd.MaskedGenerationConnector', ratio=0.5, seed=1),
            loss=dict(type='mmstructkd.MaskedGenerationLoss', alpha=1e-3),
        ),
        focal=dict(
            tap='neck[0]',
            connector=dict(type='mmstructkd.ConvConnector', act_cfg=dict(type='ReLU')),
            loss=dict(
                type='mmstructkd.FocalGlobalLoss', foreground_weight=1e-3, background_weight=5e-4, temperature=0.5
            ),
        ),
        context=dict(
            tap=['neck[0]', 'neck[1]'],
            connector=dict(type='mmstructkd.AttentionFusionConnector', mid_channels=4, norm_cfg=dict(type='BN')),
            loss=dict(type='mmstructkd.HierarchicalContextLoss', sizes=(4, 2)),
        ),
    ),
)
CONFIGS = {'segmentation': SEGMENTATION, 'depth': DEPTH, 'detection': DETECTION}

#: Keys that must be there.
REQUIRED = ('student', 'teacher', 'terms', 'config', 'tap', 'loss', 'type')
#: Keys whose dicts hold names that are free.
FREE_NAMES = ('terms',)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change of a config.

    Attributes:
        where: path to what is changed.
        what: the change in words.
        config: the config with it.
        names: what the message has to hold, one of these.
        may_pass: the config may still be a right one: a key that is not needed is gone.
    """

    where: tuple[Any, ...]
    what: str
    config: dict
    names: tuple[str, ...]
    may_pass: bool = False

    @property
    def term(self) -> str | None:
        """The term in which the change lies."""
        return self.where[1] if self.where[0] == 'terms' and len(self.where) > 1 else None

    def __str__(self) -> str:
        return f'{".".join(map(str, self.where))}: {self.what}'


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of everything in a config but the networks' own."""
    if path:
        yield path
    if path in (('student',), ('teacher', 'config')):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for place, item in enumerate(value):
            yield from places(item, (*path, place))


def at(config: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        config = config[key]
    return config


def typo(name: str) -> str:
    """Exchange the last two letters, and double the last where that changes nothing."""
    changed = name[:-2] + name[-1] + name[-2]
    return changed if changed != name else name + name[-1]


def wrong_values(key: Any, value: Any) -> Iterator[Any]:
    """Values that are wrong in place of another, whatever the key is."""
    if isinstance(value, bool):
        yield from ('no', 1, 0, [value], {})
    elif isinstance(value, int):
        yield from (str(value), value + 0.5, -1 - value, NAN, True, [], {'x': value}, [[value]])
    elif isinstance(value, float):
        yield from (str(value), -1.0 - value, NAN, INF, True, [value], {})
    elif isinstance(value, str):
        yield from (typo(value), value + 'x', '', 7, True, [], {'x': value}, [[value]], None)
    elif isinstance(value, (list, tuple)):
        kind = type(value)
        yield from ('x', 7, {}, kind(), [value], [None], [NAN], kind(['x', *value]), kind([*value, *value]))
        yield kind(reversed(value))
    elif isinstance(value, dict):
        yield from ([], 'x', 7, True, {}, [[value]], {'x': value}, {1: 2})


#: Mutations that leave a right config, by key and what it becomes, each with its reason.
RIGHT: dict[tuple[str, str], str] = {
    ('schedule', '{}'): 'a constant weight',
    ('critic', '{}'): 'the default critic',
    ('normalize', 'None'): 'the maps as they are tapped',
    ('dtype', 'None'): 'as the student',
    ('where', 'None'): 'what the method published',
    ('focal_length', '7'): 'one number for both axes',
    ('kernel_size', '7'): 'one number for both axes',
    ('temperature', '7'): 'a number in place of a registered temperature',
    ('temperature', '0.5'): 'likewise',
    ('init', '-1.0'): 'a parameter of either sign',
    ('pool', 'None'): 'the default, or what a preset says',
    ('over', 'None'): 'likewise',
    ('mode', 'None'): 'likewise',
    ('reduction', 'None'): 'likewise',
    ('student', "['backbone[2]', 'backbone[1]']"): 'levels that are matched in order may come in any',
    ('teacher', "['backbone[2]', 'backbone[1]']"): 'likewise',
    ('betas', '(0.9, 0.5)'): 'two numbers below 1',
    ('sizes', '(2, 4)'): 'grids in another order',
    ('sizes', '()'): 'the map alone',
}
#: Keys without which a dict is still a right one, although the key is needed elsewhere.
OPTIONAL_TYPES = ('schedule', 'critic')


def is_right(path: tuple[Any, ...], before: Any, after: Any) -> bool:
    key = path[-1]
    same = type(before) is type(after) and before == after
    more = key == 'connector' and isinstance(after, list) and len(after) > 1 and after != [7]
    return same or (more and all(isinstance(part, dict) for part in after)) or (key, repr(after)) in RIGHT


#: Other words for what is wrong, by path.
TOLD = {('terms',): ('term ',), ('terms', 'context', 'tap'): ("'x'",)}


def mutations(base: dict) -> Iterator[Mutation]:
    """Every mutation of a config, in a fixed order."""
    for path in places(base):
        if path == ('type',):
            continue  # of what mmengine is to build: without it none of this package is asked
        *parents, key = path
        value = at(base, path)
        name = next((part for part in reversed(path) if isinstance(part, str)), '')

        def changed(new: Any, path: tuple[Any, ...] = path) -> dict:
            config = copy.deepcopy(base)
            at(config, path[:-1])[path[-1]] = copy.deepcopy(new)
            return config

        if isinstance(key, str) and (not parents or parents[-1] not in FREE_NAMES):
            config = copy.deepcopy(base)
            holder = at(config, tuple(parents))
            items = [(typo(k) if k == key else k, v) for k, v in holder.items()]
            holder.clear()
            holder.update(items)
            yield Mutation(path, f'is spelt {typo(key)}', config, (typo(key), key))
            config = copy.deepcopy(base)
            del at(config, tuple(parents))[key]
            needed = key in REQUIRED and not (key == 'type' and parents[-1] in OPTIONAL_TYPES)
            yield Mutation(path, 'is dropped', config, (key,), may_pass=not needed)
        for new in wrong_values(key, value):
            if not is_right(path, value, new):
                told = (
                    name,
                    *([str(parents[-1])] if key == 'type' else []),
                    str(new),
                    *TOLD.get(path, ()),
                )
                yield Mutation(path, f'is {new!r:.60}', changed(new), told)
        if isinstance(value, dict) and len(value) > 1 and path not in (('student',), ('teacher', 'config')):
            keys = list(value)
            for first, second in itertools.pairwise(keys):
                if type(value[first]) is not type(value[second]):
                    swapped = {**value, first: value[second], second: value[first]}
                    told = (first, second, name)
                    yield Mutation(path, f'has {first} and {second} exchanged', changed(swapped), told)


SCOPES = {'segmentation': 'mmseg', 'depth': 'mmseg', 'detection': 'mmdet'}


@pytest.fixture(autouse=True)
def _quiet():
    MMLogger.get_instance('mmengine', log_level='CRITICAL')


def verdict(mutation: Mutation, build: Callable[[dict], Any]) -> str | None:
    """What is wrong about what a mutation leads to; ``None``: nothing."""
    torch.manual_seed(0)
    try:
        build(mutation.config)
    except (ConfigError, ShapeError, CheckpointError) as err:
        told = str(err)
    except FirstBatch:
        return None if mutation.may_pass else 'accepted in silence'
    except Exception as err:
        return f'deep: {type(err).__name__}: {str(err)[:200]}'
    else:
        return None if mutation.may_pass else 'accepted in silence'
    if mutation.term is not None and f'term {mutation.term!r}' not in told:
        return f'does not name the term: {told[:200]}'
    if not any(name and name in told for name in mutation.names):
        return f'does not name what is wrong: {told[:200]}'
    return None


class FirstBatch(Exception):
    """The training has begun."""


@pytest.mark.parametrize('task', CONFIGS)
def test_each_mutation_is_refused_by_name(task):
    """0 accepted in silence, 0 deep, 0 that name neither term nor argument."""
    DefaultScope.get_instance(f'mutations_{task}', scope_name=SCOPES[task])
    right = MODELS.build(copy.deepcopy(CONFIGS[task]))
    built = dict(student=right.student, teacher=right.teacher)  # what a mutation of a term need not build again
    faults, tried = {}, 0
    for number, mutation in enumerate(mutations(CONFIGS[task])):
        tried += 1
        if mutation.term is not None:
            mutation = dataclasses.replace(mutation, config={**mutation.config, **built})
        if number % 2:  # a config from a file, and one that Python wrote
            mutation = dataclasses.replace(mutation, config=ConfigDict(mutation.config))
        fault = verdict(mutation, MODELS.build)
        if fault is not None:
            faults[str(mutation)] = fault
    assert not faults
    assert tried > 350


def changed(base: dict = SEGMENTATION, **keys: Any) -> dict:
    return {**copy.deepcopy(base), **copy.deepcopy(keys)}


ONE = dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss'))
TEACHER = SEGMENTATION['teacher']


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (changed(term=dict(a=ONE)), "got 'term'. Did you mean 'terms'"),
        (changed(techer=TEACHER), "got 'techer'. Did you mean 'teacher'"),
        (changed(tap='decode_head'), "got 'tap'. It belongs into a term"),
        (changed(loss=dict(type='mmstructkd.PixelwiseKLLoss')), "got 'loss'. It belongs into a term"),
        (changed(checkpoint='x.pth'), "got 'checkpoint'. It is the teacher's"),
        ({**toy_segmentor(2), **SEGMENTATION}, "got 'backbone'. It is the student's: begin `model` with _delete_=True"),
        (
            {**toy_detector('gfl', 2), **DETECTION},
            "got 'backbone'. It is the student's: begin `model` with _delete_=True",
        ),
        (changed(student='pspnet.py'), '`student` must be a config or an mmengine model, got'),
        (changed(student=dict(backbone=1)), '`student` must be a dict with a `type`'),
        (
            changed(student=toy_segmentor(2, type='EncoderDecodr')),
            "`student` must name .*Did you mean 'EncoderDecoder'",
        ),
        (changed(student=toy_segmentor(2, backbon=1)), "`student` cannot be built. .*'backbon'"),
        (changed(student=dict(type='mmstructkd.PixelwiseKLLoss')), '`student` must be a config or an mmengine model'),
        (
            changed(data_preprocessor=dict(type='SegDataPreProcesor')),
            '`data_preprocessor` must name .*SegDataPreProcessor',
        ),
        (changed(teacher='pspnet.py'), '`teacher` must be a dict'),
        (changed(teacher=None), 'one of `teacher` and `teachers` must be given, got neither'),
        (changed(teacher={}), '`config` must be given'),
        (
            changed(teacher=dict(TEACHER, chekpoint='x')),
            "`teacher` cannot be built. .*'chekpoint'. Did you mean 'checkpoint'",
        ),
        (changed(teacher=dict(TEACHER, type='mmstructkd.FrozenTeachr')), "Did you mean 'FrozenTeacher'"),
        (changed(teacher=dict(TEACHER, type='mmstructkd.PixelwiseKLLoss')), '`teacher` .*PixelwiseKLLoss'),
        (changed(teacher=dict(TEACHER, allow_random='yes')), '`allow_random` must be True or False'),
        (changed(teacher=dict(TEACHER, trust_checkpoint='no')), '`trust_checkpoint` must be True or False'),
        (changed(teacher=dict(TEACHER, config=toy_segmentor(2, type='EncoderDecodr'))), "`config` .*'EncoderDecoder'"),
        (changed(teacher=dict(config='mmseg::no/such_config.py', allow_random=True)), '`config` must be a readable'),
        (changed(teacher=dict(TEACHER, cache=dict(folder='x', max_gbs=1))), "`cache`.*'max_gbs'"),
        (changed(teacher=dict(TEACHER, cache='folder')), '`cache` must be'),
        (changed(teacher=dict(TEACHER, cache={})), 'folder'),
        (changed(terms=[ONE]), '`terms` must be a dict of terms by name'),
        (changed(terms=ONE), "the key 'tap' of a single term. Give it a name"),
        (changed(terms={}), '`terms` must be a dict of terms by name'),
        (changed(terms={1: ONE}), 'must be a plain identifier, got 1'),
        (changed(terms=dict(a=[ONE])), "term 'a': each of `terms` must be a dict"),
        (changed(terms=dict(a=None)), "term 'a': each of `terms` must be a dict"),
        (
            changed(terms=dict(a=dict(ONE, student='backbone'))),
            "term 'a': .*got 'student'. Taps that differ go into tap",
        ),
        (
            changed(terms=dict(a=dict(ONE, type='mmstructkd.PixelwiseKLLoss'))),
            "term 'a': .*got 'type'. It belongs into",
        ),
        (changed(terms=dict(a=dict(ONE, loss_weight=2.0))), "term 'a': .*got 'loss_weight'. It belongs into `loss`"),
        (changed(terms=dict(a=dict(ONE, tap=None))), "term 'a': `student`: `tap` must read"),
        (changed(terms=dict(a=dict(ONE, tap=3))), "term 'a': `student`: `tap` must read"),
        (changed(terms=dict(a=dict(ONE, tap=[['backbone[0]']]))), "term 'a': `student`: `tap` must read"),
        (changed(terms=dict(a=dict(ONE, tap=['backbone[0]'] * 2))), "term 'a': `student` must name each `tap` once"),
        (
            changed(terms=dict(a=dict(ONE, tap=dict(student='backbone[0]', techer='x')))),
            "term 'a': `tap` must have the keys",
        ),
        (changed(terms=dict(a=dict(ONE, loss='mmstructkd.PixelwiseKLLoss'))), "term 'a': `loss` must be a dict"),
        (changed(terms=dict(a=dict(ONE, loss=dict(type='PixelwiseKLLoss')))), "term 'a': `loss` .*'PixelwiseKLLoss'"),
        (
            changed(terms=dict(a=dict(ONE, loss=dict(type='mmsg.PixelwiseKLLoss')))),
            "term 'a': `loss` .*PixelwiseKLLoss",
        ),
        (changed(terms=dict(a=dict(ONE, loss=dict(type='mmstructkd.ConvConnector')))), "term 'a': `loss` "),
        (changed(terms=dict(a=dict(ONE, loss=dict(type='mmstructkd.SAGANCritic')))), "term 'a': `loss` "),
        (
            changed(terms=dict(a=dict(ONE, connector=dict(type='mmstructkd.PixelwiseKLLoss')))),
            "term 'a': .*`connector`",
        ),
        (changed(terms=dict(a=dict(ONE, connector=[]))), "term 'a': .*`connectors` must be a list of at least one"),
        (changed(terms=dict(a=dict(ONE, connector='conv'))), "term 'a': `connector` must be a dict with a `type`"),
        (
            changed(terms=dict(a=dict(ONE, connector=dict(type='mmstructkd.ConvConnector', in_channels=7)))),
            "term 'a': `in_channels` of `connector` must be the width of the student, 10, got 7",
        ),
        (changed(terms=dict(a=dict(ONE, schedule=[]))), "term 'a': `schedule` must be a dict"),
        (changed(terms=dict(a=dict(ONE, schedule='linear'))), "term 'a': `schedule` must be a dict"),
        (changed(terms=dict(a=dict(ONE, schedule=dict(begin=5, end=2)))), "term 'a': .*`end` must lie after `begin`=5"),
        (changed(terms=dict(a=dict(ONE, schedule=dict(begin=0.5)))), "term 'a': .*`begin` must be an integer"),
        (changed(terms=dict(a=dict(ONE, schedule=dict(end=2.5)))), "term 'a': .*`end` must lie after"),
        (
            changed(terms=dict(a=dict(ONE, schedule=dict(by_epoch='no')))),
            "term 'a': .*`by_epoch` must be True or False",
        ),
        (
            changed(terms=dict(a=dict(ONE, schedule=dict(type='step', milestones=[3, 2])))),
            "term 'a': .*`milestones` must increase",
        ),
        (
            changed(terms=dict(a=dict(ONE, schedule=dict(type='step', milestones=5)))),
            "term 'a': .*`milestones` must be a list",
        ),
        (
            changed(terms=dict(a=dict(ONE, schedule=dict(type='linear', milestones=[2])))),
            "term 'a': .*`milestones` must be left out for type='linear'",
        ),
        (
            changed(terms=dict(a=dict(ONE, schedule=dict(gamma=0.5)))),
            "term 'a': .*`gamma` must be left out for type='constant'",
        ),
        (
            changed(terms=dict(a=dict(ONE, loss=dict(type='mmstructkd.HolisticLoss', critic=dict(base_channel=4))))),
            "term 'a': .*`critic` .*'base_channel'. Did you mean 'base_channels'",
        ),
        (
            changed(terms=dict(a=dict(ONE, loss=dict(type='mmstructkd.HolisticLoss', critic=dict(type='SAGANCritc'))))),
            "term 'a': .*`critic` must name .*'SAGANCritc'",
        ),
        (
            changed(terms=dict(holistic=SEGMENTATION['terms']['holistic'], holistic_critic=ONE)),
            "got 'loss_kd_holistic_critic', which term 'holistic' logs as well",
        ),
    ],
)
def test_mistakes_that_no_walk_makes(config, message):
    DefaultScope.get_instance('mistakes', scope_name='mmseg')
    for given in (config, ConfigDict(config)):
        with pytest.raises(ConfigError, match=message):
            MODELS.build(copy.deepcopy(given))


# --- what only a Runner sees ---------------------------------------------------------------------------------------


class StopHook(Hook):
    """Ends a run where its first batch would be trained on."""

    priority = 'LOWEST'

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        raise FirstBatch


def run(config: dict, folder: Path) -> None:
    """Start a run of the toy distiller, up to its first batch."""
    config = copy.deepcopy(config)
    model = config.pop('model', None) or dict(changed(terms=dict(a=ONE)), type='mmstructkd.StructuredDistiller')
    runner = Runner.from_cfg(toy_config(model, folder, log_level='CRITICAL', **config))
    runner.register_hook(StopHook())
    runner.train()


SGD = dict(type='SGD', lr=0.01, momentum=0.9)


def wrapper(optimizer: Any = SGD, **changes: Any) -> dict:
    return dict(optim_wrapper=dict(type='OptimWrapper', optimizer=optimizer, **changes))


def scheduled(**schedule: Any) -> dict:
    return dict(model=changed(terms=dict(a=dict(ONE, schedule=schedule))))


def test_a_right_run_gets_to_its_first_batch(tmp_path):
    with pytest.raises(FirstBatch):
        run({}, tmp_path)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (wrapper(dict(SGD, type='SDG')), "'SDG'. Did you mean 'SGD'"),
        (wrapper(dict(type='Adma', lr=0.1)), "'Adma'. Did you mean .*'Adam'"),
        (wrapper(dict(type='Adam', lr=0.1, betas=0.9)), '`optim_wrapper`.*betas'),
        (wrapper(dict(type='Adam', lr=0.1, betas=(0.9,))), '`optim_wrapper`.*betas'),
        (wrapper(dict(SGD, lr='0.1')), '`optim_wrapper`.*lr'),
        (wrapper(dict(SGD, lr=True)), '`lr` must be'),
        (wrapper(dict(SGD, lr=NAN)), '`optim_wrapper`.*lr'),
        (wrapper(dict(SGD, lr=INF)), '`lr` must be a finite number'),
        (wrapper(dict(SGD, momentum=NAN)), '`momentum` must be a finite number'),
        (wrapper(dict(SGD, nesterov='no')), '`nesterov` must be True or False'),
        (wrapper(dict(SGD, momentun=0.9)), '`optim_wrapper`.*momentun'),
        (wrapper(dict(lr=0.1)), "`optim_wrapper`.*'optimizer'.* must be a dict with a `type`"),
        (wrapper('SGD'), "`optim_wrapper`.*'optimizer'.* must be a dict with a `type`"),
        (wrapper([SGD]), "`optim_wrapper`.*'optimizer'.* must be a dict with a `type`"),
        (dict(optim_wrapper=dict(type='OptimWrapper', optimiser=SGD)), '`optim_wrapper` must be a dict with the key'),
        (dict(optim_wrapper=dict(type='OptimWraper', optimizer=SGD)), "'OptimWraper'. Did you mean 'OptimWrapper'"),
        (wrapper(clip_gard=dict(max_norm=1)), '`optim_wrapper`.*clip_gard'),
        (wrapper(clip_grad=dict(max_nrm=1)), '`clip_grad` must be arguments of clip_grad_norm_.*max_nrm'),
        (wrapper(clip_grad=dict(max_norm='1')), '`clip_grad`: `max_norm` must be a number'),
        (wrapper(clip_grad=dict(max_norm=-1)), '`clip_grad` must leave a gradient its direction'),
        (wrapper(clip_grad=dict(max_norm=NAN)), '`clip_grad` must leave a gradient its direction'),
        (wrapper(clip_grad=1.0), '`optim_wrapper`.*clip_grad'),
        (wrapper(accumulative_counts='2'), '`optim_wrapper`.*accumulative_counts'),
        (wrapper(accumulative_counts=1.5), '`accumulative_counts` must be an integer'),
        (wrapper(accumulative_counts=True), '`accumulative_counts` must be an integer'),
        (wrapper(base_constructor='DefaultOptimWraperConstructor'), "Did you mean 'DefaultOptimWrapperConstructor'"),
        (dict(optim_wrapper=dict(type='mmstructkd.AutocastOptimWrapper', dtyp='bfloat16', optimizer=SGD)), "'dtyp'"),
        (dict(custom_hooks=[dict(type='mmstructkd.FiniteLossHook', intervl=5)]), "FiniteLossHook: .*'intervl'"),
        (
            dict(custom_hooks=[dict(type='mmstructkd.TermScheduleHook', by_epoch=True)]),
            "TermScheduleHook: .*'by_epoch'",
        ),
        (scheduled(type='linear', by_epoch=True), "term 'a': `by_epoch` .*IterBasedTrainLoop"),
        (scheduled(begin=1, by_epoch=True), "term 'a': `by_epoch` .*IterBasedTrainLoop"),
        (
            dict(
                model=changed(
                    terms=dict(
                        a=dict(
                            ONE,
                            loss=dict(
                                type='mmstructkd.PixelwiseKLLoss',
                                temperature=dict(type='mmstructkd.ScheduledTemperature', by_epoch=True),
                            ),
                        )
                    )
                )
            ),
            "term 'a': `by_epoch` of ScheduledTemperature .*IterBasedTrainLoop",
        ),
    ],
)
def test_mistakes_around_the_model_stop_before_the_first_batch(config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run(config, tmp_path)
