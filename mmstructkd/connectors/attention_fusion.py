"""Fuses the student's levels from the coarsest down to the finest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as torch_functional
from mmcv.cnn import ConvModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmstructkd.connectors.base import Connector, check_input, check_width
from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.layers import check_layers
from mmstructkd.registry import MODELS

__all__ = ['AttentionFusionConnector']


def _projected(module: ConvModule, features: Tensor) -> Tensor:
    """Run a convolution with its norm, which takes its running statistics where there is one value a channel."""
    single = features.shape[0] * features.shape[2] * features.shape[3] == 1
    if not (single and module.training and isinstance(module.norm, _BatchNorm)):
        return module(features)
    module.norm.eval()
    projected = module(features)
    module.norm.train()
    return projected


class _Fusion(nn.Module):
    """One level: project, mix with what comes from the coarser level, project to the teacher's width."""

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool, norm_cfg: dict | None
    ) -> None:
        super().__init__()
        self.reduce = ConvModule(in_channels, mid_channels, 1, bias='auto', norm_cfg=norm_cfg, act_cfg=None)
        self.expand = ConvModule(mid_channels, out_channels, 3, padding=1, bias='auto', norm_cfg=norm_cfg, act_cfg=None)
        self.gates = nn.Conv2d(2 * mid_channels, 2, 1) if fuse else None
        for module in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(module.conv.weight, a=1)

    def forward(self, feature: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output and the fused feature, which goes down to the next level."""
        fused = _projected(self.reduce, feature)
        if self.gates is not None and coarser is not None:
            coarser = torch_functional.interpolate(coarser, size=fused.shape[2:], mode='nearest')
            gates = self.gates(torch.cat([fused, coarser], dim=1)).sigmoid()
            fused = fused * gates[:, :1] + coarser * gates[:, 1:]
        return _projected(self.expand, fused), fused


@MODELS.register_module()
class AttentionFusionConnector(Connector):
    r"""Mix each level of the student with all coarser ones, by learned gates.

    Attention based fusion of ReviewKD (arXiv:2104.09044), for
    :class:`~mmstructkd.losses.hierarchical_context.HierarchicalContextLoss` on
    several taps, named from fine to coarse. From the coarsest level down:
    :math:`x_l = \mathrm{BN}(\mathrm{conv}_{1 \times 1} f_l)`; with y the mixture
    of the level above, enlarged by nearest, two maps
    :math:`g = \sigma(\mathrm{conv}_{1 \times 1}[x, y])` make the mixture
    :math:`x g_1 + y g_2`, which goes on to the next level, and
    :math:`\mathrm{BN}(\mathrm{conv}_{3 \times 3})` of it is compared with the
    teacher. So a fine level of the teacher also teaches the coarse levels of the
    student.

    Trained with the student, dropped from its checkpoint; the term fills in the
    widths from the probe. The teacher's features pass unchanged.

    Args:
        in_channels: widths of the student's levels.
        out_channels: widths of the teacher's, as many.
        mid_channels: width in which the levels are mixed.
        norm_cfg: normalisation behind the projections, ``None`` for none;
            ``dict(type='SyncBN')`` for few images on each of several GPUs. Batch
            statistics of one image on a level of 1 x 1 are none: there the
            running ones take their place.

    Raises:
        ConfigError: the widths are no lists of equal length.
        ShapeError: another number of levels, or a level that is larger than the
            one before it.

    Example:
        >>> connector = AttentionFusionConnector([4, 8], [6, 6], mid_channels=4)
        >>> levels = [torch.zeros(2, 4, 8, 8), torch.zeros(2, 8, 4, 4)]
        >>> students, teachers = connector(levels, levels)
        >>> [tuple(s.shape) for s in students]
        [(2, 6, 8, 8), (2, 6, 4, 4)]
    """

    joint = True
    paper = 'Distilling Knowledge via Knowledge Review (arXiv:2104.09044)'

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        mid_channels: int = 256,
        norm_cfg: dict | None = dict(type='BN'),  # noqa: B006  # never written to
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        widths = (in_channels, out_channels)
        if not all(isinstance(w, (list, tuple)) for w in widths) or not 0 < len(in_channels) == len(out_channels):
            raise ConfigError(
                f'{owner}: `in_channels` and `out_channels` must be lists of equal length, one width a level, '
                f'got {in_channels!r} and {out_channels!r}. Name several taps in the term, from fine to coarse.'
            )
        for name, values in (('in_channels', in_channels), ('out_channels', out_channels)):
            for value in values:
                check_width(owner, name, value)
        check_width(owner, 'mid_channels', mid_channels)
        for width in (mid_channels, *out_channels):
            check_layers(owner, width, norm_cfg=norm_cfg)
        self.in_channels = tuple(in_channels)
        coarsest = len(in_channels) - 1
        self.fusions = nn.ModuleList(
            _Fusion(width_s, mid_channels, width_t, level < coarsest, norm_cfg)
            for level, (width_s, width_t) in enumerate(zip(in_channels, out_channels, strict=True))
        )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the mixed levels of the student, and the teacher's as they came."""
        owner = type(self).__name__
        if not len(students) == len(teachers) == len(self.fusions):
            raise ShapeError(
                f'{owner}: `students` and `teachers` must be {len(self.fusions)} levels, as many as `in_channels` and '
                f'`out_channels` have widths, got {len(students)} and {len(teachers)}.'
            )
        for student, width in zip(students, self.in_channels, strict=True):
            check_input(owner, student, width)
        sizes = [tuple(s.shape[2:]) for s in students]
        if any(fine[0] < coarse[0] or fine[1] < coarse[1] for fine, coarse in itertools.pairwise(sizes)):
            raise ShapeError(
                f'{owner}: `students` must go from fine to coarse, got maps of {sizes}. Name the taps in that order.'
            )
        outputs: list[Tensor] = []
        coarser: Tensor | None = None
        for level in reversed(range(len(self.fusions))):
            output, coarser = self.fusions[level](students[level], coarser)
            outputs.insert(0, output)
        return outputs, list(teachers)
