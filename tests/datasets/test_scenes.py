"""The renderer: determinism, and image, mask, depth and boxes of one and the same scene."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmstructkd.datasets import scene_shapes, scenes
from mmstructkd.datasets.scene_layout import SceneObject, draw_layout
from mmstructkd.datasets.scenes import (
    CLASSES,
    IGNORE_INDEX,
    MAX_DEPTH,
    OBJECT_CLASSES,
    OBJECT_PALETTE,
    PALETTE,
    Scene,
    render_scene,
)
from mmstructkd.errors import ConfigError

FIELDS = ('image', 'labels', 'depth', 'instances', 'boxes', 'box_labels', 'box_ids', 'box_ignored')


def digest(scene: Scene) -> str:
    return hashlib.sha256(b''.join(getattr(scene, name).tobytes() for name in FIELDS)).hexdigest()


@pytest.fixture(scope='module')
def family() -> list[Scene]:
    return [render_scene(3, index) for index in range(40)]


def test_types_and_shapes() -> None:
    scene = render_scene(0, 0, size=(48, 80))
    n = len(scene.boxes)
    assert (scene.image.shape, scene.image.dtype) == ((48, 80, 3), np.uint8)
    assert (scene.labels.shape, scene.labels.dtype) == ((48, 80), np.uint8)
    assert (scene.depth.shape, scene.depth.dtype) == ((48, 80), np.float32)
    assert (scene.instances.shape, scene.instances.dtype) == ((48, 80), np.int32)
    assert (scene.boxes.shape, scene.boxes.dtype) == ((n, 4), np.float32)
    assert scene.box_labels.shape == scene.box_ids.shape == scene.box_ignored.shape == (n,)
    assert len(CLASSES) == len(set(PALETTE)) == len(PALETTE)
    assert len(OBJECT_CLASSES) == len(OBJECT_PALETTE)
    assert CLASSES[-len(OBJECT_CLASSES) :] == OBJECT_CLASSES


def test_same_scene_whatever_was_rendered_before() -> None:
    first = digest(render_scene(5, 11))
    np.random.seed(0)  # the global state must not matter
    render_scene(5, 12)
    assert digest(render_scene(5, 11)) == first


def test_same_scene_in_another_process() -> None:
    # the folder as a package by itself: its own __init__ would import mmseg and mmdet too
    code = f"""
import hashlib, sys, types
sys.modules['mmstructkd.datasets'] = package = types.ModuleType('mmstructkd.datasets')
package.__path__ = [{str(Path(scenes.__file__).parent)!r}]
from mmstructkd.datasets.scenes import render_scene
assert 'mmseg' not in sys.modules
scene = render_scene(5, 11)
print(hashlib.sha256(b''.join(getattr(scene, name).tobytes() for name in {FIELDS})).hexdigest())
"""
    root = Path(scenes.__file__).parents[2]
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == digest(render_scene(5, 11))


def test_same_scene_on_every_platform() -> None:
    # who changes the scenes changes every figure measured on them: say so in the changelog, then here
    assert (
        digest(render_scene(0, 7, size=(32, 48))) == '3487867e4a73c03ee29a641d3d039a9cdc3b276ecc690bd764574bd0ffe10c35'
    )


def test_seed_and_index_both_count() -> None:
    digests = {digest(render_scene(seed, index, size=(32, 32))) for seed in range(4) for index in range(4)}
    assert len(digests) == 16


def test_single_precision_throughout() -> None:
    # a double that creeps in would round differently under NumPy 1 and 2
    layout, _ = draw_layout(3, 0)
    canvas = scenes._Canvas(layout, (64, 64))
    canvas.draw_sky()
    canvas.draw_ground()
    hits = [scene_shapes.cast_object(o, layout, canvas.camera) for o in layout.objects]
    hits += [scene_shapes.cast_plane(p, layout, canvas.camera) for p in layout.planes]
    for hit in hits:
        if hit is not None:
            assert {a.dtype for a in (hit.depth, hit.light, hit.colour)} == {np.dtype(np.float32)}


def test_every_class_occurs(family: list[Scene]) -> None:
    pixels = sum(np.bincount(scene.labels.ravel(), minlength=256) for scene in family)
    share = pixels[: len(CLASSES)] / pixels.sum()
    assert share.min() > 0.004, dict(zip(CLASSES, share, strict=True))
    assert pixels[len(CLASSES) : IGNORE_INDEX].sum() == 0
    assert pixels[IGNORE_INDEX] < 0.01 * pixels.sum()
    found = np.bincount(np.concatenate([scene.box_labels for scene in family]), minlength=len(OBJECT_CLASSES))
    assert found.min() >= 10


def test_every_scene_has_a_box_that_counts(family: list[Scene]) -> None:
    assert min(int((~scene.box_ignored).sum()) for scene in family) >= 1


def test_mask_agrees_with_instances(family: list[Scene]) -> None:
    first = len(CLASSES) - len(OBJECT_CLASSES)
    for scene in family:
        is_object = ((scene.labels >= first) & (scene.labels < len(CLASSES))) | (scene.labels == IGNORE_INDEX)
        assert np.array_equal(is_object, scene.instances > 0)
        for label, number, ignored in zip(scene.box_labels, scene.box_ids, scene.box_ignored, strict=True):
            mine = set(np.unique(scene.labels[scene.instances == number]).tolist())
            assert mine == {first + label} or (ignored and mine == {IGNORE_INDEX})
        assert set(np.unique(scene.instances)) - {0} == set(scene.box_ids.tolist())


def test_boxes_are_tight(family: list[Scene]) -> None:
    for scene in family:
        for (x1, y1, x2, y2), number in zip(scene.boxes.astype(int), scene.box_ids, strict=True):
            mine = scene.instances == number
            inside = mine[y1:y2, x1:x2]
            assert inside.sum() == mine.sum()
            # each edge touches the object
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_tiny_or_hidden_objects_are_ignored(family: list[Scene]) -> None:
    flags = np.concatenate([scene.box_ignored for scene in family])
    assert 0 < flags.sum() < 0.2 * len(flags)
    for scene in family:
        for number, ignored in zip(scene.box_ids, scene.box_ignored, strict=True):
            if not ignored:
                assert (scene.instances == number).sum() >= 12


def test_depth_is_metres_or_no_reading(family: list[Scene]) -> None:
    for scene in family:
        read = scene.depth[scene.depth > 0]
        assert read.min() > 1.0
        assert read.max() <= MAX_DEPTH
        assert not scene.depth[scene.labels == CLASSES.index('sky')].any()
        assert 0.2 < len(read) / scene.depth.size < 1.0


@pytest.mark.parametrize('index', range(6))
def test_the_nearest_surface_wins(index: int) -> None:
    # draw each object into an empty world, then compare with all of them together
    layout, _ = draw_layout(3, index)
    size = (96, 96)
    alone = []
    for number, o in enumerate(layout.objects, start=1):
        canvas = scenes._Canvas(layout, size)
        hit = scene_shapes.cast_object(o, layout, canvas.camera)
        if hit is not None:
            canvas.put(hit, 0, number)
        alone.append(canvas.depth)
    backdrop = scenes._Canvas(layout, size)
    backdrop.draw_ground()
    for plane in layout.planes:
        hit = scene_shapes.cast_plane(plane, layout, backdrop.camera)
        if hit is not None:
            backdrop.put(hit, 0, 0)
    stack = np.stack([backdrop.depth, *alone])
    assert (stack.argmin(axis=0)[stack.min(axis=0) < 1e6] > 0).any()
    scene = render_scene(3, index, size)
    assert np.array_equal(scene.instances, stack.argmin(axis=0))
    read = scene.depth > 0
    assert np.array_equal(scene.depth[read], stack.min(axis=0)[read])


def test_objects_stand_where_the_layout_says() -> None:
    # the depth of an object lies within its extent along the axis, and near things look bigger
    layout, _ = draw_layout(3, 1)
    scene = render_scene(3, 1)
    checked = 0
    for number, o in enumerate(layout.objects, start=1):
        read = scene.depth[(scene.instances == number) & (scene.depth > 0)]
        if len(read):
            assert read.min() >= o.z - o.radius - 0.07
            assert read.max() <= o.z + o.radius + 1e-3
            checked += 1
    assert checked >= 3


def test_perspective() -> None:
    # the same ball at twice the distance covers about a quarter of the pixels
    layout, _ = draw_layout(3, 0)
    camera = scene_shapes.Camera(layout, (256, 256))
    areas = []
    for z in (5.0, 10.0):
        ball = SceneObject('ball', 0.0, z, 0.7, 1.4)
        areas.append(scene_shapes.cast_object(ball, layout, camera).mask.sum())
    assert areas[0] / areas[1] == pytest.approx(4.0, rel=0.1)


def test_size_shows_the_same_scene() -> None:
    small, large = render_scene(3, 2, (64, 64)), render_scene(3, 2, (128, 128))
    shrunk = large.labels[::2, ::2]
    assert (shrunk == small.labels).mean() > 0.9


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((-1, 0), r'`seed` must be an integer of at least 0, got -1'),
        ((0, -2), r'`index` must be an integer of at least 0, got -2'),
        ((0, 1.5), r'`index` must be an integer of at least 0, got 1.5'),
        ((0, 0, (8, 128)), r'`size\[0\]` must be an integer of at least 16, got 8'),
        ((0, 0, 128), r'`size` must be \(height, width\), got 128'),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        render_scene(*arguments)
