r"""Attention of a map's places, and what changes in it from stage to stage.

Shape shorthand: B images, D channels, H x W the grid, N = H W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from mmstructkd.errors import ShapeError, check_flag, check_ndim
from mmstructkd.functional.core.nodes import by_peak, norm_floor, unit_vectors
from mmstructkd.functional.core.precision import full_precision
from mmstructkd.functional.core.reduce import masked_mean
from mmstructkd.functional.core.valid import valid_pixels, zero_elsewhere

__all__ = ['attention_residuals', 'pixel_similarity_loss']

# Attention maps have length 1: what is left of two that are equal is rounding error and has no direction.
_EQUAL = 1e-6


def _check_maps(owner: str, argument: str, maps: Sequence[Tensor]) -> None:
    if not maps:
        raise ShapeError(f'{owner}: `{argument}` must hold at least one map, got none.')
    for one in maps:
        check_ndim(owner, argument, one, 4, '(B, D, H, W)')
        if one.shape[0] != maps[0].shape[0]:
            raise ShapeError(
                f'{owner}: `{argument}` must hold maps of the same images, got {[tuple(m.shape) for m in maps]}.'
            )


@full_precision
def _attention(features: Tensor, size: tuple[int, int], valid: Tensor | None, floor: float) -> Tensor:
    """Mean of the squares over channels, pooled to ``size``, of length 1; (B, N)."""
    valid_mask = valid_pixels('attention_residuals', features, valid=valid)
    features = zero_elsewhere(features, valid_mask)
    attention = by_peak(features, floor).square().mean(dim=1, keepdim=True)
    attention = torch_functional.adaptive_avg_pool2d(attention, size)
    return unit_vectors(attention.flatten(1), 1)


def attention_residuals(
    features: Sequence[Tensor],
    *,
    size: tuple[int, int] | None = None,
    valid: Tensor | None = None,
) -> list[Tensor]:
    r"""Differences between the attention maps of the stages of a network.

    .. math:: R_{lm} = \widehat{A_m - A_l}, \quad A_l = \widehat{\overline{f_l^2}}, \quad l < m

    The mean is over channels, a hat divides by the length over the positions of
    an image. Pixel-wise part of Double Similarity Distillation
    (arXiv:2107.08591), over all pairs of stages, as it is re-implemented in
    winycg/CIRKD, where all stages have one size. Here larger ones are averaged
    down to the smallest.

    Args:
        features: maps of the stages in order, each (B, D_l, H_l, W_l). Not
            detached. A single one stands for itself: its attention.
        size: (h, w) of what is returned; ``None``: the smallest height and
            width of the stages.
        valid: positions that count, bool, shape (B, h, w), brought to each
            stage by nearest; the others are 0 in the attention. ``None``: all.

    Returns:
        The residuals, each (B, 1, h, w), of length 1 over the positions of an
        image, or 0 where two stages attend alike; in the order (0, 1), (0, 2),
        ..., (1, 2), ... Time and memory O(B D N).

    Raises:
        ShapeError: there is no map, one is not 4-D, or their batches differ.

    Example:
        >>> first = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> attention_residuals([first, first.flip(3)])[0].squeeze()
        tensor([-0.7071,  0.7071])
    """
    features = list(features)
    _check_maps('attention_residuals', 'features', features)
    if size is None:
        size = (min(f.shape[2] for f in features), min(f.shape[3] for f in features))
    batch = features[0].shape[0]
    maps = [_attention(f, size, valid, norm_floor(f)) for f in features]
    if len(maps) > 1:
        maps = [
            unit_vectors(maps[m] - maps[n], 1, _EQUAL) for n in range(len(maps) - 1) for m in range(n + 1, len(maps))
        ]
    return [m.view(batch, 1, *size) for m in maps]


@full_precision
def _distance(student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Tensor | None) -> Tensor:
    owner = 'pixel_similarity_loss'
    parts = []
    for map_s, map_t in zip(student, teacher, strict=True):
        valid_mask = valid_pixels(owner, map_s, valid=valid)
        some = None
        if valid_mask is not None:
            map_s, map_t = zero_elsewhere(map_s, valid_mask), zero_elsewhere(map_t, valid_mask)
            some = valid_mask.flatten(1).any(dim=1)
        unit_s, unit_t = unit_vectors(map_s.flatten(1), 1), unit_vectors(map_t.flatten(1), 1)
        parts.append(masked_mean((unit_s - unit_t).square().sum(dim=1), some))
    return torch.stack(parts).mean()


def pixel_similarity_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    residual: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    r"""Squared distance between the residual attention maps of student and teacher.

    .. math:: L = \frac{1}{K B} \sum_{k,b} \lVert R^s_{kb} - R^t_{kb} \rVert^2

    Pixel-wise part of Double Similarity Distillation (arXiv:2107.08591); see
    :func:`attention_residuals` for R, of which there are K. winycg/CIRKD's
    re-implementation divides by the number of positions N too, and weighs it
    with 1000; without that division a weight keeps its meaning when the map
    grows (1000 there at N positions is 1000 / N here).

    The gradient reaches ``student`` only. Widths may differ. The value does not
    change when a stage of an image is scaled.

    Args:
        student: maps of the stages, each (B, D, H, W), or one map.
        teacher: as many maps, of any size and width. Detached here.
        residual: the maps are residuals already, of one channel each.
        valid: positions that count, bool, shape (B, h, w), brought to the maps
            by nearest. ``None``: all.

    Returns:
        Scalar in [0, 4], no unit, at least float32: mean over residuals and
        images with a position that counts, 0 with a graph if there is none.
        Time and memory O(B D N).

    Raises:
        ShapeError: a map is not 4-D, the numbers of maps or images differ, or
            ``valid`` is no map of B images.

    Example:
        >>> first, second = torch.rand(2, 1, 3, 4, 4).unbind()
        >>> pixel_similarity_loss([first, second], [2 * first, 3 * second]).item() < 1e-10
        True
    """
    owner = 'pixel_similarity_loss'
    maps_s = [student] if isinstance(student, Tensor) else list(student)
    maps_t = [teacher.detach()] if isinstance(teacher, Tensor) else [t.detach() for t in teacher]
    check_flag(owner, 'residual', residual)
    _check_maps(owner, 'student', maps_s)
    _check_maps(owner, 'teacher', maps_t)
    if len(maps_s) != len(maps_t) or maps_s[0].shape[0] != maps_t[0].shape[0]:
        raise ShapeError(
            f'{owner}: `student` and `teacher` must hold as many maps of the same images, '
            f'got {[tuple(m.shape) for m in maps_s]} and {[tuple(m.shape) for m in maps_t]}.'
        )
    if residual:
        for map_s, map_t in zip(maps_s, maps_t, strict=True):
            if map_s.shape[1] != 1 or map_s.shape != map_t.shape:
                raise ShapeError(
                    f'{owner}: `student` and `teacher` must be residual maps (B, 1, H, W) of one size for '
                    f'residual=True, got {tuple(map_s.shape)} and {tuple(map_t.shape)}. '
                    "connector=dict(type='mmstructkd.AttentionResidualConnector') makes them from stages."
                )
        return _distance(maps_s, maps_t, valid)
    size = (min(m.shape[2] for m in maps_s), min(m.shape[3] for m in maps_s))
    return _distance(
        attention_residuals(maps_s, size=size, valid=valid),
        attention_residuals(maps_t, size=size, valid=valid),
        valid,
    )
