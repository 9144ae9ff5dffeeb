r"""Stages that learn for themselves, with the gradient cut between them.

Shape shorthand: B images, D channels, H x W the grid, N = H W.
"""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_finite_number
from mmstructkd.functional.attention_transfer import attention_transfer_loss
from mmstructkd.functional.core.softening import scale_gradient
from mmstructkd.functional.feature_mse import feature_mse_loss

__all__ = ['gate_gradient', 'local_learning_loss']


def gate_gradient(tensor: Tensor, *, share: float = 0.0) -> Tensor:
    """Let only a share of the gradient through, values as they are.

    What stands between two stages of a network that learn for themselves: with a
    share of 0 what comes behind does not reach what lies before.

    Args:
        tensor: finite, any shape.
        share: of the gradient, in [0, 1]. 0 cuts the graph: what lies before must
            have a loss of its own, or its parameters get no gradient at all.

    Returns:
        The same values.

    Raises:
        ConfigError: ``share`` is not in [0, 1].

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> gate_gradient(x).requires_grad
        False
        >>> torch.autograd.grad(gate_gradient(x, share=0.25).sum(), x)[0]
        tensor([0.2500, 0.2500])
    """
    check_finite_number('gate_gradient', 'share', share, minimum=0)
    if share > 1:
        raise ConfigError(f'gate_gradient: `share` must lie in [0, 1], got {share!r}.')
    return tensor.detach() if share == 0 else scale_gradient(tensor, share)


def local_learning_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    hidden_loss: Tensor | None = None,
    balance: float = 0.5,
    feature_weight: float = 1.0,
    power: float = 2,
    reduction: str = 'sum',
    valid: Tensor | None = None,
) -> Tensor:
    r"""Objective of one stage that learns without the gradient of those behind it.

    .. math::
        L = \alpha \, L_\mathrm{hidden} + (1 - \alpha) \, L_\mathrm{attention}
          + \beta \, \frac{1}{D |V|} \sum_d \sum_{i \in V} (f^s_{di} - f^t_{di})^2

    After a summary of LAKD (arXiv:2408.11478); its own code was not found, nor what
    exactly it weighs attention by. Attention is :func:`attention_transfer_loss`
    here, and ``hidden_loss`` whatever the stage is asked for by itself, such as the
    task loss of an auxiliary head on it.

    The gradient reaches ``student``, and what ``hidden_loss`` comes from.

    Args:
        student: features of the stage, shape (B, D, H, W), any float dtype; with
            ``feature_weight=0`` the widths may differ.
        teacher: features, shape (B, D, H, W). Detached here.
        hidden_loss: scalar. ``None``: 0, and with it ``balance`` still weighs.
        balance: :math:`\alpha`, in [0, 1].
        feature_weight: :math:`\beta`, at least 0.
        power: of the attention, see :func:`attention_map`.
        reduction: of the attention, ``'sum'`` or ``'mean'`` over positions.
        valid: positions that count, bool, shape (B, h, w), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Scalar, at least float32; the parts of the features are 0 with a graph where
        no position counts. Time and memory O(B D N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, ``hidden_loss`` is no
            scalar, or ``valid`` is not a map of B images.
        ConfigError: ``balance`` is not in [0, 1], ``feature_weight`` negative,
            ``power`` below 1 or ``reduction`` neither.

    Example:
        >>> import torch
        >>> s, t = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 1, 1, 2)
        >>> local_learning_loss(s, t, hidden_loss=torch.tensor(4.0), balance=0.25).item()
        3.5
    """
    owner = 'local_learning_loss'
    check_finite_number(owner, 'balance', balance, minimum=0)
    if balance > 1:
        raise ConfigError(f'{owner}: `balance` must lie in [0, 1], got {balance!r}.')
    check_finite_number(owner, 'feature_weight', feature_weight, minimum=0)
    loss = (1 - balance) * attention_transfer_loss(student, teacher, power=power, reduction=reduction, valid=valid)
    if feature_weight:
        loss = loss + feature_weight * feature_mse_loss(student, teacher, valid=valid)
    if hidden_loss is None:
        return loss
    if hidden_loss.dim() != 0:
        raise ShapeError(f'{owner}: `hidden_loss` must be a scalar, got shape {tuple(hidden_loss.shape)}.')
    return loss + balance * hidden_loss
