"""What a temperature does to scores, before a softmax turns them into a distribution.

Shape shorthand: B images, C classes, H x W the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ShapeError, check_finite_number, check_positive
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.sharing import once
from mmstructkd.functional.core.valid import zero_elsewhere

__all__ = [
    'LOWEST',
    'bounded_temperature',
    'check_temperature',
    'divided',
    'kl_along',
    'log_of_classes',
    'log_of_positions',
    'scale_gradient',
    'standardize_logits',
    'teacher_log_of_classes',
    'tempered_mean',
]

#: Logits near the end of the range make a log-probability of minus infinity, and the term of a class
#: that the teacher gives probability 0 would then be 0 * inf = NaN.
LOWEST = -1e30


def check_temperature(
    owner: str,
    temperature: float | Tensor,
    scores: Tensor | None = None,
    *,
    per: tuple[str, ...] = ('position', 'image'),
) -> None:
    """Raise unless ``temperature`` is a finite number above 0, a scalar tensor, or one that fits scores.

    The value of a tensor is not looked at: that would wait for the device.

    Args:
        owner: who asks, for the message.
        temperature: the value.
        scores: shape (B, C, H, W) or (M, C); given, the temperature may also have the
            shape (B, 1, H, W) or (M, 1), one a position, or (B, 1, 1, 1), one an image.
        per: which of these are meant.

    Raises:
        ConfigError: a number that is not above 0, or no number.
        ShapeError: a tensor with other axes.

    Example:
        >>> check_temperature('doc', 4.0)
        >>> check_temperature('doc', torch.tensor(4.0))
    """
    if not isinstance(temperature, Tensor):
        check_positive(owner, 'temperature', temperature)
    elif temperature.dim() != 0:
        if scores is not None:
            shapes = {'position': (scores.shape[0], 1, *scores.shape[2:])}
            if scores.dim() == 4:
                shapes['image'] = (scores.shape[0], 1, 1, 1)
            allowed = [shape for name, shape in shapes.items() if name in per]
            if tuple(temperature.shape) in allowed:
                return
            raise ShapeError(
                f'{owner}: `temperature` must be a number or a tensor without axes, got shape '
                f'{tuple(temperature.shape)}. One for each {" or ".join(n for n in shapes if n in per)} has shape '
                f'{" or ".join(map(str, allowed))}.'
            )
        raise ShapeError(
            f'{owner}: `temperature` must be a number or a tensor without axes, got shape '
            f'{tuple(temperature.shape)}. Divide the scores beforehand where positions have temperatures of their own.'
        )


def divided(scores: Tensor, temperature: float | Tensor) -> Tensor:
    """Divide scores by a temperature.

    Args:
        scores: any shape; minus infinity is a class of probability 0.
        temperature: a number, or a scalar tensor, which a score of minus infinity
            gives no NaN for its gradient.

    Returns:
        Same shape.

    Example:
        >>> temperature = torch.tensor(2.0, requires_grad=True)
        >>> divided(torch.tensor([-torch.inf, 1.0]), temperature).softmax(0).sum().backward()
        >>> temperature.grad.item()
        0.0
    """
    if isinstance(temperature, Tensor):
        # Of each position's own, one may be below 1: the quotient must stay a number too.
        lowest = torch.finfo(scores.dtype).min
        scores = scores.clamp(min=lowest / 256 if temperature.dim() else lowest)
    return scores / temperature


def log_of_classes(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-probabilities of the classes at each position.

    Args:
        logits: shape (B, C, H, W) or (M, C).
        temperature: what they are divided by.

    Returns:
        Same shape.

    Example:
        >>> log_of_classes(torch.tensor([[0.0, 0.0]]), 2.0).exp()
        tensor([[0.5000, 0.5000]])
    """
    return torch.log_softmax(divided(logits, temperature), dim=1)


def teacher_log_of_classes(logits: Tensor, temperature: float | Tensor, valid_mask: Tensor | None) -> Tensor:
    """:func:`log_of_classes` of the teacher, once a step for all losses that ask.

    Args:
        logits: shape (B, C, H, W) or (M, C). Detached here.
        temperature: what they are divided by.
        valid_mask: positions that count, bool, shape (B, H, W) or (M,). ``None``: all.

    Returns:
        Same shape; 0 where a position does not count, whatever stands there.

    Example:
        >>> teacher_log_of_classes(torch.tensor([[torch.nan, 0.0]]), 2.0, torch.tensor([False]))
        tensor([[0., 0.]])
    """
    logits = logits.detach()
    if valid_mask is None:
        return once(log_of_classes, logits, temperature)
    if isinstance(temperature, Tensor):
        # NaN at an ignored position must not reach the temperature's gradient.
        logits = zero_elsewhere(logits, valid_mask)
    # Masked afterwards: other losses may count other positions.
    return zero_elsewhere(once(log_of_classes, logits, temperature), valid_mask)


def log_of_positions(scores: Tensor, temperature: float | Tensor, valid_mask: Tensor | None, dim: int = -1) -> Tensor:
    """Log-probabilities of the positions of each channel.

    Args:
        scores: shape (B, C, ...).
        temperature: what they are divided by.
        valid_mask: positions that count, bool, shape (B, 1, ...). ``None``: all.
        dim: axis of the positions.

    Returns:
        Same shape. Positions that do not count have probability 0; of an image
        where none counts the result is finite and means nothing.

    Example:
        >>> log_of_positions(torch.zeros(1, 1, 2), 4.0, torch.tensor([[[True, False]]])).exp()
        tensor([[[1., 0.]]])
    """
    if valid_mask is not None and isinstance(temperature, Tensor):
        # What stands at an ignored position must not reach the temperature's gradient either.
        scores = torch.where(valid_mask, scores, 0)
    scaled = divided(scores, temperature)
    if valid_mask is not None:
        # The lowest finite number, not minus infinity: an image without any position that counts must
        # stay free of NaN, also in its gradient.
        scaled = torch.where(valid_mask, scaled, torch.finfo(scaled.dtype).min)
    return torch.log_softmax(scaled, dim=dim)


def kl_along(log_s: Tensor, log_t: Tensor, dim: int) -> Tensor:
    """KL(t || s) along ``dim`` from log-probabilities.

    Finite for every input without NaN: a class of probability 0 in both adds 0.

    Args:
        log_s: the student's log-probabilities.
        log_t: the teacher's, broadcastable.
        dim: axis of the distribution.

    Returns:
        The divergence in nats, without the axis ``dim``.

    Example:
        >>> kl_along(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log(), 0).exp().item()
        2.0
    """
    log_t = log_t.clamp(min=LOWEST)
    return (log_t.exp() * (log_t - log_s.clamp(min=LOWEST))).sum(dim)


def tempered_mean(values: Tensor, temperature: float | Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the positions that count, times the square of the temperature; inside where each has its own.

    Args:
        values: shape (B, H, W), (M,), or (B, C) for channels of images.
        temperature: a number, a scalar tensor, or one with the axes of ``values`` and
            a second one of length 1 more.
        valid: bool, broadcastable to ``values``. ``None``: all.

    Returns:
        Scalar; 0 with a graph where nothing counts.

    Example:
        >>> tempered_mean(torch.ones(2), torch.tensor([[1.0], [3.0]]), None).item()
        5.0
    """
    if not isinstance(temperature, Tensor) or temperature.dim() == 0:
        return temperature**2 * masked_mean(values, valid)
    own = temperature.square().squeeze(1)
    if valid is not None:
        own = torch.where(valid.expand(values.shape), own, 1)
    return masked_mean(own * values, valid)


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """Return ``tensor`` as it is, with its gradient multiplied by ``factor``.

    Args:
        tensor: finite, any shape.
        factor: of the gradient; -1 reverses it.

    Returns:
        The same values.

    Example:
        >>> x = torch.ones((), requires_grad=True)
        >>> torch.autograd.grad(3 * scale_gradient(x, -1.0), x)[0].item()
        -3.0
    """
    fixed = tensor.detach()
    return fixed + factor * (tensor - fixed)


@full_precision
def standardize_logits(
    logits: Tensor, *, dim: int | tuple[int, ...] = 1, valid: Tensor | None = None, eps: float = 1e-4
) -> Tensor:
    r"""Scores of mean 0 and standard deviation 1 along the axes of their distribution.

    .. math:: \hat z = (z - \bar z) / \sigma(z)

    Logit standardisation (arXiv:2403.01427): a student need not copy the
    teacher's scale of the scores, only their relations. The deviation divides by
    one less than the number of scores, as in the authors' code; that code adds
    1e-7 to it, here it has a floor.

    The value does not change when the scores of a distribution are multiplied by
    a positive number, or a number is added to them.

    Args:
        logits: shape (B, C, H, W) or (N, C), any float dtype.
        dim: axes of the distribution: 1 for classes at each position, (2, 3) for
            positions of each channel.
        valid: positions that count, bool, shape (B, H, W) or (N,). Elsewhere the
            result is 0, whatever stands there. ``None``: all.
        eps: scores that differ by less, relative to the largest of them (or to
            1), count as equal; it bounds the gradient at 1 / eps or so, which half
            precision can hold.

    Returns:
        Same shape, at least float32; 0 where all scores of a distribution are
        equal. Time and memory O(B C H W).

    Example:
        >>> standardize_logits(torch.tensor([[0.0, 2.0, 4.0]])).tolist()
        [[-1.0, 0.0, 1.0]]
    """
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    mask = torch.ones_like(logits, dtype=torch.bool) if valid is None else valid.unsqueeze(1).expand_as(logits)
    logits = torch.where(mask, logits, 0)
    # Sums of scores near the end of the range, and their squares, would overflow.
    logits = logits / logits.detach().abs().amax(axes, keepdim=True).clamp(min=1)
    count = mask.sum(axes, keepdim=True)
    centred = torch.where(mask, logits - logits.sum(axes, keepdim=True) / count.clamp(min=1), 0)
    centred = centred / centred.detach().abs().amax(axes, keepdim=True).clamp(min=eps)
    freedom = (count - 1).clamp(min=1).to(centred.dtype)
    variance = centred.square().sum(axes, keepdim=True) / freedom
    # The largest one is 1 in size now, unless `eps` held it: there the deviation is constant, not 0.
    return centred / variance.clamp(min=1 / freedom).sqrt()


@full_precision
def bounded_temperature(scores: Tensor, *, lowest: float = 1.0, span: float = 20.0) -> Tensor:
    r"""Temperature between two bounds from a score without any.

    .. math:: T = T_0 + \Delta \, \sigma(x)

    The form of Curriculum Temperature (arXiv:2211.16231). Bounded on both sides: a
    temperature that learns against the student would otherwise silence any
    position by growing without end.

    Args:
        scores: x, any shape, any float dtype.
        lowest: :math:`T_0`, above 0.
        span: :math:`\Delta`, at least 0.

    Returns:
        Same shape, at least float32, in ``[lowest, lowest + span]``.

    Raises:
        ConfigError: a bound is out of range.

    Example:
        >>> bounded_temperature(torch.tensor([0.0, 1.0]))
        tensor([11.0000, 15.6212])
    """
    owner = 'bounded_temperature'
    check_positive(owner, 'lowest', lowest)
    check_finite_number(owner, 'span', span, minimum=0)
    return lowest + span * torch.sigmoid(scores)
