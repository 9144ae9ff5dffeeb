"""Mean 0 and deviation 1 for each channel of each image, in both networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmstructkd.connectors.base import Connector, check_widths
from mmstructkd.errors import check_ndim, check_positive
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.registry import MODELS

__all__ = ['StandardizeConnector']


@full_precision
def _standardize(tensor: Tensor, eps: float) -> Tensor:
    """Subtract the mean over positions and divide by the deviation; maps (B, C, H, W) or tokens (B, N, C)."""
    axes = (2, 3) if tensor.dim() == 4 else (1,)
    centred = tensor - tensor.mean(axes, keepdim=True)
    # The largest value is divided out before anything is squared: no overflow, and no underflow. The result
    # does not depend on it, so that its gradient is rightly left out.
    peak = centred.detach().abs().amax(axes, keepdim=True).clamp(min=1e-12)
    scaled = centred / peak
    return scaled / torch.sqrt(scaled.square().mean(axes, keepdim=True) + (eps / peak).square())


@MODELS.register_module()
class StandardizeConnector(Connector):
    r"""Bring each channel of each image to mean 0 and deviation 1, in student and teacher alike.

    .. math:: \hat f = \frac{f - \mu}{\sqrt{\sigma^2 + \epsilon^2}}

    with mean and deviation over the positions of one image and channel, the
    normalisation of Normalized Feature Distillation (arXiv:2207.05256): what is
    left is where a channel is strong, not how strong. For losses that do not
    normalise by themselves. It sees no mask: padding counts. The student's
    gradient passes through mean and deviation. Nothing is trained.

    A channel that is constant becomes 0, so a map of 1x1 becomes 0.

    Args:
        in_channels: widths of the student, one a level; not used.
        out_channels: widths of the teacher, likewise.
        eps: deviation below which a channel counts as constant, above 0.

    Raises:
        ConfigError: ``eps`` is not above 0.
        ShapeError: a tensor is neither a map nor tokens.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
        >>> (student,), (teacher,) = StandardizeConnector([1], [1])([x], [10 * x])
        >>> student.flatten().tolist(), teacher.flatten().tolist()
        ([-1.0, 1.0], [-1.0, 1.0])
    """

    joint = True
    keeps_width = True
    paper = 'Normalized Feature Distillation for Semantic Segmentation (arXiv:2207.05256)'

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int], eps: float = 1e-6) -> None:
        super().__init__()
        check_widths('StandardizeConnector', 'in_channels', in_channels)
        check_widths('StandardizeConnector', 'out_channels', out_channels)
        check_positive('StandardizeConnector', 'eps', eps)
        self.eps = float(eps)

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return all tensors standardised, at least float32."""
        for name, tensors in (('students', students), ('teachers', teachers)):
            for tensor in tensors:
                check_ndim('StandardizeConnector', name, tensor, (3, 4), '(B, C, H, W) or (B, N, C)')
        return [_standardize(s, self.eps) for s in students], [_standardize(t.detach(), self.eps) for t in teachers]

    def extra_repr(self) -> str:
        """Show the settings in the model's print-out."""
        return f'eps={self.eps:g}'
