"""The embedded scenes as mmseg datasets."""

from __future__ import annotations

from typing import Any

from mmseg.datasets import BaseSegDataset

from mmstructkd.datasets.scene_source import SceneSource
from mmstructkd.datasets.scenes import CLASSES, PALETTE
from mmstructkd.registry import DATASETS

__all__ = ['SceneDepthDataset', 'SceneSegDataset']


@DATASETS.register_module()
class SceneSegDataset(BaseSegDataset):
    """Rendered scenes with class masks; nothing is read from disk.

    The pipeline starts with ``mmstructkd.LoadScene`` and
    ``mmstructkd.LoadSceneAnnotations``; everything after is mmseg's own. To make
    an epoch longer than the number of scenes, use mmengine's ``RepeatDataset``.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``; they share no scene.
        num_scenes: how many scenes of the split.
        seed: the family of scenes. Keep it for all splits of an experiment.
        size: ``(height, width)`` of the images.
        cache: keep rendered scenes in memory (200 kB each at 128 x 128, in every worker).
        **kwargs: of mmseg's :class:`BaseSegDataset`; ``metainfo=dict(classes=...)``
            selects a subset of the classes, the others are ignored.

    Raises:
        ConfigError: an unknown split, or a number out of range.
    """

    #: The class that it is made from would not find them, see ``plain_config``.
    finds_samples_itself = True
    METAINFO = dict(classes=CLASSES, palette=[list(colour) for colour in PALETTE])

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
        return [
            dict(info, label_map=self.label_map, reduce_zero_label=self.reduce_zero_label, seg_fields=[])
            for info in self.source.infos()
        ]

    def get_data_info(self, idx: int) -> dict:
        """Return the information of one sample, with the rendered ``scene``."""
        info = super().get_data_info(idx)
        info['scene'] = self.source.render(info['scene_index'])
        return info


@DATASETS.register_module()
class SceneDepthDataset(SceneSegDataset):
    """Rendered scenes with depth maps in metres, for mmseg's depth estimators.

    The same scenes as :class:`SceneSegDataset`. The pipeline loads the depth with
    ``dict(type='mmstructkd.LoadSceneAnnotations', with_seg=False, with_depth=True)``;
    readings lie between 1 and 24 m, 0 is no reading. mmseg's ``DepthMetric``
    leaves those out with ``min_depth_eval`` above 0.
    """
