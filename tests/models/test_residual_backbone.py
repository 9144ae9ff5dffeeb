"""Residual KD: sums level by level, a base that stays as it is, weights from a plain file, and an export that loads."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import init_model
from torch import nn

from mmstructkd.checkpoints import read_checkpoint
from mmstructkd.errors import ConfigError
from mmstructkd.functional.residual import residual_loss
from mmstructkd.models import ResidualBackbone
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.testing import (
    toy_batch,
    toy_config,
    toy_depth_estimator,
    toy_detector,
    toy_distiller,
    toy_segmentor,
)
from tests.comparison import assert_same
from tests.teachers.test_kinds import Interrupt

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))

import export_student  # noqa: E402

RESIDUAL = dict(residual=dict(tap='backbone[*]', match='order', loss=dict(type='mmstructkd.FeatureMSELoss')))


class Pyramid(nn.Module):
    """Maps of given widths and strides."""

    def __init__(self, *levels: tuple[int, int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, width, stride, stride) for width, stride in levels)
        self.norm = nn.BatchNorm2d(levels[0][0])

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first, *others = (conv(inputs) for conv in self.convs)
        return (self.norm(first), *others)


def residual_student(base: dict, narrow: int = 2, **settings: Any) -> dict:
    """A toy network whose backbone has an assistant."""
    student = copy.deepcopy(base)
    width = 'base_channels' if 'base_channels' in base['backbone'] else 'width'
    assistant = dict(base['backbone'], **{width: narrow})
    if 'stem_channels' in assistant:
        assistant['stem_channels'] = narrow
    student['backbone'] = dict(
        type='mmstructkd.ResidualBackbone', base=base['backbone'], assistant=assistant, **settings
    )
    return student


def plain_checkpoint(config: dict, path: Path, seed: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    network = MODELS.build(copy.deepcopy(config))
    network.init_weights()
    torch.save({'state_dict': network.state_dict(), 'meta': {}}, path)
    return network.state_dict()


def test_the_sum_level_by_level() -> None:
    """Widths that differ and that are equal, a stride that differs."""
    base, assistant = Pyramid((4, 4), (6, 8)), Pyramid((2, 4), (6, 16))
    backbone = ResidualBackbone(base, assistant).eval()
    assert [type(one) for one in backbone.projections] == [nn.Conv2d, nn.Identity]
    inputs = torch.randn(2, 3, 32, 48)
    first, second = backbone(inputs)
    torch.testing.assert_close(first, base(inputs)[0])  # a projection begins at 0
    grown = nn.functional.interpolate(assistant(inputs)[1], size=(4, 6), mode='bilinear', align_corners=False)
    torch.testing.assert_close(second, base(inputs)[1] + grown)
    nn.init.normal_(backbone.projections[0].weight)
    expected = torch.einsum('oi,bihw->bohw', backbone.projections[0].weight[:, :, 0, 0], assistant(inputs)[0])
    torch.testing.assert_close(backbone(inputs)[0], base(inputs)[0] + expected, rtol=1e-4, atol=1e-5)


def test_the_distance_of_the_sum_is_the_residual_loss() -> None:
    base, assistant = Pyramid((4, 4)), Pyramid((4, 4))
    backbone = ResidualBackbone(base, assistant).eval()
    inputs, teacher = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 4, 4)
    loss = MODELS.build(dict(type='mmstructkd.FeatureMSELoss', loss_weight=1.0))
    weights = list(assistant.convs.parameters())
    distance = loss(backbone(inputs)[0], teacher, Targets())
    wanted = residual_loss(base(inputs)[0], teacher, assistant=assistant(inputs)[0])
    torch.testing.assert_close(distance, wanted)
    grads = [torch.autograd.grad(one, weights) for one in (distance, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('frozen', [True, False])
def test_a_frozen_base_has_no_gradient_and_no_new_statistics(frozen: bool) -> None:
    backbone = ResidualBackbone(Pyramid((4, 4)), Pyramid((2, 4)), freeze_base=frozen)
    assert backbone.train() is backbone
    before = copy.deepcopy(backbone.base.state_dict())
    backbone(torch.randn(2, 3, 16, 16))[0].sum().backward()
    assert all((p.grad is None) is frozen for p in backbone.base.parameters())
    assert all(p.grad is not None for p in backbone.projections.parameters())
    same = all(torch.equal(value, before[key]) for key, value in backbone.base.state_dict().items())
    assert same is frozen


STUDENTS = {
    'seg': toy_segmentor(4),
    'depth': toy_depth_estimator(4),
    'det': toy_detector('fcos', 4),
}


@pytest.mark.parametrize('task', list(STUDENTS))
def test_a_run_after_the_run_of_the_base(task: str, tmp_path: Path) -> None:
    """Weights of the base and of the heads come from the plain file; the base is as it was at the end."""
    plain = STUDENTS[task]
    weights = plain_checkpoint(plain, tmp_path / 'base.pth')
    student = residual_student(plain)
    teacher = dict(config=copy.deepcopy(plain), allow_random=True)
    model = toy_distiller(student=student, teacher=teacher, terms=RESIDUAL)
    cfg = toy_config(model, tmp_path / 'run', max_iters=2, task=task, load_from=str(tmp_path / 'base.pth'))
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    content = read_checkpoint(str(tmp_path / 'run' / 'iter_2.pth'))
    MODELS.build(copy.deepcopy(student)).load_state_dict(content['state_dict'], strict=True)
    saved = content['state_dict']
    for key, value in weights.items():
        if key.startswith('backbone.'):
            assert torch.equal(value, saved[key.replace('backbone.', 'backbone.base.', 1)]), key
    moved = [key for key in saved if key.startswith(('backbone.assistant.', 'backbone.projections.'))]
    assert any(bool(saved[key].ne(0).any()) for key in moved if key.startswith('backbone.projections.'))
    heads = [key for key, value in weights.items() if 'head' in key and value.dim() == 4]
    assert heads
    for key in heads:  # two steps from where the file left them, not another beginning
        assert (saved[key] - weights[key]).abs().max() < 0.3 * weights[key].abs().max() + 0.05


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    plain_checkpoint(toy_segmentor(4), tmp_path / 'base.pth')
    model = toy_distiller(student=residual_student(toy_segmentor(4)), terms=RESIDUAL)
    settings = dict(max_iters=4, load_from=str(tmp_path / 'base.pth'))
    Runner.from_cfg(toy_config(model, tmp_path / 'straight', **settings)).train()
    cfg = toy_config(model, tmp_path / 'stopped', **settings)
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.register_hook(Interrupt(), priority='LOWEST')
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    cfg.update(resume=True, load_from=None)
    Runner.from_cfg(cfg).train()
    first, second = (read_checkpoint(str(tmp_path / name / 'iter_4.pth')) for name in ('straight', 'stopped'))
    assert_same(first['state_dict'], second['state_dict'])
    assert_same(first['optimizer'], second['optimizer'])


def test_every_trained_parameter_has_a_gradient() -> None:
    """So two processes need not look for unused parameters; those of the base are not trained."""
    student = residual_student(toy_segmentor(4))
    model = MODELS.build(toy_distiller(student=student, terms=RESIDUAL)).train()
    total, _ = model.parse_losses(model(**toy_batch(), mode='loss'))
    total.backward()
    grads = {name: p.grad is not None for name, p in model.named_parameters() if p.requires_grad}
    assert all(grads.values())
    assert not any('.base.' in name for name in grads)


@pytest.mark.parametrize('imports', [None, ['mmstructkd'], ['json'], 'json'])
def test_what_is_exported_holds_the_assistant_and_loads_by_its_config(imports: Any, tmp_path: Path) -> None:
    plain_checkpoint(toy_segmentor(4), tmp_path / 'base.pth')
    model = toy_distiller(student=residual_student(toy_segmentor(4)), terms=RESIDUAL)
    cfg = toy_config(model, tmp_path, max_iters=2, load_from=str(tmp_path / 'base.pth'))
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    runner.train()
    cfg.pop('custom_imports')
    if imports is not None:
        cfg.custom_imports = dict(imports=imports)
    cfg.dump(tmp_path / 'config.py')
    arguments = [str(tmp_path / 'config.py'), str(tmp_path / 'iter_2.pth'), '--out', str(tmp_path / 'out.pth')]
    assert export_student.main([*arguments, '--size', '48', '64']) == 0
    content = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert any(key.startswith('backbone.assistant.') for key in content['state_dict'])
    written = Config.fromstring(content['meta']['cfg'], '.py')
    assert written.model.backbone.type == 'mmstructkd.ResidualBackbone'
    assert 'mmstructkd' in written.custom_imports.imports
    assert 'terms' not in written.model
    loaded = init_model(written, str(tmp_path / 'out.pth'), device='cpu')
    inputs = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), runner.model.student.eval()(inputs))


def test_a_frozen_base_without_weights_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    model = toy_distiller(student=residual_student(toy_segmentor(4)), terms=RESIDUAL)
    runner = Runner.from_cfg(toy_config(model, tmp_path, max_iters=2))
    with pytest.raises(ConfigError, match='ResidualBackbone: `freeze_base` must go with a base that has been trained'):
        runner.train()


@pytest.mark.parametrize('way', ['not frozen', 'own weights', 'saved by itself'])
def test_ways_to_have_weights(way: str, tmp_path: Path) -> None:
    base = toy_segmentor(4)
    state = plain_checkpoint(base, tmp_path / 'base.pth')
    if way == 'own weights':
        base.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'), prefix='backbone.')
    student = residual_student(base, freeze_base=way != 'not frozen')
    student['backbone']['assistant'].pop('init_cfg', None)
    network = MODELS.build(copy.deepcopy(student))
    network.init_weights()
    if way == 'saved by itself':
        network.load_state_dict(copy.deepcopy(network.state_dict()))
    network.backbone.check_weights()
    if way == 'own weights':
        assert all(torch.equal(v, state[f'backbone.{k}']) for k, v in network.backbone.base.state_dict().items())


def test_a_plain_file_lacks_the_assistant_and_strict_loading_says_so(tmp_path: Path) -> None:
    state = plain_checkpoint(toy_segmentor(4), tmp_path / 'base.pth')
    network = MODELS.build(residual_student(toy_segmentor(4)))
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*backbone.assistant'):
        network.load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(base=dict(type='ResNetV2c')), r'`base` must name a registered backbone, got .ResNetV2c'),
        (dict(assistant=dict(depth=18)), '`assistant` must be a dict with a `type`'),
        (dict(assistant=Pyramid((2, 4), (2, 8))), '`assistant` must give as many levels as `base`, 1, got 2'),
        (dict(assistant=nn.Flatten()), r'`assistant` must give maps of shape \(B, C, H, W\)'),
        (dict(base=nn.Linear(7, 7)), '`base` must be a backbone that runs on an image, got Linear, which failed'),
        (dict(freeze_base='no'), '`freeze_base` must be True or False'),
    ],
)
def test_mistakes(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=f'ResidualBackbone: {match}'):
        ResidualBackbone(**{'base': Pyramid((4, 4)), 'assistant': Pyramid((4, 4)), **changes})
