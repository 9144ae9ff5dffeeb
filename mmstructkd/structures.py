"""What the stages hand to each other: frozen, and free of any mm package."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ['Blend', 'Targets']


@dataclass(frozen=True, eq=False)
class Targets:
    """What a batch knows besides its features. Every field may be absent.

    B images, H x W the size of the padded input of the student.

    Attributes:
        labels: class of each pixel, int64, shape (B, H, W); ``ignore_index``
            where nothing is known.
        valid: pixels that count, bool, shape (B, H, W), whatever a loss computes;
            ``None``: all. As a batch is collected: inside the image and
            labelled, that is not ignored (for depth: with a reading).
        ignore_index: the label that marks pixels which do not count.
        num_classes: number of classes of the student's task.
        images: the student's normalised input, shape (B, 3, H, W).
        input_size: (H, W) of the student's input.
        boxes: one tensor an image, shape (n_i, 4), ``xyxy`` in pixels of the input.
        box_labels: one tensor an image, int64, shape (n_i,).
        depth: metres, shape (B, H, W); 0 where there is no reading.
        inside: pixels inside the image, labelled or not, bool, shape (B, H, W);
            ``None``: nothing is padding. A term puts them in the place of
            ``valid`` where its loss counts unlabelled pixels.
        views: where the batch is several copies of one, one after the other, how
            each is turned, ``'none'`` among them; empty: it is not.
    """

    labels: Tensor | None = None
    valid: Tensor | None = None
    ignore_index: int = 255
    num_classes: int | None = None
    images: Tensor | None = None
    input_size: tuple[int, int] | None = None
    boxes: tuple[Tensor, ...] | None = None
    box_labels: tuple[Tensor, ...] | None = None
    depth: Tensor | None = None
    inside: Tensor | None = None
    views: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Blend:
    """How the images of a batch were blended in pairs.

    Attributes:
        partners: the image that each is blended with, int64, shape (B,).
        share: of the image itself, in [0, 1]; the partner has the rest.
    """

    partners: Tensor
    share: float
