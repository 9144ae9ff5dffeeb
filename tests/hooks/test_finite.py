"""What is not finite stops the run in its iteration, names the side, and reaches no checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.distillers.step_record import StepRecord, explain, not_finite
from mmstructkd.hooks import FiniteCheckpointHook
from mmstructkd.optim import for_distiller
from mmstructkd.registry import MODELS
from mmstructkd.testing import toy_batch, toy_config, toy_depth_estimator, toy_distiller, toy_segmentor, toy_terms

NAN, INF, HUGE = float('nan'), float('inf'), 1e30
WRAPPERS = {'fp32': 'OptimWrapper', 'bf16': 'mmstructkd.AutocastOptimWrapper'}
every_precision = pytest.mark.parametrize('precision', list(WRAPPERS))


def depth_distiller() -> Any:
    terms = dict(
        feature=dict(tap='backbone[3]', loss=dict(type='mmstructkd.StandardizedMSELoss')),
        depth=dict(tap='decode_head.to_depth', loss=dict(type='mmstructkd.DepthRegressionLoss')),
    )
    teacher = dict(config=toy_depth_estimator(8), allow_random=True)
    return toy_distiller(student=toy_depth_estimator(4), teacher=teacher, terms=terms)


def seg_distiller() -> Any:
    terms = toy_terms()
    terms['mse'] = dict(tap='backbone[2]', loss=dict(type='mmstructkd.FeatureMSELoss'))
    return toy_distiller(terms=terms)


def set_all(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if value == HUGE:
                parameter.mul_(value)
            else:
                parameter.fill_(value)


def set_output(module: nn.Module, value: float) -> None:
    module.register_forward_hook(lambda module, args, output: output * value)


def depth_batch(value: float | None = None) -> dict[str, Any]:
    batch = toy_batch()
    for place, sample in enumerate(batch['data_samples']):
        depth = torch.full((1, 48, 64), 2.0)
        if value is not None and place == 1:
            depth[0, :4] = value
            sample.set_metainfo(dict(img_path='second.png'))
        sample.gt_depth_map = PixelData(data=depth)
    return batch


class Bench:
    """A distiller that has taken a step, ready for what goes wrong in the next."""

    def __init__(self, model: Any, precision: str, batch: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = MODELS.build(model).train()
        settings = dict(type=WRAPPERS[precision], optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
        self.wrapper = build_optim_wrapper(self.model, for_distiller(settings, self.model))
        self.step(batch)

    def step(self, batch: dict[str, Any]) -> None:
        with self.wrapper.optim_context(self.model):
            losses = self.model(**batch, mode='loss')
        self.wrapper.update_params(self.model.parse_losses(losses)[0])

    def fails(self, batch: dict[str, Any], message: str) -> str:
        """Take the step; it must say why not, and change no weight."""
        before = copy.deepcopy(dict(self.model.named_parameters()))
        with pytest.raises(FloatingPointError, match=message) as caught:
            self.step(batch)
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
        return str(caught.value)


STUDENT, TEACHER = r'Side: student\. ', r'Side: teacher\. '
INJECTIONS: dict[str, tuple[Callable[[nn.Module, float], None], tuple[float, ...], str]] = {
    'weights of the student': (
        lambda m, v: set_all(m.student, v),
        (NAN, INF, HUGE),
        STUDENT + 'Its weights are not sound',
    ),
    'one weight of the student': (
        lambda m, v: m.student.backbone.layer1[0].conv1.weight.data.view(-1)[0].fill_(v),
        (NAN, INF, HUGE),
        STUDENT + r'Its weights are not sound: backbone.layer1.0.conv1.weight \((nan|inf|1e\+30)\)\.',
    ),
    'output of the student': (
        lambda m, v: set_output(m.student.decode_head.conv_seg, v),
        (NAN, INF),
        STUDENT + "term 'pixel': 'decode_head.conv_seg' of the student",
    ),
    'feature of the student': (
        lambda m, v: set_output(m.student.backbone.layer3, v),
        (NAN, INF, HUGE),
        STUDENT + '.*of the student',
    ),
    'an untapped layer of the student': (
        lambda m, v: set_output(m.student.auxiliary_head.conv_seg, v),
        (NAN, INF),
        STUDENT + 'Its own loss: aux.loss_ce',
    ),
    'weights of the teacher': (lambda m, v: set_all(m.teacher.network, v), (NAN, INF, HUGE), TEACHER),
    'output of the teacher': (
        lambda m, v: set_output(m.teacher.network.decode_head.conv_seg, v),
        (NAN, INF),
        TEACHER + r"term 'pixel': 'decode_head.conv_seg' of the teacher \(nan|inf\)",
    ),
    'feature of the teacher': (
        lambda m, v: set_output(m.teacher.network.backbone.layer3, v),
        (NAN, INF, HUGE),
        TEACHER + ".*'backbone.layer4' of the teacher|.*'backbone\\[.\\]' of the teacher",
    ),
    'connector': (
        lambda m, v: set_all(m.terms['feature'].connectors, v),
        (NAN, INF, HUGE),
        "Side: connector of term 'feature'. Its weights are not sound: connectors.0",
    ),
    'critic': (
        lambda m, v: set_all(m.terms['holistic'].loss.critic.score, v),
        (NAN, INF, HUGE),
        "Side: critic of term 'holistic'. Its weights are not sound: losses.0.critic.score",
    ),
}


@every_precision
@pytest.mark.parametrize(
    ('kind', 'value'), [(kind, value) for kind, (_, values, _) in INJECTIONS.items() for value in values]
)
def test_the_side_is_named_and_no_weight_moves(kind: str, value: float, precision: str) -> None:
    bench = Bench(seg_distiller(), precision, toy_batch())
    inject, _, message = INJECTIONS[kind]
    inject(bench.model, value)
    text = bench.fails(toy_batch(seed=1), message)
    if 'Side: teacher' in text:
        assert 'learning rate' not in text
        assert 'checkpoint' in text


@every_precision
@pytest.mark.parametrize('value', [NAN, INF])
def test_images_are_named(precision: str, value: float) -> None:
    bench = Bench(seg_distiller(), precision, toy_batch())
    batch = toy_batch(seed=1)
    batch['inputs'][1, 0, 5, 5] = value
    batch['data_samples'][1].set_metainfo(dict(img_path='some/second.png'))
    bench.fails(batch, rf'Side: images. some/second.png \({value}\)\. Look at these files')


def raw_labels(precision: str, batch: dict[str, Any]) -> Bench:
    """A student with a loss of mmseg that takes labels as they are; the head of this package leaves such ones out."""
    model = depth_distiller()
    model.student.decode_head.loss_decode = dict(type='mmseg.SiLogLoss')
    bench = Bench(model, precision, batch)
    bench.model.student.decode_head.ground_truth = lambda samples: torch.stack([s.gt_depth_map.data for s in samples])
    return bench


@every_precision
def test_labels_are_named(precision: str) -> None:
    bench = raw_labels(precision, depth_batch())
    bench.fails(depth_batch(INF), r'decode.loss_silog is \w+ .*Side: labels. gt_depth_map of second.png \(inf\)')


@every_precision
def test_labels_that_are_missing_as_nan_are_not_blamed(precision: str) -> None:
    """They are left out of every loss; what is wrong here is the teacher."""
    bench = raw_labels(precision, depth_batch(NAN))
    set_all(bench.model.teacher.network.backbone, NAN)
    assert 'labels' not in bench.fails(depth_batch(NAN), TEACHER)


def test_boxes_are_named() -> None:
    batch = toy_batch()
    sample = batch['data_samples'][0]
    sample.gt_instances = InstanceData(bboxes=HorizontalBoxes(torch.tensor([[0.0, 0.0, NAN, 4.0]])))
    record = StepRecord(batch['inputs'], batch['data_samples'], losses={'loss_bbox': torch.tensor(NAN)})
    fault = explain(MODELS.build(seg_distiller()), record)
    assert fault.side == 'labels'
    assert 'gt_instances of image 0 of the batch (nan)' in str(fault)


def test_a_gradient_of_the_students_own_loss_is_named() -> None:
    bench = Bench(seg_distiller(), 'fp32', toy_batch())
    loss = bench.model.student.auxiliary_head.loss_decode
    loss.forward = lambda scores, *args, **kwargs: (scores * 0).square().sum().sqrt()  # 0, with inf * 0 behind it
    bench.fails(toy_batch(), r'the gradient of .* the losses are .*Side: student. Its own loss: aux.loss_ce\. ')


@every_precision
@pytest.mark.parametrize('value', [NAN, INF, HUGE])
def test_a_teacher_of_depth(precision: str, value: float) -> None:
    bench = Bench(depth_distiller(), precision, depth_batch())
    set_all(bench.model.teacher.network.backbone, value)
    bench.fails(depth_batch(), r"Side: teacher\. term 'feature': 'backbone\[3\]' of the teacher")


# --- runs ---------------------------------------------------------------------------------------------------------


class At(Hook):
    """Does something before an iteration (the first is 1)."""

    priority = 'LOWEST'

    def __init__(self, iteration: int, action: Callable[[Runner], Any]) -> None:
        self.iteration, self.action = iteration, action

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if runner.iter + 1 == self.iteration:
            self.action(runner)


def run(cfg: Config, iteration: int, action: Callable[[Runner], Any], message: str) -> Runner:
    """Train until the error."""
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(At(iteration, action))
    with pytest.raises(FloatingPointError, match=message):
        runner.train()
    return runner


def config(folder: Path, precision: str = 'fp32', **changes: Any) -> Config:
    cfg = toy_config(toy_distiller(), folder, max_iters=6, **changes)
    cfg.optim_wrapper.type = WRAPPERS[precision]
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=1)
    return cfg


def assert_good(folder: Path, names: list[str]) -> None:
    """Only these checkpoints are there, finite, and the plain student loads them."""
    assert sorted(path.name for path in folder.glob('*.pth')) == names
    for name in names:
        content = read_checkpoint(str(folder / name))
        parts = ('state_dict', 'ema_state_dict', 'optimizer', 'mmstructkd')
        assert not any(not_finite(content.get(part)) for part in parts)
        MODELS.build(toy_segmentor(4)).load_state_dict(content['state_dict'], strict=True)


@every_precision
def test_a_gradient_leaves_the_last_checkpoint(precision: str, tmp_path: Path) -> None:
    """With one checkpoint kept: it is the one from before, and resumes."""
    cfg = config(tmp_path, precision, custom_hooks=[dict(type='EMAHook')])

    def spoil(runner: Runner) -> None:
        runner.model.student.backbone.layer1[0].conv1.weight.register_hook(lambda grad: grad * NAN)

    run(cfg, 4, spoil, r'^iteration 4: the gradient of backbone.layer1.0.conv1.weight \(nan\) .*Side: student')
    assert_good(tmp_path, ['iter_3.pth'])
    cfg.resume = True
    Runner.from_cfg(cfg).train()
    assert_good(tmp_path, ['iter_6.pth'])


@every_precision
@pytest.mark.parametrize('scale', [HUGE, -HUGE, 1e20])
def test_a_student_that_explodes(precision: str, scale: float, tmp_path: Path) -> None:
    def explode(runner: Runner) -> None:
        with torch.no_grad():
            for parameter in runner.model.student.parameters():
                parameter.mul_(scale)

    run(config(tmp_path, precision), 3, explode, r'^iteration 3: .*Side: student. Its weights are not sound')
    assert_good(tmp_path, ['iter_2.pth'])


def test_an_accelerators_verdict_is_read_before_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmstructkd.optim.step._free_to_read', lambda tensor: False)
    teacher = lambda runner: set_output(runner.model.teacher.network.decode_head.conv_seg, NAN)  # noqa: E731
    runner = run(config(tmp_path), 3, teacher, r'^iteration 3: loss_kd_pixel is nan.*Side: teacher')
    assert_good(tmp_path, ['iter_2.pth'])
    assert all(bool(parameter.isfinite().all()) for parameter in runner.model.parameters())


def poison_buffer(runner: Runner) -> None:
    runner.model.student.backbone.layer1[0].bn1.running_mean[0] = NAN


def poison_momentum(runner: Runner) -> None:
    optimizer = runner.optim_wrapper.optimizer.parts[1]
    next(iter(optimizer.state.values()))['exp_avg'].fill_(INF)


def poison_average(runner: Runner) -> None:
    average = next(hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook').ema_model
    next(average.module.student.parameters()).data.fill_(NAN)


def poison_connector(runner: Runner) -> None:
    set_all(runner.model.terms['feature'].connectors, INF)


@pytest.mark.parametrize(
    ('action', 'place'),
    [
        (poison_buffer, r"backbone.layer1.0.bn1.running_mean'\] \(nan\)"),
        (poison_momentum, r"optimizer\['parts'\]\[1\]\['state'\]\[0\]\['exp_avg'\] \(inf\)"),
        (poison_average, r"state_dict\['backbone.stem.0.weight'\] \(nan\)"),
        (poison_connector, r"mmstructkd\['terms'\]\['feature.connectors.0.conv.conv.weight'\] \(inf\)"),
    ],
)
def test_the_last_guard(action: Callable, place: str, tmp_path: Path) -> None:
    """What the step did not see: it happened between the step and the checkpoint."""

    class Between(Hook):
        priority = 'LOW'

        def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
            if runner.iter + 1 == 3:
                action(runner)

    cfg = config(tmp_path, custom_hooks=[dict(type='EMAHook')])
    runner = Runner.from_cfg(cfg)
    runner.register_hook(Between())
    with pytest.raises(FloatingPointError, match=f'got after iteration 3 \\d+ that are not: .*{place}.*stays'):
        runner.train()
    assert_good(tmp_path, ['iter_2.pth'])


def test_the_best_checkpoint_is_guarded_too(tmp_path: Path) -> None:
    """It is saved within the validation; the average is NaN, the raw weights are finite."""
    cfg = config(tmp_path, custom_hooks=[dict(type='EMAHook')])
    cfg.train_cfg.val_interval = 2
    cfg.default_hooks.checkpoint.update(interval=100, save_best='mIoU', rule='less')
    run(cfg, 4, poison_average, r'FiniteCheckpointHook: .*state_dict')
    assert len([path.name for path in tmp_path.glob('*.pth')]) == 1
    assert_good(tmp_path, ['best_mIoU_iter_2.pth'])


class Masked(nn.Module):
    """A network with a mask of minus infinity, and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('mask', torch.tensor([0.0, -INF]))
        self.weight = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_constants_may_be_infinite(prefix: str, tmp_path: Path) -> None:
    class Holder:
        model = Masked()
        work_dir = tmp_path

    hook, runner = FiniteCheckpointHook(), Holder()
    hook.before_run(runner)
    state = {prefix + name: value for name, value in runner.model.state_dict().items()}
    hook.before_save_checkpoint(runner, dict(meta=dict(iter=1), state_dict=state))
    state[prefix + 'mask'] = torch.tensor([-INF, 1.0])
    with pytest.raises(FloatingPointError, match='1 that are not'):
        hook.before_save_checkpoint(runner, dict(meta=dict(iter=1), state_dict=state))


def test_plain_training_may_use_the_hook(tmp_path: Path) -> None:
    cfg = toy_config(toy_segmentor(4), tmp_path, max_iters=2, custom_hooks=[dict(type='mmstructkd.FiniteLossHook')])
    spoil = lambda runner: set_output(runner.model.decode_head.conv_seg, NAN)  # noqa: E731
    run(cfg, 2, spoil, r'^iteration 2: decode.loss_ce is nan \(loss nan')


def test_what_is_not_finite_is_found_wherever_it_lies() -> None:
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([INF]), (2,))
    content = dict(a=[torch.ones(2), torch.tensor([NAN])], b=dict(c=(sparse,), d=3, e=torch.tensor([1])), f='text')
    assert list(not_finite(content)) == ["['a'][1]", "['b']['c'][0]"]
    assert not_finite(Tensor([1.0])) == {}
