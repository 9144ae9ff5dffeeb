"""Class and turn together: labels, turned samples, a teacher that learns them, a student that learns from it."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

from mmstructkd.datasets import TurnView
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional import cross_entropy_loss, joint_labels, turn_maps
from mmstructkd.losses import PixelwiseKLLoss
from mmstructkd.models import JointTurnHead
from mmstructkd.registry import MODELS
from mmstructkd.streams import TurnedStream
from mmstructkd.structures import Targets
from mmstructkd.testing import toy_batch, toy_segmentor
from tests import test_golden_teachers as published

golden = published.golden
ROOT = Path(__file__).resolve().parents[2]
TURNS = ('none', 'half', 'flip', 'flip_half')
HEAD = dict(in_channels=6, channels=4, in_index=0, num_convs=1, concat_input=False, align_corners=False)


def packed(labels, image=None, **meta):
    sample = SegDataSample(metainfo=dict(img_shape=tuple(labels.shape), **meta))
    sample.gt_sem_seg = PixelData(data=labels[None])
    return dict(inputs=torch.zeros(3, *labels.shape) if image is None else image, data_samples=sample)


@pytest.mark.parametrize('turns', [TURNS, ('half', 'none'), ('flip', 'none', 'flip_half')])
@pytest.mark.parametrize('classes', [3, 70])
def test_labels_of_class_and_turn(turns, classes):
    """What the pipeline and the head make of a batch is what the definition says; also where 255 would be a class."""
    torch.manual_seed(0)
    np.random.seed(0)
    init_default_scope('mmseg')
    head = JointTurnHead(num_classes=classes * len(turns), turns=turns, **HEAD)
    labels = torch.randint(0, classes, (40, 4, 6))
    labels[:, 0, 1] = 255
    made = [TurnView(turns)(packed(one.clone())) for one in labels]
    assert {one['data_samples'].turn for one in made} == set(turns)
    want = joint_labels(labels, turns=turns, joint_ignore_index=head.ignore_index).unflatten(0, (-1, len(turns)))
    got = head._stack_batch_gt([one['data_samples'] for one in made])
    for row, one in enumerate(made):
        assert torch.equal(got[row, 0], want[row, turns.index(one['data_samples'].turn)])
    assert (got == head.ignore_index).sum() == 40
    assert (head.ignore_index == 255) == (classes * len(turns) <= 255)
    out = head([torch.randn(40, 6, 4, 6)])
    loss = head.loss_by_feat(out, [one['data_samples'] for one in made])['loss_ce']
    # mmseg divides by all pixels, ignored ones too
    counted = got.squeeze(1) != head.ignore_index
    rows = torch.log_softmax(out, 1).movedim(1, -1)[counted]
    hard = -rows.gather(1, got.squeeze(1)[counted][:, None]).sum() / counted.numel()
    torch.testing.assert_close(loss, hard)


@published.case_names('hsakd_student*')
def test_published_through_registered_parts(name):
    case = golden.load(name)
    students = golden.learner(case)
    classes = students[0].shape[1]
    head = JointTurnHead(num_classes=4 * classes, turns=4, **HEAD)
    samples = [
        packed(label.view(1, 1).expand(2, 2).clone(), turn=turn)['data_samples']
        for label in case['target']
        for turn in head.turns
    ]
    assert torch.equal(head._stack_batch_gt(samples)[:, 0, 0, 0], case['labels'])
    loss = PixelwiseKLLoss(temperature=case['temperature'])
    soft = [loss(s, t) for s, t in zip(students, case['teacher'], strict=True)]
    golden.check(case, students, cross_entropy_loss(students[0][::4], case['target']) + torch.stack(soft).sum())


def test_drawn_evenly_and_turned_as_the_stream_turns():
    np.random.seed(0)
    image = torch.randn(3, 4, 6)
    labels = torch.arange(24).view(4, 6)
    stream = dict(zip(TURNS[1:], range(3), strict=True))
    targets = Targets(labels=labels[None])
    made = TurnedStream(TURNS[1:]).make(image[None], None, targets, {}, 0)
    seen = Counter()
    for _ in range(400):
        one = TurnView()(packed(labels.clone(), image.clone()))
        turn = one['data_samples'].turn
        seen[turn] += 1
        inputs, map_ = one['inputs'], one['data_samples'].gt_sem_seg.data[0]
        if turn == 'none':
            assert torch.equal(inputs, image)
            assert torch.equal(map_, labels)
        else:
            assert torch.equal(inputs, made.inputs[stream[turn]])
            assert torch.equal(map_, made.targets.labels[stream[turn]])
    assert all(70 < seen[turn] < 130 for turn in TURNS)


def test_quarters_are_for_squares():
    np.random.seed(0)
    with pytest.raises(ShapeError, match='must be square'):
        TurnView(['quarter'])(packed(torch.zeros(4, 6, dtype=torch.long)))
    image = torch.randn(3, 4, 4)
    one = TurnView(['quarter'])(packed(torch.zeros(4, 4, dtype=torch.long), image))
    assert torch.equal(one['inputs'], turn_maps(image[None])[1])


def test_wrong_samples_and_settings():
    with pytest.raises(ConfigError, match='TurnView: the sample must be packed.*Put it behind PackSegInputs'):
        TurnView()(dict(img=np.zeros((4, 4, 3), np.uint8)))
    boxed = packed(torch.zeros(4, 4, dtype=torch.long))
    boxed['data_samples'].gt_instances = InstanceData()
    with pytest.raises(ConfigError, match='got boxes'):
        TurnView()(boxed)
    with pytest.raises(ConfigError, match='TurnView: `turns`'):
        TurnView(['upside_down'])
    with pytest.raises(ConfigError, match='`num_classes` must be a multiple of the 4 turns, got 10'):
        JointTurnHead(num_classes=10, **HEAD)
    with pytest.raises(ConfigError, match='`out_channels` must be `num_classes`=2'):
        JointTurnHead(num_classes=2, turns=('none', 'half'), out_channels=1, **HEAD)
    head = JointTurnHead(num_classes=8, **HEAD)
    for meta in ({}, {'turn': 'quarter'}):
        with pytest.raises(ConfigError, match='each image must say its turn.*TurnView'):
            head._stack_batch_gt([packed(torch.zeros(4, 4, dtype=torch.long), **meta)['data_samples']])


@pytest.mark.parametrize('size', [(48, 64), (64, 64)])
def test_a_teacher_learns_and_a_student_learns_from_it(size):
    torch.manual_seed(0)
    init_default_scope('mmseg')
    teacher = toy_segmentor(4)
    aux = dict(teacher.auxiliary_head, type='mmstructkd.JointTurnHead', num_classes=40)
    teacher.auxiliary_head = [aux, dict(aux, in_channels=32, in_index=3)]
    teacher.data_preprocessor.size = size
    network = MODELS.build(copy.deepcopy(teacher)).train()
    cfg = Config.fromfile(ROOT / 'configs/scenes/turned_upernet_r18-w32_800_scenes-128x128.py')
    dataset = dict(cfg.train_dataloader.dataset, num_scenes=4, size=size, cache=False)
    data = pseudo_collate([DATASETS.build(dataset)[i] for i in range(4)])
    batch = network.data_preprocessor(data, training=True)
    losses = network(**batch, mode='loss')
    parts = [name for name in losses if name.startswith('aux') and 'loss' in name]
    assert len(parts) == 2
    sum(losses[name] for name in parts).backward()
    assert all(head.conv_seg.weight.grad.any() for head in network.auxiliary_head)
    student = Config.fromfile(
        ROOT / 'configs/teachers/hsakd_upernet-r18-w32_upernet-r18-w8_300_scenes-128x128.py'
    ).model
    student.student = toy_segmentor(2)
    student.student.data_preprocessor.size = size
    student.teacher = dict(config=teacher, allow_random=True)
    student.terms.joint.match = 'order'
    model = MODELS.build(student).train()
    found = model(**toy_batch(2, size), mode='loss')
    kd = {name: value for name, value in found.items() if 'kd' in name}
    assert set(kd) == {'loss_kd_joint', 'loss_kd_joint_turned', 'loss_kd_kd', 'loss_kd_kd_turned'}
    sum(kd.values()).backward()
    assert all(value > 0 for value in kd.values())
    assert all(p.grad.any() for c in model.terms['joint'].connectors for p in c.parameters())
    assert not any('auxiliary_head' in key and 'turn' in key for key in model.state_dict())
    assert list(model.state_dict()) == list(MODELS.build(toy_segmentor(2)).state_dict())
