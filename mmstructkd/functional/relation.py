r"""Relations among nodes: images, cells of a map, class centres.

Shape shorthand: G sets of n nodes with D entries (student and teacher may
differ in D), B images, H x W a grid, N = H W. Functions of nodes take (n, D),
one set; (G, n, D), several; or (B, D, H, W), one set whose nodes are the whole
images, flattened. ``valid`` then marks the nodes that count, (n,) or (G, n), or
the positions of the images, (B, h, w).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import (
    ConfigError,
    check_finite_number,
    check_flag,
    check_ndim,
    check_positive,
    check_same,
    is_count,
)
from mmstructkd.functional.affinity import _offsets, _shifted, _wide
from mmstructkd.functional.nodes import (
    as_sets,
    by_peak,
    norm_floor,
    pairs_of,
    similarity_kl_sum,
    sum_in_blocks,
    unit_vectors,
)
from mmstructkd.functional.precision import exact_matmul, full_precision
from mmstructkd.functional.reduce import masked_mean, mean_of_sum, valid_pixels
from mmstructkd.functional.softening import check_temperature, kl_along

__all__ = [
    'adjacent_correlation_loss',
    'correlation_congruence_loss',
    'cross_image_kl_loss',
    'local_structure_loss',
    'relational_loss',
    'similarity_preserving_loss',
]

# Squared distances below this share of the squared lengths are rounding error of float64.
_ROUNDING = 1e-13
# Angles divide by lengths: in half precision they must be this much longer than the smallest normal number.
_ROOM = 64.0


@full_precision
def _row_similarity(student: Tensor, teacher: Tensor, counts: Tensor | None, floor: float) -> Tensor:
    def rows(nodes: Tensor) -> Tensor:
        # One scale for the whole set cancels in the rows, and keeps long products in range.
        nodes = by_peak(nodes, floor)
        with exact_matmul(nodes.device.type):
            return unit_vectors(torch.bmm(nodes, nodes.mT), 2)

    return masked_mean((rows(student) - rows(teacher)).square(), pairs_of(counts))


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
    set_s, set_t, counts = as_sets('similarity_preserving_loss', student, teacher.detach(), valid)
    return _row_similarity(set_s, set_t, counts, floor)


def _geometry(nodes: Tensor, counts: Tensor | None, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix of centred nodes, distances, and their reciprocals (0 where two nodes coincide); (G, n, n)."""
    nodes = nodes.to(_wide(nodes))
    # Relations between differences do not change with the origin. Near it they keep their digits.
    if counts is None:
        nodes = nodes - nodes.detach().mean(dim=1, keepdim=True)
    else:
        center = mean_of_sum(nodes.detach().sum(dim=1), counts.sum(dim=1)[:, None])
        nodes = torch.where(counts[..., None], nodes - center[:, None], 0)
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
    counts: Tensor | None,
    floor: float,
    distance_weight: float,
    angle_weight: float,
) -> Tensor:
    dtype = student.dtype
    sets, nodes = student.shape[:2]
    pairs = pairs_of(counts)
    gram_s, distance_s, inverse_s = _geometry(student, counts, floor)
    gram_t, distance_t, inverse_t = _geometry(teacher, counts, floor)
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
            if counts is not None and pairs is not None:
                gap = torch.where(counts[:, part, None, None] & pairs[:, None], gap, 0)
            return gap.sum()

        triples = sets * nodes**3 if counts is None else counts.sum(dim=1).pow(3).sum()
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
    set_s, set_t, counts = as_sets(owner, student, teacher.detach(), valid)
    return _relations(set_s, set_t, counts, floor, distance_weight, angle_weight)


@full_precision
def _congruence(
    student: Tensor, teacher: Tensor, counts: Tensor | None, floor: float, gamma: float, order: int
) -> Tensor:
    units_s, units_t = unit_vectors(student, 2, floor), unit_vectors(teacher, 2, floor)
    sets, nodes = units_s.shape[:2]
    series = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]

    def kernel(units: Tensor, part: slice) -> Tensor:
        with exact_matmul(units.device.type):
            cosine = torch.bmm(units[:, part], units.mT)
        value = torch.full_like(cosine, series[-1])
        for factor in reversed(series[:-1]):
            value = value * cosine + factor
        return value

    def block(part: slice) -> Tensor:
        gap = (kernel(units_s, part) - kernel(units_t, part)).square()
        if counts is not None:
            gap = torch.where(counts[:, part, None] & counts[:, None], gap, 0)
        return gap.sum()

    if nodes == 0:
        return units_s.sum()
    count = sets * nodes**2 if counts is None else counts.sum(dim=1).square().sum()
    return mean_of_sum(sum_in_blocks(block, nodes, sets * nodes), count)


def correlation_congruence_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 0.4,
    order: int = 2,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance between the kernel matrices of the nodes.

    .. math::
        L = \frac{1}{G n^2} \sum_{g,i,j} (k^s_{gij} - k^t_{gij})^2, \quad
        k_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (\hat f_i \cdot \hat f_j)^p

    Correlation congruence (arXiv:1904.01802), the paper's form: a Gaussian
    kernel of unit features as a Taylor series. torchdistill takes the norm
    without the square, over n^2, with weight 0.003. What the authors handed out
    is another formula: :func:`adjacent_correlation_loss`.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when a node is scaled by a positive number, or all are rotated.

    Args:
        student: nodes, see the module, any float dtype.
        teacher: as many nodes. Detached here.
        gamma: of the kernel, above 0.
        order: P, an integer of at least 1.
        valid: which count. ``None``: all.

    Returns:
        Scalar in [0, 4], no unit, at least float32: the mean over ordered pairs
        of nodes that count, each node with itself included, 0 with a graph if
        there is none. Time O(G n^2 D); of n^2 only blocks are in memory.

    Raises:
        ShapeError: the nodes of student and teacher differ in number, or the
            mask does not fit them.
        ConfigError: ``gamma`` or ``order`` is out of range.

    Example:
        >>> x = torch.eye(2)
        >>> correlation_congruence_loss(3 * x, x).item()
        0.0
        >>> round(correlation_congruence_loss(torch.ones(2, 3), x).item(), 4)
        0.1266
    """
    owner = 'correlation_congruence_loss'
    check_positive(owner, 'gamma', gamma)
    if not is_count(order) or order < 1:
        raise ConfigError(f'{owner}: `order` must be an integer of at least 1, got {order!r}.')
    floor = norm_floor(student, teacher)
    set_s, set_t, counts = as_sets(owner, student, teacher.detach(), valid)
    return _congruence(set_s, set_t, counts, floor, gamma, order)


@full_precision
def adjacent_correlation_loss(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    r"""Products of the deviations of neighbouring nodes from the teacher's.

    .. math::
        L = \frac{1}{G (n - 1)} \sum_{g,i} \sum_d |f^s - f^t|_{g,i,d} \, |f^s - f^t|_{g,i+1,d}

    Correlation congruence (arXiv:1904.01802) as its authors handed the code to
    RepDistiller, with weight 0.02: no correlation, and not what the paper
    prints, see :func:`correlation_congruence_loss`. Neighbours are consecutive
    in the batch.

    The gradient reaches ``student`` only. The value is a sum over D, in squared
    units of the features, and 0 as soon as every other node fits.

    Args:
        student: nodes, see the module, any float dtype.
        teacher: the same shape. Detached here.
        valid: which count; a pair counts where both do. ``None``: all.

    Returns:
        Scalar, at least float32: the mean over pairs of neighbours that count, 0
        with a graph if there is none. Time and memory O(G n D).

    Raises:
        ShapeError: the shapes differ, or the mask does not fit.

    Example:
        >>> adjacent_correlation_loss(torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(3, 1)).item()
        4.0
    """
    owner = 'adjacent_correlation_loss'
    set_s, set_t, counts = as_sets(owner, student, teacher.detach(), valid)
    check_same(owner, set_s, set_t, (2,), 'widths', 'Put a connector in front of the student.')
    deviation = (set_s - set_t).abs()
    product = (deviation[:, :-1] * deviation[:, 1:]).sum(dim=2)
    return masked_mean(product, None if counts is None else counts[:, :-1] & counts[:, 1:])


def _window(values: list[Tensor], grid: tuple[int, int], radius: int, fill: float | bool) -> Tensor:
    """Stack what belongs to a place and each offset of the window, (B, offsets, H, W)."""
    planes = []
    for (dy, dx), value in zip(_offsets(grid, radius), values, strict=True):
        rows, columns = (0, dy), (max(0, -dx), max(0, dx))
        # The product belongs to its first place (offset forwards) and to its second (backwards).
        planes.append(torch_functional.pad(value, (*columns, *rows), value=fill))
        if (dy, dx) != (0, 0):
            planes.append(torch_functional.pad(value, (*columns[::-1], *rows[::-1]), value=fill))
    return torch.stack(planes, dim=1)


@full_precision
def _local_structure(
    student: Tensor,
    teacher: Tensor,
    counts: Tensor | None,
    floor: float,
    radius: int,
    temperature: float | Tensor,
    include_self: bool,
) -> Tensor:
    batch, _, height, width = student.shape
    grid = (height, width)
    here = torch.ones(batch, height, width, dtype=torch.bool, device=student.device) if counts is None else counts
    offsets = list(_offsets(grid, radius))
    both = []
    for dy, dx in offsets:
        first, second = _shifted(here, dy, dx)
        both.append((first & second) if include_self or (dy, dx) != (0, 0) else torch.zeros_like(first))
    neighbours = _window(both, grid, radius, False)

    def log_structure(features: Tensor) -> Tensor:
        if counts is not None:
            features = torch.where(counts[:, None], features, 0)
        units = unit_vectors(features, 1, floor)
        products = []
        for dy, dx in offsets:
            first, second = _shifted(units, dy, dx)
            products.append((first * second).sum(dim=1))
        scores = _window(products, grid, radius, 0.0) / temperature
        # The lowest finite number: a place without a neighbour must stay free of NaN. It does not count below.
        return torch.log_softmax(torch.where(neighbours, scores, torch.finfo(scores.dtype).min), dim=1)

    gap = kl_along(log_structure(student), log_structure(teacher), dim=1)
    return masked_mean(gap, here & neighbours.any(dim=1))


def local_structure_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    radius: int = 1,
    temperature: float | Tensor = 0.1,
    include_self: bool = True,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of how like each neighbour a place is in the student from how in the teacher.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \mathrm{KL}(l^t_i \| l^s_i), \quad
        l_i = \mathrm{softmax}_{j \in \mathcal N(i)} \frac{\cos(f_i, f_j)}{T}

    Local structure preserving (CVPR 2020), made for graphs, on a grid: the
    neighbours of a place are those at most ``radius`` away in rows and columns.
    The authors' code has the similarity exp(-|f_i - f_j| / 100) with the L1
    norm, and this direction of the divergence; as far as is known the paper has
    a Gaussian kernel and the other direction. Cosine over T is blind to the
    scale of features. It complements
    :func:`~mmstructkd.functional.affinity.pairwise_affinity_loss`, which
    compares affinities one by one.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when the feature of a place is scaled by a positive number. A feature
    whose norm is zero (at most 1e-12, in half precision at most the smallest
    normal number) has cosine 0 with all.

    Args:
        student: features, shape (B, D_s, H, W), any float dtype.
        teacher: features, shape (B, D_t, H, W). Detached here.
        radius: r, an integer of at least 1.
        temperature: T, above 0, a number or a scalar tensor.
        include_self: a place is its own neighbour, with cosine 1: what the
            others are measured against. Without, only their order counts.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest; the others are no neighbours either. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over places that count and
        have a neighbour, 0 with a graph if there is none. With K = (2 r + 1)^2:
        time O(B K D N), memory O(B (K + D) N).

    Raises:
        ShapeError: an input is not 4-D, B, H or W differ, or ``valid`` is no
            map of B images.
        ConfigError: ``radius`` or ``temperature`` is out of range.

    Example:
        >>> x = torch.arange(24.0).view(1, 2, 3, 4)
        >>> local_structure_loss(3 * x, x).item() < 1e-8
        True
        >>> x = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> local_structure_loss(torch.ones_like(x), x, temperature=1).item() > 0.01
        True
    """
    owner = 'local_structure_loss'
    if not is_count(radius) or radius < 1:
        raise ConfigError(f'{owner}: `radius` must be an integer of at least 1, got {radius!r}.')
    check_temperature(owner, temperature)
    check_flag(owner, 'include_self', include_self)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(
        owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map; channels may differ.'
    )
    counts = valid_pixels(owner, student, valid=valid)
    return _local_structure(
        student, teacher.detach(), counts, norm_floor(student, teacher), radius, temperature, include_self
    )


@full_precision
def _cross_image(
    student: Tensor, teacher: Tensor, counts: Tensor | None, floor: float, temperature: float | Tensor
) -> Tensor:
    def places(features: Tensor) -> Tensor:
        if counts is not None:
            features = torch.where(counts[:, None], features, 0)
        return unit_vectors(features, 1, floor).flatten(2).mT.contiguous()

    units_s, units_t = places(student), places(teacher)
    flat = None if counts is None else counts.flatten(1)
    total, count = similarity_kl_sum(
        (units_s.flatten(0, 1), units_s),
        (units_t.flatten(0, 1), units_t),
        temperature=temperature,
        rows_valid=None if flat is None else flat.flatten(),
        keys_valid=flat,
    )
    return mean_of_sum(total, count)


def cross_image_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of how like the places of each image of the batch a place is.

    .. math::
        L = \frac{1}{B^2 N} \sum_{a,b} \sum_{i} \mathrm{KL}(p^t_{abi} \| p^s_{abi}), \quad
        p_{abi} = \mathrm{softmax}_{j} \frac{\cos(f_{ai}, f_{bj})}{T}

    Mini-batch term of Cross-Image Relational distillation, CIRKD (CVPR 2022):
    place i of image a against all places of image b, for all pairs of images, b
    = a included. Same value as the authors' code, whose weight is 1; that one
    averages over 4 x 4 positions where a map has at least 256 x 256.

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when the feature of a place is scaled by a positive number. A feature
    whose norm is zero (at most 1e-12, in half precision at most the smallest
    normal number) has cosine 0 with all.

    Args:
        student: features, shape (B, D_s, H, W), any float dtype.
        teacher: features, shape (B, D_t, H, W). Detached here.
        temperature: T, above 0, a number or a scalar tensor.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest: as rows and as columns. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over places that count and
        images with one, 0 with a graph if there is none. Time O(B^2 N^2 D); of
        the (B N)^2 similarities only blocks of 2^22 are in memory, computed
        again in the backward pass. Pool large maps first.

    Raises:
        ShapeError: an input is not 4-D, B, H or W differ, or ``valid`` is no
            map of B images.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> x = torch.arange(24.0).view(2, 2, 3, 2)
        >>> cross_image_kl_loss(3 * x, x).item() < 1e-6
        True
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)
        >>> round(cross_image_kl_loss(torch.ones_like(x), x, temperature=1).item(), 4)
        0.1109
    """
    owner = 'cross_image_kl_loss'
    check_temperature(owner, temperature)
    check_ndim(owner, 'student', student, 4, '(B, D, H, W)')
    check_ndim(owner, 'teacher', teacher, 4, '(B, D, H, W)')
    check_same(
        owner, student, teacher, (0, 2, 3), 'B, H and W', 'Resize the teacher with resize_map; channels may differ.'
    )
    counts = valid_pixels(owner, student, valid=valid)
    return _cross_image(student, teacher.detach(), counts, norm_floor(student, teacher), temperature)
