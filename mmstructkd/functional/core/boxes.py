"""Boxes on the grids of features: which cells show an object.

Shape shorthand: B images, n boxes of an image, H x W the grid, N = H W. Boxes
are ``xyxy`` in pixels of the padded input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmstructkd.errors import ConfigError, ShapeError
from mmstructkd.functional.core.reduce import mean_of_sum
from mmstructkd.functional.core.valid import valid_pixels

__all__ = ['TAP_THE_SAME_OUTPUT', 'box_masks', 'check_boxes', 'inside_boxes']

# No block of boxes by cells has more elements (16 MiB in float32).
MAX_BLOCK = 2**22
TAP_THE_SAME_OUTPUT = 'Tap the same output of both heads, at the same level.'


def check_boxes(owner: str, boxes: Sequence[Tensor], batch: int | None = None) -> None:
    """Raise unless ``boxes`` holds one tensor (n, 4) an image, ``batch`` of them where that is given."""
    way_out = 'Give one tensor an image, shape (0, 4) where it has no box.'
    if not isinstance(boxes, (tuple, list)) or not boxes:
        raise ConfigError(f'{owner}: `boxes` must be one tensor for each image, got {type(boxes).__name__}. {way_out}')
    shapes = [tuple(box.shape) for box in boxes]
    if any(len(shape) != 2 or shape[1] != 4 for shape in shapes):
        raise ShapeError(f'{owner}: `boxes` must have shape (n, 4) each, got {shapes}. {way_out}')
    if batch is not None and len(boxes) != batch:
        raise ShapeError(f'{owner}: `boxes` must be those of {batch} images, got {len(boxes)}. {way_out}')


def _check_input_size(owner: str, input_size: tuple[int, int]) -> tuple[int, int]:
    good = isinstance(input_size, (tuple, list)) and len(input_size) == 2
    if not good or not all(isinstance(side, int) and side > 0 for side in input_size):
        raise ConfigError(
            f'{owner}: `input_size` must be two integers (h, w) above 0, got {input_size!r}. '
            'It is the size of the padded input, whose pixels the boxes are given in.'
        )
    return (int(input_size[0]), int(input_size[1]))


@torch.no_grad()
def _foreground(boxes: Sequence[Tensor], size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
    """One over the number of cells of the smallest box that covers a cell, (B, H, W); 0 where none does."""
    # Missing boxes are NaN: no cell compares as inside, and no count has to be sent to the device.
    padded = pad_sequence(
        [box.to(torch.promote_types(box.dtype, torch.float32)) for box in boxes],
        batch_first=True,
        padding_value=torch.nan,
    )
    inside_axis, lengths = [], []
    for axis in (0, 1):
        # A box's side on the grid. Multiplied first: an edge on the border of a cell stays there exactly.
        cells, pixels = size[1 - axis], input_size[1 - axis]
        first = (padded[..., axis] * cells / pixels).floor()[..., None]
        last = (padded[..., axis + 2] * cells / pixels).ceil()[..., None]
        index = torch.arange(cells, device=padded.device)
        inside_axis.append((index >= first) & (index <= last))
        lengths.append((last + 1 - first).clamp(min=1))
    columns, rows = inside_axis
    weights = 1 / (lengths[0] * lengths[1])

    out = padded.new_zeros((padded.shape[0], *size))
    step = max(1, MAX_BLOCK // out.numel())
    for start in range(0, padded.shape[1], step):
        some = slice(start, start + step)
        inside = rows[:, some, :, None] & columns[:, some, None, :]
        out = torch.maximum(out, torch.where(inside, weights[:, some, :, None], 0).amax(dim=1))
    return out


def box_masks(
    boxes: Sequence[Tensor],
    size: tuple[int, int],
    *,
    input_size: tuple[int, int],
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Weigh the cells of a grid by the boxes they lie in.

    Of Focal and Global Distillation (arXiv:2111.11837). A box covers the columns
    floor(x1 W / w) to ceil(x2 W / w), both included, and rows alike, with (h, w)
    the input's size. So it is up to two cells wider than its pixels, and counts
    its cells beyond the edge of the grid: this is what the authors' code does.
    Differs from it in that it divides by the size of the image before padding,
    which shifts the boxes of padded images against the features; and in that
    padding is neither foreground nor background here.

    Args:
        boxes: one tensor an image, shape (n, 4), n may differ and be 0.
        size: (H, W) of the grid.
        input_size: (h, w) of the padded input.
        valid: pixels that count, bool, shape (B, h', w'), brought to H x W by
            nearest. ``None``: all.

    Returns:
        Two tensors of shape (B, H, W), without a graph. Foreground: one over the
        number of cells of the box that the cell lies in, of the smallest where
        boxes overlap; 0 outside. Background: one over the number of cells in no
        box, in each of them; 0 inside. Time O(B n N); memory O(B N), and no block
        of more than 16 MiB (float32) besides.

    Raises:
        ShapeError: a tensor of ``boxes`` is not (n, 4), or ``valid`` is not a
            map of B images.
        ConfigError: ``boxes`` is no sequence, or a size is none.

    Example:
        >>> box = torch.tensor([[16.0, 0.0, 24.0, 8.0]])
        >>> foreground, background = box_masks([box], (2, 6), input_size=(16, 48))
        >>> foreground
        tensor([[[0.0000, 0.0000, 0.2500, 0.2500, 0.0000, 0.0000],
                 [0.0000, 0.0000, 0.2500, 0.2500, 0.0000, 0.0000]]])
        >>> background
        tensor([[[0.1250, 0.1250, 0.0000, 0.0000, 0.1250, 0.1250],
                 [0.1250, 0.1250, 0.0000, 0.0000, 0.1250, 0.1250]]])
    """
    owner = 'box_masks'
    check_boxes(owner, boxes)
    input_size = _check_input_size(owner, input_size)
    foreground = _foreground(boxes, (int(size[0]), int(size[1])), input_size)
    outside = foreground == 0
    valid_mask = valid_pixels(owner, foreground[:, None], valid=valid)
    if valid_mask is not None:
        foreground = torch.where(valid_mask, foreground, 0)
        outside = outside & valid_mask
    number = outside.sum(dim=(1, 2), keepdim=True)
    return foreground, mean_of_sum(outside.to(foreground.dtype), number)


def inside_boxes(boxes: Sequence[Tensor], size: tuple[int, int], input_size: tuple[int, int]) -> Tensor:
    """Which positions of a map have their centre inside a box.

    Args:
        boxes: one tensor an image, shape (n, 4), ``xyxy`` in pixels of the input;
            n may be 0.
        size: (H, W) of the map.
        input_size: (h, w) of the input.

    Returns:
        Bool, shape (B, H, W); a centre on the border is inside. Time and memory
        O(n H W) an image.

    Raises:
        ShapeError: boxes are not (n, 4).

    Example:
        >>> inside_boxes([torch.tensor([[0.0, 0.0, 5.0, 4.0]])], (1, 2), (4, 8))
        tensor([[[ True, False]]])
    """
    out = []
    for one in boxes:
        if one.dim() != 2 or one.shape[1] != 4:
            raise ShapeError(
                f'inside_boxes: `boxes` must hold tensors of shape (n, 4), got {tuple(one.shape)}. '
                'Corner form: x1, y1, x2, y2 in pixels.'
            )
        one = one.detach().to(torch.promote_types(one.dtype, torch.float32))
        y = (torch.arange(size[0], device=one.device, dtype=one.dtype) + 0.5) * (input_size[0] / size[0])
        x = (torch.arange(size[1], device=one.device, dtype=one.dtype) + 0.5) * (input_size[1] / size[1])
        across = (x >= one[:, 0:1]) & (x <= one[:, 2:3])
        down = (y >= one[:, 1:2]) & (y <= one[:, 3:4])
        out.append((down[:, :, None] & across[:, None, :]).any(dim=0))
    return torch.stack(out)
