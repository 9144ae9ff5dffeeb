"""What the check before training finds: terms that say nothing, samples used up, weights that are not there."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import PretrainedInit
from mmengine.runner.checkpoint import CheckpointLoader, load_checkpoint
from torch import Tensor, nn

from mmstructkd.compat import without_pretrained
from mmstructkd.distillers import StructuredDistiller
from mmstructkd.distillers.preflight import build_distiller, measure_cost, peak_factor, try_batch
from mmstructkd.errors import ConfigError
from mmstructkd.losses.base import DistillLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.tasks.batches import needs_of, synthetic_batch
from mmstructkd.tasks.targets import collect_targets
from mmstructkd.testing import toy_batch, toy_detector, toy_distiller, toy_segmentor, toy_terms

CHANNEL = dict(type='mmstructkd.ChannelwiseKLLoss')


class Simple(DistillLoss):
    """Squared difference of the class scores, where pixels count, or where there are boxes."""

    def __init__(self, loss_weight: float = 1.0, only: str = 'valid') -> None:
        super().__init__(loss_weight)
        self.only = only

    def forward(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        gap = (student.softmax(1) - teacher.softmax(1)).square().mean(1)
        if self.only == 'boxes':
            counts = gap.new_tensor([float(len(boxes) > 0) for boxes in targets.boxes or ()]).view(-1, 1, 1)
        else:
            height, width = gap.shape[-2:]
            counts = 1.0 if targets.valid is None else targets.valid[:, ::8, ::8][:, :height, :width]
        return self.loss_weight * (gap * counts).mean()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    MODELS.register_module(name='Simple', module=Simple)
    yield
    MODELS.module_dict.pop('Simple')


SIMPLE = dict(type='mmstructkd.Simple')


def build(terms: dict, student: dict | None = None, teacher: dict | None = None) -> StructuredDistiller:
    student = student or toy_segmentor(4)
    config = toy_distiller(student=student, teacher=dict(config=teacher or student, allow_random=True), terms=terms)
    return MODELS.build(config).train()


# --- a term that says nothing --------------------------------------------------------------------------------


def one_channel() -> dict:
    student = toy_segmentor(4)
    student.decode_head.update(channels=1)
    return student


def the_problem(distiller: StructuredDistiller, batch: dict, factors: dict | None = None) -> str:
    trial = try_batch(distiller, batch, factors)
    (report,) = trial.terms
    assert report.raw == 0
    (problem,) = trial.problems
    assert f'term {report.name!r}: its value and its gradient are 0 although its weight is 1.' in problem
    return problem


def test_one_channel() -> None:
    terms = dict(one=dict(tap='decode_head.convs', loss=SIMPLE))
    assert 'one channel, and a softmax over one class is 1 everywhere' in the_problem(
        build(terms, one_channel()), toy_batch()
    )


def test_no_pixel_counts() -> None:
    batch = toy_batch()
    for sample in batch['data_samples']:
        sample.gt_sem_seg.data.fill_(255)
    terms = dict(scores=dict(tap='decode_head.conv_seg', where='labelled', loss=SIMPLE))
    assert 'No pixel of this batch counts' in the_problem(build(terms), batch)


def test_no_boxes() -> None:
    terms = dict(levels=dict(tap='neck[0]', loss=dict(SIMPLE, only='boxes')))
    distiller = build(terms, toy_detector('fcos', 2))
    batch = synthetic_batch(distiller, (64, 96), 2)
    for sample in batch['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    assert 'No image of this batch has a box' in the_problem(distiller, batch)


@pytest.mark.parametrize('tap', ['decode_head.conv_seg', 'backbone[3]'])
def test_one_network_twice(tap: str) -> None:
    student = toy_segmentor(4)
    student.decode_head.dropout_ratio = student.auxiliary_head.dropout_ratio = 0
    student.backbone.norm_eval = True
    student.decode_head.norm_cfg = student.auxiliary_head.norm_cfg = None
    distiller = build(dict(same=dict(tap=tap, loss=SIMPLE)), student)
    distiller.teacher.network.load_state_dict(distiller.student.state_dict())
    assert 'they are one network with the same weights' in the_problem(distiller, toy_batch())


def test_one_position() -> None:
    student = toy_segmentor(4)
    student.neck = dict(type='mmstructkd.Pooled')
    MODELS.register_module(name='Pooled', module=type('Pooled', (nn.Module,), {'forward': pooled}))
    try:
        distiller = build(dict(one=dict(tap='neck[3]', loss=CHANNEL)), student)
    finally:
        MODELS.module_dict.pop('Pooled')
    assert 'one position, and a softmax over it is 1' in the_problem(distiller, toy_batch())


def pooled(self: nn.Module, maps: Any) -> tuple[Tensor, ...]:
    """A neck whose last level is one position."""
    return (*maps[:3], maps[3].mean((2, 3), keepdim=True))


def test_a_schedule_that_never_begins() -> None:
    cfg = Config(dict(train_cfg=dict(max_iters=10)))
    terms = dict(late=dict(tap='decode_head.conv_seg', loss=SIMPLE, schedule=dict(begin=10)))
    distiller = build(terms)
    factors = {name: peak_factor(term, cfg) for name, term in distiller.terms.items()}
    assert factors['late'] == (0.0, 0.0)
    trial = try_batch(distiller, toy_batch(), factors)
    assert any("term 'late'" in problem and 'factor 0' in problem for problem in trial.problems)


def test_a_term_that_is_off_is_no_problem() -> None:
    off = dict(tap='decode_head.conv_seg', loss=dict(SIMPLE, loss_weight=0.0))
    assert not try_batch(build(dict(off=off)), toy_batch()).problems


def test_a_level_of_one_position_is_a_note() -> None:
    """SSDLite's last levels: nothing to learn there, enough elsewhere."""
    student = toy_detector('retinanet', 2)
    distiller = build(dict(levels=dict(tap='neck[*]', loss=CHANNEL)), student)
    trial = try_batch(distiller, synthetic_batch(distiller, (64, 64), 2))
    assert trial.terms[0].levels[4].student[2:] == (1, 1)
    assert trial.terms[0].levels[4].term_gradient == 0
    assert not trial.problems
    (note,) = trial.notes
    assert "its gradient at 'neck[3]', 'neck[4]' is zero, a map of one position" in note or "'neck[4]' is zero" in note


# --- taps without gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'tap', 'why'),
    [
        (dict(frozen_stages=4), 'backbone[3]', "'backbone[3]' lies in a frozen part of the student"),
        (dict(frozen_stages=1), 'in:backbone.layer2', "'in:backbone.layer2' lies in a frozen part of the student"),
        (dict(with_cp=True), 'backbone.layer4.0.conv1', 'lies inside a checkpointed block (with_cp)'),
    ],
)
def test_a_tap_without_gradient_is_a_problem_and_the_rest_is_still_shown(changes: dict, tap: str, why: str) -> None:
    student = toy_segmentor(4)
    student.backbone.update(changes)
    terms = dict(cut=dict(tap=tap, loss=CHANNEL), pixel=dict(tap='decode_head.conv_seg', loss=SIMPLE))
    distiller = build(terms, student, toy_segmentor(8))
    trial = try_batch(distiller, toy_batch())
    (problem,) = trial.problems
    assert problem.startswith("term 'cut': ")
    assert why in problem
    assert trial.terms[1].levels[0].share > 0
    assert measure_cost(distiller, toy_batch(), runs=1).teacher_forward > 0
    assert [term.factor for term in distiller.terms.values()] == [1.0, 1.0]


# --- samples, the message hub, sizes -------------------------------------------------------------------------


def using_up(name: str) -> type:
    """A segmentor that changes its samples in each step, as RTMDet-Ins and Fast R-CNN do."""
    from mmseg.models import EncoderDecoder

    class Hungry(EncoderDecoder):
        def loss(self, inputs: Tensor, data_samples: Any) -> Any:
            losses = super().loss(inputs, data_samples)
            for sample in data_samples:
                if name == 'pop':
                    del sample.gt_sem_seg
                else:
                    sample.gt_sem_seg.data = sample.gt_sem_seg.data[0]
            return losses

    return Hungry


@pytest.mark.parametrize('name', ['pop', 'replace'])
def test_each_run_has_samples_of_its_own(name: str) -> None:
    MODELS.register_module(name='Hungry', module=using_up(name))
    try:
        student = toy_segmentor(4, type='mmstructkd.Hungry')
        distiller = build(toy_terms(), student)
    finally:
        MODELS.module_dict.pop('Hungry')
    batch = toy_batch()
    assert not try_batch(distiller, batch).problems
    measure_cost(distiller, batch, runs=2)
    assert batch['data_samples'][0].gt_sem_seg.data.dim() == 3


def test_a_network_that_changes_its_samples_trains() -> None:
    """The labels that terms need are read before the student has them."""
    MODELS.register_module(name='Hungry', module=using_up('pop'))
    try:
        distiller = build(toy_terms(), toy_segmentor(4, type='mmstructkd.Hungry'))
    finally:
        MODELS.module_dict.pop('Hungry')
    batch = toy_batch()
    labels = torch.cat([sample.gt_sem_seg.data for sample in batch['data_samples']])
    _, seen = distiller.observe(batch['inputs'], batch['data_samples'], list(distiller.terms.values()))
    assert torch.equal(seen.targets.labels, labels)


@pytest.mark.parametrize('info', ['iter', 'epoch', 'max_iters', 'max_epochs'])
def test_the_message_hub_knows_what_it_knows_in_training(info: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TOOD asks for the epoch, YOLOX's preprocessor for the iteration."""
    from mmseg.models import EncoderDecoder

    plain = EncoderDecoder.loss

    def loss(self: Any, *args: Any) -> Any:
        assert MessageHub.get_current_instance().get_info(info) in (0, 1)
        return plain(self, *args)

    monkeypatch.setattr(EncoderDecoder, 'loss', loss)
    distiller = build(toy_terms())
    assert not try_batch(distiller, toy_batch()).problems
    measure_cost(distiller, toy_batch(), runs=1)
    assert MessageHub.get_current_instance().get_info(info) is None


def test_needs_are_those_of_the_network_or_its_pipeline() -> None:
    mask, box = (MODELS.build(toy_detector(kind, 2)) for kind in ('mask_rcnn', 'faster_rcnn'))
    assert needs_of(mask).masks
    assert not needs_of(box).masks
    pipeline = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
    cfg = dict(train_dataloader=dict(dataset=dict(type='X', pipeline=pipeline)))
    assert needs_of(box, cfg).masks
    cfg['train_dataloader']['dataset']['pipeline'] = [dict(type='LoadAnnotations', with_bbox=True)]
    assert not needs_of(box, cfg).masks
    assert needs_of(mask, cfg).masks  # it could not be trained without
    edges = dict(train_dataloader=dict(dataset=dict(pipeline=[dict(type='GenerateEdge', edge_width=4)])))
    segmentor = MODELS.build(toy_segmentor(2))
    assert needs_of(segmentor, edges).edges
    batch = synthetic_batch(segmentor, (48, 64), 2, needs=needs_of(segmentor, edges))
    for sample in batch['data_samples']:
        labels, found = sample.gt_sem_seg.data[0], sample.gt_edge_map.data[0]
        assert torch.equal(found[:, 1:-1] > 0, edge_of(labels)[:, 1:-1])
    box.rpn_head = None
    assert needs_of(box).proposals
    (first, _) = synthetic_batch(box, (64, 96), 2)['data_samples']
    assert first.proposals.bboxes.shape == (15, 4)
    assert (first.proposals.bboxes[:, 2:] >= first.proposals.bboxes[:, :2]).all()


def test_class_maps_have_the_stride_of_the_pipeline() -> None:
    """And terms see them at the size of the input all the same."""
    detector = MODELS.build(toy_detector('mask_rcnn', 2))
    detector.roi_head.semantic_head = nn.Identity()
    detector.roi_head.semantic_head.num_classes = 7
    pipeline = [dict(type='LoadAnnotations', with_bbox=True, with_mask=True, with_seg=True)]
    cfg = dict(train_dataloader=dict(dataset=dict(type='X', pipeline=pipeline)))
    for scale in (1.0, 0.125):
        needs = needs_of(detector, cfg)
        assert (needs.semantic, needs.semantic_scale) == (7, scale)
        batch = synthetic_batch(detector, (64, 96), 2, needs=needs)
        (stored, _) = (sample.gt_sem_seg.sem_seg for sample in batch['data_samples'])
        assert stored.shape == (1, round(64 * scale), round(96 * scale))
        labels = collect_targets(detector, batch['inputs'], batch['data_samples']).labels
        assert labels.shape == (2, 64, 96)
        assert torch.equal(labels[0, :: round(1 / scale), :: round(1 / scale)], stored[0])
        pipeline.append(dict(type='SegRescale', scale_factor=0.125))


def edge_of(labels: Tensor) -> Tensor:
    """Pixels with a neighbour of another class, one by one."""
    out = torch.zeros(labels.shape, dtype=torch.bool)
    for i in range(labels.shape[0]):
        for j in range(labels.shape[1]):
            near = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
            inside = [(a, b) for a, b in near if 0 <= a < labels.shape[0] and 0 <= b < labels.shape[1]]
            out[i, j] = any(labels[a, b] != labels[i, j] for a, b in inside)
    return out


# --- without weights -----------------------------------------------------------------------------------------


def starts_from(**backbone: Any) -> Config:
    student = toy_segmentor(4)
    student.backbone.update(backbone)
    model = toy_distiller(student=student, teacher=dict(config=toy_segmentor(4), allow_random=True))
    return Config(dict(default_scope='mmseg', model=model))


class Greedy(nn.Conv2d):
    """Reads weights in its code, wherever the config says nothing of it."""

    def __init__(self, when: str) -> None:
        super().__init__(3, 3, 1)
        self.when = when
        if when == 'build':
            load_checkpoint(self, 'https://example.invalid/greedy.pth')

    def init_weights(self) -> None:
        if self.when == 'hub':
            torch.hub.load_state_dict_from_url('https://example.invalid/hub.pth')
        PretrainedInit('https://example.invalid/default.pth')(self)


@pytest.mark.parametrize(
    'init',
    [
        dict(checkpoint='https://example.invalid/a.pth'),
        dict(type='Pretrained', checkpoint='https://example.invalid/a.pth'),
        dict(type='Pretrained_Part', checkpoint='https://example.invalid/a.pth'),
        [dict(type='Kaiming', layer='Conv2d'), dict(type='Pretrained', checkpoint='https://example.invalid/a.pth')],
    ],
)
def test_random_init_reads_nothing(init: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('a download')

    monkeypatch.setattr(CheckpointLoader, 'load_checkpoint', staticmethod(load))
    assert isinstance(build_distiller(starts_from(init_cfg=init), random_init=True), StructuredDistiller)
    student = toy_segmentor(4, pretrained='https://example.invalid/b.pth')
    cfg = starts_from()
    cfg.model.student = student
    cfg.load_from = 'nowhere.pth'
    build_distiller(cfg, random_init=True)


def test_files_that_a_network_needs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text encoder that is not in the cache, and a file of a config that is nowhere."""
    from mmseg.models import EncoderDecoder

    for error, message in (
        (OSError("We couldn't connect to load 'bert-base-uncased'.\nmore"), "needs files .*'bert-base-uncased'"),
        (FileNotFoundError(2, 'No such file', 'configs/x.py'), 'files that its config names, got .*configs/x.py'),
    ):

        def build_encoder(self: Any, *args: Any, error: OSError = error, **kwargs: Any) -> None:
            raise error

        monkeypatch.setattr(EncoderDecoder, '__init__', build_encoder)
        with pytest.raises(ConfigError, match=message):
            build_distiller(starts_from(), random_init=True)


def test_weights_that_stand_in_the_code() -> None:
    quiet = Greedy('init')
    with without_pretrained():
        before = copy.deepcopy(quiet.state_dict())
        quiet.init_weights()
        assert all(torch.equal(a, b) for a, b in zip(before.values(), quiet.state_dict().values(), strict=True))
        with pytest.raises(ConfigError, match="asks for 'https://example.invalid/greedy.pth' in its code"):
            Greedy('build')
        with pytest.raises(ConfigError, match="asks for 'https://example.invalid/hub.pth' in its code"):
            Greedy('hub').init_weights()
    assert CheckpointLoader.load_checkpoint.__name__ == 'load_checkpoint'
    assert torch.hub.load_state_dict_from_url.__name__ == 'load_state_dict_from_url'
