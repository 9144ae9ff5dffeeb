r"""A mix of a teacher's layers, and the loss that finds it from both sides.

Shape shorthand: L layers, B images, D channels, H x W the grid, V what counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ShapeError, check_finite_number, check_ndim
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.valid import valid_pixels

__all__ = ['bridge_loss', 'mix_layers']

_WAY_OUT = 'Resize with resize_map, project the student.'


@full_precision
def mix_layers(layers: Sequence[Tensor], scores: Tensor) -> Tensor:
    r"""Weighted mean of several maps, with a softmax of scores as weights.

    .. math:: A = \sum_j w_j T_j, \quad w = \mathrm{softmax}(\beta)

    Differentiable feature aggregation (arXiv:2008.00506).

    Args:
        layers: maps of one shape, (B, D, H, W), any float dtype. Not detached.
        scores: :math:`\beta`, one a layer, shape (L,).

    Returns:
        Shape (B, D, H, W), at least float32, in the graph of both. Time O(L B D N),
        memory for two maps.

    Raises:
        ShapeError: there is no layer, their shapes differ, or ``scores`` is not
            one number a layer.

    Example:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> mix_layers([one, 3 * one], torch.zeros(2)).item()
        2.0
    """
    owner = 'mix_layers'
    if not layers or any(layer.shape != layers[0].shape for layer in layers):
        raise ShapeError(
            f'{owner}: `layers` must be maps of one shape, got {[tuple(layer.shape) for layer in layers]}. {_WAY_OUT}'
        )
    check_ndim(owner, 'layers', layers[0], 4, '(B, D, H, W)')
    if tuple(scores.shape) != (len(layers),):
        raise ShapeError(f'{owner}: `scores` must have shape ({len(layers)},), got {tuple(scores.shape)}.')
    mixed = torch.zeros_like(layers[0])
    for weight, layer in zip(torch.softmax(scores, dim=0), layers, strict=True):
        mixed = mixed + weight * layer
    return mixed


@full_precision
def bridge_loss(
    student: Tensor,
    teacher: Sequence[Tensor],
    *,
    scores: Tensor,
    task_loss: Tensor,
    imitation_weight: float = 1.0,
    injection_weight: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""What tells good mixes of a teacher's layers from easy ones.

    .. math::
        L = \gamma_{ST} \, \frac{1}{D |V|} \sum_{d} \sum_{i \in V} (f^s_{di} - A_{di})^2
          + \gamma_{TS} \, L_\mathrm{task}(\mathrm{tail}(\varphi(A))), \quad
        A = \sum_j \mathrm{softmax}(\beta)_j \, f^{t}_j

    Bridge loss of Differentiable Feature Aggregation Search (arXiv:2008.00506).
    Imitation alone draws the scores to the layer that is easiest to imitate, a
    shallow one. So the mix is fed to the rest of the student as well
    (:func:`mix_layers` gives it, the caller runs that rest), and its task loss says
    what the mix is good for. No code of the authors was found; squared distance
    and means are our reading of the paper. Weights are learned on one split of the
    training data, scores on the other, layer by layer.

    The gradient reaches ``student``, ``scores`` through both parts, and whatever
    ``task_loss`` comes from; not the teacher's layers.

    Args:
        student: features, shape (B, D, H, W), any float dtype, of the teacher's
            width.
        teacher: layers of one group, each of that shape. Detached here.
        scores: :math:`\beta`, one a layer, shape (L,).
        task_loss: scalar, the loss of the student's tail on the mix, in the graph
            of ``scores``.
        imitation_weight: :math:`\gamma_{ST}`, at least 0.
        injection_weight: :math:`\gamma_{TS}`, at least 0.
        valid: positions that count in the first part, bool, shape (B, h, w),
            brought to H x W by nearest. ``None``: all.

    Returns:
        Scalar, at least float32: the mean over channels and positions V that
        count, 0 with a graph if there is none, and the task loss as it is. Time
        O(L B D N), memory for two maps.

    Raises:
        ShapeError: ``student`` is not 4-D, a layer has another shape, there is not
            one score a layer, ``task_loss`` is no scalar, or ``valid`` is not a map
            of B images.
        ConfigError: a weight is negative.

    Example:
        >>> x = torch.ones(1, 1, 1, 1)
        >>> bridge_loss(x, [x, 3 * x], scores=torch.zeros(2), task_loss=torch.tensor(0.5)).item()
        1.5
    """
    owner = 'bridge_loss'
    check_finite_number(owner, 'imitation_weight', imitation_weight, minimum=0)
    check_finite_number(owner, 'injection_weight', injection_weight, minimum=0)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    if any(layer.shape != student.shape for layer in teacher):
        raise ShapeError(
            f'{owner}: `teacher` must hold layers of the shape of `student`, {tuple(student.shape)}, '
            f'got {[tuple(layer.shape) for layer in teacher]}. {_WAY_OUT}'
        )
    if task_loss.dim() != 0:
        raise ShapeError(f'{owner}: `task_loss` must be a scalar, got shape {tuple(task_loss.shape)}.')
    valid_mask = valid_pixels(owner, student, valid=valid)
    layers = [layer.detach() for layer in teacher]
    some = None
    if valid_mask is not None:
        some = valid_mask[:, None]
        # Whatever stands where nothing counts, NaN included, goes nowhere.
        student = torch.where(some, student, 0)
        layers = [torch.where(some, layer, 0) for layer in layers]
    imitation = masked_mean((student - mix_layers(layers, scores)).square(), some)
    return imitation_weight * imitation + injection_weight * task_loss
