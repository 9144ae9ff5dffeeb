r"""Distances between nodes, and angles of three of them.

Shape shorthand: G sets of n nodes with D entries (student and teacher may differ
in D), B images, H x W a grid, N = H W. Functions of nodes take (n, D), one set;
(G, n, D), several; or (B, D, H, W), one set whose nodes are the whole images,
flattened. ``valid`` then marks the nodes that count, (n,) or (G, n), or the
positions of the images, (B, h, w).
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import check_finite_number
from mmstructkd.functional.core.nodes import as_sets, norm_floor, pairs_of, sum_in_blocks
from mmstructkd.functional.core.precision import full_precision, wide_dtype
from mmstructkd.functional.core.reduce import masked_mean, mean_of_sum

__all__ = ['relational_loss']

# Squared distances below this share of the squared lengths are rounding error of float64.
_ROUNDING = 1e-13
# Angles divide by lengths: in half precision they must be this much longer than the smallest normal number.
_ROOM = 64.0


def _geometry(nodes: Tensor, valid_mask: Tensor | None, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix of centred nodes, distances, and their reciprocals (0 where two nodes coincide); (G, n, n)."""
    nodes = nodes.to(wide_dtype(nodes))
    # Relations between differences do not change with the origin. Near it they keep their digits.
    if valid_mask is None:
        nodes = nodes - nodes.detach().mean(dim=1, keepdim=True)
    else:
        center = mean_of_sum(nodes.detach().sum(dim=1), valid_mask.sum(dim=1)[:, None])
        nodes = torch.where(valid_mask[..., None], nodes - center[:, None], 0)
    gram = torch.bmm(nodes, nodes.mT)
    length = gram.diagonal(dim1=1, dim2=2)
    both = length[:, :, None] + length[:, None, :]
    square = both - 2 * gram
    # Not `>`: what is not a number stays one.
    apart = ~(square.detach() <= (_ROUNDING * both.detach()).clamp(min=floor**2))
    safe = torch.where(apart, square, 1)
    return gram, torch.where(apart, safe.sqrt(), 0), torch.where(apart, safe.rsqrt(), 0)


def _relative(distance: Tensor, pairs: Tensor | None) -> Tensor:
    """Distances divided by their mean over pairs of different nodes of the set."""
    count = distance.shape[1]
    if pairs is None:
        mean = distance.sum(dim=(1, 2), keepdim=True) / max(count * (count - 1), 1)
    else:
        distance = torch.where(pairs, distance, 0)
        nodes = pairs.diagonal(dim1=1, dim2=2).sum(dim=1)
        mean = mean_of_sum(distance.sum(dim=(1, 2)), nodes * (nodes - 1))[:, None, None]
    return distance / torch.where(mean > 0, mean, 1)


@full_precision
def _relations(
    student: Tensor,
    teacher: Tensor,
    valid_mask: Tensor | None,
    floor: float,
    distance_weight: float,
    angle_weight: float,
) -> Tensor:
    dtype = student.dtype
    sets, nodes = student.shape[:2]
    pairs = pairs_of(valid_mask)
    gram_s, distance_s, inverse_s = _geometry(student, valid_mask, floor)
    gram_t, distance_t, inverse_t = _geometry(teacher, valid_mask, floor)
    total = gram_s.sum() * 0
    if distance_weight:
        near_s, near_t = _relative(distance_s, pairs), _relative(distance_t, pairs)
        gap = torch_functional.smooth_l1_loss(near_s, near_t, reduction='none')
        total = total + distance_weight * masked_mean(gap, pairs)
    if angle_weight and nodes:

        def angles(gram: Tensor, inverse: Tensor, part: slice) -> Tensor:
            # (f_j - f_i) . (f_k - f_i), from products of nodes alone: no differences of D entries are formed.
            own = gram.diagonal(dim1=1, dim2=2)[:, part, None, None]
            near = gram[:, part]
            corner = gram[:, None] - near[:, :, :, None] - near[:, :, None, :] + own
            return corner * inverse[:, part, :, None] * inverse[:, part, None, :]

        def block(part: slice) -> Tensor:
            gap = torch_functional.smooth_l1_loss(
                angles(gram_s, inverse_s, part), angles(gram_t, inverse_t, part), reduction='none'
            )
            if valid_mask is not None and pairs is not None:
                gap = torch.where(valid_mask[:, part, None, None] & pairs[:, None], gap, 0)
            return gap.sum()

        triples = sets * nodes**3 if valid_mask is None else valid_mask.sum(dim=1).pow(3).sum()
        total = total + angle_weight * mean_of_sum(sum_in_blocks(block, nodes, sets * nodes**2), triples)
    return total.to(dtype)


def relational_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    valid: Tensor | None = None,
) -> Tensor:
    r"""How far distances and angles among nodes are from the teacher's.

    .. math::
        L = \frac{\lambda_D}{n^2} \sum_{i,j} h(\hat d^s_{ij} - \hat d^t_{ij})
          + \frac{\lambda_A}{n^3} \sum_{i,j,k} h(a^s_{ijk} - a^t_{ijk})

    Relational distillation (arXiv:1904.05068): :math:`\hat d` are distances
    divided by their mean over pairs of different nodes, a the cosine of the
    angle at node i between those to j and k, h the smooth absolute value (a
    parabola up to 1). Same value as the authors' code and RepDistiller's, which
    count the zeros at i = j and i = k in the means as well. Angles are taken
    from the Gram matrix: no tensor of n^2 D, and of n^3 only blocks of 2^22
    entries, computed again in the backward pass.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when the nodes of a set are shifted, rotated or scaled together. Two
    nodes that coincide (up to 1e-12, in half precision 64 of its smallest
    normal numbers) have distance 0 and no angle.

    Args:
        student: nodes, see the module, any float dtype; a few dozen a set.
        teacher: as many nodes. Detached here.
        distance_weight: weight of distances, at least 0.
        angle_weight: weight of angles, at least 0.
        valid: which count. ``None``: all.

    Returns:
        Scalar, no unit, at least float32: means over the pairs and triples of
        nodes that count, 0 with a graph if there is none. Computed in float64
        where the device has it. Time O(G n^2 (n + D)), memory O(G n (n + D)).

    Raises:
        ShapeError: the nodes of student and teacher differ in number, or the
            mask does not fit them.
        ConfigError: a weight is no finite number of at least 0.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> relational_loss(5 * x + 1, x).item() < 1e-10
        True
        >>> relational_loss(x * torch.tensor([2.0, 1.0]), x).item() > 0.1
        True
    """
    owner = 'relational_loss'
    check_finite_number(owner, 'distance_weight', distance_weight, minimum=0)
    check_finite_number(owner, 'angle_weight', angle_weight, minimum=0)
    floor = norm_floor(student, teacher)
    if floor > 1e-12:
        floor *= _ROOM
    set_s, set_t, valid_mask = as_sets(owner, student, teacher.detach(), valid)
    return _relations(set_s, set_t, valid_mask, floor, distance_weight, angle_weight)
