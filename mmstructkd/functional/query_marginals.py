r"""Class probabilities of each pixel, out of what a structured or finer teacher says.

Shape shorthand: B images, Q queries, C classes, H x W the grid, N = H W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_one_of, check_positive
from mmstructkd.functional.core.binary import two_classes
from mmstructkd.functional.core.precision import exact_matmul, full_precision
from mmstructkd.functional.core.resize import check_size

__all__ = ['pool_probabilities', 'query_marginals']

RULES = ('sum', 'noisy_or')


@full_precision
def query_marginals(
    class_scores: Tensor,
    mask_scores: Tensor,
    *,
    rule: str = 'sum',
    background: bool = True,
    eps: float = 1e-6,
) -> Tensor:
    r"""Log-probabilities of the classes of each pixel from a set of queries.

    Each query q has probabilities :math:`p_q(c)` of the classes and a mask
    :math:`\sigma(m_{qi})` over the pixels. A class's evidence at a pixel is

    - ``'sum'``: :math:`u_{ic} = \sum_q p_q(c) \, \sigma(m_{qi})`, what MaskFormer
      and Mask2Former take the largest of;
    - ``'noisy_or'``: :math:`u_{ic} = 1 - \prod_q (1 - p_q(c) \, \sigma(m_{qi}))`, the
      probability that at least one of several instances is there, each for itself;

    and :math:`p_{ic} = (u_{ic} + \epsilon) / \sum_k (u_{ik} + \epsilon)`. So a
    pixel-wise student can learn from a teacher that predicts masks: structural
    knowledge distillation (arXiv:2010.05010) for a student with finer factors than
    its teacher, in a dense reading of ours.

    Args:
        class_scores: logits, shape (B, Q, C), any float dtype; with ``background``
            (B, Q, C + 1), the last for "no object".
        mask_scores: logits, shape (B, Q, H, W).
        rule: ``'sum'`` or ``'noisy_or'``.
        background: whether there is a class for "no object", which is left out.
        eps: :math:`\epsilon`, above 0: where no query says anything, all classes are
            alike.

    Returns:
        Shape (B, C, H, W), at least float32, differentiable. It may stand wherever
        scores may: its softmax is p. Time O(B Q C N), memory for two such maps.

    Raises:
        ShapeError: an input has another number of axes, B or Q differ, or there is no
            class.
        ConfigError: ``rule`` is neither, or ``eps`` not above 0.

    Example:
        >>> classes = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]])  # two classes and "no object"
        >>> masks = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]])
        >>> query_marginals(classes, masks).softmax(1).round(decimals=2).squeeze()
        tensor([[1., 0.],
                [0., 1.]])
    """
    owner = 'query_marginals'
    check_one_of(owner, 'rule', rule, RULES)
    check_positive(owner, 'eps', eps)
    check_ndim(owner, 'class_scores', class_scores, 3, '(B, Q, C)')
    check_ndim(owner, 'mask_scores', mask_scores, 4, '(B, Q, H, W)')
    if class_scores.shape[:2] != mask_scores.shape[:2]:
        raise ShapeError(
            f'{owner}: `class_scores` and `mask_scores` must share B and Q, '
            f'got {tuple(class_scores.shape)} and {tuple(mask_scores.shape)}.'
        )
    if class_scores.shape[2] < 1 + background:
        raise ShapeError(f'{owner}: `class_scores` must have at least one class, got {tuple(class_scores.shape)}.')
    chance = torch.softmax(class_scores, dim=2)
    if background:
        chance = chance[..., :-1]
    mask = torch.sigmoid(mask_scores)
    if rule == 'sum':
        with exact_matmul(mask.device.type):
            evidence = torch.einsum('bqc,bqhw->bchw', chance, mask)
    else:
        # Query by query: all at once would need a map for each pair of query and class.
        absent = torch.zeros(chance.shape[0], chance.shape[2], *mask.shape[2:], dtype=mask.dtype, device=mask.device)
        for q in range(mask.shape[1]):
            present = chance[:, q, :, None, None] * mask[:, q, None]
            # Certain presence would be a logarithm of 0, whose gradient has no bound.
            absent = absent + torch.log1p(-present.clamp(max=1 - 1e-6))
        evidence = -torch.expm1(absent)
    raised = evidence + eps
    return raised.log() - raised.sum(dim=1, keepdim=True).log()


@full_precision
def pool_probabilities(scores: Tensor, size: tuple[int, int], *, temperature: float = 1.0) -> Tensor:
    r"""Log-probabilities on a coarser grid: the mean of those of its pixels.

    .. math:: \log \bar p_{jc} = \log \frac{1}{|N_j|} \sum_{i \in N_j} \mathrm{softmax}_C(z_i / T)_c

    For a teacher with a finer grid than the student's: what a coarse pixel is, is what
    its pixels are on average. A mean of scores is another thing: of two pixels, one
    sure of a road and one sure of a car, it makes a pixel that is sure of neither or
    of a third class. Structural knowledge distillation (arXiv:2010.05010) for a
    teacher with finer factors, in a dense reading of ours.

    Args:
        scores: logits, shape (B, C, H, W), any float dtype. One channel is the score of
            a sigmoid, and makes two classes.
        size: (h, w), at most (H, W).
        temperature: T, above 0. The result has it in it: a loss takes it at 1.

    Returns:
        Shape (B, C, h, w), at least float32, differentiable; a class that is
        impossible everywhere has minus infinity or almost. It may stand wherever
        scores may.

    Raises:
        ShapeError: ``scores`` is not 4-D.
        ConfigError: ``size`` is no size or larger than the map, or ``temperature`` not
            above 0.

    Example:
        >>> z = torch.tensor([[10.0, 0.0, 6.0], [0.0, 10.0, 6.0]]).mT.view(1, 3, 1, 2)
        >>> pool_probabilities(z, (1, 1)).exp().round(decimals=2).flatten()
        tensor([0.4900, 0.4900, 0.0200])
        >>> z.mean(3).softmax(1).round(decimals=2).flatten()
        tensor([0.2100, 0.2100, 0.5800])
    """
    owner = 'pool_probabilities'
    size = check_size(owner, size)
    check_positive(owner, 'temperature', temperature)
    check_ndim(owner, 'scores', scores, 4, '(B, C, H, W)')
    if size[0] > scores.shape[2] or size[1] > scores.shape[3]:
        raise ConfigError(
            f'{owner}: `size` must be at most {tuple(scores.shape[2:])}, got {size}. Larger grids are for resize_map.'
        )
    probability = torch.softmax(two_classes(scores) / temperature, dim=1)
    pooled = torch_functional.adaptive_avg_pool2d(probability, size)
    return pooled.clamp(min=torch.finfo(pooled.dtype).tiny).log()
