"""The two self-teachers of FRSKD, run on a plain dict of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.functional import fuse_maps, refine_pyramid

Weights = Mapping[str, Tensor]


def normed(weights: Weights, name: str, x: Tensor) -> Tensor:
    """A BatchNorm in training: its running statistics move."""
    statistics = (weights[f'{name}.running_mean'], weights[f'{name}.running_var'])
    return torch_functional.batch_norm(
        x, *statistics, weights[f'{name}.weight'], weights[f'{name}.bias'], training=True, momentum=0.1
    )


def segmentation(weights: Weights, levels: Sequence[Tensor], last: bool) -> list[Tensor]:
    """Levels 2, 3, ... of one width; layers are a scale and bias a channel, a BatchNorm and a ReLU."""

    def layer(name: str) -> object:
        def run(x: Tensor) -> Tensor:
            scale, bias = weights[f'{name}.0.weight'], weights[f'{name}.0.bias']
            return normed(weights, f'{name}.1', x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)).relu()

        return run

    up = [layer(f'conv{k}up') for k in range(2, 2 + len(levels))]
    down = None if last else [layer(f'conv{k}dw') for k in range(3, 2 + len(levels))]
    return refine_pyramid(levels, up=up, down=down)


def classification(weights: Weights, levels: Sequence[Tensor]) -> list[Tensor]:
    """Levels from fine to coarse, each half the size before; refined maps, then the logits of the pooled last one."""
    number = len(levels)

    def pointwise(name: str, x: Tensor) -> Tensor:
        name = f'layers.0.{name}.conv.0'
        return normed(weights, f'{name}.1', torch_functional.conv2d(x, weights[f'{name}.0.weight'])).relu()

    def separable(name: str, x: Tensor) -> Tensor:
        """Two of them, a ReLU between, none behind."""
        for k in range(2):
            deep, wide, norm = (f'layers.0.{name}.conv.{k}.{k + j}' for j in range(3))
            x = x.relu() if k else x
            x = torch_functional.conv2d(x, weights[f'{deep}.weight'], padding=1, groups=x.shape[1])
            x = normed(weights, norm, torch_functional.conv2d(x, weights[f'{wide}.weight']))
        return x

    def halved(x: Tensor) -> Tensor:
        """Maximum over 3 x 3 at stride 2, padded with 0 at the far side of an even size."""
        odd = [(side + 1) % 2 for side in x.shape[-2:]]
        x = torch_functional.pad(x, [1 - odd[1], 1, 1 - odd[0], 1])
        return torch_functional.max_pool2d(x, 3, 2)

    def doubled(x: Tensor) -> Tensor:
        return torch_functional.interpolate(x, scale_factor=2, mode='nearest')

    entering = [pointwise(f'lat_conv.{k}', level.relu()) for k, level in enumerate(levels)]
    again = [pointwise(f'lat_conv2.{k - 1}', levels[k].relu()) for k in range(1, number)]
    raised = [entering[-1]]
    for k in range(number - 2, -1, -1):
        below = pointwise(f'up_sample.{k}.1', doubled(raised[0].relu()))
        fused = fuse_maps([entering[k].relu(), below], weights[f'layers.0.up_weight.{k}'])
        raised.insert(0, separable(f'up_conv.{k}', fused))
    out = [raised[0]]
    for k in range(1, number):
        parts = [again[k - 1].relu(), pointwise(f'down_sample.{k - 1}.1', halved(out[-1].relu()))]
        if k < number - 1:
            parts.insert(1, raised[k].relu())
        fused = fuse_maps(parts, weights[f'layers.0.down_weight.{k - 1}'])
        out.append(separable(f'down_conv.{k - 1}', fused))
    refined = [x.relu() for x in out]
    scores = torch_functional.linear(refined[-1].mean((2, 3)), weights['fc.weight'], weights['fc.bias'])
    return [*refined, scores]
