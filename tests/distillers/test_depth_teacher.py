"""A teacher of disparity beside a student of depth: found in the first step, or converted where the config says so."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmstructkd import functional as F
from mmstructkd.distillers.preflight import try_batch
from mmstructkd.errors import ConfigError
from mmstructkd.losses import (
    DepthRegressionLoss,
    GradientMatchingLoss,
    HolisticLoss,
    OrdinalRelationLoss,
    ScaleShiftInvariantLoss,
    VirtualNormalLoss,
)
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets
from mmstructkd.teachers import TeacherSource
from mmstructkd.terms import building as term_building
from mmstructkd.terms import term as term_module
from mmstructkd.terms.depth_order import check_depth_order, depth_order
from mmstructkd.testing import toy_config, toy_depth_estimator, toy_distiller

#: What a teacher makes of the true depth.
SAYS: dict[str, Callable[[Tensor], Tensor]] = {
    'depth': lambda depth: depth,
    'disparity': lambda depth: 1 / depth,
    'relative': lambda depth: 3 + 40 / depth,
    'half': lambda depth: 0.5 * depth,
    'negative': lambda depth: 25 - depth,
}


@MODELS.register_module(force=True)
class Oracle(TeacherSource):
    """Knows the ground truth, and says it in its own unit."""

    def __init__(self, says: str, checkpoint: str | None = 'oracle.pth') -> None:
        self.says, self.checkpoint = SAYS[says], checkpoint

    def attach(self, student: nn.Module, config: Any = None) -> None:
        """Needs nothing of the student."""

    def probe(self, inputs: Tensor, data_samples: Sequence[Any] | None, taps: Iterable, **known: Any) -> Any:
        size = (inputs.shape[2] // 8, inputs.shape[3] // 8)
        return SimpleNamespace(records={tap: [torch.ones(len(inputs), 1, *size)] for tap in taps})

    def observe(self, inputs: Tensor, data_samples: Any, taps: Iterable, **known: Any) -> dict:
        depth = torch.stack([sample.gt_depth_map.data for sample in data_samples])
        depth = torch.where(depth > 0, depth, 10.0)[..., ::8, ::8]
        return {tap: [self.says(depth)] for tap in taps}

    def move(self, function: Callable[[Tensor], Tensor]) -> None:
        """Holds no tensor."""

    def provenance(self) -> dict:
        return {}


def config(says: str, loss: str = 'DepthRegressionLoss', *, checkpoint: str | None = 'oracle.pth', **settings) -> dict:
    terms = dict(metres=dict(tap='decode_head.to_depth', loss=dict(type=f'mmstructkd.{loss}', **settings)))
    teacher = dict(type='mmstructkd.Oracle', says=says, checkpoint=checkpoint)
    return toy_distiller(student=toy_depth_estimator(4), teacher=teacher, terms=terms)


def batch(seed: int = 0) -> dict:
    """Two scenes with a floor that recedes and a box on it; the sensor has holes."""
    torch.manual_seed(seed)
    samples = []
    for image in range(2):
        depth = torch.linspace(20.0, 2.0, 48)[:, None].expand(48, 64).clone()
        depth[20:40, 10 + 8 * image : 34] = 3.0 + image
        depth[torch.rand(48, 64) < 0.2] = 0
        sample = SegDataSample(metainfo=dict(img_shape=(48, 64)))
        sample.gt_depth_map = PixelData(data=depth[None])
        samples.append(sample)
    return dict(inputs=torch.randn(2, 3, 48, 64), data_samples=samples)


def step(model: nn.Module, data: dict | None = None) -> Tensor:
    return model.train()(**(data or batch()), mode='loss')['loss_kd_metres']


LOSSES = [
    'DepthRegressionLoss',
    'GradientMatchingLoss',
    'OrdinalRelationLoss',
    'ScaleShiftInvariantLoss',
    'VirtualNormalLoss',
]


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('says', ['disparity', 'relative', 'negative'])
def test_the_first_step_names_term_and_key(loss: str, says: str) -> None:
    model = MODELS.build(config(says, loss))
    with pytest.raises(
        ConfigError, match=rf"term 'metres': {loss}: `teacher_output` must be .* got 'depth'.*Set teacher_output='disp"
    ):
        step(model)


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('says', ['depth', 'half'])
def test_metres_of_any_scale_pass(loss: str, says: str) -> None:
    model = MODELS.build(config(says, loss))
    assert step(model).isfinite()
    assert model.terms['metres'].depth_checks_left == 0


@pytest.mark.parametrize('loss', LOSSES)
def test_disparity_that_is_said_is_converted(loss: str) -> None:
    few = {'OrdinalRelationLoss': dict(num_pairs=300), 'VirtualNormalLoss': dict(num_triplets=300)}.get(loss, {})
    torch.manual_seed(0)
    said = MODELS.build(config('disparity', loss, teacher_output='disparity', **few))
    torch.manual_seed(0)
    plain = MODELS.build(config('depth', loss, **few))
    got, want = step(said), step(plain)
    got.backward()
    assert said.student.decode_head.conv_depth.weight.grad.any()
    if loss != 'ScaleShiftInvariantLoss':  # which compares in disparity
        torch.testing.assert_close(got, want)


def test_a_relative_disparity_needs_a_loss_that_is_blind_to_unit() -> None:
    model = MODELS.build(config('relative', 'ScaleShiftInvariantLoss', teacher_output='disparity'))
    assert step(model) > 0
    depth = 1 + 9 * torch.rand(2, 1, 6, 8)
    for loss in (
        ScaleShiftInvariantLoss(teacher_output='disparity'),
        GradientMatchingLoss(align=True, teacher_output='disparity'),
    ):
        assert loss(depth, 3 + 40 / depth) < 1e-6
        assert loss(depth, 3 + 40 * depth) > 1e-4
        with pytest.raises(ConfigError, match='`min_depth` and `max_depth` must be left out with teacher_output'):
            type(loss)(
                teacher_output='disparity', max_depth=10.0, **({'align': True} if hasattr(loss, 'align') else {})
            )


def test_metres_said_to_be_disparity() -> None:
    with pytest.raises(ConfigError, match=r"`teacher_output` must be .* got 'disparity'.*Set teacher_output='depth'"):
        step(MODELS.build(config('depth', teacher_output='disparity')))


def test_both_networks_predict_something_else() -> None:
    """A student that predicts disparity as well: nothing is converted, and nothing is asked of the ground truth."""
    model = MODELS.build(config('disparity', teacher_output='same'))
    assert step(model).isfinite()


@pytest.mark.parametrize(
    ('loss', 'settings'),
    [
        ('FeatureMSELoss', {}),
        ('StandardizedMSELoss', {}),
        ('ChannelwiseKLLoss', {}),
        ('HolisticLoss', dict(critic=dict(base_channels=2))),
    ],
)
def test_other_losses_on_depth_maps_are_looked_at_too(loss: str, settings: dict) -> None:
    model = MODELS.build(config('disparity', loss, **settings))
    with pytest.raises(ConfigError, match=rf"term 'metres': {loss}: the map of the teacher must be depth.*teacher_out"):
        step(model)
    assert step(MODELS.build(config('depth', loss, **settings))).isfinite()


def test_a_critic_of_depth_is_looked_at_too() -> None:
    critic = dict(base_channels=2)
    for said, ok in (('depth', False), ('disparity', True)):
        model = MODELS.build(config('disparity', 'HolisticLoss', critic=critic, normalize='depth', teacher_output=said))
        if ok:
            assert step(model).isfinite()
        else:
            with pytest.raises(ConfigError, match="term 'metres': HolisticLoss: `teacher_output` must be"):
                step(model)
    with pytest.raises(ConfigError, match="HolisticLoss: `normalize` must be 'depth' or 'log_depth' with teacher_out"):
        HolisticLoss(teacher_output='disparity')


def test_the_preflight_finds_it() -> None:
    model = MODELS.build(config('disparity')).train()
    with pytest.raises(ConfigError, match="term 'metres': DepthRegressionLoss: `teacher_output`"):
        try_batch(model, batch())


def test_a_run_ends_at_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="term 'metres': DepthRegressionLoss: `teacher_output` must be"):
        Runner.from_cfg(toy_config(config('disparity'), tmp_path, max_iters=4, task='depth')).train()
    good = config('disparity', teacher_output='disparity')
    Runner.from_cfg(toy_config(good, tmp_path / 'good', max_iters=2, task='depth')).train()


def test_a_random_teacher_is_not_asked() -> None:
    model = MODELS.build(config('disparity', checkpoint=None))
    assert step(model).isfinite()


def test_only_the_first_steps_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is settled, and three times at most: images without a reading settle nothing."""
    looks = []

    def noted(*args: Any, **kwargs: Any) -> bool:
        looks.append(check_depth_order(*args, **kwargs))
        return looks[-1]

    monkeypatch.setattr(term_module, 'check_depth_order', noted)
    model = MODELS.build(config('depth'))
    empty = batch()
    for sample in empty['data_samples']:
        sample.gt_depth_map.data.zero_()
    step(model, empty)
    step(model)
    step(model)
    assert looks == [False, True]
    looks.clear()
    model = MODELS.build(config('depth'))
    for _ in range(5):
        step(model, empty)
    assert looks == [False] * 3


def test_order_of_two_maps() -> None:
    depth = torch.rand(2, 12, 16) * 9 + 1
    valid = torch.rand(2, 12, 16) > 0.3
    for change, want in ((depth, 1.0), (depth**2 + 3, 1.0), (1 / depth, -1.0), (12 - depth, -1.0)):
        gamma, number = depth_order(change[:, None], depth, valid).tolist()
        assert gamma == pytest.approx(want)
        assert number > 500
    # By hand: pairs of pixels one by one, all of them.
    first, second = torch.rand(2, 1, 6, 8) + 0.5
    agreed = against = 0
    for i in range(48):
        for j in range(48):
            gaps = [(m.flatten()[i] - m.flatten()[j]).item() for m in (first, second)]
            large = [max(m.flatten()[i], m.flatten()[j]).item() for m in (first, second)]
            if all(abs(g) > 0.03 * m for g, m in zip(gaps, large, strict=True)):
                agreed, against = agreed + (gaps[0] * gaps[1] > 0), against + (gaps[0] * gaps[1] < 0)
    gamma, _ = depth_order(first[None], second, torch.ones(1, 6, 8, dtype=torch.bool)).tolist()
    assert gamma == pytest.approx((agreed - against) / (agreed + against), abs=0.08)
    nothing, number = depth_order(depth[:, None], torch.ones(2, 12, 16), valid).tolist()
    assert (nothing, number) == (0.0, 0.0)


class DisparityHead(nn.Module):
    """Says by its name what it predicts."""


class PlainHead(nn.Module):
    """Says it by an attribute, or not."""

    def __init__(self, **facts: Any) -> None:
        super().__init__()
        vars(self).update(facts)


@pytest.mark.parametrize(
    'head', [DisparityHead(), PlainHead(predicts='disparity'), type('InverseDepthHead', (nn.Module,), {})()]
)
def test_heads_that_say_so_are_believed_at_build(head: nn.Module) -> None:
    metres = PlainHead(to_depth=None)
    for kind in (DepthRegressionLoss, OrdinalRelationLoss, VirtualNormalLoss):
        with pytest.raises(ConfigError, match=f"{kind.__name__}: `teacher_output` must be .* Set teacher_output='disp"):
            kind().check_heads(metres, head)
        assert kind(teacher_output='disparity').check_heads(metres, head) == []
        with pytest.raises(ConfigError, match="Set teacher_output='depth'"):
            kind(teacher_output='disparity').check_heads(PlainHead(), metres)
        with pytest.raises(
            ConfigError, match='the student must predict depth .* got .*Head, whose output is disparity'
        ):
            kind(teacher_output='disparity').check_heads(head, head)
        assert kind(teacher_output='same').check_heads(head, head) == []
        assert kind().check_heads(PlainHead(), PlainHead()) == []


def test_other_ranges_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[int, str]] = []
    monkeypatch.setattr(
        term_building, 'print_log', lambda text, logger, level=logging.INFO: logged.append((level, text))
    )

    def build(near: float, far: float, **loss) -> list[str]:
        logged.clear()
        networks = [toy_depth_estimator(width) for width in (4, 8)]
        for network, end in zip(networks, (near, far), strict=True):
            network.decode_head.max_depth = end
        terms = dict(
            metres=dict(tap='decode_head.to_depth', loss=dict(dict(type='mmstructkd.DepthRegressionLoss'), **loss))
        )
        teacher = dict(config=networks[1], allow_random=True)
        MODELS.build(toy_distiller(student=networks[0], teacher=teacher, terms=terms))
        return [text for level, text in logged if level == logging.WARNING]

    (warned,) = build(80.0, 10.0)
    assert warned.startswith(
        "term 'metres': DepthRegressionLoss: the heads have other ranges: max_depth=80 m of the stu"
    )
    assert '10 m of the teacher' in warned
    assert build(25.0, 25.0) == []
    assert build(80.0, 10.0, max_depth=10.0) == []
    assert build(80.0, 10.0, type='mmstructkd.ScaleShiftInvariantLoss') == []
    assert len(build(10.0, 80.0, type='mmstructkd.VirtualNormalLoss')) == 1


@pytest.mark.parametrize('loss', ['PixelwiseKLLoss', 'DistLoss', 'ChannelwiseKLLoss', 'LocalizationKLLoss'])
def test_bins_of_another_range_are_other_classes(loss: str) -> None:
    settings = dict(edges=1, region='all') if loss == 'LocalizationKLLoss' else {}

    def build(far: float) -> nn.Module:
        networks = [toy_depth_estimator(width, 'DepthClassificationHead') for width in (4, 8)]
        networks[1].decode_head.max_depth = far
        terms = dict(bins=dict(tap='decode_head.conv_depth', loss=dict(type=f'mmstructkd.{loss}', **settings)))
        return MODELS.build(
            toy_distiller(student=networks[0], teacher=dict(config=networks[1], allow_random=True), terms=terms)
        )

    assert build(25.0).terms['bins'].levels
    with pytest.raises(
        ConfigError, match=rf"term 'bins': the heads must have the same bins for {loss}, got 12 bins from 0\.5 to 25 m"
    ):
        build(80.0)


def test_conversions() -> None:
    disparity = torch.tensor([0.5, 0.0, -1.0, torch.nan, torch.inf, 4.0])
    assert F.depth_of_disparity(disparity).tolist() == [2.0, 0.0, 0.0, 0.0, 0.0, 0.25]
    depth = torch.tensor([2.0, 0.25, 0.0, -1.0], requires_grad=True)
    got = F.disparity_of_depth(depth, eps=0.1)
    torch.testing.assert_close(got, torch.tensor([0.5, 4.0, 20.0, 120.0]))
    (grad,) = torch.autograd.grad(got.sum(), depth)
    torch.testing.assert_close(grad, torch.tensor([-0.25, -16.0, -100.0, -100.0]))
    assert F.disparity_of_depth(torch.tensor([torch.inf])).isnan()
    with pytest.raises(ConfigError, match='disparity_of_depth: `eps` must be a finite number above 0, got 0'):
        F.disparity_of_depth(depth, eps=0)


def test_bad_outputs_are_named() -> None:
    with pytest.raises(ConfigError, match=r"DepthRegressionLoss: `teacher_output` must be one of .*, got 'inverse'"):
        DepthRegressionLoss(teacher_output='inverse')
    loss = DepthRegressionLoss(teacher_output='disparity', max_depth=5.0)
    student = torch.full((1, 1, 1, 3), 2.0)
    assert loss(student, torch.tensor([[[[0.5, 0.25, 0.01]]]]), Targets()).item() == 1.0  # 2, 4 and 100 m
