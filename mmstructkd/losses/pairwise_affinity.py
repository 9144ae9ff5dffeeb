"""Pair-wise distillation: which parts of an image look alike."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, check_count, check_one_of, is_finite_number
from mmstructkd.functional.core.pooling import POOLS, check_kernel_size
from mmstructkd.functional.pairwise_affinity import check_radius, pairwise_affinity_loss
from mmstructkd.losses.base import DistillLoss
from mmstructkd.losses.presets import settle
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['PairwiseAffinityLoss']

_DEFAULTS: dict[str, Any] = {
    'loss_weight': 1.0,
    'pool': 'avg',
    'kernel_size': None,
    'kernel_scale': None,
    'max_side': None,
    'radius': None,
    'detach_norm': False,
}
_PRESETS: dict[str, dict[str, Any]] = {
    'paper': {'loss_weight': 10.0, 'pool': 'avg', 'kernel_size': 2, 'detach_norm': False},
    'code': {'loss_weight': 0.5, 'pool': 'max', 'kernel_scale': 0.5, 'detach_norm': True},
}


@MODELS.register_module()
class PairwiseAffinityLoss(DistillLoss):
    r"""Squared distance between the affinities among nodes in student and teacher.

    Pair-wise term of Structured Knowledge Distillation (arXiv:1903.04197). See
    :func:`~mmstructkd.functional.pairwise_affinity.pairwise_affinity_loss` for the
    formula, and what it costs. Tap features (in the paper the last ones before
    the classifier); widths may differ.

    ============  ============  ===========  ==========
    argument      default       ``'paper'``  ``'code'``
    ============  ============  ===========  ==========
    loss_weight   1             10           0.5
    pool          avg           avg          max
    kernel_size   2             2            --
    kernel_scale  --            --           0.5
    max_side      --            --           --
    detach_norm   no            no           yes
    ============  ============  ===========  ==========

    ``'code'``: the authors' released code (master) pools by half the map's size,
    rounded down, in ceil mode: 2 x 2 nodes where H and W are even, 3 x 3 where
    they are odd (and above 1). The default weight of 1 is where to start: the
    paper's is 10, that of the code 0.5.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        pool: ``'avg'`` or ``'max'``.
        kernel_size: size of a node's patch in positions, one number or (h, w);
            1 for no pooling.
        kernel_scale: the same as a share of the map, in (0, 1]: the patch is
            int(share * H) x int(share * W), at least 1 x 1. Instead of
            ``kernel_size``.
        max_side: pool just so far that there are at most this many nodes along
            each side, and a small map not at all: for the levels of a pyramid.
            Instead of the two above.
        radius: pairs of nodes further apart than this do not count. ``None``:
            all do.
        detach_norm: leave the norms of features out of the gradient.
        preset: ``'paper'``, ``'code'`` or ``None``. A preset fixes the values of
            its column; an argument that says otherwise is an error.

    Shape:
        - student: :math:`(B, D_s, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: scalar in [0, 4], no unit, 0 with a graph where no pixel counts.

    Pixels without a label count, as in the published code
    (``where='inside'``); padding is no part of any node.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset.
        ShapeError: the maps differ in B, H or W.

    Example:
        >>> import torch
        >>> loss = PairwiseAffinityLoss(preset='paper')
        >>> x = torch.randn(2, 5, 4, 4)
        >>> loss(x, 3 * x).item() < 1e-10
        True
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'cosine affinities among all places of a map'
    paper = 'Structured Knowledge Distillation for Dense Prediction (arXiv:1903.04197)'
    needs_equal_channels = False

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        pool: str | None = None,
        kernel_size: int | tuple[int, int] | None = None,
        kernel_scale: float | None = None,
        max_side: int | None = None,
        radius: int | None = None,
        detach_norm: bool | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {
            'loss_weight': loss_weight,
            'pool': pool,
            'kernel_size': kernel_size,
            'kernel_scale': kernel_scale,
            'max_side': max_side,
            'radius': radius,
            'detach_norm': detach_norm,
        }
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(loss_weight=settings['loss_weight'])
        check_one_of(owner, 'pool', settings['pool'], POOLS)
        check_radius(owner, settings['radius'])
        size, scale, most = (settings[name] for name in ('kernel_size', 'kernel_scale', 'max_side'))
        named = {
            name: settings[name] for name in ('kernel_size', 'kernel_scale', 'max_side') if settings[name] is not None
        }
        if len(named) > 1:
            raise ConfigError(
                f'{owner}: the size of a patch must be given by one of {", ".join(f"`{name}`" for name in named)}, '
                f'got {named}. Name one of them' + ('.' if preset is None else f'; preset={preset!r} fixes another.')
            )
        if most is not None:
            check_count(owner, 'max_side', most)
        if scale is not None and not (is_finite_number(scale) and 0 < scale <= 1):
            raise ConfigError(f'{owner}: `kernel_scale` must be above 0 and at most 1, got {scale!r}.')
        self.preset = preset
        self.pool: str = settings['pool']
        self.kernel_scale: float | None = None if scale is None else float(scale)
        self.max_side: int | None = most
        pooled = scale is None and most is None
        self.kernel_size = check_kernel_size(owner, 2 if size is None else size) if pooled else None
        self.radius: int | None = settings['radius']
        self.detach_norm: bool = settings['detach_norm']

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        return pairwise_affinity_loss(
            student,
            teacher,
            pool=self.pool,
            kernel_size=self._kernel_at(student.shape[-2], student.shape[-1]),
            radius=self.radius,
            detach_norm=self.detach_norm,
            valid=valid,
        )

    def _kernel_at(self, height: int, width: int) -> tuple[int, int]:
        if self.kernel_size is not None:
            return self.kernel_size
        if self.max_side is not None:
            return (-(-height // self.max_side), -(-width // self.max_side))
        scale = self.kernel_scale or 1.0
        return (max(1, int(scale * height)), max(1, int(scale * width)))

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        patch = f'kernel_size={self.kernel_size}'
        if self.kernel_size is None:
            patch = f'kernel_scale={self.kernel_scale:g}' if self.kernel_scale else f'max_side={self.max_side}'
        return (
            f'{super().extra_repr()}, pool={self.pool!r}, {patch}, radius={self.radius}, detach_norm={self.detach_norm}'
        )
