r"""Losses on class scores that go beyond one divergence per pixel.

Shape shorthand: B images, C classes, H x W the grid, M rows (regions, samples).
Rows stand for the pixels of a batch wherever a map is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_finite_number, check_ndim, check_same, is_count
from mmstructkd.functional.binary import as_two_classes, two_class_logits
from mmstructkd.functional.precision import full_precision
from mmstructkd.functional.reduce import masked_mean, mean_of_sum, nan_unless_finite, valid_pixels
from mmstructkd.functional.resize import resize_labels
from mmstructkd.functional.softening import (
    LOWEST,
    check_temperature,
    divided,
    kl_along,
    log_of_classes,
    teacher_log_of_classes,
    tempered_mean,
)

__all__ = [
    'decoupled_kl_loss',
    'dist_loss',
    'map_logits',
    'weighted_soft_label_loss',
    'zipf_label_loss',
]

_WAY_OUT = 'Resize the teacher with resize_map, or map its classes with map_logits.'

# Deviations below this, relative to the largest probability along the axis, are rounding noise: there is
# nothing to correlate. Also the floor of a norm, which bounds the gradient.
_FLAT = 1e-6


def _scores(owner: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both as scores of classes, two of them for the one channel of a sigmoid; raise unless they are alike."""
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, C, H, W) or (M, C)')
    student, teacher = as_two_classes(student, teacher)
    axes, names = (range(4), 'B, C, H and W') if student.dim() == 4 else (range(2), 'M and C')
    check_same(owner, student, teacher, axes, names, _WAY_OUT)
    return student, teacher


def _only(counts: Tensor | None, *scores: Tensor) -> list[Tensor]:
    """Put 0 where a pixel does not count, so that whatever stands there, NaN included, goes nowhere."""
    if counts is None:
        return list(scores)
    return [torch.where(counts.unsqueeze(1), s, 0) for s in scores]


def _labelled(
    owner: str, reference: Tensor, labels: Tensor, ignore_index: int, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Labels of each pixel or row as an index of the class axis, and which count.

    A label outside the classes does not count: as an index it would be an error of the device.
    """
    counts = valid_pixels(owner, reference, labels=labels, ignore_index=ignore_index, valid=valid)
    assert counts is not None
    if reference.dim() == 4:
        labels = resize_labels(labels, (reference.shape[2], reference.shape[3]))
    labels = labels.to(reference.device, torch.int64)
    counts = counts & (labels >= 0) & (labels < reference.shape[1])
    return torch.where(counts, labels, 0), counts


def _correlation(log_s: Tensor, log_t: Tensor, axes: tuple[int, ...], counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pearson's correlation of two families of probabilities along ``axes``, and where it is defined.

    From log-probabilities, each divided by the largest one along the axes, which changes no correlation:
    the squares of a rare class's probabilities would underflow.

    Returns:
        The correlation, and whether the teacher varies; both with the axes kept, of length 1.
    """

    def unit(log_p: Tensor) -> tuple[Tensor, Tensor]:
        if counts is not None:
            log_p = torch.where(counts, log_p, LOWEST)
        p = (log_p - log_p.detach().amax(axes, keepdim=True)).exp()
        if counts is None:
            number: Tensor | int = torch.Size([p.shape[a] for a in axes]).numel()
            centred = p - p.mean(axes, keepdim=True)
        else:
            number = counts.sum(axes, keepdim=True)
            p = torch.where(counts, p, 0)
            centred = torch.where(counts, p - mean_of_sum(p.sum(axes, keepdim=True), number), 0)
        square = mean_of_sum(centred.square().sum(axes, keepdim=True), number)
        # Of length sqrt(number), or shorter where it is flat.
        return centred / square.clamp(min=_FLAT**2).sqrt(), square

    unit_s, _ = unit(log_s)
    unit_t, square_t = unit(log_t)
    number = torch.Size([unit_t.shape[a] for a in axes]).numel() if counts is None else counts.sum(axes, keepdim=True)
    # Not `square_t > ...`: a teacher that is not a number varies, so that the value shows it.
    return mean_of_sum((unit_s * unit_t).sum(axes, keepdim=True), number), ~(square_t <= _FLAT**2)


@full_precision
def dist_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""One minus the correlation of the class probabilities, among classes and among pixels.

    .. math::
        L = T^2 \Big[ w_\mathrm{inter} \Big(1 - \frac{1}{|V|} \sum_{i \in V} \rho(p^s_{i \cdot}, p^t_{i \cdot})\Big)
          + w_\mathrm{intra} \Big(1 - \frac{1}{C} \sum_c \rho(p^s_{\cdot c}, p^t_{\cdot c})\Big) \Big]

    with Pearson's correlation :math:`\rho` and :math:`p_i = \mathrm{softmax}_C(z_i / T)`.
    DIST (arXiv:2205.10536): the student shall rank like the teacher, how sharp it
    is stays its own affair. A map is the same as the rows of all pixels of the
    batch, so the second part sees the batch of one process. The factor T squared
    is that of the released code for rows.

    Differs from the released code: the norms have a floor instead of a number
    added to their product, so that the loss of equal inputs is 0 whatever their
    scale; and a pixel (a class) whose probabilities do not vary in the *teacher*
    is left out of the mean, since nothing correlates with a constant. Where only
    the student's do not vary, the correlation is 0.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when all probabilities of a pixel go through an
    increasing affine map (first part), or all of a class (second part).

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One
            channel is the score z of a sigmoid: the two classes (0, z).
        teacher: logits, same shape; a pair of one and two channels fits as well.
            Detached here.
        inter_weight: factor of the part among the classes of a pixel, at least 0.
        intra_weight: factor of the part among the pixels of a class.
        temperature: T, above 0, a number or a scalar tensor.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,); only compared with ``ignore_index``.
        ignore_index: pixels with this label do not count.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar without unit, at least float32, within T squared times [0, 2] for
        each part: means over the pixels V that count, and over the classes; 0
        with a graph where nothing counts. A single pixel has no second part.
        Time and memory O(B C N).

    Raises:
        ShapeError: the shapes differ or are no scores, or ``labels`` or
            ``valid`` does not fit.
        ConfigError: ``temperature`` is not above 0, or a weight is negative.

    Example:
        >>> z = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
        >>> abs(dist_loss(z + 5, z).item()) < 1e-6
        True
        >>> round(dist_loss(-z, z, intra_weight=0).item(), 3)
        1.837
    """
    owner = 'dist_loss'
    check_temperature(owner, temperature)
    check_finite_number(owner, 'inter_weight', inter_weight, minimum=0)
    check_finite_number(owner, 'intra_weight', intra_weight, minimum=0)
    student, teacher = _scores(owner, student, teacher)
    counts = valid_pixels(owner, student, labels=labels, ignore_index=ignore_index, valid=valid)
    (student,) = _only(counts, student)
    log_s = log_of_classes(student, temperature).clamp(min=LOWEST)
    log_t = teacher_log_of_classes(teacher, temperature, counts).clamp(min=LOWEST)
    inter, varies = _correlation(log_s, log_t, (1,), None)
    among_classes = masked_mean(1 - inter, varies if counts is None else varies & counts.unsqueeze(1))
    over = (0, 2, 3) if student.dim() == 4 else (0,)
    intra, varies = _correlation(log_s, log_t, over, None if counts is None else counts.unsqueeze(1))
    among_pixels = masked_mean(1 - intra, varies)
    return temperature**2 * (inter_weight * among_classes + intra_weight * among_pixels)


@full_precision
def decoupled_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float | Tensor = 1.0,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of class probabilities, split at the labelled class.

    .. math::
        L = \frac{T^2}{|V|} \sum_{i \in V} \left[ \alpha \, \mathrm{KL}(b^t_i \| b^s_i)
          + \beta \, \mathrm{KL}(q^t_i \| q^s_i) \right]

    with :math:`b_i = (p_{i y_i}, 1 - p_{i y_i})`, the labelled class against all
    others, and :math:`q_i` the distribution among the others. Decoupled Knowledge
    Distillation (arXiv:2203.08679). The plain divergence is the sum with
    :math:`\alpha = 1` and :math:`\beta = 1 - p^t_{i y_i}`, which is small wherever
    the teacher is sure; here it is a constant.

    Differs from the authors' code: both parts are formed from log-probabilities
    (that code takes the logarithm of a summed softmax, minus infinity where it is
    saturated, and subtracts 1000 from the labelled logit). The authors have not
    tried it on maps.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor.
    The value does not change when a constant is added to all logits of a pixel.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One
            channel is the score z of a sigmoid: the two classes (0, z).
        teacher: logits, same shape; a pair of one and two channels fits as well.
            Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,). Rows of a box head include the background as a class.
        alpha: weight of the labelled class against the others, at least 0.
        beta: weight of the distribution among the others.
        temperature: T, above 0, a number or a scalar tensor; or one for each position
            or image, (B, 1, H, W), (B, 1, 1, 1) or (M, 1), its square inside the mean.
        ignore_index: pixels with this label do not count; nor do labels that are
            no class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count,
        0 with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: the shapes differ or are no scores, or ``labels`` or
            ``valid`` does not fit.
        ConfigError: ``temperature`` is not above 0, or a weight is negative.

    Example:
        >>> z = torch.tensor([[0.0, 1.0, 3.0]])
        >>> decoupled_kl_loss(z + 5, z, labels=torch.tensor([2])).item() < 1e-6
        True
        >>> round(decoupled_kl_loss(0 * z, z, labels=torch.tensor([2]), alpha=0).item(), 4)
        0.1109
    """
    owner = 'decoupled_kl_loss'
    check_finite_number(owner, 'alpha', alpha, minimum=0)
    check_finite_number(owner, 'beta', beta, minimum=0)
    student, teacher = _scores(owner, student, teacher)
    check_temperature(owner, temperature, student)
    index, counts = _labelled(owner, student, labels, ignore_index, valid)
    log_t = teacher_log_of_classes(teacher, temperature, counts)
    student, teacher = _only(counts, student, teacher.detach())
    one = torch.zeros_like(student, dtype=torch.bool).scatter_(1, index.unsqueeze(1), True)

    def split(logits: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_p.clamp(min=LOWEST)
        labelled = log_p.gather(1, index.unsqueeze(1))
        # Not log(1 - p): that is minus infinity as soon as p rounds to 1.
        others = log_p.masked_fill(one, -torch.inf).logsumexp(1, keepdim=True)
        # From the logits, where differences are exact; minus infinity of an impossible class must stay a
        # number, since it may be all that is left.
        kept = logits.clamp(min=torch.finfo(logits.dtype).min).masked_fill(one, -torch.inf)
        among = torch.log_softmax(kept, dim=1)
        return torch.cat([labelled, others], dim=1), among.masked_fill(one, LOWEST)

    against_s, among_s = split(divided(student, temperature), log_of_classes(student, temperature))
    against_t, among_t = split(divided(teacher, temperature), log_t)
    both = alpha * kl_along(against_s, against_t, 1) + beta * kl_along(among_s, among_t, 1)
    return tempered_mean(both, temperature, counts)


@full_precision
def weighted_soft_label_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor,
    temperature: float | Tensor = 2.0,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy to the teacher's soft labels, weighted where the student lags behind.

    .. math::
        L = \frac{T^2}{|V|} \sum_{i \in V} w_i \Big(-\sum_c p^t_{ic} \log p^s_{ic}\Big), \quad
        w_i = 1 - \exp\!\left(-\frac{\mathrm{CE}^s_i}{\mathrm{CE}^t_i + 10^{-7}}\right)

    with :math:`p = \mathrm{softmax}_C(z / T)` and CE the cross-entropy with the
    label at temperature 1. Weighted soft labels (arXiv:2102.00650): a sample that
    the student already has better than the teacher is hardly distilled. As in the
    authors' code this is the cross-entropy, not the divergence: it is *not* 0 on
    itself, its gradient is that of the weighted divergence (for a number as
    temperature). Differs: any number of classes, maps, and pixels left out.

    The gradient reaches ``student``, and ``temperature`` where that is a tensor;
    the weights carry none.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. One
            channel is the score z of a sigmoid: the two classes (0, z).
        teacher: logits, same shape; a pair of one and two channels fits as well.
            Detached here.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,).
        temperature: T, above 0, a number or a scalar tensor; or one for each position
            or image, (B, 1, H, W), (B, 1, 1, 1) or (M, 1), its square inside the mean.
        ignore_index: pixels with this label do not count; nor do labels that are
            no class.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count,
        0 with a graph if there is none. Time and memory O(B C N).

    Raises:
        ShapeError: the shapes differ or are no scores, or ``labels`` or
            ``valid`` does not fit.
        ConfigError: ``temperature`` is not above 0.

    Example:
        >>> z = torch.tensor([[0.0, 0.0]])
        >>> round(weighted_soft_label_loss(z, z, labels=torch.tensor([1]), temperature=1).item(), 4)
        0.4382
    """
    owner = 'weighted_soft_label_loss'
    student, teacher = _scores(owner, student, teacher)
    check_temperature(owner, temperature, student)
    index, counts = _labelled(owner, student, labels, ignore_index, valid)
    (student,) = _only(counts, student)

    def hardness(log_p: Tensor) -> Tensor:
        return -log_p.gather(1, index.unsqueeze(1)).squeeze(1).clamp(min=LOWEST)

    hard_s = hardness(log_of_classes(student.detach(), 1.0))
    hard_t = hardness(teacher_log_of_classes(teacher, 1.0, counts))
    weight = -torch.expm1(-hard_s / (hard_t + 1e-7))
    log_s = log_of_classes(student, temperature).clamp(min=LOWEST)
    p_t = teacher_log_of_classes(teacher, temperature, counts).exp()
    return tempered_mean(weight * -(p_t * log_s).sum(1), temperature, counts)


@full_precision
def zipf_label_loss(
    student: Tensor,
    teacher: Tensor | None = None,
    *,
    labels: Tensor,
    kernel_size: int = 7,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the wrong classes' probabilities from Zipf's law over votes.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \mathrm{KL}(q_i \| \hat p_i), \quad
        q_{ik} \propto 1 / r_{ik}, \; k \ne y_i

    with :math:`\hat p_i` the softmax over all classes but the labelled one and
    :math:`r_{ik}` the rank of class k by the votes it got, 1 for the most. Zipf's
    label smoothing (arXiv:2207.12980), which lets every cell of the last feature
    map vote for the image; in this port for maps the pixels of a k x k window
    vote for its centre, each for the class it scores highest. Ties share the best
    rank. No probabilities of a teacher are used: ``teacher``, where given, only
    casts the votes, else the student does.

    Differs from the authors' code, which ranks the labelled class along with the
    others before it drops it.

    The gradient reaches ``student`` through :math:`\hat p` only. The value does
    not change when a constant is added to all logits of a pixel.

    Args:
        student: logits, shape (B, C, H, W), any float dtype; of two classes (or
            the one channel of a sigmoid) the value is 0.
        teacher: logits whose highest class is the vote, same shape; detached.
            ``None``: the student's own.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest.
        kernel_size: side k of the window, odd; at the border it is cut.
        ignore_index: pixels with this label neither count nor vote; nor do those
            whose label is no class.
        valid: pixels that count and vote, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count,
        0 with a graph if there is none. Time O(B N C (k + log C)), memory O(B C N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``labels`` or
            ``valid`` does not fit.
        ConfigError: ``kernel_size`` is not odd.

    Example:
        >>> z = torch.tensor([5.0, 1.0, 0.0]).view(1, 3, 1, 1)
        >>> round(zipf_label_loss(z, labels=torch.zeros(1, 1, 1, dtype=torch.int64)).item(), 4)
        0.1201
    """
    owner = 'zipf_label_loss'
    if not is_count(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(f'{owner}: `kernel_size` must be an odd integer above 0, got {kernel_size!r}.')
    check_ndim(owner, 'student', student, 4, '(B, C, H, W)')
    student, voter = _scores(owner, student, student if teacher is None else teacher)
    index, counts = _labelled(owner, student, labels, ignore_index, valid)
    student, voter = _only(counts, student, voter.detach())
    classes = student.shape[1]
    one = torch.zeros_like(student, dtype=torch.bool).scatter_(1, index.unsqueeze(1), True)

    ballots = torch.zeros_like(student).scatter_(1, voter.argmax(1, keepdim=True), 1.0) * counts.unsqueeze(1)
    # One axis after the other. Sums of ones and zeros are exact, so that ties stay ties.
    half = kernel_size // 2
    votes = torch_functional.avg_pool2d(ballots, (kernel_size, 1), 1, (half, 0), divisor_override=1)
    votes = torch_functional.avg_pool2d(votes, (1, kernel_size), 1, (0, half), divisor_override=1)
    # The labelled class stands behind all others; the rank is 1 + the number of classes with more votes.
    votes = votes.masked_fill(one, -1.0).movedim(1, -1).contiguous()
    ahead = classes - torch.searchsorted(votes.sort(dim=-1).values, votes, right=True)
    zipf = (1.0 / (1 + ahead).to(student.dtype)).movedim(-1, 1).masked_fill(one, 0.0)
    zipf = zipf / zipf.sum(1, keepdim=True)

    kept = student.clamp(min=torch.finfo(student.dtype).min).masked_fill(one, -torch.inf)
    among = torch.log_softmax(kept, dim=1).masked_fill(one, 0.0).clamp(min=LOWEST)
    loss = masked_mean((torch.special.xlogy(zipf, zipf) - zipf * among).sum(1), counts)
    # A vote is a whole number, whatever it was made of; a class may be impossible.
    return loss + nan_unless_finite(voter.clamp(min=torch.finfo(voter.dtype).min))


@full_precision
def map_logits(logits: Tensor, class_map: Sequence[int]) -> Tensor:
    r"""Log-probabilities of coarse classes from the scores of fine ones.

    .. math:: \log p_k = \log \sum_{j : m(j) = k} \mathrm{softmax}_C(z)_j

    For a teacher whose classes are finer than the student's, or in another order:
    the probabilities of all its classes that are one class of the student are
    added up. The result may stand wherever scores may: its softmax is p, less
    what went to classes without a counterpart.

    Args:
        logits: shape (B, C, H, W) or (M, C), any float dtype; one channel is the
            score of class 1 of two.
        class_map: for each of the C classes the number k of the class it belongs
            to, from 0 on without a gap; -1: it has no counterpart.

    Returns:
        Shape (B, K, H, W) or (M, K), at least float32, differentiable; classes in
        the order of their number. Time and memory O(B C N).

    Raises:
        ShapeError: ``logits`` is neither 4-D nor 2-D, or C is not the length of
            ``class_map``.
        ConfigError: ``class_map`` does not number classes 0, 1, ... without a gap.

    Example:
        >>> z = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
        >>> map_logits(z, [1, 0, 1, -1]).exp().mul(10).round().tolist()
        [[2.0, 4.0]]
    """
    owner = 'map_logits'
    check_ndim(owner, 'logits', logits, (2, 4), '(B, C, H, W) or (M, C)')
    numbers = list(class_map)
    if any(not is_count(k) or k < -1 for k in numbers):
        raise ConfigError(f'{owner}: `class_map` must hold integers of at least -1, got {numbers!r}.')
    reached = sorted(set(numbers) - {-1})
    if not reached or reached != list(range(len(reached))):
        raise ConfigError(
            f'{owner}: `class_map` must number the classes it maps to 0, 1, ... without a gap, got {numbers!r}.'
        )
    if logits.shape[1] == 1:
        logits = two_class_logits(logits)
    if logits.shape[1] != len(numbers):
        raise ShapeError(
            f'{owner}: `logits` must have the {len(numbers)} classes of `class_map`, got {tuple(logits.shape)}.'
        )
    log_p = torch.log_softmax(logits, dim=1).clamp(min=LOWEST)
    groups = [[j for j, k in enumerate(numbers) if k == wanted] for wanted in reached]
    if all(len(group) == 1 for group in groups):
        return log_p[:, [group[0] for group in groups]]
    return torch.stack([log_p[:, group].logsumexp(1) for group in groups], dim=1)
