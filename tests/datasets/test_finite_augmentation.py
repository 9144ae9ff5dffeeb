"""A finite set of views: each is the same wherever it is drawn, and the streams outside do not notice."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform

from mmstructkd.datasets import FiniteAugmentation
from mmstructkd.errors import ConfigError
from mmstructkd.registry import TRANSFORMS


@TRANSFORMS.register_module(force=True)
class DrawFromAll(BaseTransform):
    """Adds a number from each stream to the image."""

    def transform(self, results: dict) -> dict:
        drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
        return dict(results, img=results['img'] + np.array(drawn), drawn=drawn)


DRAW = [dict(type='mmstructkd.DrawFromAll')]


def results(name: str = 'a.png', **changes: Any) -> dict:
    return dict(img=np.zeros((2, 2, 3)), img_path=name, **changes)


def views(step: FiniteAugmentation, name: str = 'a.png', count: int = 60) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for _ in range(count):
        out = step(results(name))
        record = out['augmentation_view']
        assert found.setdefault(record['view'], out['drawn']) == out['drawn']
        assert (record['views'], record['seed']) == (step.views, step.seed)
    return found


def test_there_are_as_many_views_and_each_is_always_the_same() -> None:
    first = views(FiniteAugmentation(DRAW, views=3))
    assert sorted(first) == [0, 1, 2]
    assert len({tuple(drawn) for drawn in first.values()}) == 3
    assert views(FiniteAugmentation(DRAW, views=3)) == first
    assert views(FiniteAugmentation(DRAW, views=3), 'b.png') != first
    assert views(FiniteAugmentation(DRAW, views=3, seed=1)) != first
    assert all(len(set(drawn)) == 3 for drawn in first.values())  # the streams differ from each other


def test_the_streams_outside_go_on_as_after_one_number() -> None:
    states = []
    for step in (lambda: FiniteAugmentation(DRAW, views=5)(results()), lambda: np.random.randint(5)):
        random.seed(3)
        np.random.seed(3)
        torch.manual_seed(3)
        step()
        states.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert states[0] == states[1]


def test_a_step_that_fails_gives_the_streams_back() -> None:
    random.seed(3)
    before = random.getstate()
    with pytest.raises(KeyError):
        FiniteAugmentation(DRAW)(dict(img_path='a.png'))
    assert random.getstate() == before


def test_the_pixels_are_recorded() -> None:
    step = FiniteAugmentation([], views=1)
    first, second = step(results()), step(results())
    assert first['augmentation_view'] == second['augmentation_view']
    changed = step(dict(results(), img=np.ones((2, 2, 3))))
    assert changed['augmentation_view']['pixels'] != first['augmentation_view']['pixels']


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('inside', [True, False])
def test_packing_carries_the_record(scope: str, inside: bool) -> None:
    pack = dict(type='mmseg.PackSegInputs' if scope == 'mmseg' else 'mmdet.PackDetInputs')
    data = dict(img=np.zeros((4, 6, 3), np.uint8), img_path='a.png', img_shape=(4, 6), ori_shape=(4, 6))
    if inside:
        out = FiniteAugmentation([pack], views=1)(data)
    else:
        out = TRANSFORMS.build(dict(pack, meta_keys=('img_path', 'augmentation_view')))(
            FiniteAugmentation([], views=1)(data)
        )
    assert out['data_samples'].metainfo['augmentation_view']['view'] == 0
    assert out['inputs'].shape == (3, 4, 6)


def test_an_image_that_is_dropped_stays_dropped() -> None:
    class Drop(BaseTransform):
        def transform(self, results: dict) -> None:
            return None

    assert FiniteAugmentation([Drop()])(results()) is None


@pytest.mark.parametrize(
    ('changes', 'message'),
    [(dict(views=0), '`views` must be an integer of at least 1, got 0'), (dict(seed=-1), '`seed` must be')],
)
def test_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FiniteAugmentation([], **changes)


def test_an_image_needs_a_name() -> None:
    with pytest.raises(ConfigError, match=r"must name the image by one of \('img_path', 'img_id', 'sample_idx'\)"):
        FiniteAugmentation([])(dict(img=np.zeros((2, 2, 3))))
