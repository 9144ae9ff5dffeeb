"""Localization distillation: where a box's edges lie, and how surely."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mmstructkd.errors import ConfigError, ShapeError, check_count, check_finite_number, check_one_of
from mmstructkd.functional.core.boxes import inside_boxes
from mmstructkd.functional.localization_kl import edge_confidence, localization_kl_loss
from mmstructkd.losses.presets import settle
from mmstructkd.losses.softening import SoftenedLoss
from mmstructkd.registry import MODELS
from mmstructkd.structures import Targets

__all__ = ['LocalizationKLLoss']

REGIONS = ('boxes', 'confident', 'all')

_DEFAULTS: dict[str, Any] = {
    'loss_weight': 0.25,
    'temperature': 10.0,
    'bin_reduction': 'sum',
    'reduction': 'mean',
}
_PRESETS: dict[str, dict[str, Any]] = {
    'code': {'loss_weight': 0.25, 'temperature': 10.0, 'bin_reduction': 'mean', 'reduction': 'sum'},
}


def distributions_of(head: nn.Module) -> tuple[int, int] | None:
    """Distributions a position and bins of each that a head predicts; ``None``: it predicts none."""
    reg_max = getattr(head, 'reg_max', None)
    if isinstance(reg_max, int) and any(hasattr(head, name) for name in ('integral', 'proj', 'project')):
        return 4, reg_max + 1
    bins = getattr(getattr(head, 'to_depth', None), 'num_bins', None)
    return None if bins is None else (1, bins)


@MODELS.register_module()
class LocalizationKLLoss(SoftenedLoss):
    r"""Divergence of the student's box-edge distributions from the teacher's.

    Localization Distillation (arXiv:2102.12252). See
    :func:`~mmstructkd.functional.localization_kl.localization_kl_loss` for the formula.
    Tap the edge logits of a head that predicts distributions: of a GFL
    ``'bbox_head.scales.0'`` and so on, behind the factor that it learns for each
    level. A head with plain offsets (RetinaNet, FCOS, ATSS) has none, and is
    refused. Which positions count is said by ``region``, labelled or not
    (``where='inside'``).

    =============  =======  ==========
    argument       default  ``'code'``
    =============  =======  ==========
    loss_weight    0.25     0.25
    temperature    10       10
    bin_reduction  sum      mean
    reduction      mean     sum
    =============  =======  ==========

    ``'code'``: the scale of the authors' released code, which sums over the
    positives. That code takes the positions its assigner picked and weighs them by
    the student's class scores; here positions come from ``region`` and weigh the
    same. Its second term, on positions around the positives, is not here. The
    default weight is theirs, 0.25, on a mean instead of a sum: tune it.

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        temperature: softens both: a number from 0.001 to 1000, or the config of a registered
            temperature. The loss is multiplied by its square.
        region: which positions of a map count: those whose centre lies inside a
            labelled box (``'boxes'``, on every level alike), those where the
            teacher's edges are sharp (``'confident'``: the likeliest bin has a
            probability of at least ``threshold``, mean over the edges; needs no
            boxes), or ``'all'``. Rows count all.
        threshold: see ``region``, within [0, 1].
        edges: distributions a position: 4, or 1 for depth in bins.
        bin_reduction: ``'sum'``, a divergence, or ``'mean'`` over the bins.
        reduction: ``'mean'`` over the positions, or their ``'sum'``.
        preset: ``'code'`` or ``None``. A preset fixes the values of its column; an
            argument that says otherwise is an error.

    Shape:
        - student, teacher: :math:`(B, 4(n+1), H, W)`, or :math:`(M, n+1)`, one
          edge a row; the teacher is detached.
        - output: scalar, in nats, 0 with a graph where no position counts.

    Raises:
        ConfigError: an argument is out of range or contradicts the preset, or the
            boxes are missing.
        ShapeError: the maps differ in shape, or do not split into edges.

    Example:
        >>> import torch
        >>> z = torch.randn(1, 68, 4, 4)
        >>> targets = Targets(boxes=(torch.tensor([[0.0, 0.0, 16.0, 16.0]]),), input_size=(32, 32))
        >>> LocalizationKLLoss()(z, z, targets).item()
        0.0
    """

    # A 1x1 convolution would let the student hide behind it: bins must be the same ones.
    needs_equal_channels = False
    tasks = ('depth', 'det')
    transfers = 'distributions of the edges of boxes'
    paper = 'Localization Distillation for Dense Object Detection (arXiv:2102.12252)'

    def __init__(
        self,
        loss_weight: float | None = None,
        *,
        temperature: Any = None,
        region: str = 'boxes',
        threshold: float = 0.5,
        edges: int = 4,
        bin_reduction: str | None = None,
        reduction: str | None = None,
        preset: str | None = None,
    ) -> None:
        owner = type(self).__name__
        given = {
            'loss_weight': loss_weight,
            'temperature': temperature,
            'bin_reduction': bin_reduction,
            'reduction': reduction,
        }
        settings = settle(owner, preset, given, defaults=_DEFAULTS, presets=_PRESETS)
        super().__init__(settings['loss_weight'], settings['temperature'])
        if not isinstance(self.temperature, float) and self.temperature.reshapes:
            raise ConfigError(
                f'{owner}: `temperature` must be one that leaves the scores as they are, got '
                f'{type(self.temperature).__name__}. The channels hold several distributions.'
            )
        check_one_of(owner, 'region', region, REGIONS)
        check_finite_number(owner, 'threshold', threshold, minimum=0)
        if threshold > 1:
            raise ConfigError(f'{owner}: `threshold` must be at most 1, a probability, got {threshold!r}.')
        check_one_of(owner, 'bin_reduction', settings['bin_reduction'], ('sum', 'mean'))
        check_one_of(owner, 'reduction', settings['reduction'], ('mean', 'sum'))
        check_count(owner, 'edges', edges)
        self.preset = preset
        self.region = region
        self.threshold = float(threshold)
        self.edges = edges
        self.bins: int | None = None  # of an edge, from the heads
        self.bin_reduction: str = settings['bin_reduction']
        self.reduction: str = settings['reduction']

    def check_heads(self, student: nn.Module | None, teacher: nn.Module | None) -> list[str]:
        """Refuse heads without distributions, and those with other ones.

        A head with distributions of box edges has ``reg_max`` and ``integral``
        (``GFLHead`` and what derives from it): ``reg_max`` + 1 bins for each of
        four edges. One that sorts depth into bins has ``edges=1`` of them.

        Args:
            student: the student's head.
            teacher: the teacher's.

        Returns:
            Nothing to be known.

        Raises:
            ConfigError: a head predicts plain offsets, or the two have other
                bins or edges than the loss.
        """
        owner = type(self).__name__
        found = {}
        for side, head in (('student', student), ('teacher', teacher)):
            if head is None:
                continue  # a source without a network: its tensors must do
            known = distributions_of(head)
            if known is None:
                raise ConfigError(
                    f'{owner}: the {side} must predict where an edge lies as a distribution over bins (GFLHead), '
                    f'got {type(head).__name__}, which predicts plain numbers. Tap features or class scores of it, '
                    'or train it with a head that has distributions.'
                )
            if known[0] != self.edges:
                raise ConfigError(
                    f'{owner}: `edges` must be {known[0]} for the {type(head).__name__} of the {side}, '
                    f'got {self.edges}.'
                )
            found[side] = known[1]
        if len(set(found.values())) > 1:
            raise ConfigError(
                f'{owner}: student and teacher must have the same bins, got {found["student"]} of '
                f'{type(student).__name__} and {found["teacher"]} of {type(teacher).__name__} (reg_max + 1).'
            )
        self.bins = next(iter(found.values()), None)
        return []

    def bind(self, student: Tensor, teacher: Tensor) -> None:
        """Refuse a tap that does not give the distributions.

        Args:
            student: a probed tensor of the student.
            teacher: the probed tensor of the teacher.

        Raises:
            ShapeError: the channels are not those of the head's bins.
        """
        if self.bins is None or student.dim() not in (2, 4):
            return
        wanted = self.bins * (self.edges if student.dim() == 4 else 1)
        if student.shape[1] != wanted:
            raise ShapeError(
                f'{type(self).__name__}: `student` must have {wanted} channels, {self.edges} x {self.bins} bins, got '
                f"{tuple(student.shape)}. Tap the edge logits of the head ('bbox_head.gfl_reg', 'bbox_head.scales.0')."
            )

    def compute(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
        """Return the unweighted loss."""
        valid = self._positives(student, teacher, targets) if student.dim() == 4 else None
        student, teacher, temperature = self.soften(student, teacher, targets)
        return localization_kl_loss(
            student,
            teacher,
            temperature=temperature,
            edges=self.edges,
            valid=valid,
            bin_reduction=self.bin_reduction,
            reduction=self.reduction,
        )

    def _positives(self, student: Tensor, teacher: Tensor, targets: Targets) -> Tensor | None:
        """Which positions count, bool, shape (B, H, W)."""
        owner = type(self).__name__
        valid = self.counting(student, targets)
        if self.region == 'all':
            return valid
        if self.region == 'confident':
            # Not `>=`: a teacher that is not a number must reach the loss.
            chosen = ~(edge_confidence(teacher, edges=self.edges) < self.threshold)
        elif targets.boxes is None or targets.input_size is None:
            missing = 'boxes' if targets.boxes is None else 'input_size'
            raise ConfigError(
                f"{owner}: `targets.{missing}` must be given for region='boxes', got None. "
                "Set region='confident' where there are no boxes."
            )
        else:
            size = (student.shape[2], student.shape[3])
            chosen = inside_boxes(targets.boxes, size, targets.input_size).to(student.device)
        return chosen if valid is None else chosen & valid

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return (
            f'{super().extra_repr()}, region={self.region!r}, bin_reduction={self.bin_reduction!r}, '
            f'reduction={self.reduction!r}'
        )
