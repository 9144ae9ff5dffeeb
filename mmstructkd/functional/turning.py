r"""Images turned about their middle: rows of a batch, the way back, and labels of class and turn.

Shape shorthand: B images, T turns, H x W the grid. Row T b + k of a turned batch
is image b in turn k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmstructkd.errors import ConfigError, ShapeError, check_ndim, check_one_of

__all__ = ['TURNS', 'check_turns', 'joint_labels', 'turn_back', 'turn_maps']

Turn = Callable[[Tensor], Tensor]

#: Name -> the turn and its way back. Quarter turns go against the clock.
_WAYS: dict[str, tuple[Turn, Turn]] = {
    'none': (lambda x: x, lambda x: x),
    'quarter': (lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(-1, (-2, -1))),
    'half': (lambda x: x.flip((-2, -1)), lambda x: x.flip((-2, -1))),
    'three_quarters': (lambda x: x.rot90(-1, (-2, -1)), lambda x: x.rot90(1, (-2, -1))),
    'flip': (lambda x: x.flip(-1), lambda x: x.flip(-1)),
    'flip_half': (lambda x: x.flip(-2), lambda x: x.flip(-2)),
}
TURNS = tuple(_WAYS)
_QUARTERS = ('none', 'quarter', 'half', 'three_quarters')
_CROSSWISE = {'quarter', 'three_quarters'}


def check_turns(owner: str, turns: int | Sequence[str]) -> tuple[str, ...]:
    """Return the names of ``turns``, or raise :class:`~mmstructkd.errors.ConfigError`.

    Args:
        owner: who asks, for messages.
        turns: 4 for the four quarter turns, or names out of :data:`TURNS`.

    Example:
        >>> check_turns('doc', 4)
        ('none', 'quarter', 'half', 'three_quarters')
    """
    if not isinstance(turns, (int, str)):
        names = tuple(turns)
        for name in names:
            check_one_of(owner, 'turns', name, TURNS)
        if names and len(set(names)) == len(names):
            return names
    elif turns == 4:
        return _QUARTERS
    raise ConfigError(f'{owner}: `turns` must be 4 or different names out of {list(TURNS)}, got {turns!r}.')


def _check_square(owner: str, maps: Tensor, names: Sequence[str]) -> None:
    if _CROSSWISE.intersection(names) and maps.shape[-1] != maps.shape[-2]:
        raise ShapeError(
            f'{owner}: `maps` must be square for quarter turns, got {tuple(maps.shape)}. '
            "Turns that keep the shape are 'none', 'half', 'flip' and 'flip_half'."
        )


def turn_maps(maps: Tensor, *, turns: int | Sequence[str] = 4) -> Tensor:
    """Put every image of a batch into the batch in each of several turns.

    Rotations by quarters are what HSAKD and SSKD classify with, on square images;
    ``('none', 'half', 'flip', 'flip_half')`` are four turns that keep any shape.

    Args:
        maps: images, features or labels, shape (B, C, H, W) or (B, H, W).
        turns: 4 for the four quarter turns, or names out of :data:`TURNS`.

    Returns:
        Shape (T B, ...), differentiable: row T b + k is image b in turn k.

    Raises:
        ShapeError: ``maps`` is neither 4-D nor 3-D, or not square for a quarter
            turn.
        ConfigError: ``turns`` are no turns.

    Example:
        >>> turn_maps(torch.tensor([[[1, 2], [3, 4]]]), turns=['none', 'quarter', 'flip']).tolist()
        [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[2, 1], [4, 3]]]
    """
    owner = 'turn_maps'
    names = check_turns(owner, turns)
    check_ndim(owner, 'maps', maps, (3, 4), '(B, C, H, W) or (B, H, W)')
    _check_square(owner, maps, names)
    return torch.stack([_WAYS[name][0](maps) for name in names], dim=1).flatten(0, 1)


def turn_back(maps: Tensor, *, turns: int | Sequence[str] = 4) -> Tensor:
    """Bring the rows of a turned batch upright again: the inverse of each row's turn.

    Args:
        maps: shape (T B, C, H, W) or (T B, H, W), e.g. what a network makes of a
            turned batch.
        turns: as in :func:`turn_maps`.

    Returns:
        Same shape, differentiable: the T rows of an image now lie on one grid.

    Raises:
        ShapeError: ``maps`` is neither 4-D nor 3-D, not square for a quarter turn,
            or its rows are no multiple of T.
        ConfigError: ``turns`` are no turns.

    Example:
        >>> x = torch.arange(4).view(1, 2, 2)
        >>> torch.equal(turn_back(turn_maps(x)), x.expand(4, 2, 2))
        True
    """
    owner = 'turn_back'
    names = check_turns(owner, turns)
    check_ndim(owner, 'maps', maps, (3, 4), '(B, C, H, W) or (B, H, W)')
    _check_square(owner, maps, names)
    if maps.shape[0] % len(names):
        raise ShapeError(f'{owner}: `maps` must have {len(names)} rows an image, got {tuple(maps.shape)}.')
    rows = maps.unflatten(0, (-1, len(names)))
    return torch.stack([_WAYS[name][1](rows[:, k]) for k, name in enumerate(names)], dim=1).flatten(0, 1)


def joint_labels(
    labels: Tensor,
    *,
    turns: int | Sequence[str] = 4,
    ignore_index: int = 255,
    joint_ignore_index: int | None = None,
) -> Tensor:
    r"""Labels of class and turn together, for the rows of a turned batch.

    .. math:: y_{T b + k} = T \, y_b + k

    Hierarchical self-supervised distillation, HSAKD (IJCAI 2021), whose auxiliary
    classifiers tell T times as many classes. On maps, which the paper has not, the
    labels are turned along with the image.

    Args:
        labels: integer classes, one an image (B,), or a map of them (B, H, W).
        turns: as in :func:`turn_maps`.
        ignore_index: the label that stands for none.
        joint_ignore_index: what stands for none in the result. ``None``: the same,
            which is a class of the joint labels once there are more than
            ``ignore_index / T`` classes: 64 of them for 255 and four turns.

    Returns:
        Int64, shape (T B,) or (T B, H, W).

    Raises:
        ShapeError: ``labels`` is neither 1-D nor 3-D, or not square for a quarter
            turn.
        ConfigError: ``turns`` are no turns.

    Example:
        >>> joint_labels(torch.tensor([3, 255])).tolist()
        [12, 13, 14, 15, 255, 255, 255, 255]
        >>> joint_labels(torch.tensor([[[0, 1]]]), turns=['none', 'flip']).tolist()
        [[[0, 2]], [[3, 1]]]
    """
    owner = 'joint_labels'
    names = check_turns(owner, turns)
    check_ndim(owner, 'labels', labels, (1, 3), '(B,) or (B, H, W)')
    if labels.dim() == 1:
        rows = labels.long().repeat_interleave(len(names))
    else:
        _check_square(owner, labels, names)
        rows = turn_maps(labels.long(), turns=names)
    number = torch.arange(len(rows), device=rows.device) % len(names)
    joint = rows * len(names) + number.view(-1, *[1] * (rows.dim() - 1))
    return torch.where(rows == ignore_index, ignore_index if joint_ignore_index is None else joint_ignore_index, joint)
