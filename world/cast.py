"""Rays through a scene: what they hit, its colour and light, the camera's image, the LiDAR sweep.

Camera, LiDAR and shadow map are three grids of rays through one caster. Therefore what a LiDAR
point hits and what its pixel shows agree.

N counts points or rays, P primitives, H and W a grid's rows and columns. Distances are metres along
a ray of unit length. Arrays are float32 where nothing else is said.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from ftdpp.readers.base import Array
from ftdpp.world import scene as world
from ftdpp.world.scene import Rng, Scene

NEAREST = 0.05  # distance below which nothing is hit
CHUNK = 40_000  # pairs of a primitive and a ray that are computed together
SHADOW_SHAPE, SHADOW_CELL = (200, 280), 0.3

Pose = tuple[Array, Array]  # position (3,) and rotation (3, 3) from a sensor's frame to the scene's


class Camera(NamedTuple):
    """A pinhole camera, in pixels; it looks along its own z axis, x to the right, y down."""

    height: int
    width: int
    focal: float
    centre_u: float
    centre_v: float

    @property
    def matrix(self) -> Array:
        """The (3, 3) matrix from the camera's frame to homogeneous pixels."""
        return np.array([[self.focal, 0, self.centre_u], [0, self.focal, self.centre_v], [0, 0, 1]])


class Lidar(NamedTuple):
    """A spinning LiDAR; angles in radians, azimuth counter-clockwise."""

    elevations: Array  # of the beams, from low to high
    columns: int
    max_range: float
    azimuth: tuple[float, float] = (0.0, 2 * np.pi)


class Picture(NamedTuple):
    """What a camera sees; label and depth are those of each pixel's central ray."""

    image: Array  # (H, W, 3) u8
    label: Array  # (H, W) u8
    depth: Array  # (H, W) f32, metres along the optical axis, inf for the sky


def _f32(*values: Any) -> Array:
    return np.array(values, np.float32)


@cache
def _noise_table(dim: int, size: int, power: float) -> Array:
    """Tileable 1/f noise (size,)*dim, flat, spread evenly over 0..1: a threshold is a share."""
    white = np.random.default_rng(7 + dim).standard_normal((size,) * dim)
    axes = np.meshgrid(*[np.fft.fftfreq(size)] * dim, indexing="ij")
    frequency = np.sqrt(sum(axis**2 for axis in axes))
    smooth = np.fft.ifftn(np.fft.fftn(white) / (frequency + 1 / size) ** power).real
    ranks = np.empty(smooth.size, np.float32)
    order = np.argsort(smooth, axis=None, kind="stable")
    ranks[order] = np.linspace(0, 1, smooth.size, dtype=np.float32)
    return ranks


def _noise(x: Array, y: Array, texel: float, power: float = 1.1) -> Array:
    """Noise at places in the plane; `texel` is the size of a cell."""
    column, row = (np.floor(v * (1 / texel)).astype(np.int32) & 511 for v in (x, y))
    return _noise_table(2, 512, power)[column * 512 + row]


def _hash(a: Array, b: Array, seed: Array | float) -> Array:
    """A number in 0..1 that looks random for each pair of integers."""
    wave = np.sin(a * 12.9898 + b * 78.233 + seed * 37.719) * 438.5453
    return wave - np.floor(wave)


# ---- rays and what they hit ----------------------------------------------------------------------


def _span(kind: int, p: Array, origin: Array, direction: Array) -> tuple[Array, Array]:
    """Entry and exit distance (N,) of rays through the convex primitives p (N,), all of `kind`.

    origin, direction: (3, N). A miss has entry >= exit.
    """
    (x, y, z), (dx, dy, dz) = origin - p["center"].T, direction
    cos, sin, half = p["cos"], p["sin"], p["half"].T
    ox, dx, oy, dy = cos * x + sin * y, cos * dx + sin * dy, cos * y - sin * x, cos * dy - sin * dx
    dz = dz + 1e-9  # no division by zero, here and below
    if kind == world.ELLIPSOID:
        return _round_span((ox / half[0], oy / half[1], z / half[2]), (dx, dy, dz) / half)
    slowness = 1 / dz
    middle, reach = -z * slowness, np.abs(half[2] * slowness)
    near, far = middle - reach, middle + reach
    if kind == world.CYLINDER:
        enter, leave = _round_span((ox / half[0], oy / half[1]), (dx, dy) / half[:2])
        return np.maximum(near, enter), np.minimum(far, leave)
    for o, d, h, lean in zip((ox, oy), (dx, dy), half, p["taper"].T, strict=False):
        for sign in (1, -1):  # the two sides, which lean inwards from the base
            slope = sign * d + lean * dz + 1e-9
            distance = (h - lean * (z + half[2]) - sign * o) / slope
            near = np.where(slope < 0, np.maximum(near, distance), near)
            far = np.where(slope > 0, np.minimum(far, distance), far)
    return near, far


def _round_span(origin: Any, direction: Any) -> tuple[Array, Array]:
    """The span inside the unit circle or sphere."""
    inverse = 1 / sum(d * d for d in direction)
    middle = -sum(o * d for o, d in zip(origin, direction, strict=True)) * inverse
    squared = middle * middle - (sum(o * o for o in origin) - 1) * inverse
    reach = np.sqrt(np.maximum(squared, 0))
    return np.where(squared > 0, middle - reach, np.float32(1e9)), middle + reach


def _foliage(p: Array, origin: Array, direction: Array, near: Array, far: Array) -> Array:
    """Where rays (N,) end in porous leaves: front or back surface, roughened; inf in the holes."""
    size = np.clip(p["half"].min(1) * 0.08, 0.04, 0.10)  # of a leaf
    inverse, start = 1 / size, p["pattern"] / size
    thick = far - near
    holes = 0.33 + 0.45 * np.exp(thick * -3)  # the outline is ragged
    end = np.full(near.shape, np.inf, np.float32)
    for surface in (far, near):
        point = origin - p["center"].T + surface * direction
        x, y, z = np.floor(point * inverse + start).astype(np.int32) & 63
        noise = _noise_table(3, 64, 1.6)[(x * 64 + y) * 64 + z]
        rough = surface + (noise - 0.36) * np.minimum(thick, 0.9) * 0.5
        end = np.where((noise > holes) & (surface > NEAREST), rough, end)
    return end


class Rays:
    """Rays (N) through a scene, and the nearest of what they met so far.

    origin: (3, N), or (3, 1) where all rays share it. direction: (3, N). distance: (N,), inf for
    the sky. hit: (N,) int32, the index of the primitive, -1 for the ground.
    """

    def __init__(self, scene: Scene, pose: Pose, local: Array):
        """pose: of the sensor; its position may be (3, N). local: directions (3, N) there."""
        self.scene, self.local = scene, local
        self.origin = _f32(*pose[0]).reshape(3, -1)
        self.direction = np.tensordot(_f32(*pose[1]), local, 1)
        self.distance = np.full(local.shape[1], np.inf, np.float32)
        self.hit = np.full(local.shape[1], -1, np.int32)

    def meet(self, owner: Array, ray: Array) -> None:
        """Computes the pairs of primitive `owner` (M,) and `ray` (M,)."""
        prims = self.scene.primitives
        for kind in range(len(world.SHAPES)):
            pick = np.nonzero(prims["kind"][owner] == kind)[0]
            who, where = owner[pick], ray[pick]
            p, course, best = prims.take(who), self.direction.take(where, 1), self.distance[where]
            start = self.origin if self.origin.shape[1] == 1 else self.origin.take(where, 1)
            near, far = _span(kind, p, start, course)
            near[(near >= far) | (near >= best) | (far < NEAREST)] = np.inf
            leaf = np.nonzero((p["texture"] == world.LEAF) & (near < np.inf))[0]
            if len(leaf):
                start = np.broadcast_to(start, course.shape)[:, leaf]
                near[leaf] = _foliage(p.take(leaf), start, course[:, leaf], near[leaf], far[leaf])
            good = np.nonzero((near > NEAREST) & (near < best))[0]
            # The last of several values for a ray stays: the nearest.
            good = good[np.argsort(-near[good], kind="stable")]
            self.distance[where[good]], self.hit[where[good]] = near[good], who[good]

    def meet_ground(self) -> None:
        """Bisects between the highest and the lowest level of the ground."""
        top, bottom = float(self.scene.profile_height.max()) + 0.01, -0.01
        (ox, oy, oz), down = self.origin, self.direction[2]
        first = np.maximum((top - oz) / np.minimum(down, -1e-6), 0)
        spots = np.nonzero((down < -1e-4) & (first < self.distance) & (first < 400))[0]
        dx, dy, dz = self.direction[:, spots]
        low, high = first[spots], (bottom - oz) / dz
        for _ in range(10):
            at = (low + high) / 2
            under = oz + at * dz < self.scene.ground(ox + at * dx, oy + at * dy)[0]
            low, high = np.where(under, low, at), np.where(under, at, high)
        closer = high < self.distance[spots]
        self.distance[spots[closer]], self.hit[spots[closer]] = high[closer], -1

    def meet_all(self, bounds: Array, grid: Array) -> None:
        """Lets rays meet all primitives that they may hit.

        bounds: (P, 4), first row and column and end row and column in `grid` of the rays that may
        hit each primitive. grid: (rows, columns) of indices of rays, -1 where there is none; a
        column beyond its end is one from its beginning.
        """
        prims = self.scene.primitives
        # From near to far: what is hidden is left out early.
        radius = np.linalg.norm(prims["half"], axis=1)
        nearest = np.linalg.norm(prims["center"] - self.origin.mean(1), axis=1) - radius
        order = np.argsort(nearest, kind="stable")
        rows, columns = (bounds[order, 2:] - bounds[order, :2]).clip(0).T
        pairs = np.cumsum(rows * columns)
        parallel = self.origin.shape[1] > 1
        for group in np.split(order, np.nonzero(np.diff(pairs // CHUNK))[0] + 1):
            windows = [
                grid[top:bottom].take(range(first, end), 1, mode="wrap").ravel()
                for top, first, bottom, end in bounds[group]
            ]
            owner, ray = np.repeat(group, [w.size for w in windows]), np.concatenate(windows)
            use = (ray >= 0) & (parallel | (self.distance[ray] > nearest[owner]))
            self.meet(owner[use], ray[use])


def _bounds(low: Array, high: Array, shape: tuple[int, int]) -> Array:
    """Bounds (P, 4), see `Rays.meet_all`, from the lowest and the highest row and column (P, 2)."""
    cells = np.concatenate([np.ceil(low), np.floor(high) + 1], 1)
    return cells.clip(0, (*shape, *shape)).astype(np.int64)


def _pixel_rays(camera: Camera, u: Array, v: Array) -> tuple[Array, Array]:
    """Directions (3, N) through places u, v (...) of the image; their cosine (...) to the axis."""
    x, y = (u - camera.centre_u) / camera.focal, (v - camera.centre_v) / camera.focal
    cosine = 1 / np.sqrt(x * x + y * y + 1)
    local = np.stack([x, y, np.ones_like(x)]) * cosine
    return local.astype(np.float32).reshape(3, -1), cosine.astype(np.float32)


def _cast_lidar(scene: Scene, lidar: Lidar, pose: Pose) -> Rays:
    """A ray for each beam and column."""
    elevation, (begin, end) = lidar.elevations, lidar.azimuth
    per_column = (end - begin) / lidar.columns
    azimuth = begin + np.arange(lidar.columns) * per_column
    flat, climb = np.cos(elevation)[:, None], np.sin(elevation)[:, None]
    local = _f32(flat * np.cos(azimuth), flat * np.sin(azimuth), climb + 0 * azimuth)
    # The bounds of a primitive are those of the sphere around its box.
    seen = (scene.corners - pose[0]) @ pose[1]
    x, y, z = seen.mean(1).T
    radius = np.linalg.norm(seen[:, 0] - seen.mean(1), axis=1) + 1e-3
    away, far = np.hypot(x, y), np.sqrt(x * x + y * y + z * z)
    high, wide = (np.arcsin(np.minimum(radius / v, 1)) for v in (far, away))
    level, centre = np.arctan2(z, away), (np.arctan2(y, x) - begin) % (2 * np.pi)
    first = np.searchsorted(elevation, level - high), (centre - wide) // per_column
    last = np.searchsorted(elevation, level + high), (centre + wide) // per_column + 2
    bounds = np.stack([*first, *last], 1).astype(np.int64)
    bounds[away <= radius] = (0, 0, len(elevation), lidar.columns)
    bounds[far - radius > lidar.max_range] = 0
    rays = Rays(scene, pose, local.reshape(3, -1))
    grid = np.full((len(elevation), round(2 * np.pi / per_column)), -1)  # all around
    grid[:, : lidar.columns] = np.arange(len(rays.hit)).reshape(len(elevation), -1)
    rays.meet_all(bounds, grid)
    rays.meet_ground()
    return rays


# ---- surfaces ------------------------------------------------------------------------------------


class Surface(NamedTuple):
    """What points (N) look like, to the camera and to the LiDAR."""

    normal: Array  # (N, 3)
    albedo: Array  # (N, 3)
    emission: Array  # (N, 3), radiance of its own
    gloss: Array  # (N,) share of mirrored light
    reflect: Array  # (N,) LiDAR reflectance
    label: Array  # (N,) uint8


def surface_at(scene: Scene, hit: Array, points: Array) -> Surface:
    """The surface at points (N, 3) where rays hit something: hit (N,) as in `Rays`."""
    ground, thing = np.nonzero(hit < 0)[0], np.nonzero(hit >= 0)[0]
    struck = scene.primitives.take(hit[thing])  # far faster than an index
    pairs = zip(_ground(scene, points[ground]), _things(scene, struck, points[thing]), strict=True)
    order = np.argsort(np.concatenate([ground, thing]), kind="stable")
    return Surface(*[np.concatenate(pair)[order] for pair in pairs])


def _normals(struck: Array, points: Array) -> tuple[Array, Array]:
    """Normals and local coordinates, both (N, 3), of points on the primitives `struck` (N,)."""
    cos, sin, half, lean = (struck[name] for name in ("cos", "sin", "half", "taper"))
    x, y, z = (points - struck["center"]).T
    local = np.stack([cos * x + sin * y, cos * y - sin * x, z], 1)
    gap = half - np.abs(local)
    gap[:, :2] -= lean * (local[:, 2:] + half[:, 2:])
    tube = struck["kind"] == world.CYLINDER
    gap[tube, 0] = half[tube, 0] - np.hypot(local[tube, 0], local[tube, 1])
    gap[tube, 1] = np.inf
    axis, rows = np.argmin(gap, 1), np.arange(len(struck))  # of the nearest face
    normal = np.zeros_like(local)
    normal[rows, axis] = np.sign(local[rows, axis])
    normal[:, 2] += np.where(axis < 2, lean[rows, np.minimum(axis, 1)], 0)
    normal[tube & (axis == 0)] = local[tube & (axis == 0)] * _f32(1, 1, 0)
    ball = struck["kind"] == world.ELLIPSOID
    normal[ball] = local[ball] / half[ball] ** 2
    x, y, z = normal.T / (np.sqrt((normal * normal).sum(1)) + 1e-9)
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], 1), local


def _ground(scene: Scene, points: Array) -> Surface:
    """The surface of the ground at points (N, 3)."""
    detail, (x, y, _) = scene.city.detail, points.T
    _, label, across, beyond = scene.ground(x, y)
    road, sidewalk = label == world.ROAD, label == world.SIDEWALK
    fine, coarse = _noise(x, y, 0.03), _noise(x + 9, y, 0.12)
    contrast = _f32(0, 0.30, 0, 0, 0.22, 0.9)[label] * detail
    albedo = scene.colors[label] * (1 + contrast * (0.5 * fine + 0.5 * coarse - 0.5))[:, None]
    bare = (label == world.TERRAIN) & (coarse > 1 - 0.14 * detail)
    albedo[bare] = albedo[bare] * 0.5 + _f32(0.20, 0.14, 0.09)
    albedo[sidewalk & ((x % 1.5 < 0.05) | ((across % 1.5) < 0.05))] *= 0.7  # joints
    kerb = np.nonzero((beyond > 0) & (beyond < 0.18))[0]
    albedo[kerb] = _f32(*scene.city.kerb)[np.floor(x[kerb] / 2).astype(int) % 2]
    # Tyres darken the tracks; patches of newer asphalt break the evenness of the road.
    approach = np.abs(x - scene.cross) - scene.cross_half
    street, aside = road & (approach > 1), np.abs(across)
    track = np.exp(-10 * (np.abs(aside % scene.lane - scene.lane / 2) - 0.8) ** 2)
    albedo *= np.where(street, 1 - track * 0.1 * detail, 1)[:, None]
    patch = road & (_hash(np.floor(x / 7.3), np.floor(across / scene.lane), 3.0) > 0.9)
    albedo[patch] *= 1 - 0.28 * detail

    dashes = (np.abs(aside - scene.lane) < 0.07) & (x % 9 < 3.5) & (scene.lanes == 2)
    edge = np.abs(aside - scene.lanes * scene.lane + 0.15) < 0.06
    zebra = (approach > 1.2) & (approach < 3.6) & (across % 1.1 < 0.5)
    arriving = across * (x - scene.cross) * scene.city.side < 0
    stop = (approach > 4.4) & (approach < 4.8) & arriving
    double, broken = np.abs(aside - 0.13) < 0.055, (aside < 0.07) & (x % 6 < 3)
    middle = street & (double if scene.city.double_line else broken)
    paint = street & (dashes | edge | zebra | stop) | middle
    fresh = paint & (fine * 0.6 + coarse * 0.4 > 0.22 * detail)  # what is not worn off
    color = np.where(middle[:, None], _f32(*scene.city.centre_line), np.float32(0.65))
    albedo[fresh] = color[fresh] * (0.8 + 0.3 * fine[fresh, None])
    label = np.where(street & (aside > scene.lanes * scene.lane), world.PARKING, label)
    label = np.where(paint, world.LANE_MARKING, label).astype(np.uint8)
    reflect = np.where(road, np.float32(0.1), np.where(sidewalk, np.float32(0.2), 0.34))
    reflect = np.where(fresh, np.float32(0.6), np.where(bare, np.float32(0.25), reflect))
    reflect *= 0.85 + 0.3 * coarse
    dark = np.zeros_like(points)
    return Surface(dark + _f32(0, 0, 1), albedo, dark, dark[:, 0], reflect, label)


def _things(scene: Scene, struck: Array, points: Array) -> Surface:
    """The surface of the primitives `struck` (N,) at points (N, 3)."""
    normal, local = _normals(struck, points)
    night, texture, half = scene.light.lamps, struck["texture"], struck["half"]
    detail = scene.city.detail
    emission = np.zeros((len(struck), 3), np.float32)
    leaf = texture == world.LEAF
    fine = _noise(local[:, 0] + local[:, 1] * 1.3, local[:, 2] + local[:, 0] * 0.3, 0.05)
    lacquer = np.isin(struck["label"], world.VEHICLES) & (struck["reflect"] > 0.2)
    contrast = np.where(leaf, np.float32(0.5 + 0.7 * detail), np.float32(0.2 * detail))
    contrast[lacquer] *= 0.2
    tone = 1 + contrast * (fine - 0.5)
    level = 0.5 + local[:, 2] / (2 * half[:, 2])
    tone = np.where(leaf, tone * (0.55 + 0.65 * level), tone)  # a crown is dark below
    albedo = struck["color"] * tone[:, None]
    gloss = np.where(lacquer, np.float32(0.08), 0)

    # Coordinates on an upright face: u along it, height above its base.
    height = local[:, 2] + half[:, 2]
    faces_x = np.abs(normal[:, 0] * struck["cos"] + normal[:, 1] * struck["sin"]) > 0.5
    along = (np.where(faces_x, of[:, 1], of[:, 0]) for of in (local, half, struck["taper"]))
    u, wide, lean = along
    edge = wide - lean * height
    upright = np.abs(normal[:, 2]) < 0.75

    facade = np.nonzero((texture == world.FACADE) & upright)[0]
    parts = struck.take(facade), u[facade], edge[facade], height[facade]
    albedo[facade], gloss[facade], emission[facade] = _facade(scene, *parts, albedo[facade])
    albedo[(texture == world.SLATS) & upright & (u % 0.24 < 0.05)] *= 0.35
    joint = (height % 0.3 < 0.04) | ((u / 0.6 + 0.5 * np.floor(height / 0.3)) % 1 < 0.07)
    albedo[(texture == world.BRICK) & upright & joint] *= 1 - 0.25 * detail
    pane = (texture == world.GLASS) & (level > 0.08) & (level < 0.88) & (np.abs(u) < edge - 0.09)
    pane &= faces_x | (np.abs(u + 0.1) > 0.05)
    deck = (level > 0.42) & (level < 0.78)
    bus = (texture == world.BANDS) & upright & deck & (np.abs(u) < edge - 0.15) & (u % 1.4 > 0.1)
    pane = (pane & upright) | bus
    albedo[pane] = (0.02, 0.024, 0.03)
    gloss[pane] = 0.45
    if night:
        emission[bus] = (0.22, 0.22, 0.17)
    lamp = texture == world.LAMP
    emission[lamp] = struck["color"][lamp] * np.float32(6.0 if night else 0.25)
    reflect = struck["reflect"] * np.where(gloss > 0.3, np.float32(0.12), 1)
    return Surface(normal, albedo, emission, gloss, reflect, struck["label"])


def _facade(
    scene: Scene, struck: Array, u: Array, edge: Array, height: Array, albedo: Array
) -> tuple[Array, Array, Array]:
    """Albedo (N, 3), gloss (N,) and emission (N, 3) of facades whose walls have `albedo`."""
    style, glass = np.floor(struck["pattern"]), struck["pattern"] % 1
    bay = u / (2.2 + (style % 5) * 0.35)
    above = height - 1.0
    storey = above / (3.0 + (style % 3) * 0.25)
    column, floor = np.floor(bay), np.floor(storey)
    from_middle, level = np.abs(bay - column - 0.5), storey - floor
    shop = (floor == 0) & (style % 2 == 0)
    wide = np.where(shop, np.float32(0.44), glass / 2)
    low, high = np.where(shop, 0.12, 0.26), np.where(shop, 0.72, 0.82)
    inside = (height < 2 * struck["half"][:, 2] - 0.5) & (above > 0) & (np.abs(u) < edge - 0.4)
    framed = inside & (from_middle < wide + 0.03) & (level > low - 0.04) & (level < high + 0.03)
    window = inside & (from_middle < wide) & (level > low) & (level < high)
    window &= (from_middle > 0.012) | (glass > 0.6) | shop  # the sash
    chance = _hash(column, floor, style)
    weather = 1 - 0.25 * (level > 0.95) - 0.3 * np.exp(-height) * scene.city.detail
    albedo = albedo * weather[:, None].astype(np.float32)
    albedo[framed & (glass < 0.8)] = (0.62, 0.61, 0.58)
    curtain = (chance > 0.75) | ((chance % 0.25 > 0.15) & (level > 0.6) & ~shop)
    albedo[window] = np.where(curtain[window, None], (0.22, 0.21, 0.19), (0.035, 0.05, 0.065))
    gloss = np.where(window, 0.35 + 0.4 * chance, 0).astype(np.float32)
    emission = np.zeros_like(albedo)
    if scene.light.lamps:
        lit = window & (chance > np.where(shop, 0.4, 0.72))
        bulb, tube = (0.75, 0.45, 0.16), (0.45, 0.52, 0.55)
        tint = np.where((chance * 57 % 1 > 0.3)[:, None], bulb, tube)
        emission[lit] = (tint * (0.15 + 0.55 * (chance * 91 % 1))[:, None])[lit]
    return albedo, gloss, emission


# ---- the camera's image --------------------------------------------------------------------------


def _sky(scene: Scene, direction: Array) -> Array:
    """Radiance (N, 3) of the sky along directions (N, 3)."""
    horizon, zenith = _f32(*scene.light.horizon), _f32(*scene.light.zenith)
    up = direction[:, 2].clip(0, 1)
    clear = horizon + (zenith - horizon) * (1 - np.exp(-4.5 * up))[:, None]
    scale = 1 / (up + 0.12)
    offset = float(scene.bend[1])
    noise = _noise(direction[:, 0] * scale + offset, direction[:, 1] * scale, 0.012, 1.9)
    clouds = ((noise - 1 + scene.light.clouds) / 0.4).clip(0, 1) * (up * 9).clip(0, 1)
    return clear + (horizon * 1.18 - clear) * (0.75 * clouds)[:, None]


class Shader:
    """Gives what rays from one camera hit its colour.

    The sun's shadow is a depth map of parallel rays, turned with the view.
    """

    def __init__(self, scene: Scene, pose: Pose):
        (position, forward), self.pose = (pose[0], pose[1][:, 2]), pose
        self.scene, self.position, self.forward = scene, _f32(*position), _f32(*forward)
        ahead = forward * (1, 1, 0) / np.hypot(forward[0], forward[1])
        side = np.cross(scene.sun, ahead)
        side /= np.linalg.norm(side)
        # Axes of rows, of columns, to the sun.
        self.axes = _f32(side, np.cross(side, scene.sun), scene.sun)
        middle = position + ahead * (SHADOW_SHAPE[1] * SHADOW_CELL / 2 - 8)
        self.centre = _f32(*(middle + scene.sun * 90))
        cells = [(np.arange(n) + 0.5 - n / 2) * SHADOW_CELL for n in SHADOW_SHAPE]
        grid = _f32(*np.meshgrid(*cells, indexing="ij"))
        start = self.centre[:, None, None] + np.tensordot(self.axes[:2].T, grid, 1)
        down = np.broadcast_to(_f32(0, 0, -1)[:, None], (3, grid[0].size))
        rays = Rays(scene, (start, self.axes.T), down)
        seen = self._cells(scene.corners - self.centre)
        bounds = _bounds(seen.min(1), seen.max(1), SHADOW_SHAPE)
        rays.meet_all(bounds, np.arange(len(rays.hit)).reshape(SHADOW_SHAPE))
        self.depth = rays.distance

    def _cells(self, offset: Array) -> Array:
        """Row and column (..., 2), real numbers, of points (..., 3) relative to the centre."""
        return offset @ self.axes[:2].T / SHADOW_CELL + (_f32(*SHADOW_SHAPE) - 1) / 2

    def lit(self, points: Array) -> Array:
        """The share (N,) of the sun that points (N, 3) see."""
        offset = points - self.centre
        rows, columns = SHADOW_SHAPE
        row, column = self._cells(offset).clip(0, _f32(rows - 1.01, columns - 1.01)).T
        below = -(offset @ self.axes[2]) - 0.12
        first = row.astype(np.int32) * columns + column.astype(np.int32)
        down, right = row % 1, column % 1
        above, under = (
            (self.depth[cell] > below) * (1 - right) + (self.depth[cell + 1] > below) * right
            for cell in (first, first + columns)
        )
        return above * (1 - down) + under * down

    def radiance(self, rays: Rays) -> tuple[Array, Array]:
        """Radiance (N, 3) and label (N,) of what rays of the camera hit."""
        scene, light = self.scene, self.scene.light
        out, label = _sky(scene, rays.direction.T), np.full(len(rays.hit), world.SKY, np.uint8)
        solid = np.nonzero(np.isfinite(rays.distance))[0]
        direction, distance, hit = rays.direction.T[solid], rays.distance[solid], rays.hit[solid]
        points = self.position + direction * distance[:, None]
        normal, albedo, emission, gloss, _, label[solid] = surface_at(scene, hit, points)
        leafy = label[solid] == world.VEGETATION
        # A cell of the shadow map is wide: what casts a shadow must not shade itself.
        lit = self.lit(points + normal * np.where(hit >= 0, np.float32(0.3), 0)[:, None])
        # Leaves face all ways, mostly up.
        normal[leafy] = normal[leafy] * np.float32(0.7) + _f32(0, 0, 0.3)
        facing = (normal @ _f32(*scene.sun)).clip(0, 1)
        facing[leafy] = 0.25 + 0.6 * facing[leafy]
        sky_share = (0.62 + 0.38 * normal[:, 2]) * (0.62 + 0.38 * lit)
        irradiance = sky_share[:, None] * _f32(*light.ambient)
        irradiance += (facing * lit)[:, None] * _f32(*light.sun)
        if light.lamps:
            irradiance += self._lamps(points, normal, lit)
        color = albedo * irradiance * (1 - gloss * 0.6)[:, None] + emission
        shiny = np.nonzero(gloss > 0)[0]
        course, facet = direction[shiny], normal[shiny]
        cosine = (course * facet).sum(1)
        mirrored = course - 2 * cosine[:, None] * facet
        # Low down, houses and the road are mirrored, not the sky; flat angles mirror more.
        bright = 0.25 + 0.75 * (mirrored[:, 2] * 3 + 0.3).clip(0, 1)
        share = gloss[shiny] * bright * (0.75 + 1.5 * (1 - np.abs(cosine)) ** 3)
        color[shiny] += share[:, None] * _sky(scene, mirrored)
        clear = np.exp(distance * np.float32(-1 / light.haze))[:, None]
        out[solid] = color * clear + (1 - clear) * _f32(*light.horizon)
        return out, label

    def _lamps(self, points: Array, normal: Array, lit: Array) -> Array:
        """Irradiance (N, 3) from the street lamps near the camera and the car's headlights."""
        beam = points - self.position + _f32(0, 0, 0.8)
        distance = np.sqrt((beam**2).sum(1))
        cone = np.clip((beam @ self.forward) / distance, 0, 1) ** 14
        facing = np.clip(-(normal * beam).sum(1) / distance, 0.08, 1)
        dipped = np.clip(1.6 - beam[:, 2] * 0.5, 0.05, 1)
        total = (26 * cone * facing * dipped / (distance**2 + 25))[:, None] * _f32(1.0, 0.95, 0.82)
        for lamp in _f32(*self.scene.lamps).reshape(-1, 3):
            if -25 < (lamp - self.position) @ self.forward < 90:
                to_lamp = lamp - points
                squared = (to_lamp**2).sum(1)
                distance = np.sqrt(squared + 0.01)
                cone = np.clip(to_lamp[:, 2] / distance - 0.1, 0, 1)
                cone *= np.clip((normal * to_lamp).sum(1) / distance, 0.12, 1)
                falloff = 22.0 * cone * (0.35 + 0.65 * lit) / (squared + 6)
                total += falloff[:, None] * _f32(1.0, 0.66, 0.30)
        return total

    def smooth_edges(self, camera: Camera, rays: Rays, radiance: Array) -> None:
        """Replaces the radiance (H, W, 3) of pixels at edges by the mean of four rays.

        These rays can only hit what the pixel's own ray and those of its four neighbours hit.
        """
        scene, shape = self.scene, radiance.shape[:2]
        sky, hit = np.isinf(rays.distance).reshape(shape), rays.hit.reshape(shape)
        leaf = (scene.primitives["texture"][hit] == world.LEAF) & (hit >= 0)
        what = np.where(sky, -2, np.where(leaf, -3, hit))
        film = np.sqrt(radiance[..., 1] * scene.light.exposure)
        edge = np.zeros(shape, bool)
        for before, after in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
            differ = what[before] != what[after]
            differ |= (np.abs(film[before] - film[after]) > 0.12) & ~leaf[before]
            edge[before] |= differ
            edge[after] |= differ
        row, column = np.nonzero(edge)
        v = (row + 0.5)[:, None] + _f32(-0.25, -0.25, 0.25, 0.25)
        u = (column + 0.5)[:, None] + _f32(-0.25, 0.25, -0.25, 0.25)
        local, _ = _pixel_rays(camera, u, v)
        padded = np.pad(np.where(sky, -2, hit), 1, "edge")
        steps = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))  # the pixel itself, and its neighbours
        around = np.stack([padded[row + a, column + b] for a, b in steps])
        new = [(own >= 0) & (own != around[:k]).all(0) for k, own in enumerate(around)]
        which, pixel = np.nonzero(new)
        ray = (pixel[:, None] * 4 + np.arange(4)).ravel()
        fine = Rays(scene, self.pose, local)
        fine.meet(np.repeat(around[which, pixel], 4), ray)
        fine.meet_ground()
        # A ray that slips between all of them goes the way of the pixel's own.
        lost = np.isinf(fine.distance) & np.repeat((around != -2).all(0), 4)
        own = np.repeat(row * shape[1] + column, 4)[lost]
        fine.distance[lost], fine.hit[lost] = rays.distance[own], rays.hit[own]
        color, _ = self.radiance(fine)
        # Clipped before averaging: a highlight must not outshine its whole pixel.
        radiance[row, column] = color.clip(0, 4).reshape(-1, 4, 3).mean(1)


def photo(scene: Scene, camera: Camera, pose: Pose, rng: Rng) -> Picture:
    """What the camera sees: a ray goes through each pixel's centre, more through those at edges."""
    shape = camera.height, camera.width
    v, u = np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij")
    local, cosine = _pixel_rays(camera, u, v)
    corners = (scene.corners - pose[0]) @ pose[1]
    aside, z = camera.focal * corners[..., 1::-1], corners[..., 2:]
    centre = camera.centre_v, camera.centre_u
    seen = aside / np.maximum(z, 0.1) + centre - 0.5  # (P, 8, 2), row and column
    # Of a primitive that the image plane cuts, all corners count as if on a plane close by: that
    # bounds what is cut off.
    close = np.where(z.min(1, keepdims=True) < 0.1, aside / 0.1 + centre, seen)
    high = np.where(z.max(1) > 0.1, np.maximum(seen, close).max(1) + 0.01, -9)
    bounds = _bounds(np.minimum(seen, close).min(1) - 0.01, high, shape)
    rays = Rays(scene, pose, local)
    rays.meet_all(bounds, np.arange(cosine.size).reshape(shape))
    rays.meet_ground()
    shader = Shader(scene, pose)
    radiance, label = shader.radiance(rays)
    radiance = radiance.reshape(*shape, 3)
    shader.smooth_edges(camera, rays, radiance)
    depth = rays.distance.reshape(shape) * cosine
    return Picture(_develop(scene, radiance, rng), label.reshape(shape), depth)


def _develop(scene: Scene, radiance: Array, rng: Rng) -> Array:
    """The image (H, W, 3) u8 of a camera with the scene's tone."""
    light = scene.light
    height, width, _ = radiance.shape
    if light.lamps:
        bright = Image.fromarray((np.clip(radiance, 0, 1.5) * 170).astype(np.uint8))
        halo = np.asarray(bright.filter(ImageFilter.GaussianBlur(width / 80))) / np.float32(170)
        radiance = radiance + np.maximum(halo - 0.08, 0) * 0.5
    v, u = ((np.arange(n, dtype=np.float32) / n - 0.5) ** 2 for n in (height, width))
    corner = 1 - light.vignette * (v[:, None] + u)
    film = (1 - np.exp(-light.exposure * radiance * corner[..., None])) ** np.float32(1 / 2.2)
    film = film - light.contrast * np.sin(2 * np.pi * film)
    grey = film @ _f32(0.3, 0.6, 0.1)
    film = grey[..., None] + (film - grey[..., None]) * np.float32(light.saturation)
    film = 255 * film * _f32(*light.tint)
    grain = rng.standard_normal((height, width, 3), np.float32)
    grain += 0.5 * rng.standard_normal((height, width, 1), np.float32)
    return (film + light.grain * grain).clip(0, 255).astype(np.uint8)


def sweep(scene: Scene, lidar: Lidar, pose: Pose, rng: Rng) -> tuple[Array, Array]:
    """Points (N, 5) f32 (x, y, z in the LiDAR's frame, intensity 0-255, ring), labels (N,) u8.

    Column by column, as the sensor spins.
    """
    rays = _cast_lidar(scene, lidar, pose)
    spin = np.arange(len(rays.hit)).reshape(-1, lidar.columns).T.ravel()
    spin = spin[rays.distance[spin] < lidar.max_range]
    distance, ring, count = rays.distance[spin], spin // lidar.columns, len(spin)
    own, direction = rays.local.T[spin], rays.direction.T[spin]
    surface = surface_at(scene, rays.hit[spin], rays.origin.T + direction * distance[:, None])
    label = surface.label
    incidence = np.abs((surface.normal * direction).sum(1)) ** np.float32(0.6)
    speckle = rng.uniform(0.8, 1.2, count)
    echo = surface.reflect * (0.1 + 0.9 * incidence) * speckle
    keep = rng.random(count) > scene.world.lidar_drop
    keep &= rng.random(count) < 1 - np.exp(-echo * (55.0 / distance) ** 2 * 3.0)
    # Grass scatters the beam, which is what tells a lawn from a pavement at the same height.
    spread = np.where(label == world.TERRAIN, 0.04, 0.015)
    distance = distance + rng.normal(0, 1, count) * spread
    intensity = np.floor(np.clip(echo * 110 * np.exp(-distance / 90), 1, 255))
    stray = rng.random(count) < 0.0008
    distance[stray] *= rng.uniform(0.3, 0.95, count)[stray]
    label[stray] = world.NOISE
    points = np.concatenate([own * distance[:, None], intensity[:, None], ring[:, None]], 1)
    return points[keep].astype(np.float32), label[keep]
