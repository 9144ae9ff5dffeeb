"""Mutated configs: each mistake fails before the first batch, told by its term and argument, and none passes in silence.

Valid distilling configs of the three tasks, with all kinds of keys, are walked
over: every key is misspelled and dropped, every value gets another kind, sign,
nesting or name, neighbours are exchanged. A mutation must be refused by an error
of this package that names the term (where it lies in one) and what is wrong in
it. The few mutations that leave a right config are listed with their reason.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
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
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_detector, toy_distiller, toy_segmentor

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
        holistic=dict(
            tap='decode_head.conv_seg',
            loss=dict(
                type='mmstructkd.HolisticLoss',
                critic=dict(type='mmstructkd.SAGANCritic', base_channels=2, batch_norm=False, max_side=65, size=(64, 64)),
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
                type='mmstructkd.GradientMatchingLoss', loss_weight=0.5, scales=2, align=True, eps=1e-2, where='all'
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
            loss=dict(type='mmstructkd.FocalGlobalLoss', foreground_weight=1e-3, background_weight=5e-4, temperature=0.5),
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
        yield from ('no', 'yes', 1, 0, 0.5, [value], {})
    elif isinstance(value, int):
        yield from (str(value), value + 0.5, -1 - value, NAN, True, [], {}, {'x': value}, [[value]], 'x')
    elif isinstance(value, float):
        yield from (str(value), -1.0 - value, NAN, INF, True, [], {}, {'x': value}, [value], 'x')
    elif isinstance(value, str):
        yield from (typo(value), value + 'x', '', 7, 0.5, True, [], {}, {'x': value}, [[value]], None)
    elif isinstance(value, (list, tuple)):
        kind = type(value)
        yield from ('x', 7, {}, {'x': 1}, kind(), [value], [None], [NAN], kind(['x', *value]), kind([*value, *value]))
        yield kind(reversed(value))
    elif isinstance(value, dict):
        yield from ([], (), 'x', 7, 0.5, True, {}, [[value]], {'x': value}, {1: 2}, [7])


#: Mutations that leave a right config, by key and what it becomes, each with its reason.
RIGHT: dict[tuple[str, str], str] = {
    ('schedule', '{}'): 'a constant weight',
    ('critic', '{}'): 'the default critic',
    ('normalize', 'None'): 'the maps as they are tapped',
    ('focal_length', '7'): 'one number for both axes',
}


def is_right(path: tuple[Any, ...], before: Any, after: Any) -> bool:
    key = path[-1]
    return type(before) is type(after) and before == after or (key, repr(after)) in RIGHT


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
            yield Mutation(path, 'is dropped', config, (key,), may_pass=key not in REQUIRED)
        for new in wrong_values(key, value):
            if not is_right(path, value, new):
                told = (name, *([str(parents[-1])] if key == 'type' and parents else []), str(new))
                yield Mutation(path, f'is {new!r:.60}', changed(new), told)
        if isinstance(value, dict) and len(value) > 1 and path not in (('student',), ('teacher', 'config')):
            keys = list(value)
            for first, second in zip(keys, keys[1:], strict=False):
                if type(value[first]) is not type(value[second]):
                    swapped = {**value, first: value[second], second: value[first]}
                    told = (first, second, name)
                    yield Mutation(path, f'has {first} and {second} exchanged', changed(swapped), told)
