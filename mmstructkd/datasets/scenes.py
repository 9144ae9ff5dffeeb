"""A small ray caster: scenes with an image, a class mask, a depth map and boxes.

Every scene is a pure function of ``(seed, index)``. Random numbers come from a
frozen generator (MT19937 through ``RandomState``), and pixels are computed with
sums, products, quotients and square roots alone, which IEEE 754 rounds the same
everywhere: a scene is bit-equal in every process and on every platform.

Axes: x to the right, y up, z away from the camera; metres. The camera stands at
``(0, camera height, 0)`` and looks along z; depth is z, so the ray through a
pixel is ``(dx, dy, 1)`` and its parameter is the depth itself.

Shape shorthand: H x W the image, h x w a patch of it (the box around an object),
dx (1, w) and dy (h, 1) the slopes of the rays of a patch. Colours are (3, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mmstructkd.errors import ConfigError

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

CLASSES = ('ground', 'path', 'wall', 'sky', 'box', 'ball', 'cylinder', 'cone', 'pole', 'sign')
"""Classes of the mask; the objects come last."""

PALETTE = (
    (106, 142, 85),
    (196, 164, 132),
    (140, 96, 92),
    (120, 178, 226),
    (233, 116, 37),
    (214, 39, 72),
    (58, 84, 196),
    (248, 205, 52),
    (132, 60, 168),
    (32, 172, 140),
)
"""RGB of each class."""

OBJECT_CLASSES = CLASSES[4:]
"""Classes of the boxes: the countable part of :data:`CLASSES`."""

OBJECT_PALETTE = PALETTE[4:]

IGNORE_INDEX = 255
MAX_DEPTH = 24.0
"""Metres; the depth sensor reads nothing beyond."""

_FIRST_OBJECT = len(CLASSES) - len(OBJECT_CLASSES)
_GROUND, _PATH, _WALL, _SKY = range(_FIRST_OBJECT)
_MIN_PIXELS = 12  # an object with fewer visible pixels is ignored by mask and boxes
_MIN_VISIBLE = 0.25  # ... or with less of its silhouette visible (boxes only)
_NEAR = 0.4  # nothing nearer than this is drawn
_NOISE = 64  # side of the noise table, a power of two

Array = np.ndarray
Patch = tuple[slice, slice]


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


# ---------------------------------------------------------------------------
# layout: random numbers only, no pixel
# ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Object:
    """One object: what it is, where it stands, how big it is and how it is painted."""

    kind: str
    x: float
    z: float
    radius: float
    height: float
    sizes: tuple[float, float] = (0.0, 0.0)  # box: width and depth; sign: height of the plate, its shape
    turn: tuple[float, float] = (1.0, 0.0)  # cosine and sine of the yaw
    colours: tuple[Array, Array] = field(default_factory=lambda: (_rgb(1, 1, 1), _rgb(0, 0, 0)))
    pattern: int = 0
    pitch: float = 0.3  # of the pattern, metres
    glossy: bool = False


@dataclass(frozen=True, eq=False)
class _Plane:
    """An upright rectangle: ``axis`` 'z' faces the camera, 'x' stands at a side."""

    axis: str
    at: float
    start: float
    stop: float
    height: float
    colours: tuple[Array, Array]
    pattern: int
    pitch: float


@dataclass(frozen=True, eq=False)
class _Layout:
    """Everything of a scene that does not depend on the size of the image."""

    camera: float
    focal: float
    horizon: float
    sun: tuple[float, float, float]
    sun_strength: float
    tint: Array
    exposure: float
    haze: float
    haze_colour: Array
    sky: tuple[Array, Array, float, float]
    ground: tuple[Array, Array, float]
    path: tuple[float, float, float, float, Array, Array, int, float] | None
    planes: tuple[_Plane, ...]
    objects: tuple[_Object, ...]
    noise: Array
    blur: float
    grain: float
    light: tuple[float, float]
    dropout: tuple[float, float, float]


class _Random:
    """Uniform draws with short names, all from one frozen stream."""

    def __init__(self, seed: int, index: int) -> None:
        self.state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, index))))

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.state.random_sample())

    def chance(self, probability: float) -> bool:
        return float(self.state.random_sample()) < probability

    def below(self, count: int) -> int:
        return min(int(float(self.state.random_sample()) * count), count - 1)

    def bytes(self, *shape: int) -> Array:
        count = math.prod(shape)
        return np.frombuffer(self.state.bytes(count), dtype=np.uint8).reshape(shape)


def _rgb(red: float, green: float, blue: float) -> Array:
    return np.array([blue, green, red], dtype=np.float32).reshape(3, 1, 1)


def _hsv(hue: float, saturation: float, value: float) -> Array:
    """Return BGR in 0..1 of a colour given by hue (in turns), saturation and value."""
    sixth = (hue % 1.0) * 6.0

    def channel(shift: float) -> float:
        k = (shift + sixth) % 6.0
        return value - value * saturation * max(0.0, min(k, 4.0 - k, 1.0))

    return _rgb(channel(5.0), channel(3.0), channel(1.0))


_HUES = dict(box=0.08, ball=0.97, cylinder=0.6, cone=0.13, pole=0.78, sign=0.45)


def _paint(rng: _Random, kind: str) -> tuple[Array, Array]:
    """Draw the two colours of an object; the class only hints at them."""
    hue = _HUES[kind] + rng.between(-0.06, 0.06) if rng.chance(0.6) else rng.between(0.0, 1.0)
    first = _hsv(hue, rng.between(0.25, 0.9), rng.between(0.35, 0.95))
    if kind == 'cone' or kind == 'sign' or rng.chance(0.3):
        second = _hsv(rng.between(0, 1), rng.between(0.0, 0.25), rng.between(0.75, 1.0))
    else:
        second = first * rng.between(0.45, 0.8)
    return first, second


def _turn(rng: _Random) -> tuple[float, float]:
    """Cosine and sine of a yaw within a quarter turn each way, without calling either."""
    half = rng.between(-0.41, 0.41)
    return (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)


def _object(rng: _Random, kind: str, x: float, z: float) -> _Object:
    paint: dict[str, Any] = dict(
        colours=_paint(rng, kind),
        pattern=rng.below(4),
        pitch=rng.between(0.14, 0.4),
        glossy=rng.chance(0.08),
    )
    if kind == 'box':
        width, depth = rng.between(0.6, 1.6), rng.between(0.6, 1.3)
        reach = math.sqrt(width * width + depth * depth) / 2
        return _Object(kind, x, z, reach, rng.between(0.5, 1.7), sizes=(width, depth), turn=_turn(rng), **paint)
    if kind == 'ball':
        radius = rng.between(0.3, 0.8)
        return _Object(kind, x, z, radius, 2 * radius, **paint)
    if kind == 'cylinder':
        return _Object(kind, x, z, rng.between(0.25, 0.55), rng.between(0.6, 1.8), **paint)
    if kind == 'cone':
        radius = rng.between(0.3, 0.6)
        return _Object(kind, x, z, radius, radius * rng.between(1.9, 3.2), **paint)
    if kind == 'pole':
        return _Object(kind, x, z, rng.between(0.05, 0.1), rng.between(1.9, 3.6), **paint)
    radius, height = rng.between(0.28, 0.5), rng.between(1.7, 2.7)
    return _Object(kind, x, z, radius, height, sizes=(0.05, float(rng.below(3))), **paint)


def _objects(rng: _Random, focal: float, far: float) -> tuple[_Object, ...]:
    """Place objects in the view, near ones rarer in metres but not in pixels, apart from each other."""
    placed: list[_Object] = []
    for _ in range(5 + rng.below(7)):
        kind = OBJECT_CLASSES[rng.below(len(OBJECT_CLASSES))]
        spot = None
        for _ in range(6):
            inverse = rng.between(1.0 / far, 1.0 / 3.2)
            z = 0.75 / inverse + 0.25 * rng.between(3.2, far)
            x = rng.between(-0.5, 0.5) * z / focal
            if all((x - o.x) * (x - o.x) + (z - o.z) * (z - o.z) > (0.9 + o.radius) ** 2 for o in placed):
                spot = x, z
                break
        if spot is not None:
            placed.append(_object(rng, kind, *spot))
    return tuple(placed)


def _walls(rng: _Random) -> tuple[tuple[_Plane, ...], float]:
    """Draw the walls; return them and how far objects may stand."""
    planes: list[_Plane] = []
    far = 15.0

    def paint() -> tuple[Array, Array]:
        hue = rng.between(0.0, 0.17) if rng.chance(0.7) else rng.between(0.0, 1.0)
        first = _hsv(hue, rng.between(0.05, 0.45), rng.between(0.4, 0.85))
        return first, first * rng.between(0.55, 0.85)

    def plane(axis: str, at: float, start: float, stop: float, height: float) -> _Plane:
        return _Plane(axis, at, start, stop, height, paint(), rng.below(3), rng.between(0.25, 0.6))

    if rng.chance(0.55):  # a yard, closed at the back
        far = rng.between(8.0, 15.0)
        planes.append(plane('z', far + 0.8, -30.0, 30.0, rng.between(2.0, 6.5)))
    else:  # open country with some houses
        for _ in range(rng.below(4)):
            centre, width = rng.between(-9.0, 9.0), rng.between(2.5, 7.0)
            at, height = rng.between(16.0, 21.0), rng.between(2.2, 6.0)
            planes.append(plane('z', at, centre - width / 2, centre + width / 2, height))
    for side in (-1.0, 1.0):
        if rng.chance(0.3):
            at, start = side * rng.between(3.0, 5.0), rng.between(3.0, 7.0)
            planes.append(plane('x', at, start, start + rng.between(3.0, 12.0), rng.between(1.6, 4.5)))
    return tuple(planes), far


def _layout(seed: int, index: int) -> tuple[_Layout, _Random]:
    """Draw a scene; also return the stream, from which the grain of the image is drawn."""
    rng = _Random(seed, index)
    focal = rng.between(0.85, 1.2)
    sun_x, sun_z = rng.between(-0.9, 0.9), rng.between(-0.9, 0.35)
    norm = math.sqrt(sun_x * sun_x + 1.0 + sun_z * sun_z)
    planes, far = _walls(rng)
    ground_hue = rng.between(0.06, 0.33)
    ground_value = rng.between(0.35, 0.7)
    ground = _hsv(ground_hue, rng.between(0.1, 0.5), ground_value)
    path = None
    if rng.chance(0.8):
        shift = rng.between(-0.06, 0.06)
        value = ground_value + rng.between(0.04, 0.2) * (1.0 if rng.chance(0.6) else -1.0)
        colour = _hsv(ground_hue + shift, rng.between(0.05, 0.35), value)
        path = (
            rng.between(-2.0, 2.0),
            rng.between(-0.22, 0.22),
            rng.between(-0.02, 0.02),
            rng.between(0.6, 1.5),
            colour,
            colour * rng.between(0.6, 0.85),
            rng.below(3),
            rng.between(0.35, 0.7),
        )
    sky_hue, warm = rng.between(0.52, 0.66), rng.between(0.0, 1.0)
    zenith = _hsv(sky_hue, rng.between(0.15, 0.6), rng.between(0.55, 0.95))
    low = zenith * 0.4 + 0.6 * _rgb(0.92, 0.88 - 0.08 * warm, 0.9 - 0.25 * warm)
    layout = _Layout(
        camera=rng.between(1.3, 2.3),
        focal=focal,
        horizon=rng.between(0.3, 0.48),
        sun=(sun_x / norm, 1.0 / norm, sun_z / norm),
        sun_strength=rng.between(0.3, 0.75),
        tint=_rgb(1.0 + 0.12 * warm, 1.0, 1.0 - 0.14 * warm),
        exposure=rng.between(0.75, 1.2),
        haze=rng.between(30.0, 160.0),
        haze_colour=low,
        sky=(zenith, low, rng.between(0.0, 0.7), rng.between(0.0, 64.0)),
        ground=(ground, ground * rng.between(0.5, 0.8), rng.between(1.5, 4.0)),
        path=path,
        planes=planes,
        objects=_objects(rng, focal, far),
        noise=np.pad(rng.bytes(_NOISE, _NOISE).astype(np.float32) / 255.0, (0, 1), mode='wrap'),
        blur=rng.between(0.0, 0.7),
        grain=rng.between(0.006, 0.035),
        light=(rng.between(-0.18, 0.18), rng.between(-0.12, 0.12)),
        dropout=(rng.between(0.0, 64.0), rng.between(0.0, 64.0), rng.between(0.85, 0.98)),
    )
    return layout, rng


# ---------------------------------------------------------------------------
# textures: values in 0..1 over coordinates in metres
# ---------------------------------------------------------------------------


def _value_noise(table: Array, u: Array, v: Array) -> Array:
    """Smooth noise: the table at the corners of the cell, blended; ``u`` and ``v`` broadcast.

    The table repeats its first row and column at the end.
    """
    u0, v0 = np.floor(u), np.floor(v)
    fu, fv = u - u0, v - v0
    fu, fv = fu * fu * (3.0 - 2.0 * fu), fv * fv * (3.0 - 2.0 * fv)
    at = (v0.astype(np.intp) & (_NOISE - 1)) * (_NOISE + 1) + (u0.astype(np.intp) & (_NOISE - 1))
    flat = table.reshape(-1)
    top = flat.take(at)
    top += fu * (flat[1:].take(at) - top)
    low = flat[_NOISE + 1 :].take(at)
    low += fu * (flat[_NOISE + 2 :].take(at) - low)
    top += fv * (low - top)
    return top


def _fraction(x: Array) -> Array:
    return x - np.floor(x)


def _bricks(u: Array, v: Array, pitch: float) -> Array:
    """1 on the joints of a running bond, 0 on the bricks."""
    row = v / pitch
    odd = 0.5 * (np.floor(row).astype(np.int32) & 1)
    joint = (_fraction(row) < 0.14) | (_fraction(u / (2 * pitch) + odd) < 0.08)
    return joint.astype(np.float32)


def _pattern(number: int, u: Array, v: Array, pitch: float, noise: Array) -> Array:
    """Share of the second colour: 0 plain with some noise, 1 bands, 2 checks, 3 blotches."""
    if number == 1:
        bands = (_fraction(v / (2 * pitch)) < 0.5).astype(np.float32)
        return np.broadcast_to(bands, np.broadcast_shapes(u.shape, v.shape))
    if number == 2:
        cells = np.floor(u / pitch).astype(np.int32) + np.floor(v / pitch).astype(np.int32)
        return (cells & 1).astype(np.float32)
    if number == 3:
        return (_value_noise(noise, u * (2.0 / pitch), v * (2.0 / pitch)) > 0.55).astype(np.float32)
    return 0.5 * _value_noise(noise, u * 9.0, v * 9.0)


def _mix(colours: tuple[Array, Array], share: Array) -> Array:
    first, second = colours
    return first + share * (second - first)


# ---------------------------------------------------------------------------
# primitives: depth, light and colour of the rays of a patch
# ---------------------------------------------------------------------------


class _Camera:
    """Slopes of the rays through the pixel centres, and patches around things in the world."""

    def __init__(self, layout: _Layout, size: tuple[int, int]) -> None:
        self.h, self.w = size
        self.focal = layout.focal * self.w
        self.row = layout.horizon * self.h
        self.height = layout.camera
        self.dx = ((np.arange(self.w, dtype=np.float32) + 0.5 - self.w / 2) / self.focal)[None]
        self.dy = ((self.row - (np.arange(self.h, dtype=np.float32) + 0.5)) / self.focal)[:, None]

    def patch(self, x0: float, x1: float, y0: float, y1: float, z0: float, z1: float) -> Patch | None:
        """Return the pixels that may see a box of the world; ``None`` if there are none."""
        z0 = max(z0, _NEAR)
        if z1 <= z0:
            return None
        left = min(x0 / z0, x0 / z1) * self.focal + self.w / 2
        right = max(x1 / z0, x1 / z1) * self.focal + self.w / 2
        top = self.row - max((y1 - self.height) / z0, (y1 - self.height) / z1) * self.focal
        low = self.row - min((y0 - self.height) / z0, (y0 - self.height) / z1) * self.focal
        a, b = max(math.floor(top) - 1, 0), min(math.ceil(low) + 1, self.h)
        c, d = max(math.floor(left) - 1, 0), min(math.ceil(right) + 1, self.w)
        return (slice(a, b), slice(c, d)) if a < b and c < d else None


@dataclass(frozen=True, eq=False)
class _Hit:
    """What the rays of a patch meet: depth, where they meet it, light in 0..1, all (h, w); BGR, (3, h, w)."""

    patch: Patch
    depth: Array
    mask: Array
    light: Array
    colour: Array


def _side(layout: _Layout, nx: Any, ny: Any, nz: Any) -> Array:
    """Light on a surface with this unit normal: the sun's part, never negative."""
    sx, sy, sz = layout.sun
    return np.maximum(nx * sx + ny * sy + nz * sz, 0.0)


def _cast_ball(o: _Object, layout: _Layout, camera: _Camera, patch: Patch) -> _Hit:
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    ox, oy, oz = -o.x, camera.height - o.radius, -o.z
    a = dx * dx + dy * dy + 1.0
    b = dx * ox + dy * oy + oz
    root = b * b - a * (ox * ox + oy * oy + oz * oz - o.radius * o.radius)
    mask = root >= 0.0
    t = (-b - np.sqrt(np.maximum(root, 0.0))) / a
    nx, ny, nz = (ox + t * dx) / o.radius, (oy + t * dy) / o.radius, (oz + t) / o.radius
    colour = _mix(o.colours, _pattern(o.pattern, nx * o.radius, ny * o.radius, o.pitch, layout.noise))
    return _Hit(patch, t, mask, _side(layout, nx, ny, nz), colour)


def _upright(x: float, z: float, radius: float, dx: Array) -> tuple[Array, Array]:
    """Depth at which each column meets an endless cylinder, and whether it does; both (1, w)."""
    a = dx * dx + 1.0
    b = dx * x + z
    root = b * b - a * (x * x + z * z - radius * radius)
    return (b - np.sqrt(np.maximum(root, 0.0))) / a, root >= 0.0


def _cast_cylinder(o: _Object, layout: _Layout, camera: _Camera, patch: Patch) -> _Hit:
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    column, meets = _upright(o.x, o.z, o.radius, dx)
    y = camera.height + column * dy
    mask = meets & (y >= 0.0) & (y <= o.height)
    nx, nz = (column * dx - o.x) / o.radius, (column - o.z) / o.radius
    light = np.broadcast_to(_side(layout, nx, 0.0, nz), mask.shape)
    share = _pattern(o.pattern, np.broadcast_to(nx * (1.6 * o.radius), mask.shape), y, o.pitch, layout.noise)
    depth = np.broadcast_to(column, mask.shape)
    if camera.height > o.height:  # the lid
        lid = (o.height - camera.height) / np.minimum(dy, -1e-6)
        px, pz = lid * dx - o.x, lid - o.z
        on_lid = (px * px + pz * pz <= o.radius * o.radius) & (dy < 0.0)
        depth = np.where(on_lid, lid, depth)
        light = np.where(on_lid, layout.sun[1], light)
        share = np.where(on_lid, 0.25, share)
        mask = mask | on_lid
    return _Hit(patch, depth, mask, light, _mix(o.colours, share.astype(np.float32)))


def _cast_cone(o: _Object, layout: _Layout, camera: _Camera, patch: Patch) -> _Hit:
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    k = (o.radius / o.height) ** 2
    e = o.height - camera.height
    a = dx * dx + 1.0 - k * dy * dy
    b = k * e * dy - (dx * o.x + o.z)
    root = b * b - a * (o.x * o.x + o.z * o.z - k * e * e)
    t = (-b - np.sqrt(np.maximum(root, 0.0))) / a
    y = camera.height + t * dy
    mask = (root >= 0.0) & (y >= 0.0) & (y < o.height)
    drop = np.maximum(o.height - y, 1e-3)
    norm = math.sqrt(k * (1.0 + k)) * drop
    light = _side(layout, (t * dx - o.x) / norm, k * drop / norm, (t - o.z) / norm)
    bands = (_fraction(y / (0.45 * o.height) + 0.2) < 0.4).astype(np.float32)
    share = bands if o.pattern < 2 else _pattern(o.pattern, t * dx - o.x, y, o.pitch, layout.noise)
    return _Hit(patch, t, mask, light, _mix(o.colours, share))


def _cast_box(o: _Object, layout: _Layout, camera: _Camera, patch: Patch) -> _Hit:
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    cos, sin = o.turn
    half_x, half_z = o.sizes[0] / 2, o.sizes[1] / 2
    ox, oz = -cos * o.x - sin * o.z, sin * o.x - cos * o.z  # the camera as the box sees it
    rx, rz = cos * dx + sin, cos - sin * dx
    rx, ry, rz = (np.where(np.abs(r) < 1e-6, np.float32(1e-6), r) for r in (rx, dy, rz))
    x_in, x_out = (-np.sign(rx) * half_x - ox) / rx, (np.sign(rx) * half_x - ox) / rx
    z_in, z_out = (-np.sign(rz) * half_z - oz) / rz, (np.sign(rz) * half_z - oz) / rz
    y_a, y_b = -camera.height / ry, (o.height - camera.height) / ry
    y_in, y_out = np.minimum(y_a, y_b), np.maximum(y_a, y_b)
    column = np.maximum(x_in, z_in)
    t = np.maximum(column, y_in)
    mask = t < np.minimum(np.minimum(x_out, z_out), y_out)
    top = y_in > column
    side = np.broadcast_to(x_in > z_in, mask.shape)
    # local normals (-sign(rx), 0, 0) and (0, 0, -sign(rz)), turned back into the world
    light_x = _side(layout, -np.sign(rx) * cos, 0.0, -np.sign(rx) * sin)
    light_z = _side(layout, np.sign(rz) * sin, 0.0, -np.sign(rz) * cos)
    light = np.where(top, layout.sun[1], np.where(side, light_x, light_z))
    px, pz = ox + t * rx, oz + t * rz
    u = np.where(side & ~top, pz, px)
    v = np.where(top, pz, camera.height + t * dy)
    if o.pattern < 2:  # crates: a frame and slats
        edge = np.minimum(v, o.height - v) < 0.07
        share = (edge | (_fraction(u / o.pitch) < 0.12)).astype(np.float32)
    else:
        share = _pattern(o.pattern, u, v, o.pitch, layout.noise)
    return _Hit(patch, t, mask, light, _mix(o.colours, share))


def _cast_sign(o: _Object, layout: _Layout, camera: _Camera, patch: Patch) -> _Hit:
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    post_radius, shape = o.sizes
    column, meets = _upright(o.x, o.z, post_radius, dx)
    y = camera.height + column * dy
    post = meets & (y >= 0.0) & (y <= o.height)
    plate_z = o.z - 0.06
    px, py = plate_z * dx - o.x, camera.height + plate_z * dy - o.height
    if shape == 0.0:  # a disc
        inner = (px * px + py * py) / (o.radius * o.radius)
    elif shape == 1.0:  # a square
        inner = np.square(np.maximum(np.abs(px), np.abs(py)) / (0.9 * o.radius))
    else:  # a triangle
        inner = np.square(np.maximum(np.maximum(-py, 0.87 * np.abs(px) + 0.5 * py), 0.0) / (0.55 * o.radius))
    plate = inner <= 1.0
    rim = (inner > 0.62).astype(np.float32)
    if o.pattern >= 2:
        rim = np.maximum(rim, (np.abs(py) < 0.22 * o.radius).astype(np.float32))
    colour = np.where(plate, _mix((o.colours[1], o.colours[0]), rim), _rgb(0.55, 0.55, 0.57))
    on_post = _side(layout, (column * dx - o.x) / post_radius, 0.0, (column - o.z) / post_radius)
    light = np.where(plate, 0.35 + 0.65 * max(-layout.sun[2], 0.0), on_post)
    depth = np.where(plate, np.float32(plate_z), column)
    return _Hit(patch, depth, plate | post, light, colour)


_CASTS = dict(
    box=_cast_box,
    ball=_cast_ball,
    cylinder=_cast_cylinder,
    cone=_cast_cone,
    pole=_cast_cylinder,
    sign=_cast_sign,
)


def _cast(o: _Object, layout: _Layout, camera: _Camera) -> _Hit | None:
    """Cast the rays that may meet an object; ``None`` if it is out of view."""
    above = o.radius if o.kind == 'sign' else 0.0
    patch = camera.patch(o.x - o.radius, o.x + o.radius, 0.0, o.height + above, o.z - o.radius, o.z + o.radius)
    return None if patch is None else _CASTS[o.kind](o, layout, camera, patch)


def _cast_plane(p: _Plane, layout: _Layout, camera: _Camera) -> _Hit | None:
    if p.axis == 'z':
        patch = camera.patch(p.start, p.stop, 0.0, p.height, p.at - 0.01, p.at)
    else:
        patch = camera.patch(p.at, p.at, 0.0, p.height, p.start, p.stop)
    if patch is None:
        return None
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    if p.axis == 'z':
        t = np.full_like(dx, p.at)
        u = t * dx
        inside, sunlit = (u >= p.start) & (u <= p.stop), max(-layout.sun[2], 0.0)
    else:
        slope = np.where(np.abs(dx) < 1e-6, np.float32(1e-6), dx)
        u = t = p.at / slope
        inside = (u >= p.start) & (u <= p.stop)
        t, u = np.where(inside, t, np.float32(p.start)), np.where(inside, u, np.float32(p.start))
        sunlit = max(-layout.sun[0] if p.at > 0 else layout.sun[0], 0.0)
    y = camera.height + t * dy
    mask = inside & (y >= 0.0) & (y <= p.height)
    if p.pattern == 0:
        share = _bricks(u, y, p.pitch * 0.6)
    elif p.pattern == 1:  # windows
        column, floor = _fraction(u / (3.4 * p.pitch)), _fraction(y / (3.8 * p.pitch))
        share = ((np.abs(column - 0.5) < 0.27) & (np.abs(floor - 0.55) < 0.26)).astype(np.float32)
    else:
        share = np.broadcast_to((_fraction(u / p.pitch) < 0.15).astype(np.float32), mask.shape)
    share = np.minimum(share + 0.5 * _value_noise(layout.noise, u * 1.3, y * 1.3), 1.0)
    light = np.full(mask.shape, 0.25 + 0.6 * sunlit, dtype=np.float32)
    return _Hit(patch, np.broadcast_to(t, mask.shape), mask, light, _mix(p.colours, share))


def _shadow(layout: _Layout, camera: _Camera, rows: slice, x: Array, z: Array) -> Array:
    """How much of the sun the objects keep from the ground, 0..1, over the rows below the horizon.

    An object shades what lies near the segment from its foot to the shadow of its top.
    """
    shade = np.zeros(x.shape, dtype=np.float32)
    sun_x, sun_y, sun_z = layout.sun
    for o in layout.objects:
        length = o.height if o.kind != 'ball' else o.radius
        ex, ez = -sun_x / sun_y * length, -sun_z / sun_y * length
        patch = camera.patch(
            min(o.x, o.x + ex) - o.radius,
            max(o.x, o.x + ex) + o.radius,
            0.0,
            0.0,
            min(o.z, o.z + ez) - o.radius,
            max(o.z, o.z + ez) + o.radius,
        )
        if patch is None or patch[0].stop <= rows.start:
            continue
        part = slice(max(patch[0].start, rows.start) - rows.start, patch[0].stop - rows.start), patch[1]
        px, pz = x[part] - o.x, z[part[0]] - o.z
        along = np.clip((px * ex + pz * ez) / (ex * ex + ez * ez + 1e-6), 0.0, 1.0)
        px, pz = px - along * ex, pz - along * ez
        radius = o.sizes[0] if o.kind == 'sign' else o.radius
        reach = radius * (1.0 - 0.85 * along) if o.kind == 'cone' else np.float32(radius)
        if o.kind == 'sign':  # the plate
            reach = np.where(along > 0.8, np.float32(o.radius), reach)
        dark = np.clip(2.5 - 2.5 * (px * px + pz * pz) / (reach * reach), 0.0, 1.0)
        np.maximum(shade[part], dark, out=shade[part])
    return shade


# ---------------------------------------------------------------------------
# the picture
# ---------------------------------------------------------------------------


class _Canvas:
    """Depth-buffered picture: what is nearest stays."""

    def __init__(self, layout: _Layout, size: tuple[int, int]) -> None:
        self.layout = layout
        self.camera = _Camera(layout, size)
        # the row of the horizon itself would be endlessly far: the ground starts a little below
        self.horizon = int(np.count_nonzero(self.camera.dy > -layout.camera / 120.0))
        self.depth = np.full(size, np.float32(1e6))
        self.labels = np.full(size, _SKY, dtype=np.uint8)
        self.instances = np.zeros(size, dtype=np.int32)
        self.light = np.ones(size, dtype=np.float32)
        self.colour = np.empty((3, *size), dtype=np.float32)

    def put(self, hit: _Hit, label: int, instance: int) -> None:
        nearer = hit.mask & (hit.depth > _NEAR) & (hit.depth < self.depth[hit.patch])
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
        cover = _value_noise(noise, dx * 7.0 + shift, dy * 16.0 + shift)
        cover += 0.5 * _value_noise(noise, dx * 19.0 + shift, dy * 40.0)
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
        grass = 0.6 * _value_noise(layout.noise, x * scale, z * scale)
        grass += 0.4 * _value_noise(layout.noise, x * 7.0, z * 7.0)
        share = 0.5 + (grass - 0.5) * (0.4 + 1.4 * fade)
        colour = _mix((base, other), np.clip(share, 0.0, 1.0))
        labels = np.full(x.shape, _GROUND, dtype=np.uint8)
        if layout.path is not None:
            a, b, c, half, stone, joint, pattern, pitch = layout.path
            across = x - (a + b * z + c * z * z)
            on_path = np.abs(across) < half
            if pattern == 0:
                share = _bricks(across, np.broadcast_to(z, x.shape), pitch)
            elif pattern == 1:
                share = _pattern(2, across, z, pitch, layout.noise) * 0.7
            else:
                share = 0.4 * _value_noise(layout.noise, x * 3.0, z * 3.0) + (np.abs(across) > half - 0.1)
            share = np.clip(share * (0.25 + 0.75 * fade), 0.0, 1.0).astype(np.float32)
            colour = np.where(on_path, _mix((stone, joint), share), colour)
            labels[on_path] = _PATH
        light = layout.sun[1] * (1.0 - 0.85 * _shadow(layout, camera, rows, x, z))
        patch = rows, slice(0, camera.w)
        hit = _Hit(patch, np.broadcast_to(z, x.shape), np.ones(x.shape, dtype=bool), light, colour)
        self.put(hit, _GROUND, 0)
        self.labels[patch] = labels

    def develop(self, rng: _Random) -> Array:
        """Light, haze, lens and sensor; return the image."""
        layout, camera = self.layout, self.camera
        sky = self.labels == _SKY
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


def _sense(canvas: _Canvas, layout: _Layout) -> Array:
    """Return the depth as a sensor reads it: 0 where it reads nothing."""
    depth = canvas.depth.copy()
    lost = (canvas.labels == _SKY) | (depth > MAX_DEPTH)
    for number, o in enumerate(layout.objects, start=1):
        if o.glossy:
            lost |= canvas.instances == number
    shift_u, shift_v, level = layout.dropout
    camera = canvas.camera
    u, v = camera.dx * 14.0 + shift_u, camera.dy * 14.0 + shift_v
    lost |= _value_noise(layout.noise, u, v) > level
    depth[lost] = 0.0
    return depth


def _boxes(canvas: _Canvas, layout: _Layout, silhouettes: Sequence[int]) -> tuple[Array, Array, Array, Array]:
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


def _check_natural(argument: str, value: Any, minimum: int) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < minimum:
        raise ConfigError(f'render_scene: `{argument}` must be an integer of at least {minimum}, got {value!r}.')
    return int(value)


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
    seed, index = _check_natural('seed', seed, 0), _check_natural('index', index, 0)
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ConfigError(f'render_scene: `size` must be (height, width), got {size!r}.')
    size = (_check_natural('size[0]', size[0], 16), _check_natural('size[1]', size[1], 16))
    layout, rng = _layout(seed, index)
    canvas = _Canvas(layout, size)
    canvas.draw_sky()
    canvas.draw_ground()
    for plane in layout.planes:
        hit = _cast_plane(plane, layout, canvas.camera)
        if hit is not None:
            canvas.put(hit, _WALL, 0)
    silhouettes = []
    for number, o in enumerate(layout.objects, start=1):
        hit = _cast(o, layout, canvas.camera)
        silhouettes.append(0 if hit is None else int(np.count_nonzero(hit.mask)))
        if hit is not None:
            canvas.put(hit, _FIRST_OBJECT + OBJECT_CLASSES.index(o.kind), number)
    image = canvas.develop(rng)
    depth = _sense(canvas, layout)
    boxes, box_labels, box_ids, box_ignored = _boxes(canvas, layout, silhouettes)
    return Scene(image, canvas.labels, depth, canvas.instances, boxes, box_labels, box_ids, box_ignored)
