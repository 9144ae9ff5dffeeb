r"""Images blended in pairs: their labels, and networks that are linear in between.

Shape shorthand: B images, C classes or D channels, H x W the grid, N = H W. The
partner of image b is image ``index[b]``; the share g is that of the image itself.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_finite_number, check_ndim, check_same
from mmstructkd.functional.core.binary import two_classes
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.scores import label_losses
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss

__all__ = ['BlendedKL', 'blend', 'blended_cross_entropy_loss', 'blended_feature_loss', 'blended_kl_losses']

Share = float | Tensor
_WAY_OUT = 'Both are of one network: tap the same place.'


def _check_pairs(owner: str, number: int, index: Tensor, share: Share) -> None:
    if tuple(index.shape) != (number,):
        raise ShapeError(f'{owner}: `index` must have shape ({number},), got {tuple(index.shape)}.')
    if not isinstance(share, Tensor):
        check_finite_number(owner, 'share', share, minimum=0)
        if share > 1:
            raise ConfigError(f'{owner}: `share` must lie in [0, 1], got {share!r}.')
    elif tuple(share.shape) not in ((), (number,)):
        raise ShapeError(f'{owner}: `share` must be a number or one an image, got shape {tuple(share.shape)}.')


def _spread(share: Share, like: Tensor) -> Share:
    """A share of each image, to be multiplied with (B, ...)."""
    if isinstance(share, Tensor) and share.dim() == 1:
        return share.detach().view(-1, *[1] * (like.dim() - 1)).to(like)
    return share.detach().to(like) if isinstance(share, Tensor) else share


def blend(values: Tensor, *, index: Tensor, share: Share) -> Tensor:
    r"""Blend each image, or what stands for it, with its partner.

    .. math:: \tilde x_b = g \, x_b + (1 - g) \, x_{\pi(b)}

    Mixup (arXiv:1710.09412), which keeps the geometry of an image.

    Args:
        values: images, features or scores, shape (B, ...), floating point.
        index: :math:`\pi`, integer, shape (B,).
        share: g, in [0, 1], a number, or a tensor: one for all, or (B,). Tensors
            are not looked at.

    Returns:
        Same shape and dtype, differentiable in ``values``.

    Raises:
        ShapeError: ``index`` or ``share`` does not fit.
        ConfigError: ``share`` is a number outside [0, 1].

    Example:
        >>> import torch
        >>> blend(torch.tensor([[0.0], [4.0]]), index=torch.tensor([1, 0]), share=0.75)
        tensor([[1.],
                [3.]])
    """
    _check_pairs('blend', values.shape[0], index, share)
    own = _spread(share, values)
    # As a product first: a difference of large numbers may leave the range.
    return own * values + (1 - own) * values[index]


@full_precision
def blended_cross_entropy_loss(
    student: Tensor,
    labels: Tensor,
    *,
    index: Tensor,
    share: Share,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of the scores of a blended image with the labels of both its parts.

    .. math::
        L = g \, \overline{\mathrm{CE}(\tilde z_b, y_b)}
          + (1 - g) \, \overline{\mathrm{CE}(\tilde z_b, y_{\pi(b)})}

    Mixup's target, a soft label. A position whose label is ignored in one of the
    parts counts for the other. STKD (arXiv:2103.10047) adds it to the teacher's
    answer on the blend; MixSKD (ECCV 2022) has it in its script for ImageNet, while
    that for CIFAR computes it and leaves it out.

    The gradient reaches ``student``.

    Args:
        student: logits of the blend, shape (B, C, H, W) or (B, C), any float dtype. One
            channel is the score of a sigmoid.
        labels: integer classes of the plain images, shape (B, h, w), brought to
            H x W by nearest, or (B,).
        index: :math:`\pi`, integer, shape (B,).
        share: g, in [0, 1], a number, or a tensor: one for all, or (B,).
        ignore_index: pixels with this label do not count; nor do labels that are no
            class.
        valid: pixels of the blend that count, bool, shape as ``labels``. ``None``:
            all.

    Returns:
        Scalar in nats, at least float32: for each part the mean over the pixels that
        count, 0 with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: ``student`` is neither 4-D nor 2-D, or another argument does not
            fit.
        ConfigError: ``share`` is a number outside [0, 1].

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> labels, index = torch.tensor([1, 0]), torch.tensor([1, 0])
        >>> round(blended_cross_entropy_loss(z, labels, index=index, share=1.0).item(), 4)
        0.5032
        >>> round(blended_cross_entropy_loss(z, labels, index=index, share=0.0).item(), 4)
        1.0032
    """
    owner = 'blended_cross_entropy_loss'
    check_ndim(owner, 'student', student, (2, 4), '(B, C, H, W) or (B, C)')
    _check_pairs(owner, student.shape[0], index, share)
    own, valid_mask = label_losses(student, labels, ignore_index=ignore_index, valid=valid, owner=owner)
    other, valid_other = label_losses(student, labels[index], ignore_index=ignore_index, valid=valid, owner=owner)
    part = _spread(share, own)
    return masked_mean(part * own, valid_mask) + masked_mean((1 - part) * other, valid_other)


class BlendedKL(NamedTuple):
    """Two scalars that say how far a network is from linear in between.

    Attributes:
        blend: the blended answers learn, the answer to the blend is their target.
        mixed: the answer to the blend learns, the blended answers are its target.
    """

    blend: Tensor
    mixed: Tensor


@full_precision
def blended_kl_losses(
    mixed: Tensor,
    plain: Tensor,
    *,
    index: Tensor,
    share: Share,
    temperature: float | Tensor = 3.0,
    valid: Tensor | None = None,
) -> BlendedKL:
    r"""Divergence between the blend of a network's answers and its answer to the blend, both ways.

    .. math::
        L_\mathrm{blend} = D(\mathrm{sg}[\tilde z], \, g z + (1 - g) z_\pi), \quad
        L_\mathrm{mixed} = D(\mathrm{sg}[g z + (1 - g) z_\pi], \, \tilde z)

    with D of :func:`pixelwise_kl_loss`, target first, and the scores z of plain
    images and :math:`\tilde z` of their blends. MixSKD (ECCV 2022), at T = 3, on the
    scores of every stage but the last, which looks to a classifier of fused features
    instead: for that, :func:`blend` and :func:`pixelwise_kl_loss`. On maps a blend
    of scores is a poor target at any one pixel; published figures are of images.

    The gradient of the first reaches ``plain``, that of the second ``mixed``.

    Args:
        mixed: logits of the blended images, shape (B, C, H, W) or (B, C), any float
            dtype. One channel is the score of a sigmoid.
        plain: logits of the plain ones, same shape.
        index: :math:`\pi`, integer, shape (B,).
        share: g, in [0, 1], a number, or a tensor: one for all, or (B,).
        temperature: T, above 0, a number or a scalar tensor.
        valid: pixels of plain images that count, bool, shape (B, h, w), brought to
            H x W by nearest, or (B,); of a blend those that count in both its parts.
            ``None``: all.

    Returns:
        Two scalars in nats, at least float32: means over the pixels that count, 0
        with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, or another argument does not
            fit.
        ConfigError: ``temperature`` is not above 0, or ``share`` a number outside
            [0, 1].

    Example:
        >>> import torch
        >>> z, index = torch.tensor([[0.0, 2.0], [0.0, 4.0]]), torch.tensor([1, 0])
        >>> losses = blended_kl_losses(torch.tensor([[0.0, 3.0], [0.0, 3.0]]), z, index=index, share=0.5)
        >>> [loss.item() for loss in losses]
        [0.0, 0.0]
    """
    owner = 'blended_kl_losses'
    for name, logits in (('mixed', mixed), ('plain', plain)):
        check_ndim(owner, name, logits, (2, 4), '(B, C, H, W) or (B, C)')
    if mixed.shape != plain.shape:
        raise ShapeError(
            f'{owner}: `mixed` and `plain` must share one shape, got {tuple(mixed.shape)} and {tuple(plain.shape)}. '
            f'{_WAY_OUT}'
        )
    _check_pairs(owner, mixed.shape[0], index, share)
    mixed, plain = two_classes(mixed), two_classes(plain)
    valid_mask = valid_pixels(owner, mixed, valid=valid)
    if valid_mask is not None:
        valid_mask = valid_mask & valid_mask[index]
    blended = blend(plain, index=index, share=share)
    return BlendedKL(
        blend=pixelwise_kl_loss(blended, mixed, temperature=temperature, valid=valid_mask),
        mixed=pixelwise_kl_loss(mixed, blended, temperature=temperature, valid=valid_mask),
    )


@full_precision
def blended_feature_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    index: Tensor,
    share: Share,
    detach_teacher: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance between features of a blend and the blend of features.

    .. math::
        L = \frac{1}{D |V|} \sum_{b,d} \sum_{i \in V_b} \big(\tilde f_{bdi} - g f_{bdi} - (1 - g) f_{\pi(b) di}\big)^2

    MixSKD (ECCV 2022), on each stage. There both sides learn:
    ``detach_teacher=False``. Its discriminators are left out: as released they are
    registered nowhere, and so fixed at random.

    The gradient reaches ``student``, and ``teacher`` only with
    ``detach_teacher=False``.

    Args:
        student: features of the blended images, shape (B, D, H, W), any float
            dtype.
        teacher: features of the plain ones, same shape.
        index: :math:`\pi`, integer, shape (B,).
        share: g, in [0, 1], a number, or a tensor: one for all, or (B,).
        detach_teacher: keep the gradient out of ``teacher``.
        valid: positions of plain images that count, bool, shape (B, h, w), brought to
            H x W by nearest; of a blend those that count in both its parts. ``None``:
            all.

    Returns:
        Scalar in squared units of the feature, at least float32: the mean over
        channels and positions V that count, 0 with a graph if there is none.
        Differences above 1e19 leave float32's range. Time and memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, or another argument does not fit.
        ConfigError: ``share`` is a number outside [0, 1].

    Example:
        >>> import torch
        >>> f, index = torch.tensor([0.0, 4.0]).view(2, 1, 1, 1), torch.tensor([1, 0])
        >>> blended_feature_loss(f, f, index=index, share=0.75).item()
        1.0
    """
    owner = 'blended_feature_loss'
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, D, H and W', _WAY_OUT)
    _check_pairs(owner, student.shape[0], index, share)
    if detach_teacher:
        teacher = teacher.detach()
    valid_mask = valid_pixels(owner, student, valid=valid)
    if valid_mask is not None:
        # Of each part before they are blended: whatever stands where nothing counts, NaN included, goes nowhere.
        teacher = zero_elsewhere(teacher, valid_mask)
        valid_mask = valid_mask & valid_mask[index]
        student = zero_elsewhere(student, valid_mask)
    gap = student - blend(teacher, index=index, share=share)
    return masked_mean(gap.square(), None if valid_mask is None else valid_mask[:, None])
