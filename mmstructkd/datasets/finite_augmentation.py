"""Random augmentation drawn from a finite set, so that what was computed of a view can be found again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform, Compose

from mmstructkd.errors import ConfigError, check_count, shown
from mmstructkd.registry import TRANSFORMS

__all__ = ['FiniteAugmentation']

VIEW = 'augmentation_view'
#: What numpy draws from.
MAX_VIEWS = 2**31
SAMPLE = ('img_path', 'img_id', 'sample_idx')


@contextlib.contextmanager
def _seeded(words: Sequence[int]) -> Iterator[None]:
    """Let Python, numpy and torch (CPU) draw from a seed for a while."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed([int(word) for word in words])
    torch.default_generator.manual_seed(int(words[2]) << 31 | int(words[3]) >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@TRANSFORMS.register_module()
class FiniteAugmentation(BaseTransform):
    """Runs random transforms from one of a few seeds an image.

    Each image has ``views`` views; which of them is taken is drawn each time,
    what it looks like is decided by the seed, the image and the number of the
    view. What was computed of a view, such as the teacher's outputs
    (``teacher=dict(cache=...)``), can then be kept across epochs and runs.

    Put everything from the first random step to the packing inside::

        train_pipeline = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='mmstructkd.FiniteAugmentation', views=8, transforms=[
                dict(type='RandomCrop', crop_size=(512, 512)),
                dict(type='RandomFlip', prob=0.5),
                dict(type='PhotoMetricDistortion'),
                dict(type='PackSegInputs')])]

    The view is recorded as ``augmentation_view`` in the metainfo of the packed
    sample: its number, how many there are, the seed, and a hash of the pixels.
    With the packing outside, name it in ``meta_keys`` there, and let nothing
    random follow.

    The streams of Python, numpy and torch go on behind it as if it had drawn
    one number. Steps that mix several images draw those outside
    (``MultiImageMixDataset``) and cannot be made finite here.

    Args:
        transforms: configs of the steps.
        views: K, how many there are of each image.
        seed: of all of them.

    Raises:
        ConfigError: an argument is out of range, or the results do not name
            their image.
    """

    repeatable = True

    def __init__(self, transforms: Sequence[Any], views: int = 8, seed: int = 0) -> None:
        owner = type(self).__name__
        check_count(owner, 'views', views, maximum=MAX_VIEWS)
        check_count(owner, 'seed', seed, 0)
        try:
            self.transforms = Compose(list(transforms))
        except Exception as err:  # whatever mmcv trips over
            raise ConfigError(
                f'{owner}: `transforms` must be a list of configs of transforms, got {shown(transforms)}. '
                f'{type(err).__name__}: {err}'
            ) from err
        self.views, self.seed = views, seed

    def transform(self, results: dict) -> dict | None:
        """Run the steps.

        Args:
            results: of an image, with its ``img_path``, ``img_id`` or ``sample_idx``.

        Returns:
            What the steps return, with the view recorded.
        """
        sample = {key: results[key] for key in SAMPLE if results.get(key) is not None}
        if not sample:
            raise ConfigError(
                f'FiniteAugmentation: `results` must name the image by one of {SAMPLE}, got {sorted(results)}.'
            )
        view = int(np.random.randint(self.views))
        text = json.dumps([self.seed, view, sample], sort_keys=True, default=str)
        words = np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), dtype=np.uint32)
        with _seeded(words.tolist()):
            results = self.transforms(results)
        if results is None:
            return None
        record = {'view': view, 'views': self.views, 'seed': self.seed, 'pixels': self._pixels(results)}
        if 'data_samples' in results:
            results['data_samples'].set_metainfo({VIEW: record})
        else:
            results[VIEW] = record
        return results

    @staticmethod
    def _pixels(results: dict) -> str:
        """Hash of the image as it leaves."""
        image = results['inputs'] if 'inputs' in results else results['img']
        array = np.ascontiguousarray(image.numpy() if isinstance(image, torch.Tensor) else image)
        head = f'{array.dtype} {array.shape}'.encode()
        return hashlib.blake2b(head + array.tobytes(), digest_size=16).hexdigest()

    def __repr__(self) -> str:
        return f'{type(self).__name__}(views={self.views}, seed={self.seed}, transforms={self.transforms})'
