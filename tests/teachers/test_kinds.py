"""The promises, for every kind of teacher: what is saved is the student, resume is exact, the step is its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers.fitting import known_of
from mmstructkd.distillers.preflight import measure_cost, try_batch
from mmstructkd.errors import ConfigError, TapError
from mmstructkd.registry import MODELS
from mmstructkd.testing import (
    toy_batch,
    toy_config,
    toy_depth_estimator,
    toy_detector,
    toy_distiller,
    toy_segmentor,
)
from tests.comparison import assert_same
from tests.teachers.kinds import ATTENTION, KINDS, KL, LEVELS, SCORES, SELF, build, frozen, model_of

every = pytest.mark.parametrize('kind', sorted(KINDS))


def train(cfg: Config) -> Runner:
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    return runner


class Interrupt(Hook):
    """Ends a run after its second iteration, as ctrl-C would."""

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == 2:
            raise KeyboardInterrupt


@every
def test_what_is_saved_is_the_student_and_resume_is_bit_equal(kind: str, tmp_path: Path) -> None:
    train(toy_config(model_of(kind), tmp_path / 'straight', max_iters=4))
    cfg = toy_config(model_of(kind), tmp_path / 'stopped', max_iters=4)
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    torch.rand(5)
    cfg.resume = True
    train(cfg)
    first, second = (read_checkpoint(str(tmp_path / name / 'iter_4.pth')) for name in ('straight', 'stopped'))
    MODELS.build(toy_segmentor(4)).load_state_dict(first['state_dict'], strict=True)
    for part in ('state_dict', 'optimizer', 'mmstructkd'):
        one, two = ({key: value for key, value in file[part].items() if key != 'config'} for file in (first, second))
        assert_same(one, two)  # the config names the folder


@every
@pytest.mark.parametrize('silent', [False, True])
def test_every_trained_parameter_has_a_gradient(kind: str, silent: bool) -> None:
    """With terms on and off: two processes need not look for unused parameters."""
    model = build(kind)
    if silent:
        for term in model.terms.values():
            term.factor = 0.0
    total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
    total.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@every
def test_the_student_draws_what_it_draws_alone(kind: str) -> None:
    """Whatever a teacher draws (dropout of a twin, of a peer), the student's losses are those of plain training."""
    plain = MODELS.build(toy_segmentor(4))
    model = build(kind)
    plain.load_state_dict(model.state_dict())
    batch, losses = toy_batch(), []
    for network in (plain.train(), model):
        torch.manual_seed(3)
        losses.append(network(**copy.deepcopy(batch), mode='loss'))
    assert all(torch.equal(value, losses[1][name]) for name, value in losses[0].items())


@every
def test_the_preflight_takes_it(kind: str) -> None:
    """One step looked at, and what it costs; a stream of data is there or is not."""
    model = build(kind)
    trial = try_batch(model, toy_batch())
    assert set(trial.task_losses) == {'decode.loss_ce', 'aux.loss_ce'}
    assert measure_cost(model, toy_batch(), runs=1).distilled_step > 0


def test_a_stream_of_data_in_the_preflight() -> None:
    streams = dict(extra=dict(type='mmstructkd.DataStream'))
    terms = dict(kd=dict(SCORES['kd'], on=['labelled', 'extra']))
    model = MODELS.build(toy_distiller(teacher=frozen(8), streams=streams, terms=terms)).train()
    for batch in (toy_batch(), dict(toy_batch(), extra=toy_batch(seed=1))):
        try_batch(model, batch)
        assert measure_cost(model, batch, runs=1).distilled_step > 0


def test_detached_and_silent_is_plain_training() -> None:
    plain = MODELS.build(toy_segmentor(4))
    model = build('self_detached')
    for term in model.terms.values():
        term.factor = 0.0
    plain.load_state_dict(model.state_dict())
    for network in (plain.train(), model):
        torch.manual_seed(3)
        total, _ = network.parse_losses(network(**toy_batch(), mode='loss'))
        total.backward()
    for (name, p), q in zip(plain.named_parameters(), model.student.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_a_twin_that_is_not_detached_teaches_the_backbone_through_its_loss() -> None:
    grads = {}
    for kind in ('self', 'self_detached'):
        model = build(kind)
        for term in model.terms.values():
            term.factor = 0.0
        torch.manual_seed(3)
        total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
        total.backward()
        grads[kind] = next(model.student.backbone.parameters()).grad.clone()
    assert not torch.allclose(grads['self'], grads['self_detached'])


def test_frozen_members_stay_as_they_are(tmp_path: Path) -> None:
    runner = Runner.from_cfg(toy_config(model_of('group'), tmp_path, max_iters=2))
    networks = [runner.model.teacher.members[name].network for name in ('big', 'wide')]
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    runner.train()
    for network, state in zip(networks, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_an_average_follows_the_student(tmp_path: Path) -> None:
    runner = train(toy_config(model_of('average'), tmp_path, max_iters=2))
    average, student = runner.model.companion, runner.model.student
    pairs = list(zip(average.parameters(), student.parameters(), strict=True))
    assert not any(p.requires_grad for p, _ in pairs)
    assert any(not torch.equal(p, q) for p, q in pairs)
    assert all(torch.allclose(p, q, atol=0.1) for p, q in pairs)


def test_the_weight_of_the_task() -> None:
    full, half, none = (build('view', task_weight=weight) for weight in (1.0, 0.5, 0.0))
    losses = []
    for model in (full, half, none):
        torch.manual_seed(3)
        losses.append(model(**toy_batch(), mode='loss'))
    torch.testing.assert_close(0.5 * losses[0]['decode.loss_ce'], losses[1]['decode.loss_ce'])
    assert losses[2]['decode.loss_ce'] == 0
    assert losses[2]['decode.loss_ce'].requires_grad
    model = build('view', task_schedule=dict(type='linear', start_factor=0.0, end_factor=1.0))
    model.set_progress(5, 10)
    assert model.task_factor == 0.5


@pytest.mark.parametrize(
    ('student', 'terms', 'task'),
    [
        (toy_depth_estimator(4), dict(levels=LEVELS), 'depth'),
        (toy_detector('fcos', 4), dict(levels=dict(tap='neck[*]', loss=ATTENTION)), 'det'),
        (toy_detector('faster_rcnn', 4), dict(levels=dict(tap='neck[*]', loss=ATTENTION)), 'det'),
    ],
)
def test_a_self_teacher_for_depth_and_detection(student: dict, terms: dict, task: str, tmp_path: Path) -> None:
    features = 'neck[*]' if task == 'det' else 'backbone[*]'
    model = toy_distiller(student=student, teacher=dict(SELF, features=features), terms=terms)
    runner = train(toy_config(model, tmp_path, max_iters=2, task=task))
    assert torch.tensor(runner.message_hub.get_scalar('train/loss_kd_levels').data[0]).isfinite().all()
    content = read_checkpoint(str(tmp_path / 'iter_2.pth'))
    MODELS.build(copy.deepcopy(student)).load_state_dict(content['state_dict'], strict=True)


@pytest.mark.parametrize('kind', ['self', 'peer', 'view', 'group'])
def test_depth_of_who_learns_in_this_training_is_not_held_against_the_truth(kind: str) -> None:
    """A twin, a peer or the student itself orders depth at random at first: no sign of disparity."""
    student = toy_depth_estimator(4)
    term = dict(tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss', kind='l1'))
    learner = dict(type='mmstructkd.PeerTeacher', config=student, terms=dict(back=term))
    teachers = {'self': SELF, 'peer': learner, 'view': dict(type='mmstructkd.ViewTeacher', flip=True)}
    model = toy_distiller(student=student, teacher=teachers.get(kind, SELF), terms=dict(metres=term))
    if kind == 'group':
        model.pop('teacher')
        model.teachers = dict(own=SELF, peer=learner)
        tap = dict(student='decode_head.to_depth', teacher='peer.decode_head.to_depth')
        model.terms = dict(metres=dict(term, tap=tap))
    built = MODELS.build(model).train()
    for seed in range(4):
        torch.manual_seed(seed)
        depth = torch.linspace(20.0, 2.0, 64)[:, None].expand(64, 64).clone()
        samples = []
        for _ in range(2):
            sample = SegDataSample(metainfo=dict(img_shape=(64, 64)))
            sample.gt_depth_map = PixelData(data=depth[None])
            samples.append(sample)
        losses = built(torch.randn(2, 3, 64, 64), samples, mode='loss')
        assert losses['loss_kd_metres'].isfinite()


def test_a_route_changes_its_weights_on_the_way(tmp_path: Path) -> None:
    files = []
    for number in range(2):
        torch.manual_seed(number)
        network = MODELS.build(toy_segmentor(8))
        network.init_weights()
        torch.save(network.state_dict(), tmp_path / f'{number}.pth')
        files.append(str(tmp_path / f'{number}.pth'))
    route = [dict(checkpoint=files[0]), dict(checkpoint=files[1], begin=2)]
    teacher = dict(type='mmstructkd.RouteTeacher', config=toy_segmentor(8), route=route)
    runner = train(toy_config(toy_distiller(teacher=teacher, terms=SCORES), tmp_path / 'run', max_iters=4))
    state = runner.model.teacher.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in torch.load(files[1]).items())
    runner.model.set_progress(1, 4)
    state = runner.model.teacher.network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in torch.load(files[0]).items())
    with pytest.raises(ConfigError, match='must lie before the end of the training'):
        runner.model.set_progress(0, 2)


def test_labels_of_a_stream_are_never_read() -> None:
    model = build('turned')
    batch = toy_batch()
    torch.manual_seed(0)
    seen = model(**copy.deepcopy(batch), mode='loss')['loss_kd_kd_turned']
    stream = model.streams['turned']
    made = stream.make(batch['inputs'], batch['data_samples'], known_of(model.student, batch['inputs']), {}, 0)
    assert not any(hasattr(sample, 'gt_sem_seg') for sample in made.data_samples)
    assert seen > 0


MISTAKES = [
    (
        dict(
            teacher=frozen(8),
            streams=dict(mixed=dict(type='mmstructkd.MixedStream')),
            terms=dict(kd=dict(SCORES['kd'], loss=dict(type='mmstructkd.IntraClassVariationLoss'), on='mixed')),
        ),
        "`on` must name a stream with labels for IntraClassVariationLoss, got 'mixed'",
    ),
    (dict(teacher=frozen(8), teachers=dict(a=frozen(8))), 'one of `teacher` and `teachers` must be given, got both'),
    (dict(teacher=dict(type='mmstructkd.SelfTeacher', features='neck[*]')), 'features'),
    (dict(teacher=dict(type='mmstructkd.ViewTeacher')), 'the view must differ from the student'),
    (dict(teacher=frozen(8), terms=dict(kd=dict(SCORES['kd'], on='web'))), "`on` must name a stream.*got 'web'"),
    (dict(teacher=frozen(8), streams=dict(a=dict(type='mmstructkd.MixdStream'))), "got 'mmstructkd.MixdStream'.*Mixed"),
]


@pytest.mark.parametrize(('changes', 'match'), MISTAKES)
def test_mistakes_are_errors_at_build(changes: dict, match: str) -> None:
    with pytest.raises((ConfigError, TapError), match=match):
        MODELS.build(toy_distiller(**{'terms': SCORES, **copy.deepcopy(changes)}))


def test_a_self_teacher_needs_the_students_config() -> None:
    student = MODELS.build(toy_segmentor(4))
    with pytest.raises(ConfigError, match='`student` must be given as a config, got a built EncoderDecoder'):
        MODELS.build(dict(toy_distiller(teacher=SELF, terms=SCORES), student=student))


def test_region_taps_of_a_teacher_that_trains_are_refused() -> None:
    detector = toy_detector('faster_rcnn', 2)
    terms = dict(region=dict(tap='roi_head.bbox_head.fc_cls', loss=KL))
    teacher = dict(type='mmstructkd.PeerTeacher', config=detector)
    with pytest.raises(TapError, match='must lie before its RoI head'):
        MODELS.build(toy_distiller(student=detector, teacher=teacher, terms=terms))
