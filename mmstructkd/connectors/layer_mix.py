"""A learned mix of several layers of the teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmstructkd.connectors.base import Connector, check_input, check_widths
from mmstructkd.connectors.conv import ConvConnector
from mmstructkd.errors import ConfigError, ShapeError, check_finite_number, check_ndim
from mmstructkd.functional.core.precision import promote
from mmstructkd.functional.core.resize import resize_map
from mmstructkd.registry import MODELS

__all__ = ['LayerMixConnector']

_STEPS = 256  # of the search for how much of the uniform mix keeps the entropy


@MODELS.register_module()
class LayerMixConnector(Connector):
    r"""Give each layer of the student one target: a learned mix of several layers of the teacher.

    .. math:: A_i = \sum_j w_{ij} T_j, \quad w_i = \mathrm{softmax}(\beta_i)

    Reduced form of Differentiable Feature Aggregation Search (ECCV 2020), whose
    two-stage search on a held-out split is left out: the weights learn along
    with the student. A plain student loss draws them to the layer that is
    easiest to imitate, a shallow one; ``entropy_floor`` keeps them apart from
    that, by blending in just so much of the uniform mix. Weights learned once
    (:meth:`mix`) can be given as ``weights`` to a later run, which then are fixed.

    Losses detach the teacher, so the weights learn through the student's
    tensor: what is returned is :math:`\varphi(S) - (A - \mathrm{sg}[A])`, whose
    value is that of the projected student. For a loss of the difference between
    student and teacher (squared errors) this is the exact gradient.

    Tap layers of one stage: all taps of the teacher must share width and size.
    A student of another width gets a 1x1 convolution; the mix is resized to the
    student's size. Number of layers: as many as ``in_channels`` has of the
    student, as many as ``out_channels`` of the teacher, and the result has one
    pair for each layer of the student.

    Args:
        in_channels: widths of the student's layers.
        out_channels: widths of the teacher's layers, all equal.
        entropy_floor: least entropy of each layer's weights, as a share of that
            of the uniform mix, in [0, 1].
        weights: fixed weights, one row for each layer of the student, or one row
            for all; rows are divided by their sum. ``None``: learned, uniform at
            the start.

    Raises:
        ConfigError: the teacher's widths differ, or an argument is out of range.
        ShapeError: the teacher's maps differ in size, or the numbers of tensors
            are not those of the widths.

    Example:
        >>> connector = LayerMixConnector([3], [3, 3], weights=[1, 3])
        >>> one = torch.ones(1, 3, 2, 2)
        >>> _, (target,) = connector([one], [0 * one, one])
        >>> target.unique()
        tensor([0.7500])
    """

    joint = True
    weights: Tensor
    paper = 'Differentiable Feature Aggregation Search for Knowledge Distillation (ECCV 2020)'

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        entropy_floor: float = 0.0,
        weights: Sequence[float] | Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        check_widths(owner, 'in_channels', in_channels)
        check_widths(owner, 'out_channels', out_channels)
        check_finite_number(owner, 'entropy_floor', entropy_floor, minimum=0)
        if entropy_floor > 1:
            raise ConfigError(f'{owner}: `entropy_floor` must be a share in [0, 1], got {entropy_floor!r}.')
        if len(set(out_channels)) != 1:
            raise ConfigError(
                f'{owner}: `out_channels`: the layers of the teacher must share one width, got {list(out_channels)}. '
                'Tap blocks of one stage; a projection of the teacher would let the target give way to the student.'
            )
        self.in_channels = tuple(in_channels)
        self.shape = (len(in_channels), len(out_channels))
        self.entropy_floor = float(entropy_floor)
        self.projections = nn.ModuleList(
            nn.Identity() if width == out_channels[0] else ConvConnector(width, out_channels[0])
            for width in in_channels
        )
        self.scores: nn.Parameter | None = None
        if weights is None:
            self.scores = nn.Parameter(torch.zeros(self.shape))
        self.register_buffer('weights', None if weights is None else self._fixed(weights))

    def _fixed(self, weights: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
        """Check given weights and bring them to rows that sum to 1."""
        rows, columns = self.shape
        try:
            table = torch.tensor(weights, dtype=torch.float32)
        except (TypeError, ValueError):
            table = torch.zeros(0)
        table = table.expand(rows, columns) if table.shape == (columns,) else table
        if table.shape != self.shape or not bool(((table >= 0).all() & (table.sum(-1) > 0).all()).item()):
            raise ConfigError(
                f'{type(self).__name__}: `weights` must be {columns} numbers of at least 0 that are not all 0, or '
                f'{rows} rows of them, got {weights!r}.'
            )
        return table / table.sum(-1, keepdim=True)

    def mix(self) -> Tensor:
        """Return the weights, shape (layers of the student, layers of the teacher); rows sum to 1."""
        if self.weights is not None or self.scores is None:
            return self.weights
        mix = torch.softmax(self.scores.float(), dim=-1)
        count = mix.shape[-1]
        if self.entropy_floor == 0 or count == 1:
            return mix
        with torch.no_grad():
            shares = torch.linspace(0, 1, _STEPS + 1, device=mix.device)[:, None, None]
            blends = (1 - shares) * mix + shares / count
            enough = -torch.xlogy(blends, blends).sum(-1) / math.log(count) >= self.entropy_floor
            enough[-1] = True  # the uniform mix itself, whatever rounding says
            # Along the way to the uniform mix the entropy only rises: the first that is enough is the least.
            share = shares[enough.to(torch.uint8).argmax(0), 0]
        return (1 - share) * mix + share / count

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the projected layers of the student, and a mix of the teacher's for each."""
        owner = type(self).__name__
        if (len(students), len(teachers)) != self.shape:
            raise ShapeError(
                f'{owner}: there must be {self.shape[0]} tensors of the student and {self.shape[1]} of the teacher, '
                f'as `in_channels` and `out_channels` have widths, got {len(students)} and {len(teachers)}.'
            )
        for student, width in zip(students, self.in_channels, strict=True):
            check_input(owner, student, width)
        for teacher in teachers:
            check_ndim(owner, 'teachers', teacher, 4, '(B, C, H, W)')
        if len({tuple(t.shape) for t in teachers}) != 1:
            raise ShapeError(
                f'{owner}: the layers of the teacher must share one shape, got {[tuple(t.shape) for t in teachers]}. '
                'Tap blocks of one stage.'
            )
        out_s, out_t = [], []
        for row, projection, student in zip(self.mix(), self.projections, students, strict=True):
            made = projection(student)
            target = sum(weight * promote(t.detach()) for weight, t in zip(row, teachers, strict=True))
            target = resize_map(target, (made.shape[2], made.shape[3]))
            if target.requires_grad:
                made = made - (target - target.detach())
            out_s.append(made)
            out_t.append(target.detach())
        return out_s, out_t

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        kind = 'learned' if self.scores is not None else 'fixed'
        return f'{kind} weights {self.shape[0]} x {self.shape[1]}, entropy_floor={self.entropy_floor:g}'
