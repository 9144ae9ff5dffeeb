"""What KITTI's depth benchmark does to images and depth maps, for mmseg's pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.transforms import BaseTransform

from mmstructkd.errors import ConfigError, check_one_of, is_count, is_finite_number
from mmstructkd.registry import TRANSFORMS

__all__ = ['BottomCrop', 'DepthWindow']

#: Shares of the image's height and width: first row, end row, first column, end column.
WINDOWS: dict[str, tuple[float, float, float, float]] = {
    'garg': (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    'eigen': (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}


@TRANSFORMS.register_module()
class BottomCrop(BaseTransform):
    """Keep the lowest rows, and of these the middle columns.

    The crop of KITTI's depth benchmark at 352x1216: above it the laser sees
    nothing, and all images get one size. Applied to the image and to every map in
    ``seg_fields``. The sample is from then on an image of this size:
    ``ori_shape`` is set as well, so that predictions come back in it.

    Args:
        crop_size: (H, W) that is kept.

    Raises:
        ConfigError: the size is not two integers above 0, or an image is smaller.
    """

    def __init__(self, crop_size: Sequence[int] = (352, 1216)) -> None:
        sides = tuple(crop_size) if isinstance(crop_size, Sequence) else (crop_size,)
        if len(sides) != 2 or any(not is_count(side) or side < 1 for side in sides):
            raise ConfigError(
                f'{type(self).__name__}: `crop_size` must be two integers above 0, (height, width), got {crop_size!r}.'
            )
        self.crop_size = sides

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Crop image and maps."""
        height, width = self.crop_size
        shape = results['img'].shape[:2]
        if shape[0] < height or shape[1] < width:
            raise ConfigError(
                f'{type(self).__name__}: `crop_size` must fit into each image, got {height}x{width} for one of '
                f'{shape[0]}x{shape[1]}. Crop before you resize, or take a smaller size.'
            )
        top, left = shape[0] - height, (shape[1] - width) // 2
        for key in ('img', *results.get('seg_fields', [])):
            results[key] = results[key][top:, left : left + width]
        results['img_shape'] = results['ori_shape'] = (height, width)
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(crop_size={self.crop_size})'


@TRANSFORMS.register_module()
class DepthWindow(BaseTransform):
    """Leave readings of the depth map in a window only; outside of it there is none (0).

    mmseg's ``DepthMetric`` scores the readings, so this limits what is scored; it
    belongs into the test pipeline alone. ``'garg'`` and ``'eigen'`` are the two
    windows with which results on KITTI's Eigen split are reported, as shares of
    the *uncropped* image: put it before a crop.

    Args:
        window: ``'garg'``, ``'eigen'``, or four shares within [0, 1]: first row,
            end row, first column, end column.

    Raises:
        ConfigError: an unknown name, or shares out of order.
    """

    def __init__(self, window: str | Sequence[float] = 'garg') -> None:
        owner = type(self).__name__
        if isinstance(window, str):
            check_one_of(owner, 'window', window, tuple(WINDOWS))
            shares: tuple[float, ...] = WINDOWS[window]
        else:
            shares = tuple(window) if isinstance(window, (list, tuple)) else ()
            numbers = len(shares) == 4 and all(map(is_finite_number, shares))
            if not numbers or not (0 <= shares[0] < shares[1] <= 1 and 0 <= shares[2] < shares[3] <= 1):
                raise ConfigError(
                    f'{owner}: `window` must be four shares within [0, 1], first row, end row, first column, end '
                    f'column, got {window!r}.'
                )
        self.window = window
        self.shares = shares

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Set the depth outside the window to 0."""
        depth = results['gt_depth_map']
        height, width = depth.shape[:2]
        # rounded down, as published
        top, bottom = (int(share * height) for share in self.shares[:2])
        left, right = (int(share * width) for share in self.shares[2:])
        kept = depth[top:bottom, left:right].copy()
        depth[...] = 0
        depth[top:bottom, left:right] = kept
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(window={self.window!r})'
