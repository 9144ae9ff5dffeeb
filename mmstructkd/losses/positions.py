"""Which positions of a tensor count for a loss: the one place that decides it."""

from __future__ import annotations

from torch import Tensor

from mmstructkd.errors import check_one_of
from mmstructkd.functional.core.valid import valid_pixels
from mmstructkd.structures import Targets

__all__ = ['PLACES', 'counting_positions']

#: What a term may say of where its loss counts.
PLACES = ('labelled', 'inside')


def counting_positions(owner: str, reference: Tensor, targets: Targets, *, where: str = 'inside') -> Tensor | None:
    """Which positions of a map, or which rows, count.

    Those of ``targets.valid``, and with ``where='labelled'`` only those whose
    label is not ignored. What the targets say about another kind of tensor says
    nothing here: maps use maps of the batch, rows labels and masks of their own.

    Args:
        owner: the loss, for messages.
        reference: a tensor of the loss, shape (B, D, H, W) or (M, C).
        targets: what the batch knows besides.
        where: ``'inside'`` or ``'labelled'``.

    Returns:
        Bool, shape (B, H, W) or (M,); ``None``: all count, as in any other tensor.

    Raises:
        ConfigError: ``where`` is neither.
        ShapeError: the tensor is a map, and a label map or mask is not of B images.

    Example:
        >>> import torch
        >>> targets = Targets(labels=torch.tensor([[[0, 255]]]))
        >>> counting_positions('doc', torch.zeros(1, 3, 1, 2), targets, where='labelled')
        tensor([[[ True, False]]])
        >>> counting_positions('doc', torch.zeros(1, 3, 1, 2), targets)
    """
    check_one_of(owner, 'where', where, PLACES)
    given = (targets.labels if where == 'labelled' else None, targets.valid)
    if reference.dim() == 4:
        labels, valid = (field if field is not None and field.dim() != 1 else None for field in given)
    elif reference.dim() == 2:
        rows = tuple(reference.shape[:1])
        labels, valid = (field if field is not None and tuple(field.shape) == rows else None for field in given)
    else:
        return None
    return valid_pixels(owner, reference, labels=labels, ignore_index=targets.ignore_index, valid=valid)
