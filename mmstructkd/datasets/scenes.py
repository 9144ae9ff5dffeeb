"""A small ray caster: scenes with an image, a class mask, a depth map and boxes.

Every scene is a pure function of ``(seed, index)``, bit-equal in every process
and on every platform: :mod:`~mmstructkd.datasets.scene_layout` draws what is in
it, :mod:`~mmstructkd.datasets.scene_shapes` says what each ray meets, and here
the nearest wins, and the picture, the labels, the depth and the boxes are taken.

Shape shorthand: H x W the image. Colours are BGR, (3, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmstructkd.datasets.scene_layout import (
    CLASSES,
    FIRST_OBJECT,
    GROUND,
    IGNORE_INDEX,
    OBJECT_CLASSES,
    OBJECT_PALETTE,
    PALETTE,
    PATH,
    SKY,
    WALL,
    Array,
    Layout,
    Random,
    draw_layout,
)
from mmstructkd.datasets.scene_shapes import (
    NEAR,
    Camera,
    Hit,
    bricks,
    cast_object,
    cast_plane,
    mix,
    pattern_share,
    shadow,
    value_noise,
)
from mmstructkd.errors import ConfigError, check_count

__all__ = [
    'CLASSES',
    'IGNORE_INDEX',
    'MAX_DEPTH',
    'OBJECT_CLASSES',
    'OBJECT_PALETTE',
    'PALETTE',
    'Scene',
    'render_scene',
]

MAX_DEPTH = 24.0
"""Metres; the depth sensor reads nothing beyond."""

_MIN_PIXELS = 12  # an object with fewer visible pixels is ignored by mask and boxes
_MIN_VISIBLE = 0.25  # ... or with less of its silhouette visible (boxes only)


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene and all that is known about it.

    Attributes:
        image: BGR, uint8, shape (H, W, 3).
        labels: index into :data:`CLASSES`, uint8, shape (H, W); 255 on objects
            of which too little is visible to tell what they are.
        depth: metres along the optical axis, float32, shape (H, W); 0 where the
            sensor reads nothing (sky, too far, glossy objects, drop-outs).
        instances: number of the object, from 1, in the order of ``labels``'
            drawing; int32, shape (H, W); 0 where there is no object.
        boxes: ``xyxy`` in pixels around the visible part of each object, float32,
            shape (n, 4); right and bottom edges are exclusive.
        box_labels: index into :data:`OBJECT_CLASSES`, int64, shape (n,).
        box_ids: the value in ``instances``, int64, shape (n,).
        box_ignored: bool, shape (n,): mostly hidden or tiny, counts neither as a
            miss nor as a false alarm.
    """

    image: Array
    labels: Array
    depth: Array
    instances: Array
    boxes: Array
    box_labels: Array
    box_ids: Array
    box_ignored: Array


class _Canvas:
    """Depth-buffered picture: what is nearest stays."""

    def __init__(self, layout: Layout, size: tuple[int, int]) -> None:
        self.layout = layout
        self.camera = Camera(layout, size)
        # the row of the horizon itself would be endlessly far: the ground starts a little below
        self.horizon = int(np.count_nonzero(self.camera.dy > -layout.camera / 120.0))
        self.depth = np.full(size, np.float32(1e6))
        self.labels = np.full(size, SKY, dtype=np.uint8)
        self.instances = np.zeros(size, dtype=np.int32)
        self.light = np.ones(size, dtype=np.float32)
        self.colour = np.empty((3, *size), dtype=np.float32)

    def put(self, hit: Hit, label: int, instance: int) -> None:
        nearer = hit.mask & (hit.depth > NEAR) & (hit.depth < self.depth[hit.patch])
        np.copyto(self.depth[hit.patch], hit.depth, where=nearer, casting='same_kind')
        np.copyto(self.labels[hit.patch], np.uint8(label), where=nearer)
        np.copyto(self.instances[hit.patch], np.int32(instance), where=nearer)
        np.copyto(self.light[hit.patch], hit.light, where=nearer, casting='same_kind')
        np.copyto(self.colour[:, hit.patch[0], hit.patch[1]], hit.colour, where=nearer, casting='same_kind')

    def draw_sky(self) -> None:
        zenith, low, clouds, shift = self.layout.sky
        rows = slice(0, self.horizon)
        dx, dy, noise = self.camera.dx, self.camera.dy[rows], self.layout.noise
        up = np.clip(dy / 0.45, 0.0, 1.0)
        cover = value_noise(noise, dx * 7.0 + shift, dy * 16.0 + shift)
        cover += 0.5 * value_noise(noise, dx * 19.0 + shift, dy * 40.0)
        cover = np.clip((cover - 0.75) * 2.5, 0.0, 1.0) * clouds
        colour = low + up * (zenith - low)
        self.colour[:, rows] = colour + cover * (1.0 - colour)

    def draw_ground(self) -> None:
        layout, camera, first = self.layout, self.camera, self.horizon
        if first >= camera.h:
            return
        rows = slice(first, camera.h)
        z = -layout.camera / camera.dy[rows]
        x = z * camera.dx
        base, other, scale = layout.ground
        fade = 8.0 / (8.0 + z)
        grass = 0.6 * value_noise(layout.noise, x * scale, z * scale)
        grass += 0.4 * value_noise(layout.noise, x * 7.0, z * 7.0)
        share = 0.5 + (grass - 0.5) * (0.4 + 1.4 * fade)
        colour = mix((base, other), np.clip(share, 0.0, 1.0))
        labels = np.full(x.shape, GROUND, dtype=np.uint8)
        if layout.path is not None:
            a, b, c, half, stone, joint, pattern, pitch = layout.path
            across = x - (a + b * z + c * z * z)
            on_path = np.abs(across) < half
            if pattern == 0:
                share = bricks(across, np.broadcast_to(z, x.shape), pitch)
            elif pattern == 1:
                share = pattern_share(2, across, z, pitch, layout.noise) * 0.7
            else:
                share = 0.4 * value_noise(layout.noise, x * 3.0, z * 3.0) + (np.abs(across) > half - 0.1)
            share = np.clip(share * (0.25 + 0.75 * fade), 0.0, 1.0).astype(np.float32)
            colour = np.where(on_path, mix((stone, joint), share), colour)
            labels[on_path] = PATH
        light = layout.sun[1] * (1.0 - 0.85 * shadow(layout, camera, rows, x, z))
        patch = rows, slice(0, camera.w)
        hit = Hit(patch, np.broadcast_to(z, x.shape), np.ones(x.shape, dtype=bool), light, colour)
        self.put(hit, GROUND, 0)
        self.labels[patch] = labels

    def develop(self, rng: Random) -> Array:
        """Light, haze, lens and sensor; return the image."""
        layout, camera = self.layout, self.camera
        sky = self.labels == SKY
        ambient = 1.0 - layout.sun_strength * 0.75
        light = np.where(sky, np.float32(1.0), ambient + layout.sun_strength * 1.25 * self.light)
        picture = self.colour * light
        picture *= layout.tint
        haze = np.where(sky, np.float32(0.0), self.depth / (self.depth + layout.haze))
        picture += haze * (layout.haze_colour - picture)
        if layout.blur > 0.05:
            side = layout.blur / 4.0
            step = side * (picture[:, 1:] - picture[:, :-1])
            picture[:, :-1] += step
            picture[:, 1:] -= step
            step = side * (picture[:, :, 1:] - picture[:, :, :-1])
            picture[:, :, :-1] += step
            picture[:, :, 1:] -= step
        across, down = (2.0 * camera.focal / n * slope for n, slope in ((camera.w, camera.dx), (camera.h, camera.dy)))
        picture *= layout.exposure * (1.0 + layout.light[0] * across + layout.light[1] * down)
        grain = rng.bytes(2, 3, camera.h, camera.w)
        step = np.subtract(grain[0], grain[1], dtype=np.float32)
        step *= layout.grain / 104.0
        picture += step
        np.clip(picture, 0.0, 1.0, out=picture)
        picture *= 255.0
        picture += 0.5
        return np.ascontiguousarray(picture.astype(np.uint8).transpose(1, 2, 0))


def _sense(canvas: _Canvas, layout: Layout) -> Array:
    """Return the depth as a sensor reads it: 0 where it reads nothing."""
    depth = canvas.depth.copy()
    lost = (canvas.labels == SKY) | (depth > MAX_DEPTH)
    for number, o in enumerate(layout.objects, start=1):
        if o.glossy:
            lost |= canvas.instances == number
    shift_u, shift_v, level = layout.dropout
    camera = canvas.camera
    u, v = camera.dx * 14.0 + shift_u, camera.dy * 14.0 + shift_v
    lost |= value_noise(layout.noise, u, v) > level
    depth[lost] = 0.0
    return depth


def _boxes(canvas: _Canvas, layout: Layout, silhouettes: Sequence[int]) -> tuple[Array, Array, Array, Array]:
    """Return boxes, labels, ids and ignore flags; also mark what is too small in the mask."""
    boxes, labels, ids, ignored = [], [], [], []
    for number, (o, whole) in enumerate(zip(layout.objects, silhouettes, strict=True), start=1):
        if not whole:
            continue
        mine = canvas.instances == number
        cols, rows = np.flatnonzero(mine.any(axis=0)), np.flatnonzero(mine.any(axis=1))
        if not len(cols):
            continue
        seen = int(np.count_nonzero(mine))
        boxes.append((cols[0], rows[0], cols[-1] + 1, rows[-1] + 1))
        labels.append(OBJECT_CLASSES.index(o.kind))
        ids.append(number)
        ignored.append(seen < _MIN_PIXELS or seen < _MIN_VISIBLE * whole)
        if seen < _MIN_PIXELS:
            canvas.labels[mine] = IGNORE_INDEX
    return (
        np.array(boxes, dtype=np.float32).reshape(-1, 4),
        np.array(labels, dtype=np.int64),
        np.array(ids, dtype=np.int64),
        np.array(ignored, dtype=bool),
    )


def _whole(argument: str, value: Any, minimum: int) -> int:
    """Check a whole number, which may be one of numpy."""
    number = int(value) if isinstance(value, np.integer) else value
    check_count('render_scene', argument, number, minimum)
    return number


def render_scene(seed: int, index: int, size: tuple[int, int] = (128, 128)) -> Scene:
    """Render the scene that ``seed`` and ``index`` name.

    Five to eleven objects stand on a ground with (mostly) a path, between walls
    and under a sky, all drawn by casting one ray a pixel; the nearest surface
    wins. Some classes share their colours and shapes and differ in texture
    (path and ground), in width (pole and cylinder) or in what is above them (pole
    and the post of a sign).

    Args:
        seed: names a family of scenes, at least 0.
        index: the scene within the family, at least 0.
        size: ``(height, width)`` in pixels, each at least 16. The layout does not
            depend on it: another size shows the same scene.

    Returns:
        The scene. About 4.5 ms for 128 x 128 on one core, linear in the pixels
        above that.

    Raises:
        ConfigError: an argument is not an integer, or too small.

    Example:
        >>> scene = render_scene(0, 7, size=(32, 48))
        >>> scene.image.shape, scene.labels.shape, scene.depth.dtype.name
        ((32, 48, 3), (32, 48), 'float32')
        >>> bool((render_scene(0, 7, size=(32, 48)).image == scene.image).all())
        True
    """
    seed, index = _whole('seed', seed, 0), _whole('index', index, 0)
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ConfigError(f'render_scene: `size` must be (height, width), got {size!r}.')
    size = (_whole('size[0]', size[0], 16), _whole('size[1]', size[1], 16))
    layout, rng = draw_layout(seed, index)
    canvas = _Canvas(layout, size)
    canvas.draw_sky()
    canvas.draw_ground()
    for plane in layout.planes:
        hit = cast_plane(plane, layout, canvas.camera)
        if hit is not None:
            canvas.put(hit, WALL, 0)
    silhouettes = []
    for number, o in enumerate(layout.objects, start=1):
        hit = cast_object(o, layout, canvas.camera)
        silhouettes.append(0 if hit is None else int(np.count_nonzero(hit.mask)))
        if hit is not None:
            canvas.put(hit, FIRST_OBJECT + OBJECT_CLASSES.index(o.kind), number)
    image = canvas.develop(rng)
    depth = _sense(canvas, layout)
    boxes, box_labels, box_ids, box_ignored = _boxes(canvas, layout, silhouettes)
    return Scene(image, canvas.labels, depth, canvas.instances, boxes, box_labels, box_ids, box_ignored)
