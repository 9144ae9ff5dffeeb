"""What is in a scene and where: random numbers only, no pixel.

Every layout is a pure function of ``(seed, index)``. Random numbers come from a
frozen generator (MT19937 through ``RandomState``).

Axes: x to the right, y up, z away from the camera; metres. The camera stands at
``(0, camera height, 0)`` and looks along z. Colours are BGR, shape (3, 1, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = [
    'CLASSES',
    'FIRST_OBJECT',
    'GROUND',
    'IGNORE_INDEX',
    'NOISE_SIDE',
    'OBJECT_CLASSES',
    'OBJECT_PALETTE',
    'PALETTE',
    'PATH',
    'SKY',
    'WALL',
    'Array',
    'Layout',
    'Plane',
    'Random',
    'SceneObject',
    'draw_layout',
    'rgb',
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

FIRST_OBJECT = len(CLASSES) - len(OBJECT_CLASSES)
GROUND, PATH, WALL, SKY = range(FIRST_OBJECT)
NOISE_SIDE = 64  # side of the noise table, a power of two

Array = np.ndarray


@dataclass(frozen=True, eq=False)
class SceneObject:
    """One object: what it is, where it stands, how big it is and how it is painted."""

    kind: str
    x: float
    z: float
    radius: float
    height: float
    sizes: tuple[float, float] = (0.0, 0.0)  # box: width and depth; sign: height of the plate, its shape
    turn: tuple[float, float] = (1.0, 0.0)  # cosine and sine of the yaw
    colours: tuple[Array, Array] = field(default_factory=lambda: (rgb(1, 1, 1), rgb(0, 0, 0)))
    pattern: int = 0
    pitch: float = 0.3  # of the pattern, metres
    glossy: bool = False


@dataclass(frozen=True, eq=False)
class Plane:
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
class Layout:
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
    planes: tuple[Plane, ...]
    objects: tuple[SceneObject, ...]
    noise: Array
    blur: float
    grain: float
    light: tuple[float, float]
    dropout: tuple[float, float, float]


class Random:
    """Uniform draws with short names, all from one frozen stream."""

    def __init__(self, seed: int, index: int) -> None:
        self.state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, index))))

    def between(self, low: float, high: float) -> float:
        """Draw from [low, high)."""
        return low + (high - low) * float(self.state.random_sample())

    def chance(self, probability: float) -> bool:
        """Draw a yes of this probability."""
        return float(self.state.random_sample()) < probability

    def below(self, count: int) -> int:
        """Draw an integer from 0 to ``count`` - 1."""
        return min(int(float(self.state.random_sample()) * count), count - 1)

    def bytes(self, *shape: int) -> Array:
        """Draw an array of bytes, uint8."""
        count = math.prod(shape)
        return np.frombuffer(self.state.bytes(count), dtype=np.uint8).reshape(shape)


def rgb(red: float, green: float, blue: float) -> Array:
    """Return a colour as an array, BGR, float32, shape (3, 1, 1)."""
    return np.array([blue, green, red], dtype=np.float32).reshape(3, 1, 1)


def _hsv(hue: float, saturation: float, value: float) -> Array:
    """Return BGR in 0..1 of a colour given by hue (in turns), saturation and value."""
    sixth = (hue % 1.0) * 6.0

    def channel(shift: float) -> float:
        k = (shift + sixth) % 6.0
        return value - value * saturation * max(0.0, min(k, 4.0 - k, 1.0))

    return rgb(channel(5.0), channel(3.0), channel(1.0))


_HUES = dict(box=0.08, ball=0.97, cylinder=0.6, cone=0.13, pole=0.78, sign=0.45)


def _paint(rng: Random, kind: str) -> tuple[Array, Array]:
    """Draw the two colours of an object; the class only hints at them."""
    hue = _HUES[kind] + rng.between(-0.06, 0.06) if rng.chance(0.6) else rng.between(0.0, 1.0)
    first = _hsv(hue, rng.between(0.25, 0.9), rng.between(0.35, 0.95))
    if kind == 'cone' or kind == 'sign' or rng.chance(0.3):
        second = _hsv(rng.between(0, 1), rng.between(0.0, 0.25), rng.between(0.75, 1.0))
    else:
        second = first * rng.between(0.45, 0.8)
    return first, second


def _turn(rng: Random) -> tuple[float, float]:
    """Cosine and sine of a yaw within a quarter turn each way, without calling either."""
    half = rng.between(-0.41, 0.41)
    return (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)


def _object(rng: Random, kind: str, x: float, z: float) -> SceneObject:
    paint: dict[str, Any] = dict(
        colours=_paint(rng, kind),
        pattern=rng.below(4),
        pitch=rng.between(0.14, 0.4),
        glossy=rng.chance(0.08),
    )
    if kind == 'box':
        width, depth = rng.between(0.6, 1.6), rng.between(0.6, 1.3)
        reach = math.sqrt(width * width + depth * depth) / 2
        return SceneObject(kind, x, z, reach, rng.between(0.5, 1.7), sizes=(width, depth), turn=_turn(rng), **paint)
    if kind == 'ball':
        radius = rng.between(0.3, 0.8)
        return SceneObject(kind, x, z, radius, 2 * radius, **paint)
    if kind == 'cylinder':
        return SceneObject(kind, x, z, rng.between(0.25, 0.55), rng.between(0.6, 1.8), **paint)
    if kind == 'cone':
        radius = rng.between(0.3, 0.6)
        return SceneObject(kind, x, z, radius, radius * rng.between(1.9, 3.2), **paint)
    if kind == 'pole':
        return SceneObject(kind, x, z, rng.between(0.05, 0.1), rng.between(1.9, 3.6), **paint)
    radius, height = rng.between(0.28, 0.5), rng.between(1.7, 2.7)
    return SceneObject(kind, x, z, radius, height, sizes=(0.05, float(rng.below(3))), **paint)


def _objects(rng: Random, focal: float, far: float) -> tuple[SceneObject, ...]:
    """Place objects in the view, near ones rarer in metres but not in pixels, apart from each other."""
    placed: list[SceneObject] = []
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


def _walls(rng: Random) -> tuple[tuple[Plane, ...], float]:
    """Draw the walls; return them and how far objects may stand."""
    planes: list[Plane] = []
    far = 15.0

    def paint() -> tuple[Array, Array]:
        hue = rng.between(0.0, 0.17) if rng.chance(0.7) else rng.between(0.0, 1.0)
        first = _hsv(hue, rng.between(0.05, 0.45), rng.between(0.4, 0.85))
        return first, first * rng.between(0.55, 0.85)

    def plane(axis: str, at: float, start: float, stop: float, height: float) -> Plane:
        return Plane(axis, at, start, stop, height, paint(), rng.below(3), rng.between(0.25, 0.6))

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


def draw_layout(seed: int, index: int) -> tuple[Layout, Random]:
    """Draw a scene; also return the stream, from which the grain of the image is drawn."""
    rng = Random(seed, index)
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
    low = zenith * 0.4 + 0.6 * rgb(0.92, 0.88 - 0.08 * warm, 0.9 - 0.25 * warm)
    layout = Layout(
        camera=rng.between(1.3, 2.3),
        focal=focal,
        horizon=rng.between(0.3, 0.48),
        sun=(sun_x / norm, 1.0 / norm, sun_z / norm),
        sun_strength=rng.between(0.3, 0.75),
        tint=rgb(1.0 + 0.12 * warm, 1.0, 1.0 - 0.14 * warm),
        exposure=rng.between(0.75, 1.2),
        haze=rng.between(30.0, 160.0),
        haze_colour=low,
        sky=(zenith, low, rng.between(0.0, 0.7), rng.between(0.0, 64.0)),
        ground=(ground, ground * rng.between(0.5, 0.8), rng.between(1.5, 4.0)),
        path=path,
        planes=planes,
        objects=_objects(rng, focal, far),
        noise=np.pad(rng.bytes(NOISE_SIDE, NOISE_SIDE).astype(np.float32) / 255.0, (0, 1), mode='wrap'),
        blur=rng.between(0.0, 0.7),
        grain=rng.between(0.006, 0.035),
        light=(rng.between(-0.18, 0.18), rng.between(-0.12, 0.12)),
        dropout=(rng.between(0.0, 64.0), rng.between(0.0, 64.0), rng.between(0.85, 0.98)),
    )
    return layout, rng
