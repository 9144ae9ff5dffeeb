"""From the student's normalised input to the teacher's, on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from mmstructkd.compat import pad_value, swaps_channels

__all__ = ['InputConversion', 'valid_area']


def image_sizes(data_samples: Sequence[Any] | None) -> list[tuple[int, int]] | None:
    """Unpadded (h, w) of each image, or ``None`` where it is not known."""
    if not data_samples:
        return None
    sizes = [sample.metainfo.get('img_shape') for sample in data_samples]
    return None if any(size is None for size in sizes) else [tuple(size[:2]) for size in sizes]


def valid_area(inputs: Tensor, data_samples: Sequence[Any] | None) -> Tensor | None:
    """Pixels inside the images, i.e. not padding.

    Args:
        inputs: the batch, shape (B, C, H, W), padded at the right and bottom.
        data_samples: one per image, with ``img_shape`` in their metainfo.

    Returns:
        Bool, shape (B, H, W); ``None`` where nothing is padded.
    """
    height, width = inputs.shape[-2:]
    sizes = image_sizes(data_samples)
    if sizes is None or all(h >= height and w >= width for h, w in sizes):
        return None
    sides = torch.tensor(sizes, device=inputs.device)
    rows = torch.arange(height, device=inputs.device)[None, :, None] < sides[:, 0, None, None]
    columns = torch.arange(width, device=inputs.device)[None, None, :] < sides[:, 1, None, None]
    return rows & columns


class InputConversion:
    """Turns a batch normalised for the student into one normalised for the teacher.

    Both preprocessors compute ``(channel order) -> (x - mean) / std -> pad``.
    The inverse of the student's and the teacher's own are one affine map per
    channel; padding gets the teacher's value. Where both agree the batch is
    passed on as it is.

    Args:
        student: the student's data preprocessor.
        teacher: the teacher's data preprocessor.
    """

    def __init__(self, student: BaseDataPreprocessor, teacher: BaseDataPreprocessor) -> None:
        mean_s, std_s, mean_t, std_t = torch.broadcast_tensors(
            *self._statistics(student), *self._statistics(teacher), torch.zeros(3, dtype=torch.float64)
        )[:4]  # three channels at the least
        self.flip = swaps_channels(student) != swaps_channels(teacher)
        if self.flip:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        self.scale = (std_s / std_t).float()
        self.shift = ((mean_s - mean_t) / std_t).float()
        self.pad_value = pad_value(teacher)
        same = bool(((self.scale - 1).abs() < 1e-6).all() and (self.shift.abs() < 1e-6).all())
        self.identity = same and not self.flip and pad_value(student) == self.pad_value

    @staticmethod
    def _statistics(preprocessor: BaseDataPreprocessor) -> tuple[Tensor, Tensor]:
        """Mean and std of the channels in float64, in the order after the swap."""
        if not getattr(preprocessor, '_enable_normalize', False):
            return torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        return preprocessor.mean.flatten().cpu().double(), preprocessor.std.flatten().cpu().double()

    def __call__(self, inputs: Tensor, data_samples: Sequence[Any] | None) -> Tensor:
        """Convert a batch.

        Args:
            inputs: normalised for the student, shape (B, 3, H, W).
            data_samples: for the size of each unpadded image.

        Returns:
            The batch as the teacher's own preprocessor would have made it.
        """
        if self.identity:
            return inputs
        if self.flip:
            inputs = inputs.flip(1)
        # moved once, not in every step
        self.scale, self.shift = self.scale.to(inputs.device), self.shift.to(inputs.device)
        converted = inputs * self.scale[:, None, None] + self.shift[:, None, None]
        valid = valid_area(inputs, data_samples)
        return converted if valid is None else converted.masked_fill(~valid[:, None], self.pad_value)
