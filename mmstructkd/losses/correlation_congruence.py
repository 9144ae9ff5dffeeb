"""Correlation congruence: a kernel among nodes, or deviations of neighbours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmstructkd.errors import ConfigError, check_count, check_one_of, check_positive
from mmstructkd.functional.correlation_congruence import adjacent_correlation_loss, correlation_congruence_loss
from mmstructkd.losses.node_loss import NodeLoss
from mmstructkd.losses.presets import settle
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['CorrelationCongruenceLoss']

#: Largest gamma: the kernel of two equal nodes is at least 1e-4 of what the whole series gives.
_STEEPEST = 5.0
#: Of the series; far more than its sum needs, and a float holds the factorial.
MAX_ORDER = 100
_MODES = ('kernel', 'adjacent')
_DEFAULTS: dict[str, Any] = {'loss_weight': 1.0, 'mode': 'kernel', 'nodes': 'cells'}
_PRESETS: dict[str, dict[str, Any]] = {'code': {'loss_weight': 0.02, 'mode': 'adjacent', 'nodes': 'images'}}


@MODELS.register_module()
class CorrelationCongruenceLoss(NodeLoss):
    r"""Squared distance between kernel matrices of nodes, or what the authors' code computes.

    Correlation congruence (arXiv:1904.01802). See
    :func:`~mmstructkd.functional.correlation_congruence.correlation_congruence_loss`
    (``mode='kernel'``, the paper) and
    :func:`~mmstructkd.functional.correlation_congruence.adjacent_correlation_loss`
    (``'adjacent'``, the code, a different formula). Tap features; widths may
    differ in the first mode, and a connector goes in front in the second.

    ===========  =======  ==========
    argument     default  ``'code'``
    ===========  =======  ==========
    loss_weight  1        0.02
    mode         kernel   adjacent
    nodes        cells    images
    ===========  =======  ==========

    The default weight is ours; torchdistill has 0.003 for the root of this
    distance.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        mode: ``'kernel'`` or ``'adjacent'``.
        gamma: of the kernel, above 0.
        order: terms of its series behind the constant, at least 1.
        nodes: ``'cells'``, ``'classes'`` or ``'images'``, see
            :class:`~mmstructkd.losses.node_loss.NodeLoss`.
        grid: cells in each direction, or (h, w).
        num_classes: of the labels, for ``'classes'``. ``None``: the task's.
        preset: ``'code'`` or ``None``. A preset fixes the values of its column;
            an argument that says otherwise is an error.

    Shape:
        - student: :math:`(B, D_s, H, W)` or :math:`(n, D_s)`; teacher: likewise,
          detached.
        - output: scalar, 0 with a graph where nothing counts.

    Pixels without a label count (``where='inside'``), since the published code
    takes whole images; with ``nodes='classes'`` labelled ones only. Padding is no
    part of any node.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, or
            labels are missing for ``nodes='classes'``.
        ShapeError: the maps do not fit each other.

    Example:
        >>> import torch
        >>> x = torch.randn(6, 5)
        >>> CorrelationCongruenceLoss()(3 * x, x).item() < 1e-10
        True
    """

    tasks = ('seg', 'depth', 'det')
    transfers = 'kernel matrix among cells, class centres or embeddings'
    paper = 'Correlation Congruence for Knowledge Distillation (arXiv:1904.01802)'

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        mode: str | None = None,
        gamma: float = 0.4,
        order: int = 2,
        nodes: str | None = None,
        grid: int | tuple[int, int] = 8,
        num_classes: int | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {'loss_weight': loss_weight, 'mode': mode, 'nodes': nodes}
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(settings['loss_weight'], nodes=settings['nodes'], grid=grid, num_classes=num_classes)
        check_one_of(owner, 'mode', settings['mode'], _MODES)
        check_positive(owner, 'gamma', gamma)
        if gamma > _STEEPEST:
            raise ConfigError(
                f'{owner}: `gamma` must be at most {_STEEPEST:g}, got {gamma!r}: the few terms of the series that are '
                'taken begin with exp(-2 gamma), and would all vanish. Published: 0.4.'
            )
        check_count(owner, 'order', order, maximum=MAX_ORDER)
        self.preset = preset
        self.mode: str = settings['mode']
        self.gamma = float(gamma)
        self.order = order
        # Deviations are taken entry by entry; kernels are not.
        self.needs_equal_channels = self.mode == 'adjacent'

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        nodes_s, nodes_t, valid = self.nodes_of(student, teacher, targets)
        if self.mode == 'adjacent':
            return adjacent_correlation_loss(nodes_s, nodes_t, valid=valid)
        return correlation_congruence_loss(nodes_s, nodes_t, gamma=self.gamma, order=self.order, valid=valid)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'{super().extra_repr()}, mode={self.mode!r}, gamma={self.gamma:g}, order={self.order}'
