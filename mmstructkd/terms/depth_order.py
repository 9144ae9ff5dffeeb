"""Whether a teacher's depth rises where the ground truth's does: disparity and depth look alike, and are not."""

from __future__ import annotations

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError
from mmstructkd.functional.core.resize import resize_labels, resize_mask
from mmstructkd.functional.core.sampling import draw_positions
from mmstructkd.losses.base import DistillLoss
from mmstructkd.structures import Targets

__all__ = ['check_depth_order', 'depth_order']

#: Pairs of pixels that are drawn of each image, and how many must say something.
PAIRS = 2000
ENOUGH = 100
#: Order below which a teacher contradicts the ground truth. A trained one is near 1, its inverse near -1.
OPPOSED = -0.3


def depth_order(first: Tensor, second: Tensor, valid: Tensor) -> Tensor:
    r"""How far two depth maps agree on which of two pixels is further off.

    .. math:: \gamma = \frac{n_+ - n_-}{n_+ + n_-}

    with the pairs of pixels of one image that both maps order alike
    (:math:`n_+`) and in opposite ways (:math:`n_-`); pairs that differ by less
    than 3 % in one of them say nothing. Blind to scale, offset and unit.

    Args:
        first: shape (B, 1, H, W).
        second: shape (B, H, W).
        valid: pixels that count, bool, shape (B, H, W).

    Returns:
        :math:`\gamma` in [-1, 1] and :math:`n_+ + n_-`, shape (2,), float32.

    Example:
        >>> near_to_far = torch.arange(1.0, 10.0).view(1, 3, 3)
        >>> depth_order(1 / near_to_far[:, None], near_to_far, near_to_far > 0)[0].item()
        -1.0
    """
    batch, size = first.shape[0], first[0, 0].numel()
    stream = torch.zeros(2, dtype=torch.int64, device=first.device)
    images = torch.arange(batch, device=first.device)
    places = draw_positions(stream, images, count=PAIRS, arity=2, size=size).flatten(1)

    def order(depth: Tensor) -> Tensor:
        one, other = depth.detach().float().flatten(1).gather(1, places).view(batch, PAIRS, 2).unbind(dim=2)
        gap = one - other
        return gap.sign() * (gap.abs() > 0.03 * torch.maximum(one.abs(), other.abs()))

    there = valid.flatten(1).gather(1, places).view(batch, PAIRS, 2).all(dim=2)
    agreed = torch.where(there, order(first) * order(second), 0)
    number = agreed.abs().sum()
    return torch.stack([agreed.sum() / number.clamp(min=1), number])


def check_depth_order(loss: DistillLoss, teacher: Tensor, targets: Targets, *, depth: bool = False) -> bool:
    """Raise where a teacher's depth map runs against the ground truth. Waits for the device.

    Args:
        loss: the loss; one on depth says with ``teacher_output`` what it is given.
        teacher: its tensor of the teacher.
        targets: what the batch knows besides.
        depth: the tensor is held against the student's depth, whatever the loss.

    Returns:
        Whether the question is settled: the loss compares no depth maps in
        known units, there is no ground truth, or enough pairs of pixels agree.

    Raises:
        ConfigError: the teacher orders pixels the other way round.
    """
    said = getattr(loss, 'teacher_output', None)
    output = 'depth' if said is None and depth else said
    if output not in ('depth', 'disparity') or targets.depth is None or teacher.dim() != 4 or teacher.shape[1] != 1:
        return True
    size = (teacher.shape[2], teacher.shape[3])
    truth = resize_labels(targets.depth, size).to(teacher.device)
    valid = (truth > 0) & teacher[:, 0].isfinite()
    if targets.inside is not None:
        valid = valid & resize_mask(targets.inside, size).to(valid.device)
    gamma, number = depth_order(teacher, truth, valid).tolist()
    if number < ENOUGH:
        return False
    if (gamma if output == 'depth' else -gamma) >= OPPOSED:
        return True
    if said is None:
        raise ConfigError(
            f'{type(loss).__name__}: the map of the teacher must be depth, as that of the student is, got one whose '
            f'order against the depth of the ground truth is {gamma:.2f} (1: alike, as depth; -1: opposite, as '
            f'disparity; {number:.0f} pairs of pixels). Take a loss that converts it, e.g. ScaleShiftInvariantLoss or '
            "DepthRegressionLoss with teacher_output='disparity'."
        )
    other = 'disparity' if output == 'depth' else 'depth'
    raise ConfigError(
        f'{type(loss).__name__}: `teacher_output` must be what the teacher predicts, got {output!r} for a map whose '
        f'order against the depth of the ground truth is {gamma:.2f} (1: alike, as depth; -1: opposite, as disparity; '
        f"{number:.0f} pairs of pixels). Set teacher_output={other!r}, or 'same' where the student predicts what the "
        'teacher does and the ground truth is something else.'
    )
