r"""Adversarial terms of a critic that tells the teacher's maps from the student's.

Shorthand: B images, C channels, H x W the map, h x w the critic's score map
(1 x 1 where the critic has shrunk the map to one position).

Unlike the other losses, both arguments of :func:`critic_loss` keep their
gradient: they are scores of the critic, which learns from both. What must not
learn (the networks' maps) is detached before the critic sees it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmstructkd.errors import ShapeError, check_ndim, check_one_of, check_same
from mmstructkd.functional.core.precision import full_precision

__all__ = ['ADVERSARIAL_MODES', 'adversarial_loss', 'critic_loss', 'gradient_penalty']

ADVERSARIAL_MODES = ('wgan', 'hinge')


@full_precision
def critic_loss(
    student_score: Tensor,
    teacher_score: Tensor,
    *,
    mode: str,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Objective of the critic: high scores for the teacher, low for the student.

    .. math::
        L_{wgan} = \overline{D(z^s)} - \overline{D(z^t)}, \qquad
        L_{hinge} = \overline{\max(0, 1 + D(z^s))} + \overline{\max(0, 1 - D(z^t))}

    Holistic term of Structured Knowledge Distillation (arXiv:1903.04197) and
    the hinge form of SAGAN (arXiv:1805.08318). As in the authors' code, the
    gradient penalty is a term of its own (:func:`gradient_penalty`).

    Args:
        student_score: the critic's scores of the student's maps, any shape
            that starts with B, e.g. :math:`(B, 1, h, w)`. Not detached.
        teacher_score: the critic's scores of the teacher's maps, the same
            shape. Not detached: the critic learns from both.
        mode: ``'wgan'`` or ``'hinge'``.
        valid: images that count, bool, shape :math:`(B,)`. ``None``: all.

    Returns:
        Scalar, no unit, at least float32: mean over the scores of the images
        that count, 0 with a graph if there is none. The wgan form is unbounded,
        the hinge form at least 0.

    Raises:
        ConfigError: ``mode`` is unknown.
        ShapeError: the scores differ in shape, or ``valid`` is not (B,).

    Example:
        >>> critic_loss(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 2.0]), mode='wgan')
        tensor(-1.5000)
        >>> critic_loss(torch.tensor([0.5, -0.5]), torch.tensor([1.0, 2.0]), mode='hinge')
        tensor(1.)
    """
    owner = 'critic_loss'
    check_one_of(owner, 'mode', mode, ADVERSARIAL_MODES)
    axes = range(student_score.dim())
    check_same(owner, student_score, teacher_score, axes, 'their shape', 'Score both maps with the same critic.')
    if mode == 'wgan':
        return _mean_score(owner, student_score, valid) - _mean_score(owner, teacher_score, valid)
    fake = torch.relu(1 + student_score)
    real = torch.relu(1 - teacher_score)
    return _mean_score(owner, fake, valid) + _mean_score(owner, real, valid)


@full_precision
def adversarial_loss(student_score: Tensor, *, mode: str, valid: Tensor | None = None) -> Tensor:
    r"""What the student gets from the critic: its scores shall rise.

    .. math:: L = -\overline{D(z^s)}

    Holistic term of Structured Knowledge Distillation (arXiv:1903.04197), the
    student's side. Both modes have the same form, as in the authors' code.

    Args:
        student_score: the critic's scores of the student's maps, any shape
            that starts with B, e.g. :math:`(B, 1, h, w)`.
        mode: ``'wgan'`` or ``'hinge'``.
        valid: images that count, bool, shape :math:`(B,)`. ``None``: all.

    Returns:
        Scalar, no unit, at least float32, unbounded: minus the mean over the
        scores of the images that count, 0 with a graph if there is none.

    Raises:
        ConfigError: ``mode`` is unknown.
        ShapeError: ``valid`` is not (B,).

    Example:
        >>> adversarial_loss(torch.tensor([1.0, 2.0]), mode='wgan')
        tensor(-1.5000)
    """
    owner = 'adversarial_loss'
    check_one_of(owner, 'mode', mode, ADVERSARIAL_MODES)
    return -_mean_score(owner, student_score, valid)


@full_precision
def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    student_map: Tensor,
    teacher_map: Tensor,
    *,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance of the critic's slope from 1, between student and teacher.

    .. math::
        L = \frac{1}{B} \sum_b \left( \lVert \nabla_{\hat z_b} \textstyle\sum D(\hat z) \rVert_2 - 1 \right)^2,
        \quad \hat z_b = u_b z^t_b + (1 - u_b) z^s_b, \quad u_b \sim U(0, 1)

    Gradient penalty of WGAN-GP (arXiv:1704.00028), as the holistic term of
    Structured Knowledge Distillation uses it: one u an image, the norm over
    all C, H and W. The authors' factor of 10 is the caller's. Differs from the
    authors' code: the norm has gradient 0 at 0, theirs gives NaN there.

    The result differentiates with respect to the critic's parameters (second
    order), so the critic must consist of twice differentiable parts: no fused
    attention, no synchronised BatchNorm. Both maps are detached here. A critic
    which masks its input leaves the masked positions out of the norm. Where
    gradients are off, the value is the same and carries no graph.

    Args:
        critic: from maps :math:`(B, C, H, W)` to scores of any shape. It runs
            with autocast off; call the bare module, not its DDP wrapper.
        student_map: the student's maps, shape :math:`(B, C, H, W)`.
        teacher_map: the teacher's maps, the same shape.
        weights: the u, in [0, 1], shape :math:`(B,)`. ``None``: drawn from
            ``generator``.
        generator: random numbers for the u, on any device. ``None``: the
            global generator of the CPU.
        valid: images that count, bool, shape :math:`(B,)`. ``None``: all.

    Returns:
        Scalar of at least 0, no unit, at least float32: mean over the images
        that count, 0 with a graph if there is none. Costs one forward and two
        backward passes of the critic.

    Raises:
        ShapeError: the maps are not 4-D or differ in shape, or ``weights`` or
            ``valid`` is not (B,).

    Example:
        >>> student, teacher = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
        >>> gradient_penalty(lambda z: 2 * z.sum(dim=(1, 2, 3)), student, teacher)  # the slope is 4
        tensor(9.)
    """
    owner = 'gradient_penalty'
    check_ndim(owner, 'student_map', student_map, 4, '(B, C, H, W)')
    check_same(owner, student_map, teacher_map, range(4), 'B, C, H and W', 'Resize the teacher first.')
    batch = student_map.shape[0]
    if weights is None:
        device = 'cpu' if generator is None else generator.device
        weights = torch.rand(batch, generator=generator, device=device)
    elif weights.shape != (batch,):
        raise ShapeError(f'{owner}: `weights` must have shape {(batch,)}, got {tuple(weights.shape)}.')
    u = weights.to(student_map).view(batch, 1, 1, 1)

    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        between = (u * teacher_map.detach() + (1 - u) * student_map.detach()).requires_grad_()
        score = critic(between)
        (slope,) = torch.autograd.grad(score.sum(), between, create_graph=keep_graph)
    # `vector_norm` takes 0 as its gradient at 0, where sqrt(sum(x ** 2)) gives NaN.
    norm = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return _mean_score(owner, (norm - 1) ** 2, valid)


def _mean_score(owner: str, score: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the scores of the images that count; 0 with a graph if none does."""
    if valid is None:
        return score.mean()
    if valid.dim() != 1 or score.dim() == 0 or valid.shape[0] != score.shape[0]:
        raise ShapeError(
            f'{owner}: `valid` must have shape (B,) for scores {tuple(score.shape)}, got {tuple(valid.shape)}.'
        )
    image = score.flatten(1).mean(1) if score.dim() > 1 else score
    # `where` and not a product: a score that does not count may be infinite.
    kept = torch.where(valid.bool(), image, torch.zeros_like(image))
    return kept.sum() / valid.sum().clamp(min=1)
