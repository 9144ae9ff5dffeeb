r"""Losses on the outputs of dense detection heads: distributions of box edges, sigmoid class maps.

Shape shorthand: B images, K classes, A anchors a position, H x W the grid of a
level, n + 1 bins of an edge's distribution. Boxes are ``xyxy`` in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_one_of, check_same, is_count
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import mean_of_sum, nan_unless_finite, valid_pixels
from mmstructkd.functional.softening import LOWEST, check_temperature, divided, kl_along

__all__ = ['binary_kl_loss', 'edge_confidence', 'inside_boxes', 'localization_kl_loss']

_WAY_OUT = 'Tap the same output of both heads, at the same level.'


def inside_boxes(boxes: Sequence[Tensor], size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
    """Which positions of a map have their centre inside a box.

    Args:
        boxes: one tensor an image, shape (n, 4), ``xyxy`` in pixels of the input;
            n may be 0.
        size: (H, W) of the map.
        input_size: (h, w) of the input.

    Returns:
        Bool, shape (B, H, W); a centre on the border is inside. Time and memory
        O(n H W) an image.

    Raises:
        ShapeError: boxes are not (n, 4).

    Example:
        >>> inside_boxes([torch.tensor([[0.0, 0.0, 5.0, 4.0]])], (1, 2), (4, 8))
        tensor([[[ True, False]]])
    """
    out = []
    for one in boxes:
        if one.dim() != 2 or one.shape[1] != 4:
            raise ShapeError(
                f'inside_boxes: `boxes` must hold tensors of shape (n, 4), got {tuple(one.shape)}. '
                'Corner form: x1, y1, x2, y2 in pixels.'
            )
        one = one.detach().to(torch.promote_types(one.dtype, torch.float32))
        y = (torch.arange(size[0], device=one.device, dtype=one.dtype) + 0.5) * (input_size[0] / size[0])
        x = (torch.arange(size[1], device=one.device, dtype=one.dtype) + 0.5) * (input_size[1] / size[1])
        across = (x >= one[:, 0:1]) & (x <= one[:, 2:3])
        down = (y >= one[:, 1:2]) & (y <= one[:, 3:4])
        out.append((down[:, :, None] & across[:, None, :]).any(dim=0))
    return torch.stack(out)


def _split_edges(owner: str, name: str, logits: Tensor, edges: int) -> Tensor:
    """Shape (B, edges, n + 1, H, W) of a map, (M, 1, n + 1) of rows."""
    if logits.dim() == 2:
        return logits.unsqueeze(1)
    if logits.shape[1] % edges:
        raise ShapeError(
            f'{owner}: `{name}` must have a multiple of {edges} channels, {edges} distributions of n + 1 bins, got '
            f'{tuple(logits.shape)}. Set `edges`, or tap a head with distributions (GFLHead; not plain offsets).'
        )
    return logits.reshape(logits.shape[0], edges, -1, *logits.shape[2:])


@full_precision
def edge_confidence(logits: Tensor, *, edges: int = 4) -> Tensor:
    """How peaked the distributions of a position's box edges are.

    Args:
        logits: edge logits, shape (B, 4 (n + 1), H, W).
        edges: distributions a position.

    Returns:
        Shape (B, H, W), within [1 / (n + 1), 1]: the probability of the likeliest
        bin, mean over the edges. Without a graph.

    Raises:
        ShapeError: ``logits`` is not 4-D, or its channels do not split.

    Example:
        >>> edge_confidence(torch.zeros(1, 8, 1, 1)).item()
        0.5
    """
    check_ndim('edge_confidence', 'logits', logits, 4, '(B, 4 (n + 1), H, W)')
    split = _split_edges('edge_confidence', 'logits', logits.detach(), edges)
    return split.softmax(dim=2).amax(dim=2).mean(dim=1)


@full_precision
def localization_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 10.0,
    edges: int = 4,
    weights: Tensor | None = None,
    valid: Tensor | None = None,
    bin_reduction: str = 'sum',
    reduction: str = 'mean',
) -> Tensor:
    r"""Divergence of the student's box-edge distributions from the teacher's.

    .. math::
        L = \frac{T^2}{|V|} \sum_{i \in V} \frac{w_i}{4} \sum_{e=1}^{4} \mathrm{KL}(p^t_{ie} \| p^s_{ie}),
        \quad p_{ie} = \mathrm{softmax}_{n+1}(z_{ie} / T)

    Localization Distillation (arXiv:2102.12252), for heads that predict where an
    edge of the box lies as a distribution over bins (GFL). V are the positive
    positions, those that answer for an object.

    Differs from the authors' code: that takes the mean over the bins of a
    distribution where a divergence is their sum (``bin_reduction='mean'``), and
    the sum over the positives, never divided by their number
    (``reduction='sum'``), so that its weight depends on the batch. ``weights``
    are its student's best class scores.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when a constant is added to the logits of an edge.

    Args:
        student: edge logits, shape (B, 4 (n + 1), H, W) with the bins of an edge
            side by side, or (M, n + 1), one edge a row; any float dtype.
        teacher: the same shape. Detached here.
        temperature: T, above 0, a number or a scalar tensor.
        edges: distributions a position of a map: 4, or 1 for depth in bins.
        weights: factor of each position, at least 0, shape (B, H, W) or (M,);
            detached. ``None``: 1.
        valid: positives, bool, shape (B, h, w), brought to H x W by nearest, or
            (M,). ``None``: all.
        bin_reduction: ``'sum'``, or ``'mean'`` over the n + 1 bins.
        reduction: ``'mean'`` over the positives, whatever their weights, or
            ``'sum'`` over them.

    Returns:
        Scalar in nats, at least float32, 0 with a graph if nothing is positive.
        Time and memory O(B 4 (n + 1) H W).

    Raises:
        ShapeError: the shapes differ, channels do not split into edges, or
            ``weights`` or ``valid`` does not fit.
        ConfigError: an argument is out of range.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> localization_kl_loss(z + 3, z).item() < 1e-6
        True
        >>> round(localization_kl_loss(0 * z, z, temperature=1).item(), 4)
        0.3278
    """
    owner = 'localization_kl_loss'
    check_temperature(owner, temperature)
    check_one_of(owner, 'bin_reduction', bin_reduction, ('sum', 'mean'))
    check_one_of(owner, 'reduction', reduction, ('mean', 'sum'))
    if not is_count(edges) or edges < 1:
        raise ConfigError(f'{owner}: `edges` must be an integer above 0, got {edges!r}.')
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, 4 (n + 1), H, W) or (M, n + 1)')
    check_same(owner, student, teacher, range(student.dim()), 'their shape', _WAY_OUT)
    counts = valid_pixels(owner, student, valid=valid)
    split_s = _split_edges(owner, 'student', student, edges)
    split_t = _split_edges(owner, 'teacher', teacher.detach(), edges)
    if counts is not None:
        kept = counts[:, None, None]
        split_s, split_t = torch.where(kept, split_s, 0), torch.where(kept, split_t, 0)
    log_s = torch.log_softmax(divided(split_s, temperature), dim=2)
    log_t = torch.log_softmax(divided(split_t, temperature), dim=2)
    values = kl_along(log_s, log_t, dim=2).mean(dim=1)
    if bin_reduction == 'mean':
        values = values / split_s.shape[2]
    if weights is not None:
        if weights.shape != values.shape:
            raise ShapeError(
                f'{owner}: `weights` must have shape {tuple(values.shape)}, one for each position, '
                f'got {tuple(weights.shape)}.'
            )
        values = values * weights.detach()
    if counts is not None:
        values = torch.where(counts, values, 0)
    total = values.sum()
    if reduction == 'mean':
        total = mean_of_sum(total, values.numel() if counts is None else counts.sum())
    return temperature**2 * total


@full_precision
def binary_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    anchors: int = 1,
    normalizer: str | Tensor | float = 'weights',
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the student's independent class probabilities from the teacher's.

    .. math::
        L = \frac{T^2}{\sum_i w_i} \sum_i w_i \sum_k \mathrm{KL}(B(p^t_{ik}) \| B(p^s_{ik})), \quad
        p_{ik} = \mathrm{sigmoid}(z_{ik} / T), \quad w_i = \max_k \mathrm{sigmoid}(z^t_{ik})

    For heads whose classes are sigmoids (FCOS, RetinaNet, GFL): each class of each
    anchor is a coin B(p) of its own. Nearly all positions of a detector are
    background in which both agree; the teacher's best score weighs them down.
    The detection form of pixel-wise distillation; no released code has it, so
    weight and normaliser are this project's.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    Infinite logits make the value NaN.

    Args:
        student: logits, shape (B, A K, H, W) with the classes of an anchor side by
            side, or (M, K); any float dtype.
        teacher: the same shape. Detached here.
        temperature: T, above 0, a number or a scalar tensor; or one for each position
            or image, (B, 1, H, W), (B, 1, 1, 1) or (M, 1), its square inside the sum.
            The weights are taken at temperature 1.
        anchors: A of a map; each anchor of a position has its own weight.
        normalizer: what the weighted sum is divided by: ``'weights'``, their sum;
            ``'positions'``, the number of positions and anchors that count; or a
            number, such as the positives of the batch (no less than 1 is used).
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest, or (M,). ``None``: all.

    Returns:
        Scalar in nats, at least float32, 0 with a graph if nothing counts. Time
        and memory O(B A K H W).

    Raises:
        ShapeError: the shapes differ, channels do not split into anchors, or
            ``valid`` does not fit.
        ConfigError: an argument is out of range.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> binary_kl_loss(z, z).item()
        0.0
        >>> round(binary_kl_loss(0 * z, z).item(), 4)
        0.3278
    """
    owner = 'binary_kl_loss'
    if isinstance(normalizer, str):
        check_one_of(owner, 'normalizer', normalizer, ('weights', 'positions'))
    if not is_count(anchors) or anchors < 1:
        raise ConfigError(f'{owner}: `anchors` must be an integer above 0, got {anchors!r}.')
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, A K, H, W) or (M, K)')
    check_same(owner, student, teacher, range(student.dim()), 'their shape', _WAY_OUT)
    if student.shape[1] % anchors or (student.dim() == 2 and anchors != 1):
        raise ShapeError(
            f'{owner}: `student` must be a map of a multiple of {anchors} channels for anchors={anchors}, '
            f'got {tuple(student.shape)}.'
        )
    check_temperature(owner, temperature, student)
    counts = valid_pixels(owner, student, valid=valid)
    teacher = teacher.detach()
    shape = (student.shape[0], anchors, student.shape[1] // anchors, *student.shape[2:])
    if counts is not None:
        student = torch.where(counts.unsqueeze(1), student, 0)
        teacher = torch.where(counts.unsqueeze(1), teacher, 0)
    weights = teacher.sigmoid().reshape(shape).amax(dim=2)
    if counts is not None:
        weights = weights * counts.unsqueeze(1)

    soft_s, soft_t = student / temperature, teacher / temperature
    values = soft_t.sigmoid() * (_log_sigmoid(soft_t) - _log_sigmoid(soft_s))
    values = values + (-soft_t).sigmoid() * (_log_sigmoid(-soft_t) - _log_sigmoid(-soft_s))
    values = values.reshape(shape).sum(dim=2)
    if isinstance(temperature, Tensor) and temperature.dim():
        # The square of each position's own stands inside the sum.
        values, temperature = temperature.square() * values, 1.0
    total = (weights * values).sum()
    if isinstance(normalizer, str) and normalizer == 'weights':
        total = total / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    elif isinstance(normalizer, str):
        total = mean_of_sum(total, weights.numel() if counts is None else anchors * counts.sum())
    else:
        total = total / (normalizer.clamp(min=1) if isinstance(normalizer, Tensor) else max(normalizer, 1))
    # A sigmoid turns infinity into a sure yes or no: a network that overflows would teach, or learn, that.
    return temperature**2 * total + nan_unless_finite(student) + nan_unless_finite(teacher)


def _log_sigmoid(logits: Tensor) -> Tensor:
    """Logarithm of the sigmoid, no lower than what may be summed over a map."""
    return torch_functional.logsigmoid(logits).clamp(min=LOWEST)
