"""The check before training: its numbers against a plain backward, its findings, its errors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmstructkd.distillers import StructuredDistiller
from mmstructkd.distillers.preflight import (
    gradient_share,
    measure_cost,
    peak_factor,
    try_batch,
)
from mmstructkd.errors import ConfigError
from mmstructkd.registry import MODELS
from mmstructkd.tasks.batches import input_size, real_batch, synthetic_batch
from mmstructkd.testing import toy_batch, toy_config, toy_distiller, toy_segmentor, toy_terms


def steady_student(**changes: Any) -> dict:
    """A toy segmentor without dropout, so that every forward gives the same."""
    student = toy_segmentor(4, **changes)
    student.decode_head.dropout_ratio = student.auxiliary_head.dropout_ratio = 0
    return student


def build(terms: dict, student: dict | None = None) -> StructuredDistiller:
    """A distiller in training mode."""
    return MODELS.build(toy_distiller(student=student or steady_student(), terms=terms)).train()


def retained_norm(module: nn.Module, loss: Callable[[], torch.Tensor]) -> float:
    """Norm of the gradient of a loss at a module's output, by ``retain_grad`` and a whole backward."""
    seen = []

    def keep(_: nn.Module, __: tuple, output: torch.Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    handle = module.register_forward_hook(keep)
    loss().backward()
    handle.remove()
    return float(seen[0].grad.norm())


@pytest.fixture(scope='module')
def tool(load_tool: Callable[[str], ModuleType]) -> ModuleType:
    return load_tool('check_config')


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp('config')
    toy_config(toy_distiller(), folder / 'run').dump(folder / 'distilled.py')
    return str(folder / 'distilled.py')


# --- the share -----------------------------------------------------------------------------------------------


def test_share_of_norms() -> None:
    assert gradient_share(1.0, 3.0) == 0.25
    assert gradient_share(2.0, 0.0) == 1.0
    assert gradient_share(0.0, 2.0) == 0.0
    assert gradient_share(0.0, 0.0) is None
    assert gradient_share(None, 1.0) is None


def test_gradients_are_those_of_a_plain_backward() -> None:
    weight = 3.0
    terms = dict(
        pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=weight))
    )
    distiller, batch = build(terms), toy_batch()
    (report,) = try_batch(distiller, batch).terms
    (level,) = report.levels

    conv_seg = distiller.student.decode_head.conv_seg
    task = retained_norm(conv_seg, lambda: distiller.student.parse_losses(distiller.student(**batch, mode='loss'))[0])
    term = retained_norm(conv_seg, lambda: distiller(**batch, mode='loss')['loss_kd_pixel'])
    assert task > 0
    assert level.task_gradient == pytest.approx(task, rel=1e-5)
    assert level.term_gradient == pytest.approx(term, rel=1e-5)
    assert level.share == pytest.approx(term / (term + task), rel=1e-5)
    assert report.weighted == pytest.approx(float(distiller(**batch, mode='loss')['loss_kd_pixel'].detach()), rel=1e-5)
    assert report.raw == pytest.approx(report.weighted / weight)


def test_gradient_of_the_task_at_a_tensor_that_is_changed_in_place() -> None:
    tap = 'decode_head.convs.0.bn'
    terms = dict(feature=dict(tap=tap, loss=dict(type='mmstructkd.PairwiseAffinityLoss')))
    distiller, batch = build(terms), toy_batch()
    assert [str(t) for t in distiller._clone] == [tap]
    (level,) = try_batch(distiller, batch).terms[0].levels

    convs = distiller.student.decode_head.convs[0]
    convs.activate.inplace = False  # so that the tensor itself can be asked for its gradient
    task = retained_norm(convs.bn, lambda: distiller.student.parse_losses(distiller.student(**batch, mode='loss'))[0])
    term = retained_norm(convs.bn, lambda: distiller(**batch, mode='loss')['loss_kd_feature'])
    assert level.task_gradient == pytest.approx(task, rel=1e-5)
    assert level.term_gradient == pytest.approx(term, rel=1e-5)
    assert task > 0
    assert term > 0


def test_pyramid_reports_each_level() -> None:
    taps = dict(
        student=['backbone.layer3', 'backbone.layer4'],
        teacher=['backbone.layer3', 'backbone.layer4'],
    )
    terms = dict(pyramid=dict(tap=taps, loss=dict(type='mmstructkd.ChannelwiseKLLoss')))
    (report,) = try_batch(build(terms), toy_batch()).terms
    assert [level.student_tap for level in report.levels] == taps['student']
    assert [level.student for level in report.levels] == [(2, 16, 6, 8), (2, 32, 6, 8)]
    assert [level.teacher for level in report.levels] == [(2, 32, 6, 8), (2, 64, 6, 8)]
    assert all(level.connector == 'ConvConnector' for level in report.levels)
    assert all(level.student_stride == level.teacher_stride == (8.0, 8.0) for level in report.levels)
    assert all(0 < level.share < 1 for level in report.levels)


def test_the_critic_has_an_objective_of_its_own() -> None:
    terms = dict(holistic=toy_terms()['holistic'])
    distiller, batch = build(terms), toy_batch()
    twin = copy.deepcopy(distiller)
    (report,) = try_batch(distiller, batch).terms
    wanted = twin(**batch, mode='loss')
    assert report.objectives == {'critic': pytest.approx(float(wanted['loss_kd_holistic_critic'].detach()), rel=1e-5)}
    assert report.weighted == pytest.approx(float(wanted['loss_kd_holistic'].detach()), rel=1e-5)


def test_a_trial_updates_nothing_and_leaves_no_hook() -> None:
    distiller, batch = build(toy_terms()), toy_batch()
    before = {name: parameter.detach().clone() for name, parameter in distiller.named_parameters()}
    weights = {name: term.loss.loss_weight for name, term in distiller.terms.items()}
    try_batch(distiller, batch)
    measure_cost(distiller, batch, runs=1)
    assert all(torch.equal(parameter, before[name]) for name, parameter in distiller.named_parameters())
    assert all(parameter.grad is None for parameter in distiller.parameters())
    assert {name: term.loss.loss_weight for name, term in distiller.terms.items()} == weights
    networks = [distiller, distiller.teacher.network]
    assert not any(m._forward_hooks or m._forward_pre_hooks for network in networks for m in network.modules())


# --- findings ------------------------------------------------------------------------------------------------


def test_lists_parameters_without_a_gradient() -> None:
    distiller = build(dict(feature=dict(tap='backbone[3]', loss=dict(type='mmstructkd.ChannelwiseKLLoss'))))
    distiller.student.idle = nn.Parameter(torch.zeros(3))
    distiller.terms['feature'].spare = nn.Linear(2, 2)
    trial = try_batch(distiller, toy_batch())
    assert trial.without_gradient == {'student': ['idle'], "term 'feature'": ['spare.weight', 'spare.bias']}
    assert not trial.problems


def test_a_term_that_is_off_leaves_its_connector_at_zero() -> None:
    loss = dict(type='mmstructkd.ChannelwiseKLLoss', loss_weight=0.0)
    distiller = build(dict(feature=dict(tap='backbone[3]', loss=loss)))
    trial = try_batch(distiller, toy_batch())
    connector = distiller.terms['feature'].connectors[0]
    assert trial.zero_gradient["term 'feature'"] == [f'connectors.0.{name}' for name, _ in connector.named_parameters()]
    assert trial.terms[0].raw > 0
    assert trial.terms[0].weighted == 0
    assert trial.terms[0].levels[0].share == 0


def test_a_tap_in_a_frozen_part_is_a_problem() -> None:
    student = steady_student()
    student.backbone.frozen_stages = 4
    terms = dict(
        feature=dict(tap='backbone[3]', loss=dict(type='mmstructkd.ChannelwiseKLLoss')),
        pixel=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss')),
    )
    trial = try_batch(build(terms, student), toy_batch())
    (problem,) = trial.problems
    assert "term 'feature': 'backbone[3]' lies in a frozen part of the student" in problem
    assert trial.terms[0].levels[0].share is None
    assert trial.terms[1].levels[0].share > 0


def test_weights_are_those_of_the_schedule() -> None:
    cfg = Config(dict(train_cfg=dict(max_iters=100)))
    term = dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss', loss_weight=2.0))
    distiller = build(
        dict(
            late=dict(term, schedule=dict(begin=50)),
            rising=dict(term, schedule=dict(type='linear', start_factor=0.5, end_factor=3.0)),
            steady=term,
        )
    )
    factors = {name: peak_factor(term, cfg) for name, term in distiller.terms.items()}
    assert factors == {'late': (0.0, 1.0), 'rising': (0.5, 3.0), 'steady': (1.0, 1.0)}
    late, rising, steady = try_batch(distiller, toy_batch(), factors).terms
    assert (late.weight, rising.weight, steady.weight) == (2.0, 6.0, 2.0)
    assert late.weighted == pytest.approx(steady.weighted)
    assert rising.levels[0].term_gradient == pytest.approx(3 * steady.levels[0].term_gradient)


# --- batches and cost ----------------------------------------------------------------------------------------


def test_synthetic_batch_is_of_the_size_of_training() -> None:
    distiller = build(toy_terms())
    cfg = Config(dict(crop_size=(8, 8)))
    assert input_size(cfg, distiller) == (48, 64)
    batch = synthetic_batch(distiller, (48, 64), 3)
    assert batch['inputs'].shape == (3, 3, 48, 64)
    assert abs(float(batch['inputs'].mean())) < 0.5  # normalised
    labels = torch.stack([sample.gt_sem_seg.data for sample in batch['data_samples']])
    assert labels.unique().tolist() == list(range(10))
    again = synthetic_batch(distiller, (48, 64), 3)
    assert torch.equal(batch['inputs'], again['inputs'])


def test_real_batch_is_of_the_train_dataloader(tmp_path: Path) -> None:
    cfg = toy_config(toy_distiller(), tmp_path)
    cfg.train_dataloader.update(num_workers=2, persistent_workers=True, prefetch_factor=2)
    distiller = build(toy_terms())
    assert real_batch(cfg, distiller)['inputs'].shape == (2, 3, 48, 64)
    assert real_batch(cfg, distiller, batch_size=3)['inputs'].shape == (3, 3, 48, 64)
    cfg.pop('train_dataloader')
    with pytest.raises(ConfigError, match='must define `train_dataloader`, got None'):
        real_batch(cfg, distiller)


def test_cost_of_the_teacher() -> None:
    distiller = build(toy_terms())
    cost = measure_cost(distiller, toy_batch(), runs=1)
    network = distiller.teacher.network
    assert cost.teacher_parameters == sum(p.numel() for p in network.parameters())
    assert cost.teacher_bytes == sum(t.numel() * t.element_size() for t in [*network.parameters(), *network.buffers()])
    assert 0 < cost.teacher_forward < cost.distilled_step
    assert cost.student_step > 0
    assert cost.student_peak is cost.distilled_peak is None
    with pytest.raises(ConfigError, match='`runs` must be an integer of at least 1, got 0'):
        measure_cost(distiller, toy_batch(), runs=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_peak_memory_is_measured_on_cuda() -> None:
    distiller = build(toy_terms()).cuda()
    cost = measure_cost(distiller, synthetic_batch(distiller, (48, 64), 2), runs=1)
    assert 0 < cost.student_peak < cost.distilled_peak


def test_detectors_are_tried_alike(detector: Callable) -> None:
    terms = dict(
        neck=dict(tap=['neck[0]', 'neck[1]'], loss=dict(type='mmstructkd.ChannelwiseKLLoss')),
        scores=dict(tap='bbox_head.retina_cls', loss=dict(type='mmstructkd.ChannelwiseKLLoss')),
    )
    model = dict(
        type='mmstructkd.StructuredDistiller',
        student=detector(4),
        teacher=dict(config=detector(8), allow_random=True),
        terms=terms,
    )
    distiller = MODELS.build(model).train()
    trial = try_batch(distiller, synthetic_batch(distiller, (60, 64), 2))
    assert trial.size == (64, 64)
    neck, scores = trial.terms
    assert [level.student_stride for level in neck.levels] == [(8, 8), (16, 16)]
    assert [level.student_tap for level in scores.levels] == [f'bbox_head.retina_cls #{n}' for n in range(3)]
    assert all(level.task_gradient > 0 for term in trial.terms for level in term.levels)
    assert set(trial.task_losses) == {'loss_cls', 'loss_bbox'}
    assert not trial.problems


# --- the command ---------------------------------------------------------------------------------------------


def test_prints_everything_and_ends_well(tool: ModuleType, config: str, capsys: pytest.CaptureFixture) -> None:
    assert tool.main([config, '--device', 'cpu', '--runs', '1']) == 0
    shown = capsys.readouterr().out
    for text in (
        '2 images of 48x64 (HxW), first of the train dataloader, on cpu',
        'backbone[3]',
        'ConvConnector',
        '2x10x6x8',
        'PairwiseAffinityLoss',
        'critic',
        'trained parameters without a gradient of the summed loss: none',
        'teacher forward, to its deepest tap',
        'peak memory is not measured on a CPU',
        'All is well.',
    ):
        assert text in shown


def test_non_finite_losses_are_problems(
    tool: ModuleType, config: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = MODELS.build(toy_segmentor(4)).state_dict()
    weights['decode_head.conv_seg.bias'].fill_(float('nan'))
    path = tmp_path / 'start.pth'
    torch.save(weights, path)
    options = ['--device', 'cpu', '--synthetic', '--runs', '0', '--cfg-options', f'load_from={path}']
    assert tool.main([config, *options]) == 1
    shown = capsys.readouterr().out
    assert "PROBLEM  term 'pixel': the loss is nan." in shown
    assert 'PROBLEM  The loss of the task is nan.' in shown
    assert 'Cost of a step' not in shown


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            ['model.type=EncoderDecoder'],
            "ConfigError: Preflight: `model.type` must be 'mmstructkd.StructuredDistiller'",
        ),
        (['model.terms.pixel.tap=decode_head.conv_sg'], "TapError: term 'pixel': `student` must name a module"),
        (['model.teacher.allow_random=False'], 'FrozenTeacher: `checkpoint` must name the weights'),
        (['model.teacher.checkpoint=absent.pth'], 'CheckpointError: local_checkpoint: `path` must be a file'),
        (
            [
                'model.terms.feature.connector.type=mmstructkd.ConvConnector',
                'model.terms.feature.connector.out_channels=5',
            ],
            "ShapeError: term 'feature': channelwise_kl_loss: `student` and `teacher` must share",
        ),
        (['load_from=absent.pth'], 'CheckpointError: local_checkpoint: `path` must be a file'),
    ],
)
def test_mistakes_end_with_one_line(
    tool: ModuleType, config: str, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert tool.main([config, '--synthetic', '--device', 'cpu', '--cfg-options', *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert 'Traceback' not in error


def test_a_plain_config_is_told_apart(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / 'plain.py'
    toy_config(toy_segmentor(), tmp_path).dump(path)
    assert tool.main([str(path)]) == 1
    assert (
        "got 'EncoderDecoder'. This config trains a plain model, there is nothing to check" in capsys.readouterr().err
    )
    assert tool.main([str(tmp_path / 'absent.py')]) == 1
    assert '`config` must be a readable config' in capsys.readouterr().err


def test_absent_data_are_named(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    cfg = toy_config(toy_distiller(), tmp_path)
    cfg.train_dataloader.dataset = dict(
        type='mmstructkd.CamVidDataset',
        data_root=str(tmp_path / 'nothing'),
        data_prefix=dict(img_path='i'),
        pipeline=[],
    )
    path = tmp_path / 'distilled.py'
    cfg.dump(path)
    assert tool.main([str(path), '--device', 'cpu']) == 1
    error = capsys.readouterr().err
    assert '`train_dataloader` must give a batch, got ConfigError: CamVidDataset' in error
    assert 'pass --synthetic' in error


@pytest.mark.parametrize('arguments', [['--size', '8', '8'], ['--synthetic', '--size', '0', '8'], ['--runs', '-1']])
def test_bad_arguments(tool: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as info:
        tool.main(['config.py', *arguments])
    assert info.value.code == 2
    assert arguments[-3 if '--size' in arguments else 0] in capsys.readouterr().err


def test_as_a_command(run_tool: Callable, config: str) -> None:
    done = run_tool('check_config', config, '--synthetic', '--device', 'cpu', '--runs', '1')
    assert done.returncode == 0, done.stderr
    assert 'All is well.' in done.stdout


def test_a_problem_is_printed_and_the_exit_code_is_1(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    student = toy_segmentor(4)
    student.backbone.frozen_stages = 4
    channel = dict(type='mmstructkd.ChannelwiseKLLoss')
    terms = dict(cut=dict(tap='backbone[3]', loss=channel), pixel=toy_terms()['pixel'])
    toy_config(toy_distiller(student=student, terms=terms), tmp_path / 'run').dump(tmp_path / 'cut.py')
    assert tool.main([str(tmp_path / 'cut.py'), '--device', 'cpu', '--runs', '1', '--synthetic', '--random-init']) == 1
    shown = capsys.readouterr().out
    assert "PROBLEM  term 'cut': 'backbone[3]' lies in a frozen part of the student" in shown
    assert '1 problem(s), see above.' in shown
    assert 'All is well' not in shown
