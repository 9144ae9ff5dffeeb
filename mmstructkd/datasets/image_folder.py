"""Images from a folder, without labels or with those that a teacher gave them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from mmstructkd.errors import ConfigError, shown
from mmstructkd.registry import DATASETS

__all__ = ['ImageFolderDataset']

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
#: Kinds of labels, and how their files end.
LABELS = {'seg_map_path': '.png', 'depth_map_path': '.npy'}


@DATASETS.register_module()
class ImageFolderDataset(BaseDataset):
    """All images below a folder, in the order of their paths, with nothing known about them.

    For streams of unlabelled images. The pipeline may load, augment and pack, but
    without ``labels`` no annotation is there to be loaded. Samples carry ``img_path`` and ``img_id``,
    and the empty fields that pipelines of mmseg and mmdet expect.

    Args:
        data_root: the folder; sub-folders are searched as well.
        ann_file: optional text file with one path a line, below ``data_root`` or
            absolute: only these images are taken.
        labels: folder of the labels that ``tools/select_images.py --write-labels``
            wrote: ``dict(seg_map_path=FOLDER)``, where ``a/b.jpg`` has the classes
            ``a/b.jpg.png``, for ``LoadAnnotations``, or
            ``dict(depth_map_path=FOLDER)``, where it has the metres ``a/b.jpg.npy``,
            for ``LoadDepthAnnotation(decode_backend='numpy')``. ``None``: none.
        **kwargs: of mmengine's :class:`BaseDataset` (``pipeline``, ...).

    Raises:
        ConfigError: there is no such folder, a listed image or a label is
            missing, there is no image, or ``labels`` is something else.
    """

    def __init__(
        self,
        data_root: str | os.PathLike,
        ann_file: str | os.PathLike = '',
        labels: Mapping[str, str | os.PathLike] | None = None,
        **kwargs: Any,
    ) -> None:
        self.listed = os.fspath(ann_file)
        if labels is not None and (
            not isinstance(labels, Mapping) or len(labels) != 1 or not set(labels) <= set(LABELS)
        ):
            raise ConfigError(
                f'{type(self).__name__}: `labels` must give one folder, as {" or ".join(LABELS)}, got {shown(labels)}. '
                "Example: labels=dict(seg_map_path='data/kept_labels')."
            )
        self.labels = labels or {}
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
                **self._labels_of(file, root),
            }
            for number, file in enumerate(files)
        ]

    def _labels_of(self, file: Path, root: Path) -> dict[str, str]:
        """Name the labels of an image."""
        found = {}
        for key, folder in self.labels.items():
            label = Path(folder).expanduser() / f'{os.path.relpath(file, root)}{LABELS[key]}'
            if not label.is_file():
                raise ConfigError(
                    f'{type(self).__name__}: `labels` must hold the labels of every image, got none for {str(file)!r}, '
                    f'which would be {str(label)!r}. Name the images that have some in `ann_file`.'
                )
            found[key] = str(label)
        return found
