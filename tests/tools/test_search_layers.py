"""The search of layers: one step against loops, a few iterations on tiny networks, what it prints, and its mistakes."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmstructkd.connectors import LayerMixConnector
from mmstructkd.errors import ConfigError, ShapeError, TapError
from mmstructkd.testing import toy_batch, toy_config, toy_depth_estimator, toy_detector, toy_distiller, toy_segmentor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import search_layers  # noqa: E402

SGD = dict(type='SGD', lr=0.05)


def student(width: int = 4) -> dict:
    """A segmentor that draws nothing."""
    config = toy_segmentor(width)
    config.decode_head.dropout_ratio = config.auxiliary_head.dropout_ratio = 0.0
    return config


def config(tmp_path: Path, task: str = 'seg', **changes: Any) -> Config:
    networks = dict(seg=student, depth=toy_depth_estimator, det=lambda width=4: toy_detector('fcos', width))
    make = networks[task]
    model = toy_distiller(**{'student': make(4), 'teacher': dict(config=make(8), allow_random=True), **changes})
    cfg = toy_config(model, tmp_path, task=task)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=SGD)
    return cfg


def made(tmp_path: Path, groups: list[str], **changes: Any) -> Any:
    torch.manual_seed(0)
    return search_layers.build_model(config(tmp_path, **changes), groups).train()


def arguments(path: Path, *more: str) -> Any:
    return search_layers.parse_args([str(path), '--device', 'cpu', *more])


# --- one step, written out -------------------------------------------------------------------------------------------


def by_loops(one: Any, batch: dict, imitation: float, injection: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Task and bridge loss of group backbone.layer2, without the code under test."""
    net, inputs, samples = one.model.student, batch['inputs'], batch['data_samples']
    teacher = one.model.teacher.network.backbone
    with torch.no_grad():
        out = teacher.layer1(teacher.maxpool(teacher.stem(inputs)))
        first = teacher.layer2[0](out)
        layers = [first, teacher.layer2[1](first)]
    exps = [score.exp() for score in one.scores[0]]
    mix = sum(e / sum(exps) * layer for e, layer in zip(exps, layers, strict=True))

    def heads(maps: list[torch.Tensor]) -> torch.Tensor:
        losses = net.decode_head.loss(maps, samples, net.train_cfg)
        more = net.auxiliary_head.loss(maps, samples, net.train_cfg)
        return losses['loss_ce'] + more['loss_ce']

    def rest(second: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        third = net.backbone.layer3(second)
        return heads([low, second, third, net.backbone.layer4(third)])

    low = net.backbone.layer1(net.backbone.maxpool(net.backbone.stem(inputs)))
    own = net.backbone.layer2(low)
    conv = one.project.conv.conv
    projected = torch.einsum('oi,bihw->bohw', conv.weight[:, :, 0, 0], own)
    if conv.bias is not None:
        projected = projected + conv.bias[:, None, None]
    distance, count = torch.zeros(()), 0
    for image in range(len(own)):
        for channel in range(mix.shape[1]):
            distance = distance + (projected[image, channel] - mix[image, channel]).square().sum()
            count += mix[image, channel].numel()
    bring = one.bring.conv.conv
    injected = torch.einsum('oi,bihw->bohw', bring.weight[:, :, 0, 0], mix)
    if bring.bias is not None:
        injected = injected + bring.bias[:, None, None]
    return rest(own, low), imitation * distance / count + injection * rest(injected, low)


@pytest.mark.parametrize(('imitation', 'injection'), [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0)])
def test_a_step_is_its_definition(imitation: float, injection: float, tmp_path: Path) -> None:
    settings = dict(imitation_weight=imitation, injection_weight=injection)
    one = search_layers.Search(made(tmp_path, ['backbone.layer2']), 'group0', SGD, score_lr=0.1, **settings)
    with torch.no_grad():
        one.scores.copy_(torch.tensor([[0.3, -0.4]]))
    twin = copy.deepcopy(one)
    first, second = toy_batch(seed=1), toy_batch(seed=2)
    task, bridge = by_loops(twin, first, imitation, injection)
    grads = torch.autograd.grad(task + bridge, twin.learned, allow_unused=True)
    with torch.no_grad():
        for parameter, grad in zip(twin.learned, grads, strict=True):
            parameter -= 0.05 * (0 if grad is None else grad)
    _, held_out = by_loops(twin, second, imitation, injection)
    (grad,) = torch.autograd.grad(held_out, [twin.scores])
    expected = twin.scores.detach() - 0.1 * grad / (grad.abs() + 1e-8)  # the first step of Adam
    values = one.step(first, second)
    close = dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(values), torch.stack([task + bridge, held_out]).detach(), **close)
    torch.testing.assert_close([p.detach() for p in one.learned], [p.detach() for p in twin.learned], **close)
    torch.testing.assert_close(one.scores.detach(), expected, **close)
    torch.testing.assert_close(torch.tensor(one.mix()), torch.softmax(expected[0], 0), **close)


def test_the_scores_do_not_see_the_batch_of_the_weights(tmp_path: Path) -> None:
    """And the weights do not see the other: with a rate of 0 for one of them, it stays."""
    still = search_layers.Search(made(tmp_path, ['backbone.layer2']), 'group0', dict(type='SGD', lr=0.0), score_lr=0.1)
    before = [p.detach().clone() for p in still.learned]
    still.step(toy_batch(seed=1), toy_batch(seed=2))
    other = search_layers.Search(made(tmp_path, ['backbone.layer2']), 'group0', dict(type='SGD', lr=0.0), score_lr=0.1)
    other.bring.load_state_dict(still.bring.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(before, still.learned, strict=True))
    assert still.scores.detach().ne(0).all()
    _, bridge = other.losses(toy_batch(seed=2))
    (grad,) = torch.autograd.grad(bridge, [other.scores])
    assert torch.equal(grad.sign(), -still.scores.detach().sign())


def test_a_mix_that_only_injection_can_tell_apart(tmp_path: Path) -> None:
    """Without imitation the scores still move: the student's rest says what the mix is good for."""
    one = search_layers.Search(made(tmp_path, ['backbone.layer3']), 'group0', SGD, imitation_weight=0.0)
    one.step(toy_batch(seed=1), toy_batch(seed=2))
    assert one.scores.detach().ne(0).all()


# --- all of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('task', ['seg', 'depth', 'det'])
def test_a_few_iterations(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is printed is a term's tap and connector that can be built."""
    cfg = config(tmp_path, task)
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.0, norm_type=2)
    cfg.dump(tmp_path / 'cfg.py')
    groups = ['backbone.layer2', 'backbone.layer3=backbone.layer3.0,backbone.layer3.1']
    found = search_layers.search(arguments(tmp_path / 'cfg.py', '--groups', *groups, '--iters', '2', '--split', '0.5'))
    assert list(found) == groups
    told = capsys.readouterr().out
    for group, weights in found.items():
        assert abs(sum(weights) - 1) < 1e-5
        assert weights[0] != weights[1]
        name = group.split('=')[0]
        assert f"tap=dict(student='{name}', teacher=['{name}.0', '{name}.1'])," in told
    printed = re.findall(r'weights=(\[[^]]+\])', told)
    assert [eval(text) for text in printed] == [[round(w, 4) for w in weights] for weights in found.values()]
    assert LayerMixConnector([3], [3, 3], weights=eval(printed[0])).mix().shape == (1, 2)


def test_the_same_seed_finds_the_same(tmp_path: Path) -> None:
    config(tmp_path).dump(tmp_path / 'cfg.py')
    args = arguments(tmp_path / 'cfg.py', '--groups', 'backbone.layer2', '--iters', '2')
    assert search_layers.search(args) == search_layers.search(args)


def test_the_parts_are_apart() -> None:
    one, two = search_layers.split(10, 0.3, seed=4)
    assert (len(one), len(two)) == (3, 7)
    assert sorted(one + two) == list(range(10))
    assert search_layers.split(10, 0.3, seed=5) != (one, two)


def test_a_group_of_equal_width_needs_no_projection(tmp_path: Path) -> None:
    model = made(tmp_path, ['backbone.layer2'], teacher=dict(config=student(4), allow_random=True))
    one = search_layers.Search(model, 'group0', SGD)
    assert isinstance(one.project, nn.Identity)
    assert isinstance(one.bring, nn.Identity)
    one.step(toy_batch(seed=1), toy_batch(seed=2))
    assert one.scores.detach().ne(0).all()


@pytest.mark.parametrize(
    ('group', 'match'),
    [
        ('backbone.layer9', "`--groups` must name a module that the teacher has as well, got 'backbone.layer9'"),
        ('decode_head.conv_seg', r'at least two candidates in each group, got \[\]'),
        ('backbone.layer2=backbone.layer2.0', 'at least two candidates'),
        ('backbone.layer2=backbone.layer2.0,backbone.layer7', 'backbone.layer7'),
        ('backbone.layer2=backbone.layer2.0,backbone.layer3.0', 'share'),
        ('backbone.layr2=backbone.layer2.0,backbone.layer2.1', "'backbone.layr2'"),
    ],
)
def test_groups_that_cannot_be_searched(group: str, match: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, TapError, ShapeError), match=match):
        made(tmp_path, [group])


def test_other_mistakes(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    plain = copy.deepcopy(cfg)
    plain.model = student()
    with pytest.raises(ConfigError, match='must be a distilling config with one `teacher`'):
        search_layers.build_model(plain, ['backbone.layer2'])
    model = search_layers.build_model(cfg, ['backbone.layer2'])
    for argument, settings in (
        ('--score-lr', dict(score_lr=0.0)),
        ('--imitation-weight', dict(imitation_weight=-1.0)),
        ('--injection-weight', dict(injection_weight=float('nan'))),
    ):
        with pytest.raises(ConfigError, match=f'search_layers: `{argument}` must be'):
            search_layers.Search(model, 'group0', SGD, **settings)
    with pytest.raises(ConfigError, match='`--split` must leave samples for weights and scores'):
        search_layers.split(1, 0.5, seed=0)
    for wrong in (['--iters', '0'], ['--split', '1.0']):
        with pytest.raises(SystemExit):
            arguments(tmp_path, '--groups', 'backbone.layer2', *wrong)
    cfg.pop('optim_wrapper')
    cfg.dump(tmp_path / 'cfg.py')
    with pytest.raises(ConfigError, match='the config must define `optim_wrapper`'):
        search_layers.search(arguments(tmp_path / 'cfg.py', '--groups', 'backbone.layer2'))
