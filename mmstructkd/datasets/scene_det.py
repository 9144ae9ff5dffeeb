"""The embedded scenes as an mmdet dataset."""

from __future__ import annotations

from typing import Any

from mmdet.datasets.base_det_dataset import BaseDetDataset

from mmstructkd.datasets.scene_source import SceneSource
from mmstructkd.datasets.scenes import OBJECT_CLASSES, OBJECT_PALETTE, Scene
from mmstructkd.registry import DATASETS

__all__ = ['SceneDetDataset']


@DATASETS.register_module()
class SceneDetDataset(BaseDetDataset):
    """Rendered scenes with the boxes of their objects; nothing is read from disk.

    The pipeline starts with ``mmstructkd.LoadScene`` and mmdet's own
    ``LoadAnnotations``. Objects that are mostly hidden, or tiny, carry
    ``ignore_flag``. ``CocoMetric`` needs no annotation file if ``'instances'`` is
    among the ``meta_keys`` of ``PackDetInputs``.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``; they share no scene.
        num_scenes: how many scenes of the split.
        seed: the family of scenes. Keep it for all splits of an experiment.
        size: ``(height, width)`` of the images.
        cache: keep rendered scenes in memory (200 kB each at 128 x 128, in every worker).
        **kwargs: of mmdet's :class:`BaseDetDataset`; ``metainfo=dict(classes=...)``
            selects a subset of the classes, the others have no box.

    Raises:
        ConfigError: an unknown split, or a number out of range.
    """

    #: The class that it is made from would not find them, see ``plain_config``.
    finds_samples_itself = True
    METAINFO = dict(classes=OBJECT_CLASSES, palette=list(OBJECT_PALETTE))

    def __init__(
        self,
        split: str = 'train',
        num_scenes: int = 800,
        seed: int = 0,
        size: tuple[int, int] = (128, 128),
        cache: bool = False,
        **kwargs: Any,
    ) -> None:
        self.source = SceneSource(type(self).__name__, split, num_scenes, seed, size, cache)
        # the list is short; serialising it would cost a full garbage collection
        super().__init__(**dict(dict(serialize_data=False), **kwargs))

    def load_data_list(self) -> list[dict]:
        """List the scenes; none is rendered yet."""
        height, width = self.source.size
        return [dict(info, img_id=info['scene_index'], height=height, width=width) for info in self.source.infos()]

    def get_data_info(self, idx: int) -> dict:
        """Return the information of one sample, with the rendered ``scene`` and its ``instances``."""
        info = super().get_data_info(idx)
        info['scene'] = self.source.render(info['scene_index'])
        info['instances'] = self._instances(info['scene'])
        return info

    def _instances(self, scene: Scene) -> list[dict]:
        classes = list(self.metainfo['classes'])
        names = [OBJECT_CLASSES[label] for label in scene.box_labels]
        return [
            dict(bbox=box, bbox_label=classes.index(name), ignore_flag=int(ignored))
            for box, name, ignored in zip(scene.boxes.tolist(), names, scene.box_ignored.tolist(), strict=True)
            if name in classes
        ]
