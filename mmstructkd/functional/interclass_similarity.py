r"""Divergences between the distributions of classes, compared pair by pair.

Shape shorthand: B images, C classes, H x W the grid, N = H W. A class's
*distribution* is the softmax of its scores over the positions of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_flag, check_ndim, check_one_of, check_same
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.core.classes import RESIZE_TO_SAME_CLASSES, position_distributions
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.softening import check_temperature
from mmstructkd.functional.core.valid import valid_pixels

__all__ = ['interclass_kl_matrix', 'interclass_similarity_loss']

MODES = ('paper', 'released_code')
# Rows of a KL matrix shorter than this (in nats) are not stretched to length 1.
_SHORT = 1e-6


def _kl_matrix(logits: Tensor, temperature: float | Tensor, valid_mask: Tensor | None) -> Tensor:
    flat = None if valid_mask is None else valid_mask.flatten(1)[:, None]
    probability, log = position_distributions(logits.flatten(2), temperature, flat, -1)
    # What all classes share at a position cancels. Taken away beforehand it leaves no rounding error.
    log = log - log.detach().clamp(min=-100).mean(dim=1, keepdim=True)
    with exact_matmul(logits.device.type):
        cross = torch.bmm(probability, log.mT)
    return cross.diagonal(dim1=1, dim2=2)[:, :, None] - cross


@full_precision
def interclass_kl_matrix(logits: Tensor, *, temperature: float | Tensor = 1.0, valid: Tensor | None = None) -> Tensor:
    r"""Divergences between the distributions of all pairs of classes of an image.

    .. math:: M_{bij} = \mathrm{KL}(p_{bi} \| p_{bj}), \quad p_{bi} = \mathrm{softmax}_N(z_{bi} / T)

    Inter-class similarity of AICSD (arXiv:2308.04243), in one batched product:
    with logarithms l of p, the products p l' have the negative entropies on
    their diagonal and the cross terms beside it.

    The matrix does not change when a constant is added to a channel. It is not
    symmetric; its diagonal is exactly 0.

    Args:
        logits: class scores, shape (B, C, H, W), any float dtype. Not detached.
        temperature: T, above 0, a number or a scalar tensor.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest: the distributions live on these alone. ``None``: all.

    Returns:
        Shape (B, C, C), in nats, at least float32; 0 for an image where nothing
        counts. Time O(B C^2 N), memory O(B C N).

    Raises:
        ShapeError: ``logits`` is not 4-D, or ``valid`` is no map of B images.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> z = torch.tensor([[0.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2)
        >>> interclass_kl_matrix(z)
        tensor([[[0.0000, 0.3278],
                 [0.4338, 0.0000]]])
    """
    owner = 'interclass_kl_matrix'
    check_temperature(owner, temperature)
    check_ndim(owner, 'logits', logits, 4, '(B, C, H, W)')
    return _kl_matrix(logits, temperature, valid_pixels(owner, logits, valid=valid))


def _rows_to_length_one(matrix: Tensor) -> Tensor:
    return matrix / matrix.square().sum(dim=-1, keepdim=True).clamp(min=_SHORT**2).sqrt()


def _released_matrix(logits: Tensor, temperature: float | Tensor, valid_mask: Tensor | None) -> Tensor:
    """The matrix of the released code, (C, C), over the whole batch."""
    probability, log = position_distributions(
        logits, temperature, None if valid_mask is None else valid_mask[:, None], 2
    )
    own = (probability * log).sum(dim=(0, 2, 3))
    flat = probability.flatten(2)
    with exact_matmul(logits.device.type):
        cross = torch.bmm(flat, flat.mT).sum(dim=0)
    upper = ((own[None] - cross) / logits.shape[0]).triu()
    return upper + upper.triu(1).mT


@full_precision
def interclass_similarity_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    normalize: bool = True,
    mode: str = 'paper',
    present: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance between the inter-class divergences of student and teacher.

    .. math::
        L = \frac{1}{|\mathcal P|} \sum_{(b,i,j) \in \mathcal P} (M^s_{bij} - M^t_{bij})^2,
        \quad M_{bij} = \mathrm{KL}(p_{bi} \| p_{bj})

    Inter-class similarity distillation, AICSD (arXiv:2308.04243); see
    :func:`interclass_kl_matrix` for M. P holds the ordered pairs of classes of
    one image, each class with itself included: B C^2 of them, fewer with
    ``present``. With ``normalize`` each row of M is divided by its length first
    (a row shorter than 1e-6 by 1e-6), so that the value has no unit.

    The authors' released code departs from that, ``mode='released_code'``: the
    softmax runs over the rows of each column of the map, not over all
    positions; the divergence is taken with probabilities in the place of their
    logarithms; only pairs i <= j are computed, over the whole batch, and
    mirrored; rows have length 1, and the mean over C^2 is divided by B once more.

    The gradient reaches ``student`` only. In the paper's form the value does
    not change when a constant is added to a channel; in that of the code, to a
    column of a channel.

    Args:
        student: class scores, shape (B, C, H, W), any float dtype. One channel is
            the score z of a sigmoid: the two classes (0, z).
        teacher: same shape; a pair of one and two channels fits as well. Detached
            here.
        temperature: T, above 0, a number or a scalar tensor.
        normalize: bring the rows of both matrices to length 1.
        mode: ``'paper'`` or ``'released_code'``.
        present: classes of each image that count, bool, shape (B, C), e.g. from
            :func:`present_classes`; the distribution of an absent class is
            nearly uniform and says little. ``None``: all. Paper's form only.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Scalar, at least float32, the mean over P: no unit with ``normalize``,
        squared nats without; 0 with a graph if P is empty. Time O(B C^2 N),
        memory O(B C N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, ``valid`` is no map
            of B images, or ``present`` is not (B, C).
        ConfigError: an argument is out of range, or ``present`` comes with the
            released code's form.

    Example:
        >>> z = torch.tensor([[0.0, 2.0], [0.0, 0.0]]).view(1, 2, 1, 2)
        >>> interclass_similarity_loss(z + 3, z).item() < 1e-10
        True
        >>> round(interclass_similarity_loss(0 * z, z, normalize=False).item(), 4)
        0.0739
    """
    owner = 'interclass_similarity_loss'
    check_temperature(owner, temperature)
    check_one_of(owner, 'mode', mode, MODES)
    check_flag(owner, 'normalize', normalize)
    check_ndim(owner, 'student', student, 4, '(B, C, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, C, H, W)')
    student, teacher = as_two_classes(student, teacher)
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, C, H and W', RESIZE_TO_SAME_CLASSES)
    valid_mask = valid_pixels(owner, student, valid=valid)
    teacher = teacher.detach()
    if mode == 'released_code':
        if present is not None:
            raise ConfigError(
                f"{owner}: `present` must be None with mode='released_code', got a mask. "
                'That form takes all classes over the whole batch.'
            )
        matrix_s = _released_matrix(student, temperature, valid_mask)
        matrix_t = _released_matrix(teacher, temperature, valid_mask)
        if normalize:
            matrix_s, matrix_t = _rows_to_length_one(matrix_s), _rows_to_length_one(matrix_t)
        return (matrix_s - matrix_t).square().mean() / max(student.shape[0], 1)

    matrix_s = _kl_matrix(student, temperature, valid_mask)
    matrix_t = _kl_matrix(teacher, temperature, valid_mask)
    pairs = None
    if present is not None:
        if tuple(present.shape) != tuple(student.shape[:2]):
            raise ShapeError(
                f'{owner}: `present` must have shape (B, C) = {tuple(student.shape[:2])}, got {tuple(present.shape)}.'
            )
        present = present.to(student.device)
        pairs = present[:, :, None] & present[:, None, :]
        matrix_s, matrix_t = torch.where(pairs, matrix_s, 0), torch.where(pairs, matrix_t, 0)
    if valid_mask is not None:
        some = valid_mask.flatten(1).any(dim=1)[:, None, None]
        pairs = some if pairs is None else pairs & some
    if normalize:
        matrix_s, matrix_t = _rows_to_length_one(matrix_s), _rows_to_length_one(matrix_t)
    return masked_mean((matrix_s - matrix_t).square(), pairs)
