"""A student that trains on smaller images than its teacher sees."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from torch import Tensor

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.tasks.scales import scale_notes
from mmstructkd.testing import (
    toy_batch,
    toy_config,
    toy_depth_estimator,
    toy_detector,
    toy_distiller,
    toy_segmentor,
)

KL = dict(type='mmstructkd.PixelwiseKLLoss')
SCORES = dict(kd=dict(tap='decode_head.conv_seg', loss=KL))
METRES = dict(kd=dict(tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1')))


def seen_by(model: Any, batch: dict[str, Any]) -> tuple[dict[str, list[tuple[int, ...]]], dict[str, Tensor]]:
    """Sizes of the images that both networks get in a step, and its losses."""
    sizes: dict[str, list[tuple[int, ...]]] = {'student': [], 'teacher': []}
    for name, network in (('student', model.student), ('teacher', model.teacher.network)):
        network.backbone.register_forward_pre_hook(
            lambda module, args, name=name: sizes[name].append(tuple(args[0].shape[-2:]))
        )
    losses = model(**copy.deepcopy(batch), mode='loss')
    return sizes, losses


@pytest.mark.parametrize('stream', [None, 'mixed', 'turned'])
def test_the_student_sees_less_and_the_teacher_all(stream: str | None) -> None:
    streams = dict(mixed=dict(type='mmstructkd.MixedStream'), turned=dict(type='mmstructkd.TurnedStream'))
    terms = dict(kd=dict(SCORES['kd'], on=['labelled', stream] if stream else 'labelled'))
    model = MODELS.build(toy_distiller(terms=terms, streams=streams, student_scale=0.5)).train()
    sizes, losses = seen_by(model, toy_batch(size=(64, 96)))
    steps = 2 if stream else 1
    assert sizes == {'student': [(32, 48)] * steps, 'teacher': [(64, 96)] * steps}
    model.parse_losses(losses)[0].backward()
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)


def test_its_task_loss_is_that_of_small_images_and_full_labels() -> None:
    model = MODELS.build(toy_distiller(terms=SCORES, student_scale=0.5)).train()
    plain = MODELS.build(toy_segmentor(4))
    plain.load_state_dict(model.state_dict())
    batch = toy_batch()
    torch.manual_seed(3)
    losses = model(**copy.deepcopy(batch), mode='loss')
    small = torch.nn.functional.interpolate(
        batch['inputs'], scale_factor=0.5, mode='bilinear', align_corners=False, antialias=True
    )
    torch.manual_seed(3)
    wanted = plain.train()(small, batch['data_samples'], mode='loss')
    torch.testing.assert_close(losses['decode.loss_ce'], wanted['decode.loss_ce'])


@pytest.mark.parametrize(
    ('student', 'terms', 'task'), [(toy_segmentor(4), SCORES, 'seg'), (toy_depth_estimator(4), METRES, 'depth')]
)
def test_what_is_saved_is_the_plain_student(student: dict, terms: dict, task: str, tmp_path: Path) -> None:
    wide = toy_depth_estimator(8) if task == 'depth' else toy_segmentor(8)
    model = toy_distiller(student=student, teacher=dict(config=wide, allow_random=True), terms=terms, student_scale=0.5)
    Runner.from_cfg(toy_config(model, tmp_path, max_iters=2, task=task)).train()
    content = read_checkpoint(str(tmp_path / 'iter_2.pth'))
    MODELS.build(copy.deepcopy(student)).load_state_dict(content['state_dict'], strict=True)


def test_prediction_is_the_students_own() -> None:
    model = MODELS.build(toy_distiller(terms=SCORES, student_scale=0.5)).eval()
    inputs = toy_batch()['inputs']
    with torch.no_grad():
        assert torch.equal(model(inputs, mode='tensor'), model.student(inputs, mode='tensor'))


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(student_scale=2.0), '`student_scale` must be at most 1, got 2'),
        (dict(student_scale=0), '`student_scale`'),
        (
            dict(student=toy_detector('fcos', 4), student_scale=0.5, terms=dict(kd=dict(SCORES['kd'], tap='neck[*]'))),
            '`student_scale` must be 1 for a detector, got 0.5. Boxes would have to shrink',
        ),
    ],
)
def test_a_scale_that_cannot_be(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        MODELS.build(toy_distiller(**{'terms': SCORES, **changes}))


def pipelines(train: list[dict], val: list[dict]) -> dict[str, Any]:
    """Config of two loaders; that of training has a dataset inside another."""
    inner = dict(type='SomeDataset', pipeline=[dict(type='LoadImageFromFile'), *train])
    outer = dict(type='RepeatDataset', dataset=inner)
    return dict(
        train_dataloader=dict(dataset=outer), val_dataloader=dict(dataset=dict(type='SomeDataset', pipeline=val))
    )


HALF = dict(type='Resize', scale_factor=0.5)
RANDOM = dict(type='RandomResize', scale=(2048, 1024), ratio_range=(0.5, 2.0))


@pytest.mark.parametrize(
    ('train', 'val', 'match'),
    [
        ([], [HALF], None),
        ([], [], 'val_dataloader shows images at 1, the student trains at 0.5.*scale_factor=0.5'),
        ([dict(type='mmseg.Resize', scale_factor=2.0)], [HALF], 'at 0.5, the student trains at 1'),
        ([RANDOM], [dict(type='Resize', scale=(1024, 512))], None),
        ([RANDOM], [dict(type='Resize', scale=(2048, 1024))], 'at 1024 x 2048, the student trains at 512 x 1024'),
        ([RANDOM], [], 'cannot be read'),
        ([dict(type='RandomChoiceResize', scales=[1, 2])], [HALF], 'cannot be read'),
    ],
)
def test_the_scales_of_training_and_validation(train: list[dict], val: list[dict], match: str | None) -> None:
    config = pipelines(train, val)
    notes = scale_notes(config, 0.5)
    assert len(notes) == (0 if match is None else 1)
    assert match is None or re.search(match, notes[0])
    assert scale_notes(config, 1.0) == []
