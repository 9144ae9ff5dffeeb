from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmstructkd.critics import SAGANCritic, SpatialSelfAttention
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.holistic import gradient_penalty
from mmstructkd.registry import MODELS


def tiny(**kwargs):
    torch.manual_seed(0)
    return SAGANCritic(**{'in_channels': 3, 'base_channels': 4, **kwargs})


def test_published_architecture():
    torch.manual_seed(0)
    critic = MODELS.build({'type': 'mmstructkd.SAGANCritic', 'in_channels': 19})
    convs = {name: m for name, m in critic.named_modules() if isinstance(m, nn.Conv2d)}
    widths = [(c.in_channels, c.out_channels) for n, c in convs.items() if n.startswith('block')]
    assert widths == [(19, 64), (64, 128), (128, 256), (256, 512)]
    assert all(c.kernel_size == (4, 4) and c.stride == (2, 2) for n, c in convs.items() if n.startswith('block'))
    assert convs['attention3.query'].out_channels == 32
    assert convs['attention4.key'].out_channels == 64
    assert convs['attention4.value'].out_channels == 512
    slopes = {m.negative_slope for m in critic.modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.1}
    critic.eval()
    for block in (critic.block1, critic.block2, critic.block3, critic.block4):
        assert torch.linalg.matrix_norm(block[0].weight.flatten(1), ord=2).item() == pytest.approx(1, rel=0.12)


@pytest.mark.parametrize(
    ('size', 'want'),
    [
        ((65, 65), (65, 65)),
        ((64, 128), (64, 128)),
        ((45, 60), (65, 87)),
        ((8, 8), (65, 65)),
        ((512, 1024), (128, 256)),
        ((16, 512), (65, 256)),
        ((1, 1), (65, 65)),
    ],
)
def test_working_size(size, want):
    assert tiny().working_size(size) == want


@pytest.mark.parametrize(
    ('size', 'score'), [((65, 65), (1, 1)), ((64, 64), (1, 1)), ((5, 7), (1, 2)), ((300, 90), (13, 1))]
)
def test_scores_of_any_size(size, score):
    assert tiny()(torch.randn(2, 3, *size)).shape == (2, 1, *score)


def test_fixed_size():
    critic = tiny(size=(64, 128), batch_norm=False)
    maps = torch.randn(2, 3, 20, 40)
    resized = nn.functional.interpolate(maps, size=(64, 128), mode='bilinear', align_corners=False)
    critic.eval()
    torch.testing.assert_close(critic(maps), critic(resized))
    assert tiny(size=65).size == (65, 65)


def test_attention_equals_loops():
    torch.manual_seed(0)
    attention = SpatialSelfAttention(8).double()
    x = torch.randn(2, 8, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(attention(x), x)  # its scale starts at 0
    nn.init.constant_(attention.gamma, 0.7)
    query, key, value = attention.query(x), attention.key(x), attention.value(x)
    want = x.clone()
    for b in range(2):
        for i in range(6):
            products = torch.stack([query[b, :, i // 3, i % 3] @ key[b, :, j // 3, j % 3] for j in range(6)])
            shares = products.exp() / products.exp().sum()
            for j in range(6):
                want[b, :, i // 3, i % 3] += 0.7 * shares[j] * value[b, :, j // 3, j % 3]
    torch.testing.assert_close(attention(x), want)


@pytest.mark.parametrize('batch_norm', [True, False])
@pytest.mark.parametrize('size', [(65, 65), (5, 7), (70, 300)])
def test_second_order_gradient_reaches_every_parameter(batch_norm, size):
    critic = tiny(batch_norm=batch_norm)
    nn.init.constant_(critic.attention3.gamma, 0.5)
    nn.init.constant_(critic.attention4.gamma, 0.5)
    student, teacher = torch.randn(2, 2, 3, *size).unbind()
    penalty = gradient_penalty(critic, student, teacher)
    (penalty + critic(student).mean()).backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() or name.endswith('key.bias'), name  # softmax ignores a shift of all keys


def test_batch_norm_equals_torch():
    critic = tiny()
    norm = nn.BatchNorm2d(3)
    x = 3 + 2 * torch.randn(4, 3, 65, 65)
    torch.testing.assert_close(critic.input_norm(x), norm(x))
    torch.testing.assert_close(critic.input_norm.running_mean, norm.running_mean)
    torch.testing.assert_close(critic.input_norm.running_var, norm.running_var)
    torch.testing.assert_close(critic.eval().input_norm(x), norm.eval()(x))


def test_sync_batch_norm_leaves_the_critic_alone():
    critic = nn.SyncBatchNorm.convert_sync_batchnorm(tiny())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in critic.modules())


def test_scores_see_the_image():
    critic = tiny(image_channels=3).eval()
    maps, images = torch.randn(2, 3, 65, 65), torch.randn(2, 3, 128, 128)
    assert not torch.allclose(critic(maps, images), critic(maps, images.flip(0)))
    with pytest.raises(ShapeError, match=r'`images` must have shape \(B, 3, H, W\), got None'):
        critic(maps)


def test_state_and_copy():
    critic = tiny()
    maps = torch.randn(2, 3, 65, 65)
    critic(maps).sum().backward()
    twin = copy.deepcopy(critic)
    other = SAGANCritic(in_channels=3, base_channels=4)
    other.load_state_dict(critic.state_dict())
    # Three training passes each: the power iterations and statistics go on from the same place.
    for _ in range(3):
        want = critic(maps)
        assert torch.equal(twin(maps), want)
        assert torch.equal(other(maps), want)
    for name, value in critic.state_dict().items():
        assert torch.equal(twin.state_dict()[name], value), name


def test_eval_moves_nothing():
    critic = tiny().eval()
    before = copy.deepcopy(critic.state_dict())
    maps = torch.randn(2, 3, 65, 65)
    assert torch.equal(critic(maps), critic(maps))
    for name, value in critic.state_dict().items():
        assert torch.equal(before[name], value), name


def test_channels_last():
    critic = tiny().eval()
    maps = torch.randn(2, 3, 65, 70)
    want = critic(maps)
    got = critic.to(memory_format=torch.channels_last)(maps.to(memory_format=torch.channels_last))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ('kwargs', 'match'),
    [
        ({'in_channels': 0}, '`in_channels` must be an integer of at least 1, got 0'),
        ({'base_channels': 2.5}, '`base_channels` must be an integer of at least 1, got 2.5'),
        ({'image_channels': -1}, '`image_channels` must be an integer of at least 0, got -1'),
        ({'max_side': 32}, '`max_side` must be an integer of at least 65, got 32'),
        ({'size': 32}, r'`size` must be a side or \(h, w\) of at least 64 each, got 32'),
        ({'size': (65, 65, 65)}, r'`size` must be .*got \(65, 65, 65\)'),
        ({'size': 65.0}, r'`size` must be .*got 65.0'),
    ],
)
def test_config_errors(kwargs, match):
    with pytest.raises(ConfigError, match=match):
        tiny(**kwargs)


def test_shape_errors():
    with pytest.raises(ShapeError, match=r'`maps` must have 3 channels, got \(2, 4, 65, 65\)'):
        tiny()(torch.zeros(2, 4, 65, 65))
    with pytest.raises(ShapeError, match=r'`maps` must have shape \(B, C, H, W\), got \(3, 65, 65\)'):
        tiny()(torch.zeros(3, 65, 65))
