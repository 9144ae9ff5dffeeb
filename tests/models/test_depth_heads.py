"""The depth heads in mmseg's DepthEstimator: losses, taps, runs, and ground truth that does not fit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.apis import inference_model
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmstructkd.errors import ConfigError
from mmstructkd.models import (
    BinsToDepth,
    DepthBinLoss,
    DepthClassificationHead,
    DepthL1Loss,
    DepthRegressionHead,
    DepthSILogLoss,
    ScoreToDepth,
)
from mmstructkd.models import depth_head as module
from tests.reference import depth as reference

CONFIGS = Path(__file__).parents[2] / 'configs' / '_base_'
HEADS = {'regression': DepthRegressionHead, 'classification': DepthClassificationHead}
every = pytest.mark.parametrize('kind', HEADS)


@pytest.fixture(autouse=True)
def _mmseg_scope():
    DefaultScope.get_instance('test_depth_heads', scope_name='mmseg')


def narrow(kind: str, width: int = 4) -> dict:
    """The shipped fragment, narrower."""
    model = Config.fromfile(CONFIGS / 'models' / f'depth_{kind}_r18.py').model
    model.backbone.update(base_channels=width, stem_channels=width)
    model.decode_head.update(in_channels=[width * 2**k for k in range(4)], channels=2 * width)
    model.data_preprocessor.size = (64, 96)
    return model


def build(kind: str, **changes):
    model = narrow(kind)
    model.decode_head.update(changes)
    return MODELS.build(model)


def batch(depth=None, size=(64, 96), images=2):
    samples = []
    for image in range(images):
        sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size, pad_shape=size))
        shown = 1 + 20 * torch.rand(1, *size) if depth is None else depth[image]
        sample.set_data({'gt_depth_map': PixelData(data=shown)})
        samples.append(sample)
    return torch.randn(images, 3, *size), samples


def head(kind: str, **kwargs):
    settings = dict(in_channels=6, channels=5, min_depth=1.0, max_depth=16.0)
    if kind == 'classification':
        settings['num_bins'] = 8
    return HEADS[kind](**{**settings, **kwargs})


# --- the parts -----------------------------------------------------------------------------------------------


def test_score_to_depth():
    score = torch.tensor([-50.0, 0.0, 50.0], dtype=torch.float64)
    torch.testing.assert_close(
        ScoreToDepth(2.0, 10.0)(score), torch.tensor([2.0, 6.0, 10.0], dtype=torch.float64), rtol=0, atol=1e-9
    )
    got = ScoreToDepth(2.0, 10.0, mapping='softplus')(score)
    torch.testing.assert_close(got, torch.tensor([2.0, 2 + math.log(2), 52.0], dtype=torch.float64))
    assert ScoreToDepth(2.0, 10.0)(score.half()).dtype == torch.float32


@pytest.mark.parametrize('average', ['log', 'depth'])
def test_bins_to_depth(average):
    bins = BinsToDepth(5, 0.5, 20.0, average)
    edges = [0.5 * 40 ** (k / 5) for k in range(6)]
    centres = [math.sqrt(a * b) for a, b in itertools.pairwise(edges)]
    scores = torch.randn(2, 5, 2, 3)
    got = bins(scores)
    share = scores.exp() / scores.exp().sum(1, keepdim=True)
    for b, y, x in np.ndindex(2, 2, 3):
        if average == 'log':
            want = math.exp(sum(share[b, k, y, x].item() * math.log(centres[k]) for k in range(5)))
        else:
            want = sum(share[b, k, y, x].item() * centres[k] for k in range(5))
        assert got[b, 0, y, x].item() == pytest.approx(want, rel=1e-5)
    sure = torch.full((1, 5, 1, 1), -100.0)
    for k in range(5):
        assert bins(sure.index_fill(1, torch.tensor([k]), 100.0)).item() == pytest.approx(centres[k], rel=1e-5)
        assert bins.bin_of(torch.tensor([edges[k] * 1.001, centres[k], edges[k + 1] * 0.999])).tolist() == [k] * 3
    assert bins.bin_of(torch.tensor([0.0, 0.1, 20.0, 99.0, float('inf')])).tolist() == [0, 0, 4, 4, 4]
    assert not bins.state_dict()


@pytest.mark.parametrize('sharpness', [0.2, 2.0, None])
def test_bin_loss_equals_loops(sharpness):
    scores = torch.randn(2, 9, 2, 3, dtype=torch.float64, requires_grad=True)
    right = torch.tensor([[[0, 8, 4], [3, 7, 1]], [[2, 2, 6], [5, 0, 8]]])
    valid = torch.rand(2, 2, 3) > 0.3
    values = []
    for b, y, x in np.ndindex(2, 2, 3):
        if valid[b, y, x]:
            log_p = scores[b, :, y, x] - scores[b, :, y, x].exp().sum().log()
            distance = [(k - int(right[b, y, x])) ** 2 for k in range(9)]
            weights = [float(d == 0) if sharpness is None else math.exp(-sharpness * d) for d in distance]
            weights = [w if w >= 1e-3 else 0.0 for w in weights]
            values.append(-sum(w * log_p[k] for k, w in enumerate(weights)) / sum(weights))
    want = 3 * sum(values) / len(values)
    got = DepthBinLoss(3.0, sharpness=sharpness)(scores, right, valid)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, scores), torch.autograd.grad(want, scores))


def test_bin_loss_of_nothing_and_of_nan():
    scores = torch.full((1, 4, 2, 2), float('nan'), requires_grad=True)
    got = DepthBinLoss()(scores, torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.bool))
    assert got.item() == 0
    assert not torch.autograd.grad(got, scores)[0].any()


def test_losses_of_a_map():
    prediction, truth = (1 + torch.rand(2, 2, 1, 3, 4, dtype=torch.float64)).unbind()
    truth[torch.rand_like(truth) < 0.3] = 0
    maps = prediction[:, 0], truth[:, 0], truth[:, 0] > 0
    torch.testing.assert_close(DepthL1Loss(2.0)(prediction, truth), 2 * reference.l1(*maps))
    got = DepthSILogLoss(2.0, variance_weight=0.85)(prediction, truth)
    torch.testing.assert_close(got, 2 * reference.silog(*maps, 0.85, root=True))
    assert (DepthL1Loss().loss_name, DepthSILogLoss(loss_name='loss_x').loss_name) == ('loss_l1', 'loss_x')


# --- the heads -----------------------------------------------------------------------------------------------


@every
def test_depth_lies_within_its_limits(kind):
    net = head(kind)
    feats = [1e4 * torch.randn(2, 6, 5, 4)]
    got = net(feats)
    assert got.shape == (2, 1, 5, 4)
    assert (got >= 1.0).all()
    assert (got <= 16.0).all()


@every
@pytest.mark.parametrize('convs', [1, 2])
def test_features_are_fused(kind, convs):
    one = head(kind, num_convs=convs, in_index=0)
    feats = [torch.randn(2, 6, 7, 5), torch.randn(2, 3, 4, 3)]
    assert one(feats).shape == (2, 1, 7, 5)
    assert len(one.convs) == convs
    both = head(kind, num_convs=convs, in_channels=[3, 6], in_index=[1, 0])
    assert both(feats).shape == (2, 1, 4, 3)
    assert both.convs[0].in_channels == 9
    assert both.input_transform == 'resize_concat'


@every
def test_every_parameter_is_used_and_the_depth_map_is_tapped(kind):
    model = build(kind)
    seen = {}
    for name in ('convs', 'conv_depth', 'to_depth'):
        part = getattr(model.decode_head, name)
        part.register_forward_hook(lambda m, i, o, name=name: seen.setdefault(name, []).append(o))
    inputs, samples = batch()
    losses = model(inputs, samples, mode='loss')
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert (
        set(losses)
        == {
            'regression': {'decode.loss_silog', 'decode.loss_l1'},
            'classification': {'decode.loss_bin'},
        }[kind]
    )
    assert all(len(calls) == 1 for calls in seen.values())
    assert seen['to_depth'][0].shape == (2, 1, 16, 24)
    assert seen['conv_depth'][0].shape == (2, 1 if kind == 'regression' else 64, 16, 24)
    seen.clear()
    depth = model(inputs, samples, mode='tensor')
    assert torch.equal(depth, seen['to_depth'][0])
    assert 'decode_head.conv_seg.weight' not in model.state_dict()


@every
@pytest.mark.parametrize('mode', ['whole', 'slide_flip'])
def test_prediction_has_the_size_of_the_input(kind, mode):
    model = build(kind).eval()
    model.test_cfg.update(mode=mode, stride=(32, 32), crop_size=(48, 64))
    with torch.no_grad():
        outputs = model(*batch(images=1), mode='predict')
    depth = outputs[0].pred_depth_map.data
    assert depth.shape == (1, 64, 96)
    assert (depth >= 0.5).all()
    assert (depth <= 25.0).all()


@every
def test_losses_equal_their_definition(kind):
    net = head(kind, loss_decode=[dict(type='mmstructkd.DepthL1Loss')])
    feats = [torch.randn(2, 6, 5, 4)]
    depth = torch.where(torch.rand(2, 1, 10, 8) < 0.5, 20 * torch.rand(2, 1, 10, 8), 0)
    samples = batch(depth, size=(10, 8))[1]
    losses = net.loss(feats, samples, None)
    truth = depth[:, 0]
    valid = (truth >= 1) & (truth <= 16)

    def large(tensor):
        return torch.nn.functional.interpolate(tensor, size=(10, 8), mode='bilinear', align_corners=False)

    torch.testing.assert_close(losses['loss_l1'], reference.l1(large(net(feats))[:, 0], truth, valid))
    if kind == 'classification':
        want = DepthBinLoss()(large(net.scores(feats)), net.to_depth.bin_of(truth), valid)
        torch.testing.assert_close(losses['loss_bin'], want)
        assert want.item() > 1


@every
def test_padding_is_no_reading(kind):
    net = head(kind)
    feats = [torch.randn(1, 6, 8, 8)]
    depth = 1 + 10 * torch.rand(1, 1, 8, 8)
    want = net.loss([feats[0]], batch(torch.where(torch.arange(8) < 6, depth, 0), size=(8, 8), images=1)[1], None)
    depth[..., 6:] = 12.0
    samples = batch(depth, size=(8, 8), images=1)[1]
    samples[0].set_metainfo(dict(padding_size=(0, 2, 0, 0)))
    torch.testing.assert_close(net.loss(feats, samples, None), want)


@every
@pytest.mark.parametrize('value', [0.0, float('nan')])
def test_no_reading_at_all_is_zero_with_a_graph_and_a_warning(kind, value, monkeypatch):
    told = []
    monkeypatch.setattr(module, 'print_log', lambda text, **kwargs: told.append(text))
    model = build(kind)
    inputs, samples = batch(torch.full((2, 1, 64, 96), value))
    for _ in range(5):
        losses = model(inputs, samples, mode='loss')
        total = sum(losses.values())
        total.backward()
        assert total.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.decode_head.parameters())
    # Looked at in the first calls alone: it makes the host wait.
    assert len(told) == 3
    assert 'no depth map of this batch has a reading' in told[0]


@every
def test_the_host_waits_in_the_first_calls_alone(kind):
    model = build(kind)
    data = batch()
    for _ in range(3):
        model(*data, mode='loss')
    # Tensors without values: whatever asks for one raises.
    model = model.to('meta')
    inputs, samples = torch.ones(2, 3, 64, 96, device='meta'), [sample.to('meta') for sample in data[1]]
    assert sum(model(inputs, samples, mode='loss').values()).device.type == 'meta'


@every
def test_other_units_are_an_error(kind):
    model = build(kind)
    inputs, samples = batch(torch.full((2, 1, 64, 96), 3000.0))
    with pytest.raises(
        ConfigError,
        match=r'in metres, got 25 and 0.5 for readings from 3000 to 3000. Maps in millimetres: .*rescale_factor=1e-3',
    ):
        model(inputs, samples, mode='loss')
    samples[0].gt_depth_map.data[:, 0, 0] = 3.0
    assert sum(model(inputs, samples, mode='loss').values()) > 0


@every
def test_a_sample_without_a_depth_map_is_an_error(kind):
    model = build(kind)
    inputs, samples = batch()
    del samples[1].gt_depth_map
    with pytest.raises(ConfigError, match=r'Depth\w+Head: `data_samples` must have a `gt_depth_map`.*all 0'):
        model(inputs, samples, mode='loss')


@every
def test_mmsegs_own_loss_serves(kind):
    model = build(kind, loss_decode=dict(type='SiLogLoss'))
    inputs, samples = batch()
    losses = model(inputs, samples, mode='loss')
    assert losses['decode.loss_silog'].isfinite()


@every
def test_bfloat16_gives_depth_in_float32(kind):
    net = head(kind)
    with torch.autocast('cpu', torch.bfloat16):
        got = net([torch.randn(2, 6, 5, 4)])
    assert got.dtype == torch.float32


@every
@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        ({'min_depth': 0}, r'`min_depth` must be a finite number above 0, got 0'),
        ({'max_depth': 1.0}, r'`max_depth` must be above min_depth=1.0, got 1.0. Both are in metres'),
        ({'num_convs': 3}, r'`num_convs` must be 1 or 2, got 3'),
        ({'num_classes': 3}, r'`num_classes` must be left out, got 3'),
        ({'input_transform': 'multiple_select'}, r"`input_transform` must be None or 'resize_concat', got 'multi"),
        (
            {'input_transform': 'resize_concat'},
            r"`in_index` must be a list with input_transform='resize_concat', got -1",
        ),
        ({'in_index': [0, 1]}, r'`in_channels` must have a number for each feature of in_index=\[0, 1\], got 6'),
        ({'in_index': [0, 1], 'in_channels': [6]}, r'`in_channels` must have a number for each .* got \[6\]'),
        ({'in_channels': [6]}, r'`in_channels` must have a number for each feature of in_index=-1, got \[6\]'),
    ],
)
def test_bad_settings(kind, kwargs, match):
    with pytest.raises(ConfigError, match=f'{HEADS[kind].__name__}: {match}'):
        head(kind, **kwargs)


def test_bad_parts():
    with pytest.raises(ConfigError, match=r"DepthRegressionHead: `mapping` must be one of .*got 'relu'"):
        head('regression', mapping='relu')
    with pytest.raises(ConfigError, match=r"DepthClassificationHead: `average` must be one of .*got 'mean'"):
        head('classification', average='mean')
    with pytest.raises(ConfigError, match=r'DepthClassificationHead: `num_bins` must be an integer .*got 1'):
        head('classification', num_bins=1)
    with pytest.raises(ConfigError, match=r'DepthBinLoss: `sharpness` must be a finite number above 0, got 0'):
        head('classification', loss_bins=dict(sharpness=0))
    with pytest.raises(ConfigError, match=r'DepthSILogLoss: `variance_weight` must be at most 1, got 2'):
        DepthSILogLoss(variance_weight=2)
    with pytest.raises(ConfigError, match=r'DepthL1Loss: `loss_weight` must be .*got -1'):
        DepthL1Loss(-1)


# --- a run ---------------------------------------------------------------------------------------------------


@every
def test_runner_trains_and_scores(kind, tmp_path):
    data = Config.fromfile(CONFIGS / 'datasets' / 'scenes_depth.py')
    for part in (data.train_dataloader, data.val_dataloader):
        part.update(num_workers=0, persistent_workers=False)
        part.dataset.update(num_scenes=4, size=(64, 96))
    data.train_dataloader.batch_size = 2
    cfg = Config(
        dict(
            default_scope='mmseg',
            model=narrow(kind),
            work_dir=str(tmp_path),
            train_dataloader=data.train_dataloader,
            val_dataloader=data.val_dataloader,
            val_evaluator=data.val_evaluator,
            train_cfg=dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2),
            val_cfg=dict(type='ValLoop'),
            optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01)),
            default_hooks=dict(logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False)),
            log_processor=dict(by_epoch=False),
            log_level='WARNING',
            randomness=dict(seed=0),
            experiment_name=f'depth_{kind}',
        )
    )
    runner = Runner.from_cfg(cfg)
    before = {name: p.clone() for name, p in runner.model.named_parameters()}
    runner.train()
    moved = [name for name, p in runner.model.named_parameters() if not torch.equal(p, before[name])]
    # All but convolutions before a BatchNorm that starts at 0.
    assert len(moved) > 0.8 * len(before)
    assert {name for name in before if 'decode_head' in name} <= set(moved)
    for key in ('abs_rel', 'rmse', 'd1', 'silog'):
        assert math.isfinite(runner.message_hub.get_scalar(f'val/{key}').current())
    assert 0 < runner.message_hub.get_scalar('val/abs_rel').current() < 5

    runner.model.cfg = Config(dict(test_pipeline=[dict(type='mmstructkd.LoadScene'), dict(type='PackSegInputs')]))
    got = inference_model(runner.model, np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
    assert got.pred_depth_map.data.shape == (1, 70, 50)
