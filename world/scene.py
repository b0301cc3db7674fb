"""What stands where in the street world: cities, their light, and the street of one scene.

A scene is a street and a list of convex primitives. The street is a height field whose bands
(pavement, lawn) follow the distance to the kerb. A `City` says how a place is built and painted, a
`World` under which light it is seen. The four worlds form two scenarios: usa -> singapore (layout,
geometry and colours shift) and day -> night (mostly light shifts).

Lengths are in metres, angles in radians, colours linear RGB in 0..1. The x axis runs along the
street, z points up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from ftdpp.readers.base import Array

# Raw class names of nuScenes-lidarseg; the index in this list is the label.
CATEGORIES = [
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child",
    "human.pedestrian.construction_worker", "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer", "human.pedestrian.stroller", "human.pedestrian.wheelchair",
    "movable_object.barrier", "movable_object.debris", "movable_object.pushable_pullable",
    "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle",
    "vehicle.bus.bendy", "vehicle.bus.rigid", "vehicle.car", "vehicle.construction",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "vehicle.motorcycle",
    "vehicle.trailer", "vehicle.truck", "flat.driveable_surface", "flat.other", "flat.sidewalk",
    "flat.terrain", "static.manmade", "static.other", "static.vegetation", "vehicle.ego",
]  # fmt: skip
NOISE, ADULT, CHILD, BARRIER, CONE = 0, 2, 3, 9, 12
BICYCLE, BUS, CAR, MOTORCYCLE, TRUCK = 14, 16, 17, 21, 23
ROAD, SIDEWALK, TERRAIN, MANMADE, VEGETATION = 24, 26, 27, 28, 30

Vector = tuple[float, float, float]
RGB = tuple[float, float, float]
Pose = tuple[float, float, float, float]  # x, y, z, yaw

BOX, CYLINDER, ELLIPSOID = range(3)  # a box may have slanted sides; a cylinder stands upright
PLAIN, FACADE, GLASS, BANDS, LEAF, LAMP = range(6)
PRIMITIVE = np.dtype(
    [
        ("kind", "u1"),
        ("label", "u1"),
        ("texture", "u1"),
        ("center", "f4", 3),
        ("half", "f4", 3),  # half extents
        ("yaw", "f4"),
        ("taper", "f4", 2),  # how far the x and y sides lean inwards, per metre of height
        ("color", "f4", 3),
        ("reflect", "f4"),  # for the LiDAR, 0..1
        ("pattern", "f4"),  # varies the texture, see cast.object_albedo
    ]
)


@dataclass(frozen=True)
class City:
    """How a place is built and painted. Where several values are given, a scene draws one."""

    locations: tuple[str, ...]
    vehicle: str  # name of the recording car
    side: int  # +1: traffic keeps left (the ego car drives at positive y), -1: right
    mount: float  # added to the height of both sensors
    road: tuple[RGB, ...]
    sidewalk: tuple[RGB, ...]
    terrain: tuple[RGB, ...]
    leaves: tuple[RGB, ...]
    walls: tuple[RGB, ...]
    paint: tuple[RGB, ...]  # of vehicles
    centre_line: RGB
    kerb: tuple[RGB, RGB]  # alternating along the road
    # Variants of the bands from the kerb outwards: (label, range of widths, height, slope).
    bands: tuple[tuple[tuple[int, tuple[float, float], float, float], ...], ...]
    floors: tuple[int, int]
    empty_lots: float  # share of building sites
    glass: tuple[float, float]  # share of a facade that is window
    hip_roof: float  # probability for a low building
    palm: float  # share of trees
    tree_gap: tuple[float, float]
    crown: Vector  # radius, half height, height of the trunk below
    hedge: float  # probability that a hedge runs along a side of the street
    wall: float  # the same for a garden wall
    mix: tuple[float, ...]  # share of each of VEHICLES


@dataclass(frozen=True)
class Light:
    """Light and air of a world."""

    elevation: tuple[float, float]  # of the sun, degrees
    sun: RGB
    ambient: RGB
    zenith: RGB
    horizon: RGB
    haze: float  # distance at which 1/e of the light arrives
    clouds: float  # share of the sky
    exposure: float
    grain: float  # of the image, standard deviation in grey levels
    lamps: bool = False


@dataclass(frozen=True)
class World:
    """A domain: its scenes alternate between `cities`."""

    cities: tuple[str, ...]
    light: Light
    description: str  # of every scene; the reader looks for "night" in it
    lidar_drop: float  # share of LiDAR returns that are lost


VEHICLES = ("car", "pickup", "van", "truck", "bus", "motorcycle", "bicycle")

# Tables: related numbers share a line.
# fmt: off
CITIES = {
    "boston": City(
        locations=("boston-seaport",), vehicle="n008", side=-1, mount=-0.07,
        road=((0.27, 0.265, 0.26), (0.33, 0.32, 0.31)),
        sidewalk=((0.52, 0.49, 0.45), (0.46, 0.44, 0.42), (0.44, 0.30, 0.25)),
        terrain=((0.36, 0.35, 0.14), (0.26, 0.32, 0.12), (0.42, 0.36, 0.20)),
        leaves=((0.20, 0.27, 0.08), (0.27, 0.27, 0.07), (0.34, 0.22, 0.06)),
        walls=(
            (0.36, 0.15, 0.10), (0.42, 0.22, 0.15), (0.50, 0.40, 0.28),
            (0.33, 0.27, 0.22), (0.45, 0.42, 0.38),
        ),
        paint=(
            (0.75, 0.75, 0.75), (0.03, 0.03, 0.035), (0.35, 0.36, 0.38),
            (0.30, 0.03, 0.03), (0.05, 0.10, 0.25),
        ),
        centre_line=(0.70, 0.50, 0.08), kerb=((0.45, 0.44, 0.42), (0.42, 0.41, 0.40)),
        bands=(
            ((SIDEWALK, (3.0, 4.2), 0.16, 0.0), (TERRAIN, (4.0, 8.0), 0.18, 0.01)),
            ((TERRAIN, (2.0, 3.4), 0.15, 0.0), (SIDEWALK, (2.6, 3.6), 0.16, 0.0),
             (TERRAIN, (4.0, 8.0), 0.18, 0.02)),
            ((TERRAIN, (2.6, 4.0), 0.14, 0.0), (SIDEWALK, (2.0, 3.0), 0.16, 0.0),
             (TERRAIN, (2.0, 5.0), 0.18, 0.02)),
            ((SIDEWALK, (4.0, 6.0), 0.16, 0.0), (TERRAIN, (2.5, 4.0), 0.16, 0.0)),
        ),
        floors=(2, 6), empty_lots=0.08, glass=(0.35, 0.55), hip_roof=0.45,
        palm=0.0, tree_gap=(9.0, 18.0), crown=(2.3, 2.2, 2.4), hedge=0.15, wall=0.35,
        mix=(0.52, 0.20, 0.12, 0.08, 0.04, 0.01, 0.03),
    ),
    "singapore": City(
        locations=("singapore-onenorth", "singapore-queenstown", "singapore-hollandvillage"),
        vehicle="n015", side=1, mount=0.06,
        road=((0.10, 0.105, 0.115), (0.14, 0.14, 0.15)),
        sidewalk=((0.28, 0.27, 0.26), (0.33, 0.33, 0.33), (0.34, 0.24, 0.20)),
        terrain=((0.08, 0.20, 0.05), (0.12, 0.24, 0.06), (0.32, 0.17, 0.10)),
        leaves=((0.05, 0.14, 0.035), (0.07, 0.18, 0.04), (0.11, 0.20, 0.05)),
        walls=(
            (0.72, 0.72, 0.70), (0.62, 0.68, 0.70), (0.70, 0.62, 0.48),
            (0.60, 0.70, 0.62), (0.45, 0.47, 0.50),
        ),
        paint=(
            (0.70, 0.70, 0.72), (0.04, 0.12, 0.45), (0.55, 0.40, 0.03),
            (0.10, 0.11, 0.12), (0.45, 0.04, 0.05),
        ),
        centre_line=(0.62, 0.62, 0.60), kerb=((0.60, 0.60, 0.58), (0.10, 0.10, 0.10)),
        bands=(
            ((TERRAIN, (1.6, 2.6), 0.21, 0.03), (SIDEWALK, (2.2, 3.0), 0.18, 0.0),
             (TERRAIN, (5.0, 9.0), 0.26, 0.07)),
            ((SIDEWALK, (2.2, 3.4), 0.13, 0.0), (TERRAIN, (5.0, 9.0), 0.18, 0.09)),
            ((TERRAIN, (2.4, 3.6), 0.26, 0.02), (SIDEWALK, (2.0, 3.0), 0.18, 0.0),
             (TERRAIN, (3.0, 6.0), 0.24, 0.08)),
            ((SIDEWALK, (2.4, 3.6), 0.14, 0.0), (TERRAIN, (2.0, 3.0), 0.28, 0.05),
             (SIDEWALK, (2.4, 3.4), 0.16, 0.0)),
        ),
        floors=(4, 16), empty_lots=0.25, glass=(0.5, 0.95), hip_roof=0.1,
        palm=0.25, tree_gap=(6.0, 12.0), crown=(3.6, 1.7, 3.6), hedge=0.45, wall=0.12,
        mix=(0.48, 0.0, 0.16, 0.10, 0.10, 0.14, 0.02),
    ),
}

LIGHTS = {
    "temperate": Light(
        elevation=(28, 48), sun=(1.30, 1.12, 0.86), ambient=(0.22, 0.27, 0.36),
        zenith=(0.10, 0.24, 0.58), horizon=(0.50, 0.62, 0.74), haze=520, clouds=0.40,
        exposure=1.5, grain=1.6,
    ),
    "tropical": Light(
        elevation=(50, 72), sun=(0.92, 0.90, 0.84), ambient=(0.34, 0.36, 0.38),
        zenith=(0.36, 0.47, 0.62), horizon=(0.68, 0.71, 0.73), haze=300, clouds=0.70,
        exposure=1.45, grain=2.0,
    ),
    "mixed": Light(
        elevation=(32, 62), sun=(1.15, 1.04, 0.88), ambient=(0.27, 0.31, 0.37),
        zenith=(0.20, 0.35, 0.62), horizon=(0.58, 0.66, 0.73), haze=400, clouds=0.55,
        exposure=1.45, grain=1.8,
    ),
    "night": Light(
        elevation=(60, 80), sun=(0.0, 0.0, 0.0), ambient=(0.070, 0.067, 0.078),
        zenith=(0.008, 0.009, 0.016), horizon=(0.040, 0.030, 0.024), haze=320, clouds=0.50,
        exposure=4.2, grain=4.0, lamps=True,
    ),
}

WORLDS = {
    "usa": World(
        ("boston",), LIGHTS["temperate"], "Parked cars, pedestrians on sidewalk, turn", 0.03
    ),
    "singapore": World(
        ("singapore",), LIGHTS["tropical"], "Wait, motorcycles, bus, dense vegetation", 0.06
    ),
    "day": World(
        ("boston", "singapore"), LIGHTS["mixed"], "Arrive at intersection, parked cars, peds", 0.04
    ),
    "night": World(
        ("singapore",), LIGHTS["night"], "Night, street lamps, parked cars, peds", 0.09
    ),
}
# fmt: on

PROFILE_CELLS, CELLS_PER_METRE = 2500, 50  # of the street's cross-section


@dataclass
class Scene:
    """One street with everything on it.

    profile_height, profile_label: (2, PROFILE_CELLS), the cross-section of each side beyond the
    kerb. Cell 0 is the road; side 1 lies at positive y.
    """

    city: City
    light: Light
    bend: tuple[float, float]  # the centre line is bend[0] * sin(x / bend[1])
    cross: float  # x of the crossing street's centre; far away where there is none
    cross_half: float  # half its width
    half: float  # half the width of the road
    lane: float
    lanes: int  # in each direction
    speed: float  # of the traffic and of the ego car, m/s
    reach: tuple[float, float]  # first and last x that is built
    profile_height: Array
    profile_label: Array
    walk: list[tuple[float, float]]  # per side: where the pavement begins and ends beyond the kerb
    setback: list[float]  # per side: where the buildings may begin
    colors: dict[int, RGB]  # of the ground, by label
    sun: Array  # (3,) unit vector towards it
    rows: list[tuple[Any, ...]] = field(default_factory=list)  # of PRIMITIVE
    lamps: list[Vector] = field(default_factory=list)  # positions of street lamps

    @cached_property
    def primitives(self) -> Array:
        """All that was added, (P,) of PRIMITIVE."""
        return np.array(self.rows, PRIMITIVE)

    def centre(self, x: Array | float) -> Any:
        """The y of the centre line."""
        return self.bend[0] * np.sin(np.asarray(x) / self.bend[1])

    def heading(self, x: float) -> float:
        """The yaw of the centre line."""
        return math.atan(self.bend[0] / self.bend[1] * math.cos(x / self.bend[1]))

    def ground(self, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        """Height, label, distance from the centre line, distance beyond the kerb; like x and y."""
        across = y - self.centre(x)
        to_kerb = np.abs(across) - self.half
        beyond = np.minimum(to_kerb, np.abs(x - self.cross) - self.cross_half)
        cell = np.clip(beyond * CELLS_PER_METRE + 1, 0, PROFILE_CELLS - 1).astype(np.int32)
        side = (across > 0).astype(np.int32)
        return self.profile_height[side, cell], self.profile_label[side, cell], across, beyond

    def site(self, x: float, across: float, turn: float = 0.0) -> Pose:
        """The base of something that stands at `x`, `across` from the centre line."""
        y = float(self.centre(x)) + across
        z = float(self.ground(np.array([x]), np.array([y]))[0][0])
        return x, y, z, self.heading(x) + turn

    def is_clear(self, x: float, margin: float) -> bool:
        """Whether `x` keeps a margin from the crossing street."""
        return abs(x - self.cross) > self.cross_half + margin

    def add(
        self,
        base: Pose,
        kind: int,
        label: int,
        offset: Vector,
        half: Vector,
        color: RGB,
        texture: int = PLAIN,
        taper: tuple[float, float] = (0.0, 0.0),
        reflect: float = 0.3,
        pattern: float = 0.0,
    ) -> None:
        """Adds a primitive whose centre is at `offset` in the frame of `base`."""
        cos, sin = math.cos(base[3]), math.sin(base[3])
        center = (
            base[0] + cos * offset[0] - sin * offset[1],
            base[1] + sin * offset[0] + cos * offset[1],
            base[2] + offset[2],
        )
        self.rows.append(
            (kind, label, texture, center, half, base[3], taper, color, reflect, pattern)
        )

    def add_leaves(
        self, base: Pose, kind: int, offset: Vector, half: Vector, color: RGB, pattern: float
    ) -> None:
        self.add(base, kind, VEGETATION, offset, half, color, LEAF, reflect=0.5, pattern=pattern)


def _pick(rng: np.random.Generator, colors: tuple[RGB, ...], spread: float = 0.12) -> RGB:
    """One of the colours, brighter or darker by up to `spread`."""
    color = np.array(colors[rng.integers(len(colors))]) * rng.uniform(1 - spread, 1 + spread)
    return float(color[0]), float(color[1]), float(color[2])


def _along(
    rng: np.random.Generator, reach: tuple[float, float], gap: tuple[float, float]
) -> Iterator[float]:
    """Positions along the street, with random gaps."""
    x = reach[0] + rng.uniform(*gap) * rng.random()
    while x < reach[1]:
        yield x
        x += rng.uniform(*gap)


TYRE = (0.02, 0.02, 0.02)
# Half length, half width, label.
_BODIES = {
    "car": (2.25, 0.9, CAR),
    "pickup": (2.75, 1.0, TRUCK),
    "van": (2.4, 0.98, CAR),
    "truck": (4.2, 1.2, TRUCK),
    "bus": (5.6, 1.25, BUS),
}


def _vehicle(scene: Scene, base: Pose, rng: np.random.Generator) -> None:
    kind = VEHICLES[int(rng.choice(len(VEHICLES), p=scene.city.mix))]
    color = _pick(rng, scene.city.paint)
    scale = rng.uniform(0.94, 1.06)
    if kind not in _BODIES:
        _two_wheeler(scene, base, kind == "motorcycle", color, rng)
        return
    length, width, label = _BODIES[kind]
    length *= scale
    box = partial(scene.add, base, BOX, label)
    if kind == "car":
        cabin = (0.64 * length, 0.92 * width, 0.28)
        box((0, 0, 0.61), (length, width, 0.33), color, taper=(0.16, 0.10))
        box((-0.15, 0, 1.19), cabin, color, GLASS, (0.85, 0.30))
    elif kind == "pickup":
        cabin = (1.15, 0.92 * width, 0.38)
        box((0, 0, 0.75), (length, width, 0.36), color, taper=(0.05, 0.06))
        box((0.25, 0, 1.48), cabin, color, GLASS, (0.45, 0.2))
    elif kind == "van":
        cabin = (0.84 * length, 0.95 * width, 0.36)
        box((0, 0, 0.7), (length, width, 0.42), color, taper=(0.10, 0.05))
        box((-0.25, 0, 1.47), cabin, color, GLASS, (0.4, 0.15))
    elif kind == "truck":
        load = (0.62, 0.62, 0.60) if scale > 1 else color
        box((length - 0.9, 0, 1.3), (0.85, 1.05, 0.9), color, GLASS, (0.15, 0.03))
        box((-0.9, 0, 1.9), (length - 1.1, width, 1.3), load)
        box((0, 0, 0.5), (length, 0.9, 0.15), TYRE)
    else:
        double_decker = scene.city.side > 0 and scale > 1
        tall = 2.05 if double_decker else 1.45
        size = (length, width, tall)
        box((0, 0, tall + 0.35), size, color, BANDS, (0.02, 0.02), pattern=tall)
    heavy = kind in ("truck", "bus")
    radius, lamp_height = (0.48, 0.95) if heavy else (0.33, 0.75)
    wheel = (radius, 0.14, radius)
    for side in (-1, 1):
        for axle in (-0.62 * length, 0.62 * length):
            hub = (axle, side * (width - 0.08), radius)
            scene.add(base, ELLIPSOID, label, hub, wheel, TYRE, reflect=0.1)
        y = side * 0.72 * width
        rear, front = (0.05, 0.16, 0.09), (0.05, 0.15, 0.08)
        box((-length, y, lamp_height), rear, (0.55, 0.02, 0.02), LAMP, reflect=0.9)
        box((length, y, lamp_height - 0.05), front, (0.9, 0.9, 0.8), LAMP, reflect=0.9)
    plate = (0.7, 0.7, 0.65) if kind == "car" else (0.05, 0.06, 0.07)
    box((-length, 0, 0.5), (0.03, 0.26, 0.06), plate, reflect=0.9)


def _two_wheeler(
    scene: Scene, base: Pose, motor: bool, color: RGB, rng: np.random.Generator
) -> None:
    """A motorcycle or a bicycle, and who rides it."""
    ball = partial(scene.add, base, ELLIPSOID, MOTORCYCLE if motor else BICYCLE)
    for axle in (-0.6, 0.6):
        ball((axle, 0, 0.31), (0.31, 0.07, 0.31), TYRE, reflect=0.1)
    ball((0, 0, 0.6), (0.6, 0.16 if motor else 0.05, 0.22), color)
    ball((-0.15, 0, 1.12), (0.22, 0.25, 0.42), _pick(rng, scene.city.paint, 0.4))
    helmet, hair = (0.6, 0.6, 0.6), (0.35, 0.2, 0.14)
    ball((-0.08, 0, 1.62), (0.15, 0.14, 0.16), helmet if motor else hair)


def _person(scene: Scene, base: Pose, rng: np.random.Generator) -> None:
    if rng.random() < 0.12:
        label, scale = CHILD, 0.7
    else:
        label, scale = ADULT, rng.uniform(0.93, 1.06)
    red, green, blue = rng.uniform(0.04, 0.6, 3)
    legs = (0.11, 0.15, 0.42 * scale)
    body = (0.16, 0.24, 0.36 * scale)
    scene.add(base, BOX, label, (0, 0, 0.42 * scale), legs, (0.05, 0.06, 0.10))
    scene.add(base, ELLIPSOID, label, (0, 0, 1.13 * scale), body, (red, green, blue))
    head = (0.11, 0.10, 0.14)
    scene.add(base, ELLIPSOID, label, (0, 0, 1.62 * scale), head, (0.36, 0.22, 0.16))


def _tree(scene: Scene, base: Pose, rng: np.random.Generator) -> None:
    radius, half_height, trunk = (size * rng.uniform(0.8, 1.25) for size in scene.city.crown)
    leaf = _pick(rng, scene.city.leaves, 0.2)
    stem = partial(scene.add, base, CYLINDER, VEGETATION, reflect=0.25)
    if rng.random() < scene.city.palm:
        trunk = rng.uniform(4.5, 7.0)
        stem((0, 0, trunk / 2), (0.14, 0.14, trunk / 2), (0.24, 0.21, 0.17))
        for turn in np.arange(5) * 1.257 + trunk:
            frond = (*base[:3], base[3] + turn)
            scene.add_leaves(frond, ELLIPSOID, (1, 0, trunk + 0.1), (1.2, 0.35, 0.45), leaf, turn)
        return
    middle = (trunk + half_height) / 2
    stem((0, 0, middle), (0.17, 0.17, middle), (0.13, 0.10, 0.075))
    for _ in range(4):
        dx, dy = rng.uniform(-0.5, 0.5, 2) * radius
        scale = rng.uniform(0.6, 0.85)
        size = (radius * scale, radius * scale, half_height * scale)
        height = trunk + half_height * rng.uniform(0.7, 1.25)
        scene.add_leaves(base, ELLIPSOID, (dx, dy, height), size, leaf, rng.random() * 60)


def _buildings(scene: Scene, side: int, rng: np.random.Generator) -> None:
    """Two rows of buildings, one behind the other."""
    city, sign = scene.city, 2 * side - 1
    for row in (0, 1):
        for x in _along(rng, scene.reach, (16, 26)):
            width, depth = rng.uniform(5.5, 11), rng.uniform(6, 11)
            floors = rng.integers(*city.floors, endpoint=True)
            tall = float(floors * 1.6 * (1 + row * 0.5))  # half the height
            color = _pick(rng, city.walls)
            glass = rng.uniform(*city.glass)
            style = float(rng.integers(1, 90))
            edge = scene.half + scene.setback[side]
            base = scene.site(x, sign * (edge + rng.uniform(0.3, 2.5) + depth + row * 28))
            roof, podium, awning, empty = rng.random(4)
            if not scene.is_clear(x, width + 3) or empty < city.empty_lots:
                continue
            box = partial(scene.add, base, BOX, MANMADE)
            size = (width, depth, tall + 0.5)
            box((0, 0, tall - 0.5), size, color, FACADE, reflect=0.35, pattern=style + glass)
            if roof < city.hip_roof and tall < 7:
                size = (width + 0.4, depth + 0.4, 1.6)
                box((0, 0, 2 * tall + 1.6), size, (0.16, 0.10, 0.08), taper=(1.8, 1.8))
            elif podium < 0.35:
                size = (width + 1.2, depth + 1.2, 2.2)
                box((0, 0, 2), size, _pick(rng, city.walls), FACADE, pattern=style + 7)
            if awning < 0.4:
                size = (width * 0.7, 0.8, 0.12)
                box((0, -sign * (depth + 0.7), 3), size, _pick(rng, city.paint))


def _greenery(scene: Scene, side: int, rng: np.random.Generator) -> None:
    """Trees, bushes and the hedge or wall behind the pavement."""
    city, sign = scene.city, 2 * side - 1
    walk, setback = scene.walk[side], scene.setback[side]
    verge = scene.half + (0.9 if walk[0] < 0.5 else walk[0] * 0.5)
    for x in _along(rng, scene.reach, city.tree_gap):
        if scene.is_clear(x, 4) and rng.random() < 0.85:
            _tree(scene, scene.site(x, sign * (verge + rng.uniform(-0.1, 0.3))), rng)
    for x in _along(rng, scene.reach, (8, 16)):
        if scene.is_clear(x, 6) and setback > walk[1] + 1:
            beyond = rng.uniform(walk[1] + 0.8, setback + 1.5)
            _tree(scene, scene.site(x, sign * (scene.half + beyond)), rng)
    hedge, wall = rng.random() < city.hedge, rng.random() < city.wall
    for x in _along(rng, scene.reach, (8.2, 9.5)):
        height, chance = rng.uniform(0.35, 0.7), rng.random()
        if (hedge or wall) and chance < 0.8 and scene.is_clear(x, 7):
            base = scene.site(x, sign * (scene.half + walk[1] + 0.5))
            if hedge:
                size, color = (4.0, 0.4, height), _pick(rng, city.leaves)
                scene.add_leaves(base, BOX, (0, 0, height), size, color, height * 30)
            else:
                size, color = (4.0, 0.14, height), _pick(rng, city.walls)
                scene.add(base, BOX, MANMADE, (0, 0, height), size, color, reflect=0.4)
    for x in _along(rng, scene.reach, (5, 16)):
        if scene.is_clear(x, 3) and rng.random() < 0.6:
            radius = rng.uniform(0.35, 0.8)
            base = scene.site(x, sign * (scene.half + setback - rng.uniform(0.2, 0.9)))
            size, color = (radius * 1.2, radius, radius), _pick(rng, city.leaves)
            scene.add_leaves(base, ELLIPSOID, (0, 0, radius * 0.7), size, color, radius * 40)


def _furniture(scene: Scene, side: int, rng: np.random.Generator) -> None:
    """Street lamps, signs, bus stops and boxes; and the people on the pavement."""
    sign, walk = 2 * side - 1, scene.walk[side]
    for x in _along(rng, scene.reach, (24, 30)):
        if scene.is_clear(x, 1):
            _street_lamp(scene, scene.site(x, sign * (scene.half + 0.45)), sign)
    for x in _along(rng, scene.reach, (14, 40)):
        what = rng.random()
        if not scene.is_clear(x, 1):
            continue
        kerbside = scene.site(x, sign * (scene.half + 0.5))
        if what < 0.5:
            plates = ((0.45, 0.03, 0.03), (0.03, 0.12, 0.42), (0.5, 0.5, 0.48), (0.55, 0.36, 0.03))
            plate, post = _pick(rng, plates), (0.045, 0.045, 1.25)
            grey = (0.35, 0.35, 0.35)
            scene.add(kerbside, CYLINDER, MANMADE, (0, 0, 1.25), post, grey, reflect=0.5)
            size = (0.03, 0.34, 0.34)
            scene.add(kerbside, BOX, MANMADE, (0, 0, 2.4), size, plate, reflect=0.95)
        elif what < 0.7:
            stop = scene.site(x, sign * (scene.half + max(walk[1] - 0.9, 1.3)))
            box = partial(scene.add, stop, BOX, MANMADE)
            box((0, 0, 2.45), (2.4, 0.8, 0.09), (0.12, 0.25, 0.22))
            box((0, sign * 0.7, 1.2), (2.3, 0.04, 1.1), (0.30, 0.38, 0.40), reflect=0.2)
            box((2.3, 0, 1.2), (0.05, 0.6, 1.1), _pick(rng, scene.city.paint))
        else:
            size, green = (0.3, 0.25, 0.55), (0.10, 0.22, 0.12)
            scene.add(kerbside, BOX, MANMADE, (0, 0, 0.55), size, green)
    for x in _along(rng, scene.reach, (6, 15)):
        across = sign * (scene.half + rng.uniform(*walk))
        _person(scene, scene.site(x, across, rng.uniform(-3, 3)), rng)


def _street_lamp(scene: Scene, base: Pose, sign: int) -> None:
    """A pole with an arm over the road."""
    grey = (0.22, 0.23, 0.24)
    scene.add(base, CYLINDER, MANMADE, (0, 0, 3.6), (0.09, 0.09, 3.6), grey, reflect=0.5)
    scene.add(base, BOX, MANMADE, (0, -sign * 1.1, 7.2), (0.06, 1.2, 0.05), grey)
    size, white = (0.13, 0.35, 0.06), (0.9, 0.8, 0.6)
    scene.add(base, BOX, MANMADE, (0, -sign * 2.2, 7.12), size, white, LAMP)
    scene.lamps.append((base[0], base[1] - sign * 2.2, base[2] + 6.9))


def _crossing(scene: Scene, rng: np.random.Generator) -> None:
    """Traffic lights, a car waiting on each side and people who cross."""
    for sign in (-1, 1):
        x = scene.cross - sign * (scene.cross_half + 0.8)
        base = scene.site(x, sign * (scene.half + 0.8))
        pole, black = (0.07, 0.07, 2.6), (0.10, 0.10, 0.10)
        scene.add(base, CYLINDER, MANMADE, (0, 0, 2.6), pole, black, reflect=0.4)
        scene.add(base, BOX, MANMADE, (0, 0, 4.7), (0.16, 0.18, 0.5), (0.05, 0.05, 0.04))
        lens, green = (0.03, 0.1, 0.1), (0.05, 0.7, 0.25)
        scene.add(base, BOX, MANMADE, (-sign * 0.16, 0, 4.4), lens, green, LAMP)
        y = float(scene.centre(scene.cross)) + sign * (scene.half + rng.uniform(4, 9))
        _vehicle(scene, (scene.cross + sign * scene.lane / 2, y, 0.0, math.pi / 2), rng)
        across = rng.uniform(-scene.half, scene.half)
        _person(scene, scene.site(scene.cross - scene.cross_half - 1.5, across), rng)


def _roadworks(scene: Scene, rng: np.random.Generator) -> None:
    """A row of cones or of barriers along the kerb."""
    sign = scene.city.side * (2 * scene.lanes - 3)
    start, cones = rng.uniform(8, 40), rng.random() < 0.5
    for k in range(7):
        base = scene.site(start + k * 2.4, sign * (scene.half - 0.35))
        if cones:
            size, orange = (0.19, 0.19, 0.37), (0.75, 0.16, 0.02)
            scene.add(base, BOX, CONE, (0, 0, 0.37), size, orange, taper=(0.23, 0.23), reflect=0.7)
        else:
            size, color = (1.1, 0.2, 0.45), ((0.7, 0.7, 0.68), (0.65, 0.15, 0.04))[k % 2]
            scene.add(base, BOX, BARRIER, (0, 0, 0.45), size, color, taper=(0, 0.12))


def _traffic(scene: Scene, parking: bool, time: float, rng: np.random.Generator) -> None:
    """Parked cars, then moving ones lane by lane."""
    keep_side = scene.city.side
    for sign in (-1, 1) if parking else ():
        for x in _along(rng, scene.reach, (8, 24)):
            if scene.is_clear(x, 9) and rng.random() < 0.8:
                turn = 0.0 if sign == keep_side else math.pi
                _vehicle(scene, scene.site(x, sign * (scene.half - 1.15), turn), rng)
    for direction in (1, -1):
        for lane in range(scene.lanes):
            # The first car of the ego lane keeps its distance; behind the ego car that lane is
            # empty.
            ego_lane = direction == 1 and lane == 0
            x = rng.uniform(15, 42) if ego_lane else rng.uniform(-50, -30)
            while x < scene.reach[1]:
                middle = direction * keep_side * scene.lane * (lane + 0.5)
                across = middle + rng.uniform(-0.2, 0.2)
                turn = 0.0 if direction == 1 else math.pi
                base = scene.site(x + direction * scene.speed * time, across, turn)
                _vehicle(scene, base, rng)
                x += rng.uniform(18, 48)


def build_scene(world: str, city: str, key: tuple[int, ...], travel: float, time: float) -> Scene:
    """The street of one scene at one moment.

    world, city: names in WORLDS and CITIES. key: the scene's random key. travel: metres that the
    ego car covers in the whole scene; the street is built as far as it will see. time: seconds
    since the scene's start; moves the traffic.
    """
    style, light = CITIES[city], WORLDS[world].light
    rng = np.random.default_rng(key)
    lanes = int(rng.choice([1, 1, 1, 2]))
    parking = rng.random() < 0.33
    lane = rng.uniform(3, 3.4)
    crossing = rng.random() < 0.45
    azimuth = rng.uniform(-math.pi, math.pi)
    elevation = math.radians(rng.uniform(*light.elevation))
    flat = math.cos(elevation)
    sun = (math.cos(azimuth) * flat, math.sin(azimuth) * flat, math.sin(elevation))

    height = np.zeros((2, PROFILE_CELLS), np.float32)
    label = np.full((2, PROFILE_CELLS), ROAD, np.uint8)
    setback, walk = [0.0, 0.0], [(0.0, 0.0), (0.0, 0.0)]
    for side in (0, 1):
        edge = 0.0
        for band, widths, level, slope in style.bands[rng.integers(len(style.bands))]:
            start, edge = edge, float(edge + rng.uniform(*widths))
            cell = 1 + round(start * CELLS_PER_METRE)
            rise = np.minimum(np.arange(PROFILE_CELLS - cell) / CELLS_PER_METRE, 6.0) * slope
            height[side, cell:] = level + rise
            label[side, cell:] = band
            if band == SIDEWALK:
                walk[side] = (start, edge)
        kerb_stone = label[side, 1:10]
        kerb_stone[kerb_stone == TERRAIN] = SIDEWALK
        setback[side] = edge

    scene = Scene(
        city=style,
        light=light,
        bend=(rng.uniform(-5, 5), rng.uniform(45, 90)),
        cross=rng.uniform(18, 55) if crossing else 1e6,
        cross_half=lane + 1.5,
        half=lanes * lane + (2.3 if parking else 0.0),
        lane=lane,
        lanes=lanes,
        speed=rng.uniform(6, 10),
        reach=(-75.0, travel + 115.0),
        profile_height=height,
        profile_label=label,
        walk=walk,
        setback=setback,
        colors={
            ROAD: _pick(rng, style.road),
            SIDEWALK: _pick(rng, style.sidewalk),
            TERRAIN: _pick(rng, style.terrain),
        },
        sun=np.array(sun),
    )
    for side in (0, 1):
        _buildings(scene, side, rng)
        _greenery(scene, side, rng)
        _furniture(scene, side, rng)
    if crossing:
        _crossing(scene, rng)
    if rng.random() < 0.6:
        _roadworks(scene, rng)
    _traffic(scene, parking, time, rng)
    return scene
