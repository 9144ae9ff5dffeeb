r"""Which nodes look alike: rows of similarities.

Shape shorthand: G sets of n nodes with D entries (student and teacher may differ
in D), B images, H x W a grid, N = H W. Functions of nodes take (n, D), one set;
(G, n, D), several; or (B, D, H, W), one set whose nodes are the whole images,
flattened. ``valid`` then marks the nodes that count, (n,) or (G, n), or the
positions of the images, (B, h, w).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.functional.core.nodes import as_sets, by_peak, norm_floor, pairs_of, unit_vectors
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.reduce import masked_mean

__all__ = ['similarity_preserving_loss']


@full_precision
def _row_similarity(student: Tensor, teacher: Tensor, valid_mask: Tensor | None, floor: float) -> Tensor:
    def rows(nodes: Tensor) -> Tensor:
        # One scale for the whole set cancels in the rows, and keeps long products in range.
        nodes = by_peak(nodes, floor)
        with exact_matmul(nodes.device.type):
            return unit_vectors(torch.bmm(nodes, nodes.mT), 2)

    return masked_mean((rows(student) - rows(teacher)).square(), pairs_of(valid_mask))


def similarity_preserving_loss(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Squared distance between the rows of the nodes' Gram matrices.

    .. math:: L = \frac{1}{G n^2} \sum_{g,i,j} (\hat S^s_{gij} - \hat S^t_{gij})^2, \quad S_{gij} = f_{gi} \cdot f_{gj}

    Similarity-preserving distillation (arXiv:1907.09682), where the nodes are
    the flattened images of a batch; a hat divides each row by its length. Same
    value as the code its author verified (RepDistiller), whose weight is 3000.
    Of two to four images a process little can be learned: hand it cells of the
    maps, or embeddings of regions.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when all nodes of a set are scaled by one number.

    Args:
        student: nodes, see the module, any float dtype.
        teacher: as many nodes. Detached here.
        valid: which count; the rest is in no row. ``None``: all.

    Returns:
        Scalar in [0, 4 / n], no unit, at least float32: the mean over ordered
        pairs of nodes that count, each node with itself included, 0 with a
        graph if there is none. Time O(G n^2 D), memory O(G n (n + D)).

    Raises:
        ShapeError: the nodes of student and teacher differ in number, or the
            mask does not fit them.

    Example:
        >>> x = torch.eye(2)
        >>> similarity_preserving_loss(5 * x, x).item()
        0.0
        >>> round(similarity_preserving_loss(torch.ones(2, 3), x).item(), 4)
        0.2929
    """
    floor = norm_floor(student, teacher)
    set_s, set_t, valid_mask = as_sets('similarity_preserving_loss', student, teacher.detach(), valid)
    return _row_similarity(set_s, set_t, valid_mask, floor)
