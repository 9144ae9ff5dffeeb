r"""Peers that learn from the class probabilities of one another.

Shape shorthand: K peers, B images, C classes, H x W the grid, N = H W, M rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ShapeError, check_ndim, check_one_of
from mmstructkd.functional.core.binary import two_classes
from mmstructkd.functional.pixelwise_kl import pixelwise_kl_loss

__all__ = ['mutual_kl_losses']

TOWARDS = ('others', 'mean')


def mutual_kl_losses(
    peers: Sequence[Tensor],
    *,
    temperature: float | Tensor = 1.0,
    towards: str = 'others',
    labels: Tensor | None = None,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> list[Tensor]:
    r"""Divergence of each of several peers from the others.

    .. math::
        L_k = \frac{1}{K - 1} \sum_{j \ne k} D(z_j, z_k), \quad
        D(a, b) = \frac{T^2}{|V|} \sum_{i \in V}
          \mathrm{KL}(\mathrm{softmax}(a_i / T) \| \mathrm{softmax}(b_i / T))

    Deep mutual learning (arXiv:1706.00384), at T = 1. ``towards='mean'``: each
    towards the mean of the logits of all, itself included,
    :math:`L_k = D(\bar z, z_k)`, at T = 3 what winycg/MCL does with logits. There,
    with more than two peers, all of these losses go to the last one, which is a
    slip and not kept.

    The gradient of the k-th loss reaches the k-th peer only, and ``temperature``
    where that is a tensor: what a peer looks up to is detached. So the sum of all
    can be differentiated at once.

    Args:
        peers: logits of each, at least two, shape (B, C, H, W) or (M, C), any
            float dtype. One channel is the score of a sigmoid.
        temperature: T, above 0, a number or a scalar tensor.
        towards: ``'others'`` or ``'mean'``.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest, or
            (M,); only compared with ``ignore_index``.
        ignore_index: pixels with this label do not count.
        valid: pixels that count, bool, shape as ``labels``. ``None``: all.

    Returns:
        One scalar a peer, in nats, at least float32: the mean over the pixels V
        that count, 0 with a graph if there is none. Time O(K^2 B C N), or
        O(K B C N) towards the mean.

    Raises:
        ShapeError: there are less than two peers, one is neither 4-D nor 2-D, or
            the shapes differ.
        ConfigError: ``temperature`` is not above 0, or ``towards`` is neither.

    Example:
        >>> z = torch.tensor([[0.0, 2.0]])
        >>> [round(loss.item(), 4) for loss in mutual_kl_losses([0 * z, z])]
        [0.3278, 0.4338]
    """
    owner = 'mutual_kl_losses'
    check_one_of(owner, 'towards', towards, TOWARDS)
    if len(peers) < 2:
        raise ShapeError(f'{owner}: `peers` must be at least 2, got {len(peers)}.')
    for peer in peers:
        check_ndim(owner, 'peers', peer, (2, 4), '(B, C, H, W) or (M, C)')
    peers = [two_classes(peer) for peer in peers]
    if any(peer.shape != peers[0].shape for peer in peers):
        raise ShapeError(
            f'{owner}: `peers` must share one shape, got {[tuple(peer.shape) for peer in peers]}. '
            'Resize with resize_map, or map classes with map_logits.'
        )

    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        return pixelwise_kl_loss(
            student, teacher, temperature=temperature, labels=labels, ignore_index=ignore_index, valid=valid
        )

    if towards == 'mean':
        # Shares first: the sum of large logits may leave the range, their mean does not.
        mean = torch.stack([peer.detach() / len(peers) for peer in peers]).sum(0)
        return [distance(peer, mean) for peer in peers]
    return [
        torch.stack([distance(peer, other) for j, other in enumerate(peers) if j != k]).mean()
        for k, peer in enumerate(peers)
    ]
