"""Pipeline steps that unpack the embedded scenes."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile

from mmstructkd.errors import ConfigError, check_one_of
from mmstructkd.registry import TRANSFORMS

__all__ = ['LoadScene', 'LoadSceneAnnotations']


#: What mmcv reads files by.
COLOR_TYPES = ('color', 'grayscale', 'unchanged', 'color_ignore_orientation', 'grayscale_ignore_orientation')
DECODERS = ('cv2', 'pillow', 'tifffile', 'turbojpeg')


@TRANSFORMS.register_module()
class LoadScene(LoadImageFromFile):
    """Take the image of the scene that the dataset rendered.

    Results that hold no ``scene`` are read from ``img_path``, so that the same
    pipeline serves ``inference_model`` and ``inference_detector`` on files.

    Required keys: ``scene`` or ``img_path``. Added keys: ``img`` (BGR, uint8,
    (H, W, 3)), ``img_shape``, ``ori_shape``, ``height``, ``width``, ``scale_factor``.

    Args:
        color_type: of the image of a file, see :func:`mmcv.imfrombytes`.
        imdecode_backend: what decodes a file, likewise.
        **kwargs: of mmcv's :class:`LoadImageFromFile`, for files.

    Raises:
        ConfigError: an unknown colour type or decoder.
    """

    #: What mmcv's loader needs behind it to leave the same keys; for configs without this package.
    plain_after = (dict(type='Resize', scale_factor=1.0),)

    def __init__(self, *, color_type: str = 'color', imdecode_backend: str = 'cv2', **kwargs: Any) -> None:
        check_one_of(type(self).__name__, 'color_type', color_type, COLOR_TYPES)
        check_one_of(type(self).__name__, 'imdecode_backend', imdecode_backend, DECODERS)
        super().__init__(color_type=color_type, imdecode_backend=imdecode_backend, **kwargs)

    def transform(self, results: dict) -> dict | None:
        """Add the image to ``results``."""
        scene = results.get('scene')
        if scene is None:
            loaded = super().transform(results)
            if loaded is not None:
                loaded.setdefault('scale_factor', (1.0, 1.0))
            return loaded
        # a copy: the scene may be cached, and transforms write into the image
        image = scene.image.astype(np.float32) if self.to_float32 else scene.image.copy()
        results['img'] = image
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        results['height'], results['width'] = image.shape[:2]
        results['scale_factor'] = (1.0, 1.0)
        return results


@TRANSFORMS.register_module()
class LoadSceneAnnotations(BaseTransform):
    """Take the class mask, the depth map, or both, of the scene that the dataset rendered.

    What :class:`mmseg.LoadAnnotations` and ``LoadDepthAnnotation`` do for files:
    class subsets (``label_map``) and ``reduce_zero_label`` are applied, and both
    maps are entered in ``seg_fields``, so that later transforms move them along
    with the image. Boxes come with the dataset's ``instances``; mmdet's own
    ``LoadAnnotations`` reads them. Without a ``scene``, nothing is done.

    Added keys: ``gt_seg_map`` (uint8, (H, W)), ``gt_depth_map`` (float32, metres,
    (H, W), 0 where the sensor reads nothing), ``seg_fields``.

    Args:
        with_seg: load the class mask.
        with_depth: load the depth map.

    Raises:
        ConfigError: nothing is to be loaded.
    """

    def __init__(self, with_seg: bool = True, with_depth: bool = False) -> None:
        if not (with_seg or with_depth):
            raise ConfigError(
                'LoadSceneAnnotations: `with_seg` must be True if `with_depth` is not, got False. '
                'Leave the step out where no map is wanted.'
            )
        self.with_seg = with_seg
        self.with_depth = with_depth

    def transform(self, results: dict) -> dict:
        """Add the maps to ``results``."""
        scene = results.get('scene')
        if scene is None:
            return results
        fields = results.setdefault('seg_fields', [])
        if self.with_seg:
            results['gt_seg_map'] = self._labels(scene.labels, results)
            fields.append('gt_seg_map')
        if self.with_depth:
            results['gt_depth_map'] = scene.depth.copy()
            fields.append('gt_depth_map')
        return results

    @staticmethod
    def _labels(labels: np.ndarray, results: dict[str, Any]) -> np.ndarray:
        # one look-up table: zero label first, then the subset, in mmseg's order
        table = np.arange(256)
        if results.get('reduce_zero_label'):
            table = np.concatenate([[255], table[:254], [255]])
        label_map = results.get('label_map')
        if label_map is not None:
            subset = np.arange(256)
            subset[list(label_map)] = list(label_map.values())
            table = subset[table]
        return table.astype(np.uint8)[labels]

    def __repr__(self) -> str:
        return f'{type(self).__name__}(with_seg={self.with_seg}, with_depth={self.with_depth})'
