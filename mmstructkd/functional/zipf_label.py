r"""Soft labels by rank, from Zipf's law.

Shape shorthand: B images, C classes, H x W the grid, M rows (regions, samples).
Rows stand for the pixels of a batch wherever a map is not needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ConfigError, check_ndim, is_count
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean, nan_unless_finite
from mmstructkd.functional.core.scores import class_scores
from mmstructkd.functional.core.softening import LOWEST
from mmstructkd.functional.core.valid import labelled_pixels, zero_elsewhere

__all__ = ['zipf_label_loss']


@full_precision
def zipf_label_loss(
    student: Tensor,
    teacher: Tensor | None = None,
    *,
    labels: Tensor,
    kernel_size: int = 7,
    ignore_index: int = 255,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the wrong classes' probabilities from Zipf's law over votes.

    .. math::
        L = \frac{1}{|V|} \sum_{i \in V} \mathrm{KL}(q_i \| \hat p_i), \quad
        q_{ik} \propto 1 / r_{ik}, \; k \ne y_i

    with :math:`\hat p_i` the softmax over all classes but the labelled one and
    :math:`r_{ik}` the rank of class k by the votes it got, 1 for the most. Zipf's
    label smoothing (arXiv:2207.12980), which lets every cell of the last feature
    map vote for the image; in this port for maps the pixels of a k x k window
    vote for its centre, each for the class it scores highest. Ties share the best
    rank. No probabilities of a teacher are used: ``teacher``, where given, only
    casts the votes, else the student does.

    Differs from the authors' code, which ranks the labelled class along with the
    others before it drops it.

    The gradient reaches ``student`` through :math:`\hat p` only. The value does
    not change when a constant is added to all logits of a pixel.

    Args:
        student: logits, shape (B, C, H, W), any float dtype; of two classes (or
            the one channel of a sigmoid) the value is 0.
        teacher: logits whose highest class is the vote, same shape; detached.
            ``None``: the student's own.
        labels: integer classes, shape (B, h, w), brought to H x W by nearest.
        kernel_size: side k of the window, odd; at the border it is cut.
        ignore_index: pixels with this label neither count nor vote; nor do those
            whose label is no class.
        valid: pixels that count and vote, bool, shape as ``labels``. ``None``: all.

    Returns:
        Scalar in nats, at least float32: the mean over the pixels V that count,
        0 with a graph if there is none. Time O(B N C (k + log C)), memory O(B C N).

    Raises:
        ShapeError: an input is not 4-D, the shapes differ, or ``labels`` or
            ``valid`` does not fit.
        ConfigError: ``kernel_size`` is not odd.

    Example:
        >>> z = torch.tensor([5.0, 1.0, 0.0]).view(1, 3, 1, 1)
        >>> round(zipf_label_loss(z, labels=torch.zeros(1, 1, 1, dtype=torch.int64)).item(), 4)
        0.1201
    """
    owner = 'zipf_label_loss'
    if not is_count(kernel_size) or kernel_size < 1 or kernel_size % 2 == 0:
        raise ConfigError(f'{owner}: `kernel_size` must be an odd integer above 0, got {kernel_size!r}.')
    check_ndim(owner, 'student', student, 4, '(B, C, H, W)')
    student, voter = class_scores(owner, student, student if teacher is None else teacher)
    index, valid_mask = labelled_pixels(
        owner, student, labels, num_classes=student.shape[1], ignore_index=ignore_index, valid=valid
    )
    student, voter = zero_elsewhere(student, valid_mask), zero_elsewhere(voter.detach(), valid_mask)
    classes = student.shape[1]
    one = torch.zeros_like(student, dtype=torch.bool).scatter_(1, index.unsqueeze(1), True)

    ballots = torch.zeros_like(student).scatter_(1, voter.argmax(1, keepdim=True), 1.0) * valid_mask.unsqueeze(1)
    # One axis after the other. Sums of ones and zeros are exact, so that ties stay ties.
    half = kernel_size // 2
    votes = torch_functional.avg_pool2d(ballots, (kernel_size, 1), 1, (half, 0), divisor_override=1)
    votes = torch_functional.avg_pool2d(votes, (1, kernel_size), 1, (0, half), divisor_override=1)
    # The labelled class stands behind all others; the rank is 1 + the number of classes with more votes.
    votes = votes.masked_fill(one, -1.0).movedim(1, -1).contiguous()
    ahead = classes - torch.searchsorted(votes.sort(dim=-1).values, votes, right=True)
    zipf = (1.0 / (1 + ahead).to(student.dtype)).movedim(-1, 1).masked_fill(one, 0.0)
    zipf = zipf / zipf.sum(1, keepdim=True)

    kept = student.clamp(min=torch.finfo(student.dtype).min).masked_fill(one, -torch.inf)
    among = torch.log_softmax(kept, dim=1).masked_fill(one, 0.0).clamp(min=LOWEST)
    loss = masked_mean((torch.special.xlogy(zipf, zipf) - zipf * among).sum(1), valid_mask)
    # A vote is a whole number, whatever it was made of; a class may be impossible.
    return loss + nan_unless_finite(voter.clamp(min=torch.finfo(voter.dtype).min))
