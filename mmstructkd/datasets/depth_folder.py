"""Depth maps in files, for mmseg's depth estimators: two folders, or the lists of KITTI's Eigen split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.fileio import join_path, list_dir_or_file, list_from_file
from mmseg.datasets import BaseSegDataset

from mmstructkd.datasets.files import check_first_label, check_prefix, check_suffix, reading
from mmstructkd.errors import ConfigError
from mmstructkd.registry import DATASETS

__all__ = ['DepthFolderDataset', 'KITTIEigenDataset']


@DATASETS.register_module()
class DepthFolderDataset(BaseSegDataset):
    """Images in one folder, depth maps of the same names in another.

    Expected files, for ``data_prefix=dict(img_path='img/train', depth_map_path='depth/train')``::

        img/train/NAME.jpg
        depth/train/NAME.png      16 bits, 0 for no reading

    The pipeline reads the maps with mmseg's ``LoadDepthAnnotation``, whose
    ``depth_rescale_factor`` turns the numbers of the file into metres: 1e-3 where
    they are millimetres, 1/256 for KITTI. Subfolders are searched as well.

    mmseg wants classes of every dataset it tests on; there is one, named ``depth``.

    Args:
        data_prefix: the folders ``img_path`` and ``depth_map_path``, below ``data_root``.
        img_suffix: ending of the image files.
        depth_map_suffix: ending of the depth files.
        **kwargs: of mmseg's :class:`BaseSegDataset`.

    Raises:
        ConfigError: the image folder holds no file of that ending.
    """

    #: The class that it is made from would not find them, see ``plain_config``.
    finds_samples_itself = True
    METAINFO = dict(classes=('depth',), palette=[[128, 128, 128]])

    def __init__(
        self,
        data_prefix: dict[str, str] | None = None,
        img_suffix: str = '.jpg',
        depth_map_suffix: str = '.png',
        **kwargs: Any,
    ) -> None:
        owner = type(self).__name__
        check_suffix(owner, 'img_suffix', img_suffix)
        check_suffix(owner, 'depth_map_suffix', depth_map_suffix)
        prefix = dict(img_path='img', depth_map_path='depth') if data_prefix is None else data_prefix
        check_prefix(owner, prefix, ('img_path', 'depth_map_path'))
        super().__init__(
            data_prefix=prefix,
            img_suffix=img_suffix,
            seg_map_suffix=depth_map_suffix,
            **kwargs,
        )

    def load_data_list(self) -> list[dict]:
        """List the images; the depth map of each has its name."""
        images, depths = self.data_prefix['img_path'], self.data_prefix['depth_map_path']
        owner = type(self).__name__
        with reading(owner, 'data_prefix', images):
            names = sorted(
                list_dir_or_file(
                    images, list_dir=False, suffix=self.img_suffix, recursive=True, backend_args=self.backend_args
                )
            )
        if not names:
            raise ConfigError(
                f'{owner}: `data_prefix` must name a folder with images (*{self.img_suffix}), got '
                f'{images!r}. Is data_root right, and `img_suffix`?'
            )
        listed = [
            dict(
                img_path=join_path(images, name),
                depth_map_path=join_path(depths, name[: -len(self.img_suffix)] + self.seg_map_suffix),
                seg_fields=[],
            )
            for name in names
        ]
        first = listed[0]['depth_map_path']
        check_first_label(owner, 'depth_map_suffix', self.seg_map_suffix, first, self.backend_args)
        return listed


@DATASETS.register_module()
class KITTIEigenDataset(DepthFolderDataset):
    """KITTI raw images with the depth maps of the depth benchmark, as the lists of the Eigen split pair them.

    Each line of ``ann_file`` is ``IMAGE DEPTH FOCAL``, separated by blanks::

        2011_09_26/.../image_02/data/0000000069.png  2011_.../proj_depth/groundtruth/image_02/0000000069.png  721.5377

    with the paths below ``data_prefix``. The word ``None`` as depth (images of the
    test list that have no improved depth map) leaves the line out. The focal
    length is in pixels, of the image as it is on disk, and goes into the sample as
    ``focal_length``. Depth PNGs hold 256 steps a metre.

    Args:
        ann_file: the list, below ``data_root``.
        data_prefix: the folders ``img_path`` and ``depth_map_path``, below ``data_root``.
        **kwargs: of :class:`DepthFolderDataset`.

    Raises:
        ConfigError: no ``ann_file``, a line of another form, or no line with a depth map.
    """

    def __init__(self, ann_file: str = '', data_prefix: dict[str, str] | None = None, **kwargs: Any) -> None:
        if not ann_file:
            raise ConfigError(
                f'{type(self).__name__}: `ann_file` must name a list of the Eigen split, got {ann_file!r}. '
                "Example: ann_file='kitti_eigen_train.txt'."
            )
        prefix = dict(img_path='input', depth_map_path='gt_depth') if data_prefix is None else data_prefix
        check_prefix(type(self).__name__, prefix, ('img_path', 'depth_map_path'))
        super().__init__(ann_file=ann_file, data_prefix=prefix, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the list; lines without a depth map are left out."""
        listed = []
        with reading(type(self).__name__, 'ann_file', self.ann_file):
            lines = list_from_file(self.ann_file, backend_args=self.backend_args)
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words:
                continue
            try:
                image, depth, focal = words[0], words[1], float(words[2])
            except (IndexError, ValueError):
                raise ConfigError(
                    f'{type(self).__name__}: `ann_file` must have lines "IMAGE DEPTH FOCAL", got {line!r} in line '
                    f'{number} of {Path(self.ann_file).name}.'
                ) from None
            if depth == 'None':
                continue
            listed.append(
                dict(
                    img_path=join_path(self.data_prefix['img_path'], image),
                    depth_map_path=join_path(self.data_prefix['depth_map_path'], depth),
                    focal_length=focal,
                    seg_fields=[],
                )
            )
        if not listed:
            raise ConfigError(
                f'{type(self).__name__}: `ann_file` must list at least one image with depth, got none in '
                f'{Path(self.ann_file).name}.'
            )
        return listed
