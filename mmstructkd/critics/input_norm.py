"""BatchNorm whose statistics are those of all processes, differentiable twice."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.dist import get_dist_info
from torch import Tensor, distributed, nn
from torch.nn import functional

__all__ = ['JointBatchNorm']


class _SumOfProcesses(torch.autograd.Function):
    """The sum over processes of a tensor; its gradient is the sum of theirs, by this very function."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOfProcesses.apply(gradient)


class JointBatchNorm(nn.Module):
    r"""BatchNorm over the channels of maps, in training over the maps of all processes.

    So n processes with B maps each normalise as one with n B, also where they
    have other numbers of maps: each process weighs by its positions. Unlike
    torch's SyncBatchNorm it has a second derivative, which the gradient penalty
    needs, and runs on a CPU. It is no subclass of torch's BatchNorm, which
    ``sync_bn`` would turn into SyncBatchNorm.

    With one process it is torch's ``batch_norm``, bit by bit. With several, all
    must run it equally often, forward and backward; each pass sends 2 C + 1
    numbers.

    Args:
        channels: C.
        momentum: share of a batch in the running statistics.
        eps: added to the variance.

    Shape:
        - input and output: :math:`(B, C, H, W)`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer('running_mean', torch.zeros(channels))
        self.register_buffer('running_var', torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised maps."""
        if self.training and get_dist_info()[1] > 1:
            return self._joint(x)
        return functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )

    def _joint(self, x: Tensor) -> Tensor:
        """Normalise by the statistics of all processes."""
        count = x.new_full((1,), x.numel() / x.shape[1])
        mean = x.mean(dim=(0, 2, 3)) if x.numel() else x.sum(dim=(0, 2, 3))
        deviation = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
        rows = self._gathered(torch.cat([count, mean, deviation]))
        counts, means, deviations = rows.split([1, x.shape[1], x.shape[1]], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        # Of the means' own spread, not mean(x**2) - mean**2, which cancels where means are large.
        squares = (deviations + counts * (means - mean).square()).sum(dim=0)
        with torch.no_grad():
            unbiased = squares / (total - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = self.weight * torch.rsqrt(squares / total + self.eps)
        return (x - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]

    @staticmethod
    def _gathered(row: Tensor) -> Tensor:
        """The rows of all processes, (n, len(row)): each puts its own into zeros, and these are added."""
        rank, processes = get_dist_info()
        mine = torch.arange(processes, device=row.device)[:, None] == rank
        rows: Tensor = _SumOfProcesses.apply(torch.where(mine, row, 0.0))
        return rows
