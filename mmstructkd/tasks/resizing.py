"""Batches at another resolution: one resize for all who show a network a smaller or larger image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.nn.functional import interpolate

from mmstructkd.errors import ConfigError, check_positive
from mmstructkd.tasks.sample_copies import resized

__all__ = ['check_scale', 'scale_batch', 'scale_images']

#: More is a slip, and would fill the memory.
MAX_SCALE = 16.0


def check_scale(owner: str, name: str, scale: float) -> float:
    """Check a factor of both sides of an image.

    Args:
        owner: whose it is, for the message.
        name: of the argument.
        scale: the factor.

    Returns:
        The factor.

    Raises:
        ConfigError: it is not above 0 and at most 16.
    """
    check_positive(owner, name, scale, MAX_SCALE)
    return float(scale)


def check_student_scale(owner: str, scale: float, task: str) -> float:
    """Check the factor by which a student's images are resized while its teacher sees them whole.

    Args:
        owner: whose it is, for the message.
        scale: the factor.
        task: ``'seg'``, ``'depth'`` or ``'det'``; a smaller input is for tasks whose labels are maps.

    Returns:
        The factor.

    Raises:
        ConfigError: it is not above 0 and at most 1, or below 1 for a detector.
    """
    scale = check_scale(owner, 'student_scale', scale)
    if scale > 1:
        raise ConfigError(
            f'{owner}: `student_scale` must be at most 1, got {scale:g}. For a student '
            'that sees more than its teacher, load larger images and rescale for the teacher with a ViewTeacher.'
        )
    if scale < 1 and task == 'det':
        raise ConfigError(
            f'{owner}: `student_scale` must be 1 for a detector, got {scale:g}. Boxes '
            'would have to shrink with the image, and small objects fall below its strides and anchors. Resize in '
            'the pipeline, for both.'
        )
    return scale


def scale_images(inputs: Tensor, scale: float) -> Tensor:
    """Resize a batch bilinearly, averaging where it shrinks.

    Args:
        inputs: shape (B, C, H, W).
        scale: factor of both sides.

    Returns:
        Shape (B, C, round(scale H), round(scale W)), at least one pixel each way.
    """
    size = [max(1, round(side * scale)) for side in inputs.shape[-2:]]
    return interpolate(inputs, size=size, mode='bilinear', align_corners=False, antialias=scale < 1)


def scale_batch(
    inputs: Tensor, data_samples: Sequence[Any] | None, scale: float
) -> tuple[Tensor, list[BaseDataElement] | None]:
    """Resize a batch, with samples that say where its images lie now and hold no label.

    Args:
        inputs: shape (B, C, H, W).
        data_samples: one per image; they are not changed.
        scale: factor of both sides.

    Returns:
        The images, and new samples.
    """
    images = scale_images(inputs, scale)
    size = (images.shape[-2], images.shape[-1])
    factors = (size[0] / inputs.shape[-2], size[1] / inputs.shape[-1])
    return images, resized(data_samples, factors, size)
