"""Rays through a scene: what they hit, its colour and light, the camera's image, the LiDAR sweep.

Camera, LiDAR and shadow map are three grids of rays through one caster. Therefore what a LiDAR
point hits and what its pixel shows agree.

N counts points, P primitives, H and W a grid's rows and columns. Distances are metres along a ray
of unit length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ftdpp.readers.base import Array
from ftdpp.world.scene import (
    BANDS,
    BUS,
    CAR,
    CYLINDER,
    ELLIPSOID,
    FACADE,
    GLASS,
    LAMP,
    LEAF,
    NOISE,
    ROAD,
    SIDEWALK,
    TERRAIN,
    TRUCK,
    Scene,
)

WIDTH, HEIGHT = 400, 225  # of the image
FOCAL, CENTRE_U, CENTRE_V = 316.604300761, 204.066755, 122.876766  # pixels
INTRINSIC = [[FOCAL, 0.0, CENTRE_U], [0.0, FOCAL, CENTRE_V], [0.0, 0.0, 1.0]]
OVERSAMPLE = 2  # rays per pixel in each direction
BEAMS, COLUMNS, MAX_RANGE = 32, 1090, 80.0
LOWEST, HIGHEST = -30.67, 10.67  # beams, degrees
NEAREST = 0.05  # distance below which nothing is hit

Grid = tuple[Any, Any, Any]  # x, y, z: arrays (H, W), or numbers where all rays share them


@dataclass(frozen=True)
class View:
    """Where a sensor is."""

    position: Array  # (3,) in the scene
    rotation: Array  # (3, 3) from the sensor's frame to the scene's

    def seen(self, points: Array) -> Array:
        """Points (..., 3) of the scene in the sensor's frame."""
        local: Array = (points - self.position) @ self.rotation
        return local

    def rays(self, local: Array) -> tuple[Grid, Grid]:
        """Origin and directions in the scene, float32; local: directions (3, H, W)."""
        ox, oy, oz = (np.float32(p) for p in self.position)
        dx, dy, dz = (
            sum(self.rotation[k, j] * local[j] for j in range(3)).astype(np.float32)
            for k in range(3)
        )
        return (ox, oy, oz), (dx, dy, dz)


# ---- noise ---------------------------------------------------------------------------------------


@cache
def _noise_table(dim: int, size: int, power: float) -> Array:
    """Tileable 1/f noise (size,)*dim float32, spread evenly over 0..1: a threshold is a share."""
    white = np.random.default_rng(7 + dim).standard_normal((size,) * dim)
    axes = np.meshgrid(*[np.fft.fftfreq(size)] * dim, indexing="ij")
    frequency = np.sqrt(sum(axis**2 for axis in axes))
    smooth = np.fft.ifftn(np.fft.fftn(white) / (frequency + 1 / size) ** power).real
    ranks = np.empty(smooth.size, np.float32)
    order = np.argsort(smooth, axis=None, kind="stable")
    ranks[order] = np.linspace(0, 1, smooth.size, dtype=np.float32)
    return ranks.reshape(smooth.shape)


def _noise(x: Array, y: Array, texel: float, power: float = 1.1) -> Array:
    """Noise at places in the plane; `texel` is the size of a cell."""
    column, row = (np.floor(v / texel).astype(np.int64) & 511 for v in (x, y))
    value: Array = _noise_table(2, 512, power)[column, row]
    return value


def _hash(a: Array, b: Array, seed: Array | float) -> Array:
    """A number in 0..1 that looks random for each pair of integers."""
    wave: Array = np.sin(a * 12.9898 + b * 78.233 + seed * 37.719) * 43758.5453
    return wave - np.floor(wave)


# ---- rays and what they hit ----------------------------------------------------------------------


@dataclass
class Rays:
    """A grid of rays, float32.

    `window` maps the corners of the primitives' bounding boxes (P, 8, 3) to (P, 4): first and end
    row, first and end column of the rays that may hit each. With `wrap` the grid closes to a ring
    and columns may lie beyond either end.
    """

    origin: Grid
    direction: Grid
    window: Callable[[Array], Array]
    wrap: bool = False


def _corners(primitives: Array) -> Array:
    """Corners of the bounding boxes, (P, 8, 3)."""
    signs = [(a, b, c) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)]
    x, y, z = np.moveaxis(primitives["half"][:, None] * np.array(signs, np.float32), -1, 0)
    cos, sin = np.cos(primitives["yaw"])[:, None], np.sin(primitives["yaw"])[:, None]
    turned = np.stack([cos * x - sin * y, sin * x + cos * y, z], -1)
    corners: Array = primitives["center"][:, None] + turned
    return corners


def _span(primitive: Any, origin: Grid, direction: Grid) -> tuple[Array, Array]:
    """Entry and exit distance of rays through a convex primitive; a miss has entry >= exit."""
    cos, sin = math.cos(primitive["yaw"]), math.sin(primitive["yaw"])
    x, y, z = (origin[k] - primitive["center"][k] for k in range(3))
    ox, oy, oz = cos * x + sin * y, cos * y - sin * x, z
    dx = cos * direction[0] + sin * direction[1]
    dy = cos * direction[1] - sin * direction[0]
    dz = direction[2] + 1e-9  # no division by zero, here and below
    hx, hy, hz = primitive["half"]
    if primitive["kind"] == ELLIPSOID:
        return _round_span([(ox, dx, hx), (oy, dy, hy), (oz, dz, hz)])
    near, far = _slab_span(oz, dz, hz)
    if primitive["kind"] == CYLINDER:
        sides = [_round_span([(ox, dx, hx), (oy, dy, hy)])]
    elif primitive["taper"].any():
        lean_x, lean_y = primitive["taper"]
        above = oz + hz
        sides = [
            _tapered_span(ox, dx, hx, above, dz, lean_x),
            _tapered_span(oy, dy, hy, above, dz, lean_y),
        ]
    else:
        sides = [_slab_span(ox, dx + 1e-9, hx), _slab_span(oy, dy + 1e-9, hy)]
    for entry, leave in sides:
        near, far = np.maximum(near, entry), np.minimum(far, leave)
    return near, far


def _slab_span(origin: Any, direction: Any, half: Any) -> tuple[Array, Array]:
    """The span between two parallel planes at -half and half."""
    a, b = (-half - origin) / direction, (half - origin) / direction
    return np.minimum(a, b), np.maximum(a, b)


def _tapered_span(
    origin: Any, direction: Any, half: Any, above: Any, climb: Any, lean: Any
) -> tuple[Array, Array]:
    """The span between two sides that lean inwards by `lean` per metre above the base.

    above: height of the origin above the base. climb: the direction's z.
    """
    near: Any = np.float32(-1e9)
    far: Any = np.float32(1e9)
    for sign in (1, -1):
        slope = sign * direction + lean * climb + 1e-9
        distance = (half - lean * above - sign * origin) / slope
        near = np.maximum(near, np.where(slope < 0, distance, near))
        far = np.minimum(far, np.where(slope > 0, distance, far))
    return near, far


def _round_span(axes: list[tuple[Any, Any, Any]]) -> tuple[Array, Array]:
    """The span inside an ellipse or ellipsoid; axes: (origin, direction, half) of each."""
    a = sum((d / h) ** 2 for _, d, h in axes)
    b = sum(o * d / h**2 for o, d, h in axes)
    c = sum((o / h) ** 2 for o, _, h in axes) - 1
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    hit = discriminant > 0
    return np.where(hit, (-b - root) / a, 1e9), np.where(hit, (-b + root) / a, -1e9)


def _foliage(
    primitive: Any, origin: Grid, direction: Grid, near: Array, far: Array, mask: Array
) -> Array:
    """Where rays end in porous leaves: front or back surface, roughened; inf in the holes."""
    end = np.full(near.shape, np.inf, np.float32)
    spots = np.nonzero(mask)
    size = np.clip(primitive["half"].min() * 0.09, 0.05, 0.14)  # of a leaf
    depth = np.minimum(far - near, 0.9)[spots]
    for surface in (near, far):
        distance = surface[spots]
        cell = []
        for k in range(3):
            start = np.broadcast_to(origin[k], near.shape)[spots]
            point = start + distance * direction[k][spots]
            texel = (point - primitive["center"][k] + primitive["pattern"]) / size
            cell.append(np.floor(texel).astype(np.int64) & 63)
        noise = _noise_table(3, 64, 1.6)[cell[0], cell[1], cell[2]]
        solid = (noise > 0.36) & (distance > NEAREST)
        rough = distance + (noise - 0.36) * depth * 0.5
        end[spots] = np.where(solid & np.isinf(end[spots]), rough, end[spots])
    return end


def _column_pieces(first: int, end: int, columns: int, wrap: bool) -> list[tuple[int, int]]:
    """A range of columns, cut where the ring of columns closes."""
    if wrap and end > columns:
        return [(first, columns), (0, end - columns)]
    if wrap and first < 0:
        return [(first + columns, columns), (0, end)]
    return [(first, end)]


def cast(rays: Rays, scene: Scene, ground: bool = True) -> tuple[Array, Array]:
    """The nearest hit of each ray, on primitives and, unless that is left out, the ground.

    Returns the distance (H, W) float32, inf for the sky, and the index of the primitive (H, W)
    int32, -1 for the ground.
    """
    shape = rays.direction[0].shape
    distance, hit = np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int32)
    bounds = rays.window(_corners(scene.primitives))
    visible = (bounds[:, 0] < bounds[:, 1]) & (bounds[:, 2] < bounds[:, 3])
    for index in np.nonzero(visible)[0]:
        primitive = scene.primitives[index]
        first_row, end_row, first, end = bounds[index]
        for start, stop in _column_pieces(first, end, shape[1], rays.wrap):
            view = np.s_[first_row:end_row, start:stop]
            origin = tuple(v[view] if np.ndim(v) else v for v in rays.origin)
            direction = tuple(v[view] for v in rays.direction)
            near, far = _span(primitive, origin, direction)
            mask = (near < far) & (far > NEAREST)
            if not mask.any():
                continue
            if primitive["texture"] == LEAF:
                near = _foliage(primitive, origin, direction, near, far, mask)
            mask &= (near > NEAREST) & (near < distance[view])
            distance[view][mask] = near[mask]
            hit[view][mask] = index
    if ground:
        _cast_ground(rays, scene, distance, hit)
    return distance, hit


def _cast_ground(rays: Rays, scene: Scene, distance: Array, hit: Array) -> None:
    """Marches between the highest and the lowest level of the ground, then bisects.

    Writes into distance and hit where the ground is nearer.
    """
    top, bottom = float(scene.profile_height.max()) + 0.01, -0.01
    dz = rays.direction[2]
    with np.errstate(divide="ignore"):
        first = np.where(dz < -1e-4, (top - rays.origin[2]) / dz, np.inf)
    spots = np.nonzero((first < distance) & (first < 400))
    ox, oy, oz = rays.origin
    dx, dy, dz = (v[spots] for v in rays.direction)

    def is_under(at: Array) -> Array:
        below: Array = oz + at * dz < scene.ground(ox + at * dx, oy + at * dy)[0]
        return below

    start = first[spots]
    high = (bottom - oz) / dz
    step = (high - start) / 6
    low, found = start.copy(), np.zeros(start.shape, bool)
    for k in range(1, 6):
        found |= is_under(start + k * step)
        low = np.where(found, low, start + k * step)
    high = np.where(found, low + step, high)
    for _ in range(9):
        middle = (low + high) / 2
        below = is_under(middle)
        low, high = np.where(below, low, middle), np.where(below, middle, high)
    closer = high < distance[spots]
    spots = (spots[0][closer], spots[1][closer])
    distance[spots] = high[closer]
    hit[spots] = -1


# ---- grids of rays -------------------------------------------------------------------------------


def _box_window(u: Array, v: Array, none: Array, every: Array, shape: tuple[int, int]) -> Array:
    """Bounds (P, 4) of projected corners u (column) and v (row), both (P, 8).

    none, every: (P,) masks of primitives that get no ray, or every ray.
    """
    rows, columns = shape
    bounds = np.stack(
        [
            np.floor(v.min(1)).clip(0, rows),
            np.ceil(v.max(1) + 1).clip(0, rows),
            np.floor(u.min(1)).clip(0, columns),
            np.ceil(u.max(1) + 1).clip(0, columns),
        ],
        1,
    ).astype(np.int64)
    bounds[every] = (0, rows, 0, columns)
    bounds[none] = 0
    return bounds


def camera_rays(view: View) -> Rays:
    """OVERSAMPLE x OVERSAMPLE rays a pixel, for a camera that looks along its own z axis."""
    shape = HEIGHT * OVERSAMPLE, WIDTH * OVERSAMPLE
    rows, columns = ((np.arange(n) + 0.5) / OVERSAMPLE for n in shape)
    v, u = np.meshgrid(rows, columns, indexing="ij")
    local = np.stack([(u - CENTRE_U) / FOCAL, (v - CENTRE_V) / FOCAL, np.ones_like(u)])
    local /= np.sqrt((local**2).sum(0))

    def window(corners: Array) -> Array:
        seen = view.seen(corners)
        depth = np.maximum(seen[..., 2], 0.05)
        column = FOCAL * seen[..., 0] / depth + CENTRE_U
        row = FOCAL * seen[..., 1] / depth + CENTRE_V
        behind = seen[..., 2].max(1) <= 0.1
        cut = seen[..., 2].min(1) < 0.1  # by the image plane
        return _box_window(column * OVERSAMPLE, row * OVERSAMPLE, behind, cut, shape)

    return Rays(*view.rays(local), window)


def lidar_rays(view: View) -> tuple[Rays, Array]:
    """The rays of a sweep, and their directions in the LiDAR's own frame (3, BEAMS, COLUMNS)."""
    elevation = np.radians(np.linspace(LOWEST, HIGHEST, BEAMS))
    azimuth = np.arange(COLUMNS) / COLUMNS * 2 * np.pi
    flat = np.cos(elevation)[:, None]
    climb = np.broadcast_to(np.sin(elevation)[:, None], (BEAMS, COLUMNS))
    local = np.stack([flat * np.cos(azimuth), flat * np.sin(azimuth), climb])

    def window(corners: Array) -> Array:
        seen = view.seen(corners)
        middle = (seen.min(1) + seen.max(1)) / 2
        radius = np.hypot(*(seen[..., :2] - middle[:, None, :2]).transpose(2, 0, 1)).max(1)
        distance = np.hypot(middle[:, 0], middle[:, 1])
        inner, outer = np.maximum(distance - radius, 0.3), distance + radius
        low, high = seen[..., 2].min(1), seen[..., 2].max(1)
        # The lowest beam is the steepest one: the near end where z is below the sensor.
        lowest = np.arctan2(low, np.where(low < 0, inner, outer))
        highest = np.arctan2(high, np.where(high > 0, inner, outer))
        spacing = elevation[1] - elevation[0]
        first_row = np.floor((lowest - elevation[0]) / spacing)
        end_row = np.ceil((highest - elevation[0]) / spacing + 1)
        centre = np.arctan2(middle[:, 1], middle[:, 0]) % (2 * np.pi)
        wide = np.arcsin(np.minimum(radius / np.maximum(distance, 1e-3), 1.0))
        first_column = np.floor((centre - wide) / (2 * np.pi) * COLUMNS)
        end_column = np.ceil((centre + wide) / (2 * np.pi) * COLUMNS + 1)
        rows = first_row.clip(0, BEAMS), end_row.clip(0, BEAMS)
        bounds = np.stack([*rows, first_column, end_column], 1)
        bounds[distance <= radius * 1.02] = (0, BEAMS, 0, COLUMNS)
        bounds[inner > MAX_RANGE] = 0
        return bounds.astype(np.int64)

    return Rays(*view.rays(local), window, wrap=True), local


def _shadow(scene: Scene, centre: Array, points: Array) -> Array:
    """1 where points (N, 3) see the sun, 0 in shadow.

    By a depth map of parallel rays: 110 m wide, around `centre`.
    """
    extent, cells = 55.0, 440
    step = 2 * extent / cells
    sun = scene.sun
    right = np.cross(sun, (0, 0, 1.0))
    right /= np.linalg.norm(right)
    up = np.cross(sun, right)
    axes = np.stack([right, up, sun], 1)
    v, u = np.meshgrid(*[(np.arange(cells) + 0.5) * step - extent] * 2, indexing="ij")
    start = centre + sun * 90
    ox, oy, oz = ((start[k] + u * right[k] + v * up[k]).astype(np.float32) for k in range(3))
    dx, dy, dz = (np.full((cells, cells), -sun[k], np.float32) for k in range(3))

    def window(corners: Array) -> Array:
        seen = ((corners - start) @ axes + extent) / step
        nobody = np.zeros(len(corners), bool)
        return _box_window(seen[..., 0], seen[..., 1], nobody, nobody, (cells, cells))

    depth, _ = cast(Rays((ox, oy, oz), (dx, dy, dz), window), scene, ground=False)
    seen = (points - start) @ axes
    lit = np.zeros(len(points))
    for shift in (-0.35, 0.35):  # two samples soften the edge
        column, row = ((seen[:, k] + extent) / step + shift for k in range(2))
        inside = (column >= 0) & (row >= 0) & (column < cells) & (row < cells)
        column, row = (v.clip(0, cells - 1).astype(int) for v in (column, row))
        covered = inside & (depth[row, column] < -seen[:, 2] - 0.3)
        lit += np.where(covered, 0.0, 0.5)
    return lit


# ---- surfaces ------------------------------------------------------------------------------------


@dataclass
class Surface:
    """What points (N) look like, to the camera and to the LiDAR."""

    normal: Array  # (N, 3) float32
    albedo: Array  # (N, 3)
    emission: Array  # (N, 3), radiance of its own
    gloss: Array  # (N,) share of mirrored light
    reflect: Array  # (N,) LiDAR reflectance
    label: Array  # (N,) uint8


def surface_at(scene: Scene, hit: Array, points: Array) -> Surface:
    """The surface at points (N, 3) that `cast` found: hit (N,) as it returns."""
    count = len(points)
    surface = Surface(
        normal=np.zeros((count, 3), np.float32),
        albedo=np.empty((count, 3)),
        emission=np.zeros((count, 3)),
        gloss=np.zeros(count),
        reflect=np.empty(count),
        label=np.empty(count, np.uint8),
    )
    ground, thing = hit < 0, hit >= 0
    surface.normal[ground] = (0, 0, 1)
    albedo, reflect, label = _ground_albedo(scene, points[ground])
    surface.albedo[ground], surface.reflect[ground], surface.label[ground] = albedo, reflect, label

    struck = scene.primitives[hit[thing]]
    surface.normal[thing], local = _normals(struck, points[thing])
    # Colours follow the normal as it is stored, in single precision.
    albedo, emission, gloss = _object_albedo(scene, struck, surface.normal[thing], local)
    surface.albedo[thing], surface.emission[thing], surface.gloss[thing] = albedo, emission, gloss
    surface.reflect[thing] = struck["reflect"] * np.where(gloss > 0.3, 0.12, 1.0)
    surface.label[thing] = struck["label"]
    return surface


def _normals(struck: Array, points: Array) -> tuple[Array, Array]:
    """Normals and local coordinates, both (N, 3), of points on the primitives `struck` (N,)."""
    cos, sin = np.cos(struck["yaw"]), np.sin(struck["yaw"])
    x, y, z = (points - struck["center"]).T
    local = np.stack([cos * x + sin * y, cos * y - sin * x, z], 1)
    half = struck["half"].copy()
    half[:, :2] -= struck["taper"] * (local[:, 2:] + struck["half"][:, 2:])
    axis = np.argmin(half - np.abs(local), 1)  # of the nearest face
    rows = np.arange(len(struck))
    normal = np.zeros_like(local)
    normal[rows, axis] = np.sign(local[rows, axis])
    normal[:, 2] += np.where(axis < 2, struck["taper"][rows, np.minimum(axis, 1)], 0)
    ball = struck["kind"] == ELLIPSOID
    normal[ball] = (local / struck["half"] ** 2)[ball]
    tube = (struck["kind"] == CYLINDER) & (axis < 2)
    normal[tube] = local[tube] * (1, 1, 0)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    x, y, z = normal.T
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], 1), local


def _ground_albedo(scene: Scene, points: Array) -> tuple[Array, Array, Array]:
    """Albedo (N, 3), LiDAR reflectance (N,) and label (N,) of points (N, 3) on the ground."""
    x, y = points[:, 0].astype(np.float64), points[:, 1]
    _, label, across, beyond = scene.ground(x, y)
    road, sidewalk = label == ROAD, label == SIDEWALK
    fine, coarse = _noise(x, y, 0.03), _noise(x + 9, y, 0.12)
    palette = [np.array(scene.colors.get(k, (0.3, 0.3, 0.3))) for k in range(32)]
    albedo = np.stack(palette)[label]
    contrast = np.select([road, sidewalk], [0.30, 0.22], 0.9)
    albedo = albedo * (1 + contrast * (0.5 * fine + 0.5 * coarse - 0.5))[:, None]

    bare = (label == TERRAIN) & (coarse > 0.86)
    albedo[bare] = albedo[bare] * 0.5 + np.array((0.20, 0.14, 0.09))
    joint = sidewalk & ((x % 1.5 < 0.05) | ((across % 1.5) < 0.05))
    albedo[joint] *= 0.7
    kerb = (beyond > 0) & (beyond < 0.18)
    even = (np.floor(x / 2) % 2 == 0)[:, None]
    albedo[kerb] = np.where(even, scene.city.kerb[0], scene.city.kerb[1])[kerb]
    # Tyres darken the tracks; patches of newer asphalt break the evenness of the road.
    street = road & (np.abs(x - scene.cross) > scene.cross_half + 1)
    from_middle = np.abs((np.abs(across) % scene.lane) - scene.lane / 2)
    track = np.exp(-((from_middle - 0.8) ** 2) / 0.1)
    albedo[street] *= (1 - 0.10 * track)[street, None]
    patch = road & (_hash(np.floor(x / 7.3), np.floor(across / scene.lane), 3.0) > 0.9)
    albedo[patch] *= 0.72

    painted = (fine * 0.6 + coarse * 0.4 > 0.22) & street  # what is not worn off
    white, centre = (mark & painted for mark in _road_marks(scene, x, across, road))
    albedo[white] = np.array((0.66, 0.66, 0.64)) * (0.8 + 0.3 * fine[white, None])
    albedo[centre] = scene.city.centre_line

    reflect = np.select([road, sidewalk], [0.10, 0.20], 0.34)
    reflect = np.where(white | centre, 0.6, reflect)
    reflect[bare] = 0.25
    return albedo, reflect * (0.85 + 0.3 * coarse), label


def _road_marks(scene: Scene, x: Array, across: Array, road: Array) -> tuple[Array, Array]:
    """Masks (N,) of white paint and of the centre line."""
    aside = np.abs(across)
    between_lanes = np.abs(aside - scene.lane) < 0.07
    dashes = between_lanes & (x % 9 < 3.5) & (scene.lanes == 2)
    edge = np.abs(aside - scene.lanes * scene.lane - 0.05) < 0.06
    approach = np.abs(x - scene.cross) - scene.cross_half
    zebra = (approach > 1.2) & (approach < 3.6) & (across % 1.1 < 0.5) & road
    arriving = across * (x - scene.cross) * scene.city.side < 0
    stop = (approach > 4.4) & (approach < 4.8) & arriving
    double, broken = np.abs(aside - 0.13) < 0.055, (aside < 0.07) & (x % 6 < 3)
    return dashes | edge | zebra | stop, double if scene.city.side < 0 else broken


def _object_albedo(
    scene: Scene, struck: Array, normal: Array, local: Array
) -> tuple[Array, Array, Array]:
    """Albedo (N, 3), emission (N, 3) and gloss (N,) of points on the primitives `struck` (N,).

    `pattern` of a primitive says: for FACADE the style, plus the share of glass as its fraction;
    for BANDS, in metres, half the height of a bus, which tells one deck from two; for LEAF the
    offset into the noise.
    """
    night, texture, half = scene.light.lamps, struck["texture"], struck["half"]
    albedo = struck["color"].astype(np.float64)
    emission, gloss = np.zeros((len(struck), 3)), np.zeros(len(struck))
    along_grain = local[:, 0] + local[:, 1] * 1.3
    fine = _noise(along_grain, local[:, 2] + local[:, 0] * 0.3, 0.05)
    albedo *= np.where(texture == LEAF, 0.35 + 1.3 * fine, 0.9 + 0.2 * fine)[:, None]

    # Coordinates on an upright face: u along it, height above the ground.
    upright = np.abs(normal[:, 2]) < 0.75
    height = local[:, 2] + half[:, 2]
    ahead = normal[:, 0] * np.cos(struck["yaw"]) + normal[:, 1] * np.sin(struck["yaw"])
    faces_x = np.abs(ahead) > 0.5
    u = np.where(faces_x, local[:, 1], local[:, 0])
    edge = np.where(faces_x, half[:, 1], half[:, 0])

    facade = (texture == FACADE) & upright
    window, shop, chance = _facade(struck, facade, u, edge, height, albedo)
    if scene.city.side < 0:
        course = height / 0.2  # of bricks
        mortar = (course % 1 < 0.16) | ((u / 0.5 + 0.5 * np.floor(course)) % 1 < 0.08)
        albedo[facade & mortar] *= 1.18
    curtain, dark = (0.16, 0.15, 0.13), (0.035, 0.05, 0.065)
    albedo[window] = np.where(chance[window, None] > 0.75, curtain, dark)
    gloss[window] = 0.35 + 0.4 * chance[window]
    if night:
        lit = window & (chance > np.where(shop, 0.4, 0.72))
        bulb, tube = (0.75, 0.45, 0.16), (0.45, 0.52, 0.55)
        tint = np.where((chance * 57 % 1 > 0.3)[:, None], bulb, tube)
        emission[lit] = (tint * (0.15 + 0.55 * (chance * 91 % 1))[:, None])[lit]

    cabin_edge = 0.86 * (edge - 0.3 * height)
    cabin = (texture == GLASS) & upright & (np.abs(u) < cabin_edge) & (np.abs(u) > 0.03)
    level = height / (2 * half[:, 2])
    decks = ((level > 0.2) & (level < 0.4)) | ((level > 0.62) & (level < 0.84))
    deck = (level > 0.42) & (level < 0.78)
    pane = (texture == BANDS) & upright & (np.abs(u) < edge - 0.15)
    pane &= np.where(struck["pattern"] > 1.8, decks, deck)
    pane &= (u % 1.4) > 0.1
    albedo[cabin | pane] = (0.02, 0.024, 0.03)
    gloss[cabin | pane] = 0.45
    if night:
        emission[pane] = (0.22, 0.22, 0.17)
    lamp = texture == LAMP
    emission[lamp] = struck["color"][lamp] * (6.0 if night else 0.25)
    lacquer = np.isin(struck["label"], (CAR, TRUCK, BUS)) & ~lamp
    gloss[lacquer & (gloss == 0) & (struck["reflect"] > 0.2)] = 0.08
    return albedo, emission, gloss


def _facade(
    struck: Array, facade: Array, u: Array, edge: Array, height: Array, albedo: Array
) -> tuple[Array, Array, Array]:
    """Darkens walls between floors, in place, and lays out the windows; all (N,).

    Returns masks of windows and of the ground floor, and a number in 0..1 for each window.
    """
    style, glass = np.floor(struck["pattern"]), struck["pattern"] % 1
    bay = u / (2.2 + (style % 5) * 0.35)
    above = height - 1.0
    storey = above / (3.0 + (style % 3) * 0.25)
    column, floor = np.floor(bay), np.floor(storey)
    from_middle, level = np.abs(bay - column - 0.5), storey - floor
    shop = floor == 0
    window = from_middle < np.where(shop, 0.44, glass / 2)
    window &= (level > np.where(shop, 0.12, 0.26)) & (level < np.where(shop, 0.72, 0.82))
    window &= facade & (height < 2 * struck["half"][:, 2] - 0.5)
    window &= (above > 0) & (np.abs(u) < edge - 0.4)
    chance = _hash(column, floor, style)
    shade = 1 - 0.25 * (level[facade] > 0.93) - 0.12 * (chance[facade] > 0.8)
    albedo[facade] *= shade[:, None]
    return window, shop, chance


# ---- the camera's image --------------------------------------------------------------------------


def _sky(scene: Scene, direction: Array) -> Array:
    """Radiance (N, 3) of the sky along directions (N, 3)."""
    light = scene.light
    horizon, zenith = np.array(light.horizon), np.array(light.zenith)
    up = np.clip(direction[:, 2], 0, 1)
    clear = horizon + (zenith - light.horizon) * (1 - np.exp(-4.5 * up))[:, None]
    scale = 1 / (up + 0.12)
    offset = float(scene.bend[1])
    noise = _noise(direction[:, 0] * scale + offset, direction[:, 1] * scale, 0.012, 1.9)
    clouds = np.clip((noise - 1 + light.clouds) / 0.4, 0, 1) * np.clip(up * 9, 0, 1)
    radiance: Array = clear + (horizon * 1.18 - clear) * (0.75 * clouds)[:, None]
    return radiance


def _street_light(
    scene: Scene, view: View, points: Array, normal: Array, lit: Array
) -> Iterator[Array]:
    """Irradiance (N, 3) from each street lamp near the camera."""
    for lamp in scene.lamps:
        if -25 < (np.array(lamp) - view.position) @ view.rotation[:, 2] < 90:
            to_lamp = np.array(lamp) - points
            squared = (to_lamp**2).sum(1)
            distance = np.sqrt(squared + 0.01)
            cone = np.clip(to_lamp[:, 2] / distance - 0.1, 0, 1)
            cone = cone * np.clip((normal * to_lamp).sum(1) / distance, 0.12, 1)
            falloff = 22.0 * cone * (0.35 + 0.65 * lit) / (squared + 6)
            yield falloff[:, None] * np.array((1.0, 0.66, 0.30))


def _headlights(view: View, points: Array, normal: Array) -> Array:
    """Irradiance (N, 3) from the ego car's headlights."""
    beam = points - view.position + (0, 0, 0.8)
    distance = np.sqrt((beam**2).sum(1))
    cone = np.clip((beam @ view.rotation[:, 2]) / distance, 0, 1) ** 14
    facing = np.clip(-(normal * beam).sum(1) / distance, 0.08, 1)
    low = np.clip(1.6 - beam[:, 2] * 0.5, 0.05, 1)  # dipped
    falloff = 26.0 * cone * facing * low / (distance**2 + 25)
    return falloff[:, None] * np.array((1.0, 0.95, 0.82))


def _radiance(scene: Scene, view: View, direction: Array, distance: Array, hit: Array) -> Array:
    """Radiance (N, 3) that the camera receives along rays that hit something."""
    light = scene.light
    points = view.position + direction * distance[:, None]
    surface = surface_at(scene, hit, points)
    normal, gloss = surface.normal, surface.gloss[:, None]
    leafy = (hit >= 0) & (scene.primitives["texture"][hit] == LEAF)
    normal[leafy] = normal[leafy] * 0.7 + (0, 0, 0.3)  # leaves face all ways, mostly up

    lit = _shadow(scene, view.position + view.rotation[:, 2] * 32, points)
    facing = np.clip(normal @ scene.sun, 0, 1)
    facing[leafy] = 0.25 + 0.6 * facing[leafy]
    sky_share = (0.62 + 0.38 * normal[:, 2]) * (0.62 + 0.38 * lit)
    irradiance = sky_share[:, None] * np.array(light.ambient)
    irradiance = irradiance + (facing * lit)[:, None] * np.array(light.sun)
    if light.lamps:
        for lamp in _street_light(scene, view, points, normal, lit):
            irradiance += lamp
        irradiance += _headlights(view, points, normal)

    mirrored = direction - 2 * (direction * normal).sum(1, keepdims=True) * normal
    diffuse = surface.albedo * irradiance * (1 - gloss * 0.6)
    radiance = diffuse + gloss * _sky(scene, mirrored) + surface.emission
    clear = np.exp(-distance / light.haze)[:, None]
    seen: Array = radiance * clear + (1 - clear) * np.array(light.horizon)
    return seen


def photo(scene: Scene, view: View, rng: np.random.Generator) -> Image.Image:
    """The camera's image, RGB, WIDTH x HEIGHT pixels."""
    rays = camera_rays(view)
    distance, hit = (v.ravel() for v in cast(rays, scene))
    direction = np.stack([v.ravel() for v in rays.direction], 1)
    radiance = _sky(scene, direction)
    solid = np.isfinite(distance)
    struck = direction[solid], distance[solid], hit[solid]
    radiance[solid] = _radiance(scene, view, *struck)
    picture = radiance.reshape(HEIGHT, OVERSAMPLE, WIDTH, OVERSAMPLE, 3).mean((1, 3))

    light = scene.light
    if light.lamps:
        bright = Image.fromarray((np.clip(picture, 0, 1.5) * 170).astype(np.uint8))
        halo = np.asarray(bright.filter(ImageFilter.GaussianBlur(5))) / 170.0
        picture = picture + np.maximum(halo - 0.08, 0) * 0.5
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH]
    vignette = 1 - 0.28 * (((u - WIDTH / 2) / WIDTH) ** 2 + ((v - HEIGHT / 2) / HEIGHT) ** 2)
    exposed = 1 - np.exp(-light.exposure * picture * vignette[..., None])
    film = exposed ** (1 / 2.2)
    grey = 255 * (film - 0.06 * np.sin(2 * np.pi * film))  # more contrast
    grain = rng.standard_normal((HEIGHT, WIDTH, 3))
    grain = grain + 0.5 * rng.standard_normal((HEIGHT, WIDTH, 1))
    return Image.fromarray(np.clip(grey + light.grain * grain, 0, 255).astype(np.uint8))


# ---- the LiDAR's sweep ---------------------------------------------------------------------------


def sweep(scene: Scene, view: View, drop: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Points (N, 5) float32 (x, y, z in the LiDAR's frame, intensity 0-255, ring), labels (N,).

    drop: share of returns that are lost.
    """
    rays, local = lidar_rays(view)
    distance, hit = cast(rays, scene)
    # Column by column, as the sensor spins.
    distance, hit = distance.T.ravel(), hit.T.ravel()
    direction, own = (np.stack([v.T.ravel() for v in grid], 1) for grid in (rays.direction, local))
    ring = np.tile(np.arange(BEAMS, dtype=np.float32), COLUMNS)
    near = distance < MAX_RANGE
    distance, hit, direction, own, ring = (v[near] for v in (distance, hit, direction, own, ring))
    count = len(distance)

    surface = surface_at(scene, hit, view.position + direction * distance[:, None])
    label = surface.label
    incidence = np.abs((surface.normal * direction).sum(1)) ** 0.6
    speckle = rng.uniform(0.8, 1.2, count)
    echo = surface.reflect * (0.1 + 0.9 * incidence) * speckle
    keep = rng.random(count) > drop
    keep &= rng.random(count) < 1 - np.exp(-echo * (55.0 / distance) ** 2 * 3.0)
    # Grass scatters the beam, which is what tells a lawn from a pavement at the same height.
    spread = np.where(label == TERRAIN, 0.04, 0.015)
    distance = distance + rng.normal(0, 1, count) * spread
    intensity = np.floor(np.clip(echo * 110 * np.exp(-distance / 90), 1, 255))
    stray = rng.random(count) < 0.0008
    distance[stray] *= rng.uniform(0.3, 0.95, count)[stray]
    label[stray] = NOISE
    points = np.concatenate([own * distance[:, None], intensity[:, None], ring[:, None]], 1)
    return points[keep].astype(np.float32), label[keep]
