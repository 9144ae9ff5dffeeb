"""What the scene datasets of both tasks share: which scenes there are, and rendering them."""

from __future__ import annotations

from typing import Any

from mmstructkd.datasets.scenes import Scene, render_scene
from mmstructkd.errors import ConfigError, check_count, check_flag, check_one_of, shown

__all__ = ['SPLIT_SIZE', 'SceneSource']

SPLIT_SIZE = 1_000_000
"""Scenes of a split; the splits are neighbouring ranges of indices, so they share no scene."""

#: Sides of an image: below nothing can be told apart, above a slip would fill the memory.
SMALLEST, LARGEST = 16, 2**14
_SPLITS = ('train', 'val', 'test')


class SceneSource:
    """The first ``num_scenes`` scenes of a split.

    Args:
        owner: the dataset, for messages.
        split: ``'train'``, ``'val'`` or ``'test'``.
        num_scenes: how many, up to :data:`SPLIT_SIZE`.
        seed: the family of scenes.
        size: ``(height, width)`` in pixels.
        cache: keep each scene once it is rendered, per process: 12 bytes a pixel,
            200 kB a scene of 128 x 128.

    Raises:
        ConfigError: an unknown split, or a number out of range.
    """

    def __init__(self, owner: str, split: str, num_scenes: int, seed: int, size: tuple[int, int], cache: bool) -> None:
        check_one_of(owner, 'split', split, _SPLITS)
        check_count(owner, 'seed', seed, 0)
        check_flag(owner, 'cache', cache)
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            raise ConfigError(f'{owner}: `size` must be (height, width), got {shown(size)}.')
        for axis, side in enumerate(size):
            check_count(owner, f'size[{axis}]', side, SMALLEST, maximum=LARGEST)
        check_count(owner, 'num_scenes', num_scenes, maximum=SPLIT_SIZE)
        self.first = _SPLITS.index(split) * SPLIT_SIZE
        self.num_scenes = num_scenes
        self.seed = seed
        self.size = tuple(size)
        self.cache = cache
        self._scenes: dict[int, Scene] = {}
        self.render(self.first)  # a bad seed or size shows here, not in a worker

    def infos(self) -> list[dict[str, Any]]:
        """Return what identifies each scene; ``img_path`` is a name, there is no such file."""
        indices = range(self.first, self.first + self.num_scenes)
        return [dict(scene_index=i, img_path=f'scene_{self.seed}_{i:07d}.png') for i in indices]

    def render(self, index: int) -> Scene:
        """Return the scene ``index``, from the cache if there is one. Do not write into it."""
        scene = self._scenes.get(index)
        if scene is None:
            scene = render_scene(self.seed, index, self.size)
            if self.cache:
                self._scenes[index] = scene
        return scene

    def __getstate__(self) -> dict[str, Any]:
        # rendering again is cheaper than pickling for each worker
        return dict(self.__dict__, _scenes={})
