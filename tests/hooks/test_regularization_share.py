"""The share of pixels on which the teacher works against the label: the number, what is logged, and when."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from mmstructkd.errors import ConfigError
from mmstructkd.evaluation.scalars import read_scalars
from mmstructkd.hooks import RegularizationShareHook
from mmstructkd.hooks.regularization_share import share_of
from mmstructkd.losses import DecoupledKLLoss, PixelwiseKLLoss, WeightedSoftLabelLoss
from mmstructkd.structures import Targets
from mmstructkd.temperatures import InstanceTemperature
from mmstructkd.testing import toy_config, toy_distiller

ALL = [PixelwiseKLLoss, DecoupledKLLoss, WeightedSoftLabelLoss]


@pytest.mark.parametrize('kind', ALL)
@pytest.mark.parametrize('temperature', [1.0, 3.0, 'instance'])
@pytest.mark.parametrize('masked', [False, True])
def test_is_where_the_divergence_lowers_the_label(kind, temperature, masked):
    """Counted by the sign of the gradient of each pixel's divergence by its labelled score."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 4, 5, 6).unbind()
    labels = torch.randint(0, 4, (2, 5, 6))
    labels[0, 0] = 255
    valid = labels != 255 if masked else None
    if temperature == 'instance':
        temperature = InstanceTemperature(hidden=4)
    loss = kind(temperature=temperature)
    loss.bind(student, teacher)
    got = share_of(loss, student, teacher, Targets(labels=labels, valid=valid))
    own = loss.soften(student, teacher).temperature
    own = own.detach() if isinstance(own, torch.Tensor) else own
    scores = student.clone().requires_grad_()
    log_s, p_t = torch.log_softmax(scores / own, 1), torch.softmax(teacher / own, 1)
    (grad,) = torch.autograd.grad(-(p_t * log_s).sum(), scores)
    lowered = [
        bool(grad[b, labels[b, y, x], y, x] > 0)
        for b in range(2)
        for y in range(5)
        for x in range(6)
        if labels[b, y, x] != 255
    ]
    assert got.item() == pytest.approx(sum(lowered) / len(lowered))
    assert not got.requires_grad
    assert 0 < got < 1


def test_says_nothing_without_labels():
    student = torch.randn(2, 3, 4, 4)
    assert share_of(PixelwiseKLLoss(), student, student) is None
    assert share_of(PixelwiseKLLoss(), student, student, Targets()) is None
    rows, labels = torch.randn(7, 3), torch.zeros(2, 4, 4, dtype=torch.long)
    assert share_of(PixelwiseKLLoss(), rows, rows, Targets(labels=labels)) is None
    assert share_of(PixelwiseKLLoss(), rows, rows + 1, Targets(labels=torch.zeros(7, dtype=torch.long))) <= 1


@pytest.mark.parametrize('numbers', [[0, 1, 2, 2], [2, 2, 0, -1]])
def test_a_teacher_of_other_classes(numbers):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5, 6), torch.randn(2, 4, 5, 6)
    labels = torch.randint(0, 3, (2, 5, 6))
    known = sorted(set(numbers) - {-1})
    own = student[:, known].softmax(1)
    p = teacher.softmax(1)
    theirs = torch.stack([sum(p[:, j] for j, k in enumerate(numbers) if k == want) for want in known], 1)
    theirs = theirs / theirs.sum(1, keepdim=True)
    lowered = [
        bool(theirs[b, known.index(k), y, x] < own[b, known.index(k), y, x])
        for b in range(2)
        for y in range(5)
        for x in range(6)
        if (k := int(labels[b, y, x])) in known
    ]
    got = share_of(PixelwiseKLLoss(class_map=numbers), student, teacher, Targets(labels=labels))
    assert got.item() == pytest.approx(sum(lowered) / len(lowered))


def run(folder: Path, terms: dict, interval: int | None, steps: int = 4) -> Runner:
    cfg = toy_config(toy_distiller(terms=terms), folder, steps)
    if interval is not None:
        cfg.custom_hooks = [dict(type='mmstructkd.RegularizationShareHook', interval=interval)]
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=1, log_metric_by_epoch=False)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


TERMS = dict(
    kd=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.PixelwiseKLLoss')),
    other=dict(tap='decode_head.conv_seg', loss=dict(type='mmstructkd.ChannelwiseKLLoss')),
)


def test_a_run_logs_every_so_many_steps_and_trains_as_without(tmp_path, monkeypatch):
    asked: list[int] = []
    note = RegularizationShareHook._noting

    def noting(self, name):
        found = note(self, name)
        return lambda *args: (asked.append(1), found(*args))[1]

    monkeypatch.setattr(RegularizationShareHook, '_noting', noting)
    runner = run(tmp_path / 'with', TERMS, 2)
    entries = [entry for entry in read_scalars(tmp_path / 'with') if 'loss' in entry]
    key = 'stat_kd_regularization_share'
    assert [key in entry for entry in entries] == [False, True, True, True]  # from then on the newest value
    assert len(asked) == 2
    assert all(0 <= entry[key] <= 1 for entry in entries if key in entry)
    assert not any('stat_other' in name for entry in entries for name in entry)
    assert not any(loss._forward_hooks for term in runner.model.terms.values() for loss in term.losses)
    plain = run(tmp_path / 'without', TERMS, None)
    assert not any('stat_' in name for entry in read_scalars(tmp_path / 'without') for name in entry)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, runner.model.state_dict()[name])


def test_nothing_to_say_and_wrong_settings(tmp_path):
    with pytest.raises(ConfigError, match='RegularizationShareHook: a term of the model must have one of'):
        run(tmp_path, {'other': TERMS['other']}, 1)
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(ConfigError, match='RegularizationShareHook: `interval`'):
            RegularizationShareHook(bad)
