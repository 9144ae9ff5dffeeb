"""Similarity-preserving distillation: which nodes look alike, row by row."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.functional.similarity_preserving import similarity_preserving_loss
from mmstructkd.losses.node_loss import NodeLoss
from mmstructkd.losses.presets import settle
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['SimilarityPreservingLoss']

_DEFAULTS: dict[str, Any] = {'loss_weight': 1.0, 'nodes': 'images'}
_PRESETS: dict[str, dict[str, Any]] = {'code': {'loss_weight': 3000.0, 'nodes': 'images'}}


@MODELS.register_module()
class SimilarityPreservingLoss(NodeLoss):
    r"""Squared distance between the rows of the Gram matrices of student and teacher.

    Similarity-preserving distillation (arXiv:1907.09682). See
    :func:`~mmstructkd.functional.similarity_preserving.similarity_preserving_loss` for the
    formula. Tap features; widths may differ.

    ===========  =======  ==========
    argument     default  ``'code'``
    ===========  =======  ==========
    loss_weight  1        3000
    nodes        images   images
    ===========  =======  ==========

    ``'code'`` is RepDistiller's, verified by the author, for batches of 64
    images of a classifier. With the few images that a process has in dense
    tasks there is little to learn from whole images: ``nodes='cells'`` compares
    the cells of each image (a port of ours). The default weight of 1 is ours as
    well, and to be tuned.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        nodes: ``'images'``, ``'cells'`` or ``'classes'``, see
            :class:`~mmstructkd.losses.node_loss.NodeLoss`.
        grid: cells in each direction, or (h, w).
        num_classes: of the labels, for ``'classes'``. ``None``: the task's.
        preset: ``'code'`` or ``None``. A preset fixes the values of its column;
            an argument that says otherwise is an error.

    Shape:
        - student: :math:`(B, D_s, H, W)` or :math:`(n, D_s)`; teacher: likewise,
          any width, detached.
        - output: scalar, no unit, 0 with a graph where nothing counts.

    Pixels without a label count (``where='inside'``), since the published code
    takes whole images; with ``nodes='classes'`` labelled ones only. Padding is no
    part of any node.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, or
            labels are missing for ``nodes='classes'``.
        ShapeError: the maps differ in B, H or W.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 5, 4, 4)
        >>> SimilarityPreservingLoss()(3 * x, x).item() < 1e-10
        True
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'Gram matrix of the batch (or of cells), row by row'
    paper = 'Similarity-Preserving Knowledge Distillation (arXiv:1907.09682)'

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        nodes: str | None = None,
        grid: int | tuple[int, int] = 8,
        num_classes: int | None = None,
        preset: str | None = None,
    ) -> None:
        given = {'loss_weight': loss_weight, 'nodes': nodes}
        settings = settle(type(self).__name__, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(settings['loss_weight'], nodes=settings['nodes'], grid=grid, num_classes=num_classes)
        self.preset = preset

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        nodes_s, nodes_t, valid = self.nodes_of(student, teacher, targets)
        return similarity_preserving_loss(nodes_s, nodes_t, valid=valid)
