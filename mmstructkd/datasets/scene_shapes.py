"""What a ray meets: textures, and depth, light and colour of each thing of a layout.

Pixels are computed with sums, products, quotients and square roots alone, which
IEEE 754 rounds the same everywhere. Depth is z, so the ray through a pixel is
``(dx, dy, 1)`` and its parameter is the depth itself.

Shape shorthand: h x w a patch of the image (the box around an object), dx (1, w)
and dy (h, 1) the slopes of the rays of a patch. Colours are BGR, (3, h, w).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmstructkd.datasets.scene_layout import NOISE_SIDE, Array, Layout, Plane, SceneObject, rgb

__all__ = [
    'NEAR',
    'Camera',
    'Hit',
    'Patch',
    'bricks',
    'cast_object',
    'cast_plane',
    'fraction',
    'mix',
    'pattern_share',
    'shadow',
    'value_noise',
]

NEAR = 0.4  # nothing nearer than this is drawn

Patch = tuple[slice, slice]


def value_noise(table: Array, u: Array, v: Array) -> Array:
    """Smooth noise: the table at the corners of the cell, blended; ``u`` and ``v`` broadcast.

    The table repeats its first row and column at the end.
    """
    u0, v0 = np.floor(u), np.floor(v)
    fu, fv = u - u0, v - v0
    fu, fv = fu * fu * (3.0 - 2.0 * fu), fv * fv * (3.0 - 2.0 * fv)
    at = (v0.astype(np.intp) & (NOISE_SIDE - 1)) * (NOISE_SIDE + 1) + (u0.astype(np.intp) & (NOISE_SIDE - 1))
    flat = table.reshape(-1)
    top = flat.take(at)
    top += fu * (flat[1:].take(at) - top)
    low = flat[NOISE_SIDE + 1 :].take(at)
    low += fu * (flat[NOISE_SIDE + 2 :].take(at) - low)
    top += fv * (low - top)
    return top


def fraction(x: Array) -> Array:
    """Return what is behind the point: x minus the integer below it."""
    return x - np.floor(x)


def bricks(u: Array, v: Array, pitch: float) -> Array:
    """1 on the joints of a running bond, 0 on the bricks."""
    row = v / pitch
    odd = 0.5 * (np.floor(row).astype(np.int32) & 1)
    joint = (fraction(row) < 0.14) | (fraction(u / (2 * pitch) + odd) < 0.08)
    return joint.astype(np.float32)


def pattern_share(number: int, u: Array, v: Array, pitch: float, noise: Array) -> Array:
    """Share of the second colour: 0 plain with some noise, 1 bands, 2 checks, 3 blotches."""
    if number == 1:
        bands = (fraction(v / (2 * pitch)) < 0.5).astype(np.float32)
        return np.broadcast_to(bands, np.broadcast_shapes(u.shape, v.shape))
    if number == 2:
        cells = np.floor(u / pitch).astype(np.int32) + np.floor(v / pitch).astype(np.int32)
        return (cells & 1).astype(np.float32)
    if number == 3:
        return (value_noise(noise, u * (2.0 / pitch), v * (2.0 / pitch)) > 0.55).astype(np.float32)
    return 0.5 * value_noise(noise, u * 9.0, v * 9.0)


def mix(colours: tuple[Array, Array], share: Array) -> Array:
    """Blend two colours, ``share`` of the second."""
    first, second = colours
    return first + share * (second - first)


# ---------------------------------------------------------------------------
# primitives: depth, light and colour of the rays of a patch
# ---------------------------------------------------------------------------


class Camera:
    """Slopes of the rays through the pixel centres, and patches around things in the world."""

    def __init__(self, layout: Layout, size: tuple[int, int]) -> None:
        self.h, self.w = size
        self.focal = layout.focal * self.w
        self.row = layout.horizon * self.h
        self.height = layout.camera
        self.dx = ((np.arange(self.w, dtype=np.float32) + 0.5 - self.w / 2) / self.focal)[None]
        self.dy = ((self.row - (np.arange(self.h, dtype=np.float32) + 0.5)) / self.focal)[:, None]

    def patch(self, x0: float, x1: float, y0: float, y1: float, z0: float, z1: float) -> Patch | None:
        """Return the pixels that may see a box of the world; ``None`` if there are none."""
        z0 = max(z0, NEAR)
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
class Hit:
    """What the rays of a patch meet: depth, where they meet it, light in 0..1, all (h, w); BGR, (3, h, w)."""

    patch: Patch
    depth: Array
    mask: Array
    light: Array
    colour: Array


def _side(layout: Layout, nx: Any, ny: Any, nz: Any) -> Array:
    """Light on a surface with this unit normal: the sun's part, never negative."""
    sx, sy, sz = layout.sun
    return np.maximum(nx * sx + ny * sy + nz * sz, 0.0)


def _cast_ball(o: SceneObject, layout: Layout, camera: Camera, patch: Patch) -> Hit:
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    ox, oy, oz = -o.x, camera.height - o.radius, -o.z
    a = dx * dx + dy * dy + 1.0
    b = dx * ox + dy * oy + oz
    root = b * b - a * (ox * ox + oy * oy + oz * oz - o.radius * o.radius)
    mask = root >= 0.0
    t = (-b - np.sqrt(np.maximum(root, 0.0))) / a
    nx, ny, nz = (ox + t * dx) / o.radius, (oy + t * dy) / o.radius, (oz + t) / o.radius
    colour = mix(o.colours, pattern_share(o.pattern, nx * o.radius, ny * o.radius, o.pitch, layout.noise))
    return Hit(patch, t, mask, _side(layout, nx, ny, nz), colour)


def _upright(x: float, z: float, radius: float, dx: Array) -> tuple[Array, Array]:
    """Depth at which each column meets an endless cylinder, and whether it does; both (1, w)."""
    a = dx * dx + 1.0
    b = dx * x + z
    root = b * b - a * (x * x + z * z - radius * radius)
    return (b - np.sqrt(np.maximum(root, 0.0))) / a, root >= 0.0


def _cast_cylinder(o: SceneObject, layout: Layout, camera: Camera, patch: Patch) -> Hit:
    dx, dy = camera.dx[:, patch[1]], camera.dy[patch[0]]
    column, meets = _upright(o.x, o.z, o.radius, dx)
    y = camera.height + column * dy
    mask = meets & (y >= 0.0) & (y <= o.height)
    nx, nz = (column * dx - o.x) / o.radius, (column - o.z) / o.radius
    light = np.broadcast_to(_side(layout, nx, 0.0, nz), mask.shape)
    share = pattern_share(o.pattern, np.broadcast_to(nx * (1.6 * o.radius), mask.shape), y, o.pitch, layout.noise)
    depth = np.broadcast_to(column, mask.shape)
    if camera.height > o.height:  # the lid
        lid = (o.height - camera.height) / np.minimum(dy, -1e-6)
        px, pz = lid * dx - o.x, lid - o.z
        on_lid = (px * px + pz * pz <= o.radius * o.radius) & (dy < 0.0)
        depth = np.where(on_lid, lid, depth)
        light = np.where(on_lid, layout.sun[1], light)
        share = np.where(on_lid, 0.25, share)
        mask = mask | on_lid
    return Hit(patch, depth, mask, light, mix(o.colours, share.astype(np.float32)))


def _cast_cone(o: SceneObject, layout: Layout, camera: Camera, patch: Patch) -> Hit:
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
    bands = (fraction(y / (0.45 * o.height) + 0.2) < 0.4).astype(np.float32)
    share = bands if o.pattern < 2 else pattern_share(o.pattern, t * dx - o.x, y, o.pitch, layout.noise)
    return Hit(patch, t, mask, light, mix(o.colours, share))


def _cast_box(o: SceneObject, layout: Layout, camera: Camera, patch: Patch) -> Hit:
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
        share = (edge | (fraction(u / o.pitch) < 0.12)).astype(np.float32)
    else:
        share = pattern_share(o.pattern, u, v, o.pitch, layout.noise)
    return Hit(patch, t, mask, light, mix(o.colours, share))


def _cast_sign(o: SceneObject, layout: Layout, camera: Camera, patch: Patch) -> Hit:
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
    colour = np.where(plate, mix((o.colours[1], o.colours[0]), rim), rgb(0.55, 0.55, 0.57))
    on_post = _side(layout, (column * dx - o.x) / post_radius, 0.0, (column - o.z) / post_radius)
    light = np.where(plate, 0.35 + 0.65 * max(-layout.sun[2], 0.0), on_post)
    depth = np.where(plate, np.float32(plate_z), column)
    return Hit(patch, depth, plate | post, light, colour)


_CASTS = dict(
    box=_cast_box,
    ball=_cast_ball,
    cylinder=_cast_cylinder,
    cone=_cast_cone,
    pole=_cast_cylinder,
    sign=_cast_sign,
)


def cast_object(o: SceneObject, layout: Layout, camera: Camera) -> Hit | None:
    """Cast the rays that may meet an object; ``None`` if it is out of view."""
    above = o.radius if o.kind == 'sign' else 0.0
    patch = camera.patch(o.x - o.radius, o.x + o.radius, 0.0, o.height + above, o.z - o.radius, o.z + o.radius)
    return None if patch is None else _CASTS[o.kind](o, layout, camera, patch)


def cast_plane(p: Plane, layout: Layout, camera: Camera) -> Hit | None:
    """Cast the rays that may meet a wall; ``None`` if it is out of view."""
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
        share = bricks(u, y, p.pitch * 0.6)
    elif p.pattern == 1:  # windows
        column, floor = fraction(u / (3.4 * p.pitch)), fraction(y / (3.8 * p.pitch))
        share = ((np.abs(column - 0.5) < 0.27) & (np.abs(floor - 0.55) < 0.26)).astype(np.float32)
    else:
        share = np.broadcast_to((fraction(u / p.pitch) < 0.15).astype(np.float32), mask.shape)
    share = np.minimum(share + 0.5 * value_noise(layout.noise, u * 1.3, y * 1.3), 1.0)
    light = np.full(mask.shape, 0.25 + 0.6 * sunlit, dtype=np.float32)
    return Hit(patch, np.broadcast_to(t, mask.shape), mask, light, mix(p.colours, share))


def shadow(layout: Layout, camera: Camera, rows: slice, x: Array, z: Array) -> Array:
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
