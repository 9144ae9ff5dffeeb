"""CamVid: road scenes with 11 classes, as used for small segmentation networks."""

from __future__ import annotations

from typing import Any

from mmseg.datasets import BaseSegDataset

from mmstructkd.datasets.files import check_first_label, check_suffix, reading
from mmstructkd.errors import ConfigError
from mmstructkd.registry import DATASETS

__all__ = ['CamVidDataset']


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid in the 11-class form of the SegNet split (367 train, 101 val, 233 test).

    Expected files below ``data_root``, one index PNG for each image::

        img/{train,val,test}/NAME.jpg
        ann/{train,val,test}/NAME.png      0..10 in the order of ``METAINFO``, 255 for void

    Void pixels are ignored by losses and metrics; ``reduce_zero_label`` stays
    off, since class 0 is the sky.

    Args:
        img_suffix: ending of the image files.
        seg_map_suffix: ending of the label files.
        **kwargs: of mmseg's :class:`BaseSegDataset`.

    Raises:
        ConfigError: there is no image of that ending, or none has a label.
    """

    METAINFO = dict(
        classes=(
            'Sky',
            'Building',
            'Pole',
            'Road',
            'Pavement',
            'Tree',
            'SignSymbol',
            'Fence',
            'Car',
            'Pedestrian',
            'Bicyclist',
        ),
        palette=[
            [128, 128, 128],
            [128, 0, 0],
            [192, 192, 128],
            [128, 64, 128],
            [60, 40, 222],
            [128, 128, 0],
            [192, 128, 128],
            [64, 64, 128],
            [64, 0, 128],
            [64, 64, 0],
            [0, 128, 192],
        ],
    )

    def __init__(self, img_suffix: str = '.jpg', seg_map_suffix: str = '.png', **kwargs: Any) -> None:
        check_suffix(type(self).__name__, 'img_suffix', img_suffix)
        check_suffix(type(self).__name__, 'seg_map_suffix', seg_map_suffix)
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images; none is an error, where mmseg makes an empty dataset of it."""
        owner, images = type(self).__name__, self.data_prefix.get('img_path')
        with reading(owner, 'data_prefix', images):
            listed = super().load_data_list()
        if not listed:
            raise ConfigError(
                f'{owner}: `data_prefix` and `img_suffix` must name images, got {images!r} and {self.img_suffix!r}. '
                'Is data_root right?'
            )
        label = listed[0].get('seg_map_path')
        if label is not None:
            check_first_label(owner, 'seg_map_suffix', self.seg_map_suffix, label, self.backend_args)
        return listed
