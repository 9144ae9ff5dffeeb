r"""Products of the distributions of classes, compared pair by pair.

Shape shorthand: B images, C classes, H x W the grid, N = H W, n patches. A
class's *distribution* is the softmax of its scores over the patches of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_ndim, check_same
from mmstructkd.functional.core.binary import as_two_classes
from mmstructkd.functional.core.classes import RESIZE_TO_SAME_CLASSES, position_distributions
from mmstructkd.functional.core.nodes import pool_nodes
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.softening import check_temperature
from mmstructkd.functional.core.valid import valid_pixels

__all__ = ['category_similarity_loss']


@full_precision
def category_similarity_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    kernel_size: int | tuple[int, int] = 2,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance between the products of the classes' distributions.

    .. math::
        L = \frac{1}{B C^2} \sum_{b,i,j} (q^s_{bi} \cdot q^s_{bj} - q^t_{bi} \cdot q^t_{bj})^2,
        \quad q_{bi} = \mathrm{softmax}_n(z_{bi} / T)

    Category-wise part of Double Similarity Distillation (arXiv:2107.08591), as
    it is re-implemented in winycg/CIRKD: scores averaged over patches in ceil
    mode, the softmax over the n patches, T = 4. No code of the authors was
    found; a published summary has the softmax over classes and channels divided
    by their norm.

    The gradient reaches ``student`` only. The value does not change when a
    constant is added to a channel. Products of two distributions over n places
    are of the order of 1 / n: the value falls as the map grows, with its square.

    Args:
        student: class scores, shape (B, C, H, W), any float dtype. One channel is
            the score z of a sigmoid: the two classes (0, z).
        teacher: same shape; a pair of one and two channels fits as well. Detached
            here.
        temperature: T, above 0, a number or a scalar tensor.
        kernel_size: side of a patch in positions, or (h, w); 1 for no pooling.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest: patches are averaged over these alone, and a patch without
            any has no part in the distributions. ``None``: all.

    Returns:
        Scalar in [0, 1], no unit, at least float32: the mean over the pairs of
        classes of images with a position that counts, 0 with a graph if there
        is none. Time O(B C^2 N), memory O(B C N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``valid`` is no
            map of B images.
        ConfigError: ``temperature`` or ``kernel_size`` is out of range.

    Example:
        >>> z = torch.tensor([[8.0, 0.0], [0.0, 0.0]]).view(1, 2, 1, 2)
        >>> category_similarity_loss(z + 3, z, kernel_size=1).item() < 1e-10
        True
        >>> round(category_similarity_loss(0 * z, z, kernel_size=1).item(), 4)
        0.021
    """
    owner = 'category_similarity_loss'
    check_temperature(owner, temperature)
    check_ndim(owner, 'student', student, 4, '(B, C, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, C, H, W)')
    student, teacher = as_two_classes(student, teacher)
    check_same(owner, student, teacher, (0, 1, 2, 3), 'B, C, H and W', RESIZE_TO_SAME_CLASSES)
    valid_mask = valid_pixels(owner, student, valid=valid)

    def products(scores: Tensor) -> tuple[Tensor, Tensor | None]:
        nodes, some = pool_nodes(scores, kernel_size, valid_mask)
        probability, _ = position_distributions(
            nodes.flatten(2), temperature, None if some is None else some.flatten(1)[:, None], -1
        )
        with exact_matmul(scores.device.type):
            return torch.bmm(probability, probability.mT), some

    products_s, some = products(student)
    products_t, _ = products(teacher.detach())
    images = None if some is None else some.flatten(1).any(dim=1)[:, None, None]
    return masked_mean((products_s - products_t).square(), images)
