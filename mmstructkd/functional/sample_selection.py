r"""Which samples or pixels to learn from, as a teacher (and the student) see them.

Shape shorthand: n samples, B images, C classes, H x W the grid, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import (
    ConfigError,
    ShapeError,
    check_finite_number,
    check_ndim,
    check_one_of,
    check_positive,
    check_same,
)
from mmstructkd.functional.core.binary import two_classes
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.score_fusion import score_confidence
from mmstructkd.functional.core.softening import kl_along, log_of_classes
from mmstructkd.functional.core.valid import valid_entries, valid_pixels

__all__ = [
    'confident_pixels',
    'filter_by_quantile',
    'image_mean',
    'joint_confidence',
    'score_disagreement',
    'value_disagreement',
]

SIDES = ('both', 'teacher', 'student')


def _quantiles(errors: Tensor, members: Tensor, quantile: float) -> Tensor:
    """Quantile of the members of each group, (G,) from (n,) and (G, n); NaN for a group without any."""
    sorted_errors = torch.where(members, errors, torch.inf).sort(dim=1).values
    number = members.sum(dim=1)
    # Linear between the two neighbours, as numpy and torch have it.
    place = quantile * (number - 1).clamp(min=0).double()
    low = place.floor().long()
    high = (low + 1).minimum((number - 1).clamp(min=0))
    first, second = (sorted_errors.gather(1, k[:, None]).squeeze(1) for k in (low, high))
    step = (place - low).to(errors.dtype)
    cut = torch.where(step == 0, first, first + step * (second - first))
    return torch.where(number > 0, cut, torch.nan)


@full_precision
def filter_by_quantile(
    errors: Tensor,
    *,
    quantile: float,
    reference: Tensor | None = None,
    classes: Tensor | None = None,
    reference_classes: Tensor | None = None,
) -> Tensor:
    r"""Samples whose error lies below a quantile of errors.

    .. math:: \mathrm{kept}_i \iff e_i < Q_q(\{r_j : c_j = c_i\})

    Filter of cGAN-KD (UBCDingXin/cGAN-KD): of generated samples those that the
    teacher has an error on below a cutoff, before their labels are replaced by the
    teacher's. For classification that is the cross-entropy of the given class,
    q = 0.9, with a cutoff for each class from other samples of it; for regression
    the distance of the teacher's value from the label, q = 0.7, one cutoff over all
    samples themselves. As there, a sample *at* the cutoff is not kept, and
    quantiles are interpolated linearly.

    Args:
        errors: of each sample, shape (n,), any float dtype. Those that are NaN are
            never kept.
        quantile: q, in [0, 1].
        reference: errors r that the cutoff is from, shape (m,); NaN are left out.
            ``None``: ``errors`` themselves.
        classes: class of each sample, integer of at least 0, shape (n,), for a cutoff
            in each class. ``None``: one for all.
        reference_classes: likewise of ``reference``, (m,); needed where both are
            given.

    Returns:
        Bool, shape (n,). Without a reference for its class a sample is not kept.
        Time O(n log n), with K classes O(K n log n), memory O(K n), and the host waits
        for the device.

    Raises:
        ShapeError: an argument is not 1-D, or shapes differ.
        ConfigError: ``quantile`` is not in [0, 1], or classes are given of one side
            only.

    Example:
        >>> filter_by_quantile(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), quantile=0.5).tolist()
        [True, True, False, False, False]
        >>> filter_by_quantile(torch.tensor([1.0, 1.0]), quantile=0.5, reference=torch.tensor([0.0, 5.0]),
        ...                    classes=torch.tensor([0, 1]), reference_classes=torch.tensor([0, 1])).tolist()
        [False, True]
    """
    owner = 'filter_by_quantile'
    check_finite_number(owner, 'quantile', quantile, minimum=0)
    if quantile > 1:
        raise ConfigError(f'{owner}: `quantile` must lie in [0, 1], got {quantile!r}.')
    check_ndim(owner, 'errors', errors, 1, '(n,)')
    if reference is not None:
        check_ndim(owner, 'reference', reference, 1, '(m,)')
        if (classes is None) != (reference_classes is None):
            raise ConfigError(
                f'{owner}: `classes` and `reference_classes` must be given together, got '
                f'{"no" if classes is None else "some"} and {"no" if reference_classes is None else "some"} classes.'
            )
    elif reference_classes is not None:
        raise ConfigError(f'{owner}: `reference_classes` must come with `reference`, got none of these.')
    else:
        reference, reference_classes = errors, classes
    for name, given, like in (('classes', classes, errors), ('reference_classes', reference_classes, reference)):
        if given is not None and given.shape != like.shape:
            raise ShapeError(f'{owner}: `{name}` must have shape {tuple(like.shape)}, got {tuple(given.shape)}.')
    errors, reference = errors.detach(), reference.detach()
    known = ~reference.isnan()
    if len(errors) == 0 or len(reference) == 0:
        return torch.zeros_like(errors, dtype=torch.bool)
    if classes is None or reference_classes is None:
        return errors < _quantiles(reference, known[None], quantile)
    groups = classes.unique()
    cuts = _quantiles(reference, (reference_classes == groups[:, None]) & known, quantile)
    return errors < cuts[torch.searchsorted(groups, classes)]


@full_precision
def joint_confidence(
    student: Tensor, teacher: Tensor, *, by: str = 'both', measure: str = 'maximum', temperature: float = 1.0
) -> Tensor:
    r"""How sure teacher and student are of a pixel, together.

    .. math:: c_i = c(z^t_i) \, c(z^s_i)

    with c of :func:`score_confidence`; only one of the factors for ``by='teacher'``
    or ``'student'``. Selection of KD3 (arXiv:2307.11469), as we read its summary:
    samples from the web whose teacher and student are sure of them. No code of the
    authors was found.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype. Detached here.
        teacher: logits, shape (B, C', H, W) or (M, C'); classes may differ. Detached
            here.
        by: ``'both'``, ``'teacher'`` or ``'student'``.
        measure: of :func:`score_confidence`.
        temperature: of the probabilities, above 0.

    Returns:
        Shape (B, H, W) or (M,), in [0, 1], at least float32, without a graph.

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, or their places differ.
        ConfigError: ``by`` or ``measure`` is none of those, or ``temperature`` not
            above 0.

    Example:
        >>> sure, unsure = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> joint_confidence(unsure, sure), joint_confidence(unsure, sure, by='teacher')
        (tensor([0.4500]), tensor([0.9000]))
    """
    owner = 'joint_confidence'
    check_one_of(owner, 'by', by, SIDES)
    for name, logits in (('student', student), ('teacher', teacher)):
        check_ndim(owner, name, logits, (2, 4), '(B, C, H, W) or (M, C)')
    axes, shared = ((0, 2, 3), 'B, H and W') if student.dim() == 4 else ((0,), 'M')
    check_same(owner, student, teacher, axes, shared, 'Resize the teacher with resize_map.')
    sides = {'both': (teacher, student), 'teacher': (teacher,), 'student': (student,)}[by]
    found = [score_confidence(z.detach(), by=measure, temperature=temperature) for z in sides]
    return found[0] if len(found) == 1 else found[0] * found[1]


def confident_pixels(
    student: Tensor,
    teacher: Tensor,
    *,
    minimum: float = 0.9,
    by: str = 'both',
    measure: str = 'maximum',
    temperature: float = 1.0,
    valid: Tensor | None = None,
) -> Tensor:
    """Pixels that teacher and student are sure enough of, as the mask of a loss.

    Args:
        student: logits, shape (B, C, H, W) or (M, C), any float dtype.
        teacher: logits, shape (B, C', H, W) or (M, C'); classes may differ.
        minimum: the least :func:`joint_confidence` that counts, in [0, 1]. For
            ``by='both'`` a product of two.
        by: ``'both'``, ``'teacher'`` or ``'student'``.
        measure: of :func:`score_confidence`.
        temperature: of the probabilities, above 0.
        valid: pixels that count at all, bool, shape (B, h, w), brought to H x W by
            nearest, or (M,). ``None``: all.

    Returns:
        Bool, shape (B, H, W) or (M,).

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, their places differ, or
            ``valid`` does not fit.
        ConfigError: ``minimum`` is not in [0, 1], or another argument is none of
            those.

    Example:
        >>> z = torch.tensor([[3.0, 0.0], [0.1, 0.0]])
        >>> confident_pixels(z, z, minimum=0.8)
        tensor([ True, False])
    """
    owner = 'confident_pixels'
    check_finite_number(owner, 'minimum', minimum, minimum=0)
    if minimum > 1:
        raise ConfigError(f'{owner}: `minimum` must lie in [0, 1], got {minimum!r}.')
    sure = joint_confidence(student, teacher, by=by, measure=measure, temperature=temperature) >= minimum
    valid_mask = valid_pixels(owner, student, valid=valid)
    return sure if valid_mask is None else sure & valid_mask


@full_precision
def score_disagreement(first: Tensor, second: Tensor) -> Tensor:
    r"""How far two answers of a network to one image lie apart, pixel by pixel.

    .. math:: d_i = \tfrac12 \mathrm{KL}(p_i \| m_i) + \tfrac12 \mathrm{KL}(q_i \| m_i), \quad m = \tfrac12 (p + q)

    For images without labels: the answer to an image and that to its flip, brought
    back (:func:`turn_back`). Symmetric; 0 where both agree.

    Args:
        first: logits, shape (B, C, H, W) or (M, C), any float dtype. One channel is the
            score of a sigmoid. Detached here.
        second: likewise.

    Returns:
        Shape (B, H, W) or (M,), in [0, log 2] nats, at least float32, without a
        graph.

    Raises:
        ShapeError: an input is neither 4-D nor 2-D, or the shapes differ.

    Example:
        >>> z = torch.tensor([[50.0, -50.0]])
        >>> score_disagreement(z, z).item(), round(score_disagreement(z, -z).item(), 4)
        (0.0, 0.6931)
    """
    owner = 'score_disagreement'
    for name, logits in (('first', first), ('second', second)):
        check_ndim(owner, name, logits, (2, 4), '(B, C, H, W) or (M, C)')
    if first.shape != second.shape:
        raise ShapeError(
            f'{owner}: `first` and `second` must share one shape, got {tuple(first.shape)} and {tuple(second.shape)}.'
        )
    log_p, log_q = (log_of_classes(two_classes(z.detach()), 1.0) for z in (first, second))
    half = torch.full((), 0.5, dtype=log_p.dtype, device=log_p.device).log()
    middle = torch.logaddexp(log_p, log_q) + half
    return ((kl_along(middle, log_p, 1) + kl_along(middle, log_q, 1)) / 2).clamp(min=0)


@full_precision
def value_disagreement(first: Tensor, second: Tensor, *, eps: float = 1e-6) -> Tensor:
    r"""How far two positive values lie apart, as a share of their mean.

    .. math:: d_i = \frac{2 |a_i - b_i|}{|a_i| + |b_i| + 2 \epsilon}

    For depth, where :func:`score_disagreement` has no scores, and for the distance
    of a teacher's depth from a label.

    Args:
        first: values of at least 0, shape (B, 1, H, W), (B, H, W) or (n,), any float
            dtype. Detached here.
        second: likewise.
        eps: in units of the values, above 0.

    Returns:
        Same shape, in [0, 2], at least float32, without a graph.

    Raises:
        ShapeError: the shapes differ.
        ConfigError: ``eps`` is not above 0.

    Example:
        >>> value_disagreement(torch.tensor([1.0, 3.0]), torch.tensor([3.0, 3.0])).round(decimals=3)
        tensor([1., 0.])
    """
    owner = 'value_disagreement'
    check_positive(owner, 'eps', eps)
    if first.shape != second.shape:
        raise ShapeError(
            f'{owner}: `first` and `second` must share one shape, got {tuple(first.shape)} and {tuple(second.shape)}.'
        )
    first, second = first.detach(), second.detach()
    return 2 * (first - second).abs() / (first.abs() + second.abs() + 2 * eps)


@full_precision
def image_mean(values: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """One number an image out of one a pixel: its error, or how sure a network is of it.

    Args:
        values: shape (B, H, W), any float dtype, e.g. from :func:`label_losses` or
            :func:`score_confidence`. Detached here.
        valid: pixels that count, bool, shape (B, H, W). ``None``: all.

    Returns:
        Shape (B,), at least float32, without a graph: the mean over the pixels that
        count, NaN for an image without any, which :func:`filter_by_quantile` never
        keeps.

    Raises:
        ShapeError: ``values`` is not 3-D, or the shapes differ.

    Example:
        >>> image_mean(torch.tensor([[[1.0, 3.0]]]), valid=torch.tensor([[[False, True]]]))
        tensor([3.])
    """
    owner = 'image_mean'
    check_ndim(owner, 'values', values, 3, '(B, H, W)')
    values = values.detach()
    valid_mask = valid_entries(owner, values.shape, valid, like=values)
    number = valid_mask.flatten(1).sum(dim=1).to(values.dtype)
    # 0 / 0 is the NaN that is promised.
    return torch.where(valid_mask, values, 0).flatten(1).sum(dim=1) / number
