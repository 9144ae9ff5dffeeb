r"""How features vary around the centre of their class.

Shape shorthand: B images, D channels, K classes, H x W the grid, N = H W.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import check_flag, check_ndim, check_positive, check_same
from mmstructkd.functional.core.nodes import norm_floor, unit_vectors
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.regions import centers_of_classes
from mmstructkd.functional.core.valid import labelled_pixels, valid_pixels, zero_elsewhere

__all__ = ['intra_class_variation_loss']


@full_precision
def _variation_gap(
    student: Tensor, teacher: Tensor, classes: Tensor, inside: Tensor, num_classes: int, floor: float
) -> Tensor:
    """Squared gap of the cosines to the own centre, (B, N); 0 where nothing counts."""

    def likeness(features: Tensor) -> Tensor:
        features = zero_elsewhere(features, inside).flatten(2)
        centers, _ = centers_of_classes(features, classes, inside, num_classes)
        with exact_matmul(features.device.type):
            cosines = torch.bmm(unit_vectors(centers, 2, floor), unit_vectors(features, 1, floor))
        return cosines.gather(1, classes.flatten(1)[:, None])[:, 0]

    return torch.where(inside.flatten(1), (likeness(student) - likeness(teacher)).square(), 0)


def intra_class_variation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    num_classes: int,
    ignore_index: int = 255,
    valid: Tensor | None = None,
    count_ignored: bool = True,
) -> Tensor:
    r"""Squared gap between how like its class's centre a pixel is in student and teacher.

    .. math::
        L = \frac{1}{B N} \sum_{b,i} (m^s_{bi} - m^t_{bi})^2,
        \quad m_{bi} = \cos(f_{bi}, \mu_{b y_i}), \quad \mu_{bk} = \overline{\{f_{bi} : y_i = k\}}

    Intra-class feature variation, IFVD (ECCV 2020). Same value as the authors'
    code, which writes the centres into clones of the maps class by class; here
    they are one product with the one-hot labels. There, a pixel without a label
    is compared with itself: it adds nothing and is counted in the mean.
    ``count_ignored=False`` leaves it out.

    The gradient reaches ``student`` only, through pixels and centres. Widths
    may differ. The value does not change when the features of an image are
    scaled or rotated. A feature whose norm is zero (at most 1e-12, in half
    precision at most the smallest normal number) has cosine 0.

    Args:
        student: features, shape (B, D_s, H, W), any float dtype.
        teacher: features, shape (B, D_t, H, W). Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest.
            What is no class counts as ignored.
        num_classes: K.
        ignore_index: pixels with this label add nothing.
        valid: pixels that count, bool, shape (B, h, w), likewise; the others
            are in no mean. ``None``: all.
        count_ignored: divide by ignored pixels too, as the code does.

    Returns:
        Scalar in [0, 4], no unit, at least float32, 0 with a graph where no
        pixel has a class. Time O(B K D N), memory O(B (K + D) N).

    Raises:
        ShapeError: an input is not 4-D, B, H or W differ, or labels or mask are
            no map of B images.
        ConfigError: ``num_classes`` is not above 0.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> labels = torch.zeros(1, 1, 2, dtype=torch.long)
        >>> intra_class_variation_loss(3 * x, x, labels=labels, num_classes=1).item() < 1e-10
        True
        >>> round(intra_class_variation_loss(torch.ones_like(x), x, labels=labels, num_classes=1).item(), 4)
        0.0858
    """
    owner = 'intra_class_variation_loss'
    check_flag(owner, 'count_ignored', count_ignored)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(
        owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map; channels may differ.'
    )
    check_positive(owner, 'num_classes', num_classes)
    classes, inside = labelled_pixels(
        owner, student, labels, num_classes=num_classes, ignore_index=ignore_index, valid=valid
    )
    gap = _variation_gap(student, teacher.detach(), classes, inside, num_classes, norm_floor(student, teacher))
    if not count_ignored:
        return masked_mean(gap, inside.flatten(1))
    valid_mask = valid_pixels(owner, student, valid=valid)
    return masked_mean(gap, None if valid_mask is None else valid_mask.flatten(1))
