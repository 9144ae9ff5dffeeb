"""Wrong arguments of every registered class: refused with class and argument named, or they work.

Each argument of each class gets every value of a list of what configs get wrong.
A value may be refused, when built or when bound to tensors of a size; then by an
error of this package that names the class and the argument. Or it is taken; then
the object must also do its work on a small input. Nothing else may happen.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

from mmstructkd import registry
from mmstructkd.connectors import Connector
from mmstructkd.distillers.schedule import WeightSchedule
from mmstructkd.distillers.teacher import TeacherSource
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.losses import DistillLoss
from mmstructkd.memories import ClassQueue
from mmstructkd.temperatures import Temperature
from mmstructkd.testing import toy_batch, toy_segmentor
from tests.connectors import test_contract as connectors
from tests.losses import test_contract as losses


class Callme:
    """Something that no argument asks for."""

    def __repr__(self):
        return '<something>'


NAN, INF = float('nan'), float('inf')
#: What configs and scripts get wrong, by how the value reads.
VALUES: dict[str, Any] = {
    repr(value): value
    for value in (
        None, True, False, 0, 1, -1, 2, 3, 7, 0.0, 0.5, 1.0, 1.5, -0.5, 2.0, 1e30, -1e30, NAN, INF, -INF, 10**12,
        -(10**12), 2**63, 10**400, '', 'x', 'no', 'yes', 'True', '1', 'mean', '0.5', [], [1], [1, 2], [2, 1], (1, 1),
        (1, 2, 3), (0, 1), (-1, 2), (1.5, 2), ('1', '2'), [[1, 2], [3, 4]], [None], [NAN, 1], [1, 1, 1, 1], {},
        {'type': 'x'}, {'type': 'mmstructkd.PixelwiseKLLoss'}, {'type': None}, {'x': 1}, {1: 2}, b'x',
        np.float32(0.5), np.float64(NAN), np.int64(2), np.bool_(True), np.array(1), np.array([1, 2]), complex(1, 1),
        torch.tensor(1.0), torch.tensor([1, 2]), torch.zeros(2, 2), Callme(), Callme, int, range(2), {1, 2},
    )
}  # fmt: skip


def classes() -> dict[str, type]:
    """Every class of this package that a config can name, and those that these are made of."""
    found = {'ClassQueue': ClassQueue, 'WeightSchedule': WeightSchedule}
    for each in vars(registry).values():
        if isinstance(each, registry.Registry):
            each.import_from_location()
            for name, kind in each.module_dict.items():
                if isinstance(kind, type) and kind.__module__.startswith('mmstructkd.'):
                    found[name] = kind
    return found


CLASSES = classes()


def mine(cls: type) -> list[str]:
    """Names of the arguments that a class itself lists."""
    return [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


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
    assert torch.as_tensor(made.temperature).isfinite()
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


def use_head(head: nn.Module) -> None:
    sample = SegDataSample(metainfo=dict(img_shape=(8, 8)))
    sample.set_data(
        {'gt_depth_map': PixelData(data=head.min_depth + (head.max_depth - head.min_depth) * torch.rand(1, 8, 8))}
    )
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
    from mmstructkd.registry import MODELS
    from mmstructkd.taps import Tap

    student = MODELS.build(toy_segmentor(2))
    teacher.attach(student)
    batch = toy_batch(1)
    taps = [Tap.parse('backbone[1]')]
    teacher.probe(batch['inputs'], batch['data_samples'], taps)
    teacher.pace(0)
    teacher.observe(batch['inputs'], batch['data_samples'], taps)
    teacher.provenance()


def use_dataset(dataset: Any) -> None:
    assert len(dataset) > 0
    dataset[0]


def nothing(_: Any) -> None:
    return None


#: Of classes that have no family: their settings, and what they must do.
ALONE: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
    'SAGANCritic': (dict(in_channels=3, base_channels=2), use_critic),
    'DepthL1Loss': ({}, use_depth_loss),
    'DepthSILogLoss': ({}, use_depth_loss),
    'DepthBinLoss': ({}, use_depth_loss),
    'DepthRegressionHead': (dict(in_channels=6, channels=4, in_index=0), use_head),
    'DepthClassificationHead': (dict(in_channels=6, channels=4, in_index=0, num_bins=8), use_head),
    'ClassQueue': (dict(num_classes=3, capacity=4, channels=2), use_queue),
    'WeightSchedule': ({}, use_schedule),
    'FrozenTeacher': (dict(config=toy_segmentor(2), allow_random=True), use_teacher),
    'SceneSegDataset': (dict(num_scenes=2, size=(16, 16)), use_dataset),
    'SceneDepthDataset': (dict(num_scenes=2, size=(16, 16)), use_dataset),
    'SceneDetDataset': (dict(num_scenes=2, size=(16, 16)), use_dataset),
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
    needed = [
        p
        for p in inspect.signature(cls).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    return None if needed else ({}, nothing)


def verdict(name: str, argument: str, value: Any) -> str:
    """Try a value: ``refused``, ``taken``, or what is wrong."""
    cls = CLASSES[name]
    settings, use = recipe(name)
    torch.manual_seed(0)
    try:
        made = cls(**{**settings, argument: value})
    except Exception as err:
        return refusal(name, argument, err)
    try:
        use(made)
    except Exception as err:
        told = refusal(name, argument, err)
        return told if told == 'refused' else f'taken, then {told}'
    return 'taken'


def refusal(name: str, argument: str, err: Exception) -> str:
    if not isinstance(err, (ConfigError, ShapeError)):
        return f'deep: {type(err).__name__}: {str(err)[:150]}'
    if name not in str(err) or not re.search(rf'\b{argument}\b', str(err)):
        return f'unnamed: {str(err)[:150]}'
    return 'refused'
