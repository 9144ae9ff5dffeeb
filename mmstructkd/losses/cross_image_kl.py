"""Cross-image relations: which places of all images of the batch look alike."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from mmstructkd.errors import check_count
from mmstructkd.functional.core.nodes import pool_nodes
from mmstructkd.functional.core.pooling import check_kernel_size
from mmstructkd.functional.cross_image_kl import cross_image_kl_loss
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['CrossImageKLLoss']


@MODELS.register_module()
class CrossImageKLLoss(SoftenedLoss):
    r"""Divergence of how like the places of each image of the batch a place is.

    Mini-batch term of Cross-Image Relational distillation, CIRKD (CVPR 2022).
    See :func:`~mmstructkd.functional.cross_image_kl.cross_image_kl_loss` for the
    formula. Tap features, e.g. the last ones before the classifier; widths may
    differ. The default weight is published. The memory terms are
    :class:`~mmstructkd.losses.MemoryContrastLoss`.

    With several processes each compares its own images, B^2 pairs, so that the
    gradient is the mean over their batches, not that of one joint batch: n
    processes of B images see n B^2 pairs, one process of n B images n^2 B^2.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: of the softmax over cosines: a number from 0.001 to 1000, or the
            config of a registered temperature.
        max_positions: maps with more positions than this are averaged over the
            smallest square patches that bring them below it. Published: 4 x 4
            patches from 256 x 256 positions on, that is at least 4096 positions.
        kernel_size: the side of the patches, or (h, w), instead of
            ``max_positions``; 1 for no pooling.

    Shape:
        - student: :math:`(B, D_s, H, W)`; teacher: :math:`(B, D_t, H, W)`, detached.
        - output: scalar, in nats, 0 with a graph where no pixel counts.

    Pixels without a label count, as in the published code
    (``where='inside'``); padding is no part of any place.

    Raises:
        ConfigError: an argument is out of range.
        ShapeError: the maps differ in B, H or W.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 5, 4, 4)
        >>> CrossImageKLLoss()(3 * x, x).item() < 1e-6
        True
    """

    needs_equal_channels = False
    softened_axes = None
    tasks = ('seg',)
    transfers = 'likeness of places across the images of a batch'
    paper = 'Cross-Image Relational Knowledge Distillation for Semantic Segmentation (CVPR 2022)'

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        temperature: Any = 0.1,
        max_positions: int = 2048,
        kernel_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(loss_weight, temperature)
        owner = type(self).__name__
        check_count(owner, 'max_positions', max_positions)
        self.max_positions = max_positions
        self.kernel_size = None if kernel_size is None else check_kernel_size(owner, kernel_size)

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self.counting(student, targets)
        kernel = self._kernel_at(student.shape[-2], student.shape[-1])
        if kernel != (1, 1) and student.shape[-2:] == teacher.shape[-2:]:
            teacher, _ = pool_nodes(teacher.detach(), kernel, valid)
            student, valid = pool_nodes(student, kernel, valid)
        student, teacher, temperature = self.soften(student, teacher, targets)
        return cross_image_kl_loss(student, teacher, temperature=temperature, valid=valid)

    def _kernel_at(self, height: int, width: int) -> tuple[int, int]:
        if self.kernel_size is not None:
            return self.kernel_size
        side = max(1, math.isqrt(height * width // self.max_positions))
        while math.ceil(height / side) * math.ceil(width / side) > self.max_positions:
            side += 1
        return (side, side)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        patch = f'max_positions={self.max_positions}' if self.kernel_size is None else f'kernel_size={self.kernel_size}'
        return f'{super().extra_repr()}, {patch}'
