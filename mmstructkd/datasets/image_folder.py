"""Images without labels, from a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from mmstructkd.errors import ConfigError
from mmstructkd.registry import DATASETS

__all__ = ['ImageFolderDataset']

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')


@DATASETS.register_module()
class ImageFolderDataset(BaseDataset):
    """All images below a folder, in the order of their paths, with nothing known about them.

    For streams of unlabelled images. The pipeline may load, augment and pack, but
    no annotation is there to be loaded. Samples carry ``img_path`` and ``img_id``,
    and the empty fields that pipelines of mmseg and mmdet expect.

    Args:
        data_root: the folder; sub-folders are searched as well.
        ann_file: optional text file with one path a line, below ``data_root`` or
            absolute: only these images are taken.
        **kwargs: of mmengine's :class:`BaseDataset` (``pipeline``, ...).

    Raises:
        ConfigError: there is no such folder, a listed image is missing, or there
            is no image.
    """

    def __init__(self, data_root: str | os.PathLike, ann_file: str | os.PathLike = '', **kwargs: Any) -> None:
        self.listed = os.fspath(ann_file)
        super().__init__(data_root=os.fspath(data_root), ann_file='', **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the images."""
        owner = type(self).__name__
        root = Path(self.data_root).expanduser()
        if not root.is_dir():
            raise ConfigError(f'{owner}: `data_root` must be a folder that exists, got {self.data_root!r}.')
        if self.listed:
            path = Path(self.listed).expanduser()
            if not path.is_file():
                raise ConfigError(f'{owner}: `ann_file` must be a file that exists, got {self.listed!r}.')
            files = [root / line.strip() for line in path.read_text().splitlines() if line.strip()]
            absent = [file for file in files if not file.is_file()]
            if absent:
                raise ConfigError(
                    f'{owner}: `ann_file` must name images below `data_root`, got {len(absent)} that do not exist, '
                    f'the first is {str(absent[0])!r}.'
                )
        else:
            files = sorted(file for file in root.rglob('*') if file.suffix.lower() in SUFFIXES)
        if not files:
            raise ConfigError(f'{owner}: `data_root` must hold images ({", ".join(SUFFIXES)}), got none.')
        return [
            {
                'img_path': str(file),
                'img_id': number,
                'seg_map_path': None,
                'label_map': None,
                'reduce_zero_label': False,
                'seg_fields': [],
                'instances': [],
            }
            for number, file in enumerate(files)
        ]
