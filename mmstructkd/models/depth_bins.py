"""From the last convolution of a depth head to metres, and a loss for bins.

B images, K bins, H x W the grid; metres.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from mmstructkd.errors import ConfigError, check_count, check_finite_number, check_one_of, check_positive
from mmstructkd.functional.core.precision import full_precision, promote
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.models.depth_losses import check_loss_name
from mmstructkd.registry import MODELS

#: More would fill the memory.
MAX_BINS = 2**14

__all__ = ['BinsToDepth', 'DepthBinLoss', 'ScoreToDepth', 'check_range']


def check_range(owner: str, min_depth: float, max_depth: float) -> None:
    """Raise :class:`ConfigError` unless both are metres, above 0 and in order."""
    check_positive(owner, 'min_depth', min_depth)
    check_positive(owner, 'max_depth', max_depth)
    if max_depth <= min_depth:
        raise ConfigError(
            f'{owner}: `max_depth` must be above min_depth={min_depth!r}, got {max_depth!r}. Both are in metres.'
        )


class ScoreToDepth(nn.Module):
    r"""Map a score to depth.

    ``'sigmoid'``: :math:`d = d_{min} + (d_{max} - d_{min}) \, \sigma(x)`, within
    both limits; ``'softplus'``: :math:`d = d_{min} + \log(1 + e^x)`, without an
    upper limit.

    Args:
        min_depth: metres, above 0.
        max_depth: metres.
        mapping: ``'sigmoid'`` or ``'softplus'``.

    Shape:
        - score, depth: the same, any; depth in at least float32.

    Example:
        >>> ScoreToDepth(1.0, 3.0)(torch.zeros(1)).item()
        2.0
    """

    MAPPINGS = ('sigmoid', 'softplus')

    def __init__(self, min_depth: float, max_depth: float, mapping: str = 'sigmoid') -> None:
        super().__init__()
        check_range(type(self).__name__, min_depth, max_depth)
        check_one_of(type(self).__name__, 'mapping', mapping, self.MAPPINGS)
        self.min_depth = float(min_depth)
        self.max_depth = float(max_depth)
        self.mapping = mapping

    def forward(self, score: Tensor) -> Tensor:
        """Return depth in metres."""
        # Half precision would round 24 m to steps of 6 cm (bfloat16) or 2 cm.
        score = promote(score)
        if self.mapping == 'sigmoid':
            return self.min_depth + (self.max_depth - self.min_depth) * score.sigmoid()
        return self.min_depth + torch_functional.softplus(score)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'min_depth={self.min_depth:g}, max_depth={self.max_depth:g}, mapping={self.mapping!r}'


class BinsToDepth(nn.Module):
    r"""Map scores of bins to depth: the mean of their centres under the softmax.

    Bin k spans :math:`d_{min} \rho^{k/K}` to :math:`d_{min} \rho^{(k+1)/K}`,
    :math:`\rho = d_{max} / d_{min}`: equal shares of the logarithm. Its centre
    is the middle of these logarithms.

    ``'log'``: :math:`d = \exp \sum_k p_k \log c_k`, the soft-weighted sum of Cao
    et al. (arXiv:1605.02305) as Virtual Normal (arXiv:1907.12209) takes it;
    ``'depth'``: :math:`d = \sum_k p_k c_k`.

    Args:
        num_bins: K, at least 2.
        min_depth: metres, above 0.
        max_depth: metres.
        average: ``'log'`` or ``'depth'``.

    Shape:
        - scores: (B, K, H, W); depth: (B, 1, H, W), at least float32.

    Example:
        >>> to_depth = BinsToDepth(2, 1.0, 16.0)
        >>> [round(c, 3) for c in to_depth.log_centres.exp().tolist()]
        [2.0, 8.0]
        >>> round(to_depth(torch.zeros(1, 2, 1, 1)).item(), 3)
        4.0
    """

    AVERAGES = ('log', 'depth')

    log_centres: Tensor

    def __init__(self, num_bins: int, min_depth: float, max_depth: float, average: str = 'log') -> None:
        super().__init__()
        owner = type(self).__name__
        check_range(owner, min_depth, max_depth)
        check_one_of(owner, 'average', average, self.AVERAGES)
        check_count(owner, 'num_bins', num_bins, 2, maximum=MAX_BINS)
        self.num_bins = num_bins
        self.min_depth = float(min_depth)
        self.max_depth = float(max_depth)
        self.average = average
        width = math.log(max_depth / min_depth) / num_bins
        middles = (torch.arange(num_bins, dtype=torch.float64) + 0.5) * width + math.log(min_depth)
        # What the settings say already is not saved with the weights.
        self.register_buffer('log_centres', middles.float(), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        """Return depth in metres."""
        share = promote(scores).softmax(dim=1)
        centres = self.log_centres.to(share.dtype)
        if self.average == 'depth':
            return (share * centres.exp()[:, None, None]).sum(dim=1, keepdim=True)
        return (share * centres[:, None, None]).sum(dim=1, keepdim=True).exp()

    def bin_of(self, depth: Tensor) -> Tensor:
        """Return the number of the bin that each depth falls into.

        Args:
            depth: metres, any shape; what lies outside goes to the bin at that
                end, what is no number to the first.

        Returns:
            Int64 in [0, K), the same shape.
        """
        share = (promote(depth).clamp(min=self.min_depth) / self.min_depth).log()
        number = share / math.log(self.max_depth / self.min_depth) * self.num_bins
        return number.nan_to_num(0.0).clamp(0, self.num_bins - 1).long()

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return (
            f'num_bins={self.num_bins}, min_depth={self.min_depth:g}, max_depth={self.max_depth:g}, '
            f'average={self.average!r}'
        )


@MODELS.register_module()
class DepthBinLoss(nn.Module):
    r"""Cross-entropy of depth bins in which the neighbours of the right bin count too.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} - \sum_k w_{k y_i} \log p_{ik}, \quad
        w_{ky} \propto e^{-\alpha (k - y)^2}, \; \sum_k w_{ky} = 1

    The weighted cross-entropy of Cao et al. (arXiv:1605.02305) and Virtual Normal
    (arXiv:1907.12209), which take :math:`\alpha` = 0.2 and do not normalise w:
    their value is about 4 times this one. Weights below 1e-3 of the largest are
    taken for 0 (with 0.2: beyond 5 bins).

    Args:
        loss_weight: factor of the loss, finite and at least 0.
        sharpness: :math:`\alpha`, above 0; ``None``: the right bin alone.
        loss_name: name in the log.

    Shape:
        - scores: (B, K, H, W); number of the right bin: int64, (B, H, W); valid:
          bool, (B, H, W).
        - output: scalar in nats, at least float32: the mean over pixels that are
          valid, 0 with a graph if there is none.

    Example:
        >>> scores = torch.zeros(1, 4, 1, 1)
        >>> round(DepthBinLoss()(scores, torch.tensor([[[2]]]), torch.tensor([[[True]]])).item(), 4)
        1.3863
    """

    def __init__(self, loss_weight: float = 1.0, sharpness: float | None = 0.2, loss_name: str = 'loss_bin') -> None:
        super().__init__()
        owner = type(self).__name__
        check_finite_number(owner, 'loss_weight', loss_weight, minimum=0)
        if sharpness is not None:
            check_positive(owner, 'sharpness', sharpness)
        self.loss_weight = float(loss_weight)
        self.sharpness = sharpness
        self.reach = 0 if sharpness is None else int(min(math.sqrt(math.log(1e3) / sharpness), MAX_BINS))
        check_loss_name(owner, loss_name)
        self._loss_name = loss_name

    @property
    def loss_name(self) -> str:
        """Name in the log; only what contains ``loss`` is optimised."""
        return self._loss_name

    def forward(self, scores: Tensor, right: Tensor, valid: Tensor) -> Tensor:
        """Return the weighted loss."""
        return self.loss_weight * _bin_loss(scores, right, valid, self.sharpness or 0.0, self.reach)

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'loss_weight={self.loss_weight:g}, sharpness={self.sharpness}'


@full_precision
def _bin_loss(scores: Tensor, right: Tensor, valid: Tensor, sharpness: float, reach: int) -> Tensor:
    """Soft cross-entropy, one neighbour after the other: no second tensor of K channels."""
    bins = scores.shape[1]
    log_p = torch.where(valid[:, None], scores, 0).log_softmax(dim=1)
    total = torch.zeros_like(log_p[:, 0])
    weights = torch.zeros_like(total)
    for offset in range(-min(reach, bins - 1), min(reach, bins - 1) + 1):
        neighbour = right + offset
        there = (neighbour >= 0) & (neighbour < bins)
        weight = math.exp(-sharpness * offset**2) * there
        chosen = log_p.gather(1, neighbour.clamp(0, bins - 1)[:, None])[:, 0]
        total = total + weight * chosen
        weights = weights + weight
    return masked_mean(-total / weights, valid)
