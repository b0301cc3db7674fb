"""The embedded data set: a procedural street world, ray cast into LiDAR sweeps, front-camera images and labels.

It is written in the nuScenes layout on disk, so that the reader of the real data set reads it too. A scene is a street
(a height field whose bands follow the distance to the kerb) and a list of convex primitives. LiDAR, camera and shadow
map are three grids of rays through the same caster, so what a point hits and what its pixel shows agree.

A `City` says how a place is built and painted, a `World` under which light it is seen: the four worlds form the two
scenarios usa -> singapore (layout, geometry and colours shift) and day -> night (mostly light shifts).
"""

import difflib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

VERSION = 1
DEFAULT_FRAMES = {"source": 160, "target": 120, "val": 24, "test": 48}
FRAMES_PER_SCENE = 4
WIDTH, HEIGHT = 400, 225
BEAMS, COLUMNS, MAX_RANGE = 32, 1090, 80.0

CATEGORIES = [
    "noise", "animal", "human.pedestrian.adult", "human.pedestrian.child", "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility", "human.pedestrian.police_officer", "human.pedestrian.stroller",
    "human.pedestrian.wheelchair", "movable_object.barrier", "movable_object.debris",
    "movable_object.pushable_pullable", "movable_object.trafficcone", "static_object.bicycle_rack", "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid", "vehicle.car", "vehicle.construction", "vehicle.emergency.ambulance",
    "vehicle.emergency.police", "vehicle.motorcycle", "vehicle.trailer", "vehicle.truck", "flat.driveable_surface",
    "flat.other", "flat.sidewalk", "flat.terrain", "static.manmade", "static.other", "static.vegetation", "vehicle.ego",
]  # fmt: skip
NOISE, ADULT, CHILD, BARRIER, CONE, BICYCLE, BUS, CAR = 0, 2, 3, 9, 12, 14, 16, 17
MOTORCYCLE, TRUCK, ROAD, SIDEWALK, TERRAIN, MANMADE, VEGETATION = 21, 23, 24, 26, 27, 28, 30

Array = npt.NDArray[Any]
RGB = tuple[float, float, float]
Pose = tuple[float, float, float, float]  # x, y, z, yaw

BOX, ROUND, BALL = range(3)  # box (with slanted sides), vertical cylinder, ellipsoid
PLAIN, FACADE, GLASS, BANDS, LEAF, LAMP = range(6)
PRIM = np.dtype([
    ("kind", "u1"), ("label", "u1"), ("texture", "u1"), ("center", "f4", 3), ("half", "f4", 3), ("yaw", "f4"),
    ("taper", "f4", 2), ("color", "f4", 3), ("reflect", "f4"), ("seed", "f4"),
])  # fmt: skip


@dataclass(frozen=True)
class City:
    """How a place is built and painted. Lengths in metres, colours as linear RGB in 0..1."""

    locations: tuple[str, ...]
    vehicle: str
    side: int  # +1: traffic keeps left (the ego car drives at positive y), -1: right
    mount: float  # added to the height of both sensors
    road: tuple[RGB, ...]
    sidewalk: tuple[RGB, ...]
    terrain: tuple[RGB, ...]
    leaves: tuple[RGB, ...]
    walls: tuple[RGB, ...]
    paint: tuple[RGB, ...]  # vehicles
    centre_line: RGB
    kerb: tuple[RGB, RGB]  # alternating along the road
    # Bands from the kerb outwards, several variants: (label, width range, height, slope).
    bands: tuple[tuple[tuple[int, tuple[float, float], float, float], ...], ...]
    floors: tuple[int, int]
    building_gap: float  # share of empty lots
    glass: tuple[float, float]  # share of a facade that is window
    hip_roof: float  # probabilities per site
    palm: float
    tree_gap: tuple[float, float]
    crown: tuple[float, float, float]  # radius, half height, clear trunk
    hedge: float
    wall: float
    mix: tuple[float, ...]  # car, pickup, van, truck, bus, motorcycle, bicycle


@dataclass(frozen=True)
class Light:
    """Light and air of a world: linear RGB, the sun's elevation in degrees, haze as a distance in metres."""

    elevation: tuple[float, float]
    sun: RGB
    ambient: RGB
    zenith: RGB
    horizon: RGB
    haze: float
    clouds: float
    exposure: float
    sensor_noise: float
    lamps: bool = False


@dataclass(frozen=True)
class World:
    """A domain: scenes alternate between `cities`; readers look for "night" in the scene's `description`."""

    cities: tuple[str, ...]
    light: Light
    description: str
    lidar_drop: float


CITIES = {
    "boston": City(
        locations=("boston-seaport",), vehicle="n008", side=-1, mount=-0.07,
        road=((0.27, 0.265, 0.26), (0.33, 0.32, 0.31)),
        sidewalk=((0.52, 0.49, 0.45), (0.46, 0.44, 0.42), (0.44, 0.30, 0.25)),
        terrain=((0.36, 0.35, 0.14), (0.26, 0.32, 0.12), (0.42, 0.36, 0.20)),
        leaves=((0.20, 0.27, 0.08), (0.27, 0.27, 0.07), (0.34, 0.22, 0.06)),
        walls=((0.36, 0.15, 0.10), (0.42, 0.22, 0.15), (0.50, 0.40, 0.28), (0.33, 0.27, 0.22), (0.45, 0.42, 0.38)),
        paint=((0.75, 0.75, 0.75), (0.03, 0.03, 0.035), (0.35, 0.36, 0.38), (0.30, 0.03, 0.03), (0.05, 0.10, 0.25)),
        centre_line=(0.70, 0.50, 0.08), kerb=((0.45, 0.44, 0.42), (0.42, 0.41, 0.40)),
        bands=(
            ((SIDEWALK, (3.0, 4.2), 0.16, 0.0), (TERRAIN, (4.0, 8.0), 0.18, 0.01)),
            ((TERRAIN, (2.0, 3.4), 0.15, 0.0), (SIDEWALK, (2.6, 3.6), 0.16, 0.0), (TERRAIN, (4.0, 8.0), 0.18, 0.02)),
            ((TERRAIN, (2.6, 4.0), 0.14, 0.0), (SIDEWALK, (2.0, 3.0), 0.16, 0.0), (TERRAIN, (2.0, 5.0), 0.18, 0.02)),
            ((SIDEWALK, (4.0, 6.0), 0.16, 0.0), (TERRAIN, (2.5, 4.0), 0.16, 0.0)),
        ),
        floors=(2, 6), building_gap=0.08, glass=(0.35, 0.55), hip_roof=0.45, palm=0.0, tree_gap=(9.0, 18.0),
        crown=(2.3, 2.2, 2.4), hedge=0.15, wall=0.35, mix=(0.52, 0.20, 0.12, 0.08, 0.04, 0.01, 0.03),
    ),
    "singapore": City(
        locations=("singapore-onenorth", "singapore-queenstown", "singapore-hollandvillage"), vehicle="n015", side=1,
        mount=0.06,
        road=((0.10, 0.105, 0.115), (0.14, 0.14, 0.15)),
        sidewalk=((0.28, 0.27, 0.26), (0.33, 0.33, 0.33), (0.34, 0.24, 0.20)),
        terrain=((0.08, 0.20, 0.05), (0.12, 0.24, 0.06), (0.32, 0.17, 0.10)),
        leaves=((0.05, 0.14, 0.035), (0.07, 0.18, 0.04), (0.11, 0.20, 0.05)),
        walls=((0.72, 0.72, 0.70), (0.62, 0.68, 0.70), (0.70, 0.62, 0.48), (0.60, 0.70, 0.62), (0.45, 0.47, 0.50)),
        paint=((0.70, 0.70, 0.72), (0.04, 0.12, 0.45), (0.55, 0.40, 0.03), (0.10, 0.11, 0.12), (0.45, 0.04, 0.05)),
        centre_line=(0.62, 0.62, 0.60), kerb=((0.60, 0.60, 0.58), (0.10, 0.10, 0.10)),
        bands=(
            ((TERRAIN, (1.6, 2.6), 0.21, 0.03), (SIDEWALK, (2.2, 3.0), 0.18, 0.0), (TERRAIN, (5.0, 9.0), 0.26, 0.07)),
            ((SIDEWALK, (2.2, 3.4), 0.13, 0.0), (TERRAIN, (5.0, 9.0), 0.18, 0.09)),
            ((TERRAIN, (2.4, 3.6), 0.26, 0.02), (SIDEWALK, (2.0, 3.0), 0.18, 0.0), (TERRAIN, (3.0, 6.0), 0.24, 0.08)),
            ((SIDEWALK, (2.4, 3.6), 0.14, 0.0), (TERRAIN, (2.0, 3.0), 0.28, 0.05), (SIDEWALK, (2.4, 3.4), 0.16, 0.0)),
        ),
        floors=(4, 16), building_gap=0.25, glass=(0.5, 0.95), hip_roof=0.1, palm=0.25, tree_gap=(6.0, 12.0),
        crown=(3.6, 1.7, 3.6), hedge=0.45, wall=0.12, mix=(0.48, 0.0, 0.16, 0.10, 0.10, 0.14, 0.02),
    ),
}  # fmt: skip

DAY = Light(
    elevation=(28, 48), sun=(1.30, 1.12, 0.86), ambient=(0.22, 0.27, 0.36), zenith=(0.10, 0.24, 0.58),
    horizon=(0.50, 0.62, 0.74), haze=520, clouds=0.40, exposure=1.5, sensor_noise=1.6,
)  # fmt: skip
TROPIC = Light(
    elevation=(50, 72), sun=(0.92, 0.90, 0.84), ambient=(0.34, 0.36, 0.38), zenith=(0.36, 0.47, 0.62),
    horizon=(0.68, 0.71, 0.73), haze=300, clouds=0.70, exposure=1.45, sensor_noise=2.0,
)  # fmt: skip
MIXED = Light(
    elevation=(32, 62), sun=(1.15, 1.04, 0.88), ambient=(0.27, 0.31, 0.37), zenith=(0.20, 0.35, 0.62),
    horizon=(0.58, 0.66, 0.73), haze=400, clouds=0.55, exposure=1.45, sensor_noise=1.8,
)  # fmt: skip
NIGHT = Light(
    elevation=(60, 80), sun=(0.0, 0.0, 0.0), ambient=(0.070, 0.067, 0.078), zenith=(0.008, 0.009, 0.016),
    horizon=(0.040, 0.030, 0.024), haze=320, clouds=0.50, exposure=4.2, sensor_noise=4.0, lamps=True,
)  # fmt: skip

WORLDS: dict[str, World] = {
    "usa": World(("boston",), DAY, "Parked cars, pedestrians on sidewalk, turn", 0.03),
    "singapore": World(("singapore",), TROPIC, "Wait, motorcycles, bus, dense vegetation", 0.06),
    "day": World(("boston", "singapore"), MIXED, "Arrive at intersection, parked cars, peds", 0.04),
    "night": World(("singapore",), NIGHT, "Night, street lamps, parked cars, peds", 0.09),
}


def _names(ranges: str) -> list[str]:
    """Expands "0161-0163 0170" to scene names."""
    spans = [(item.split("-") * 2)[:2] for item in ranges.split()]
    return [f"scene-{n:04d}" for first, last in spans for n in range(int(first), int(last) + 1)]


# Scene names decide the split of a real nuScenes scene, so each split draws from its official names. For boston and for
# singapore by day within the world "day" no target validation list exists: their val names are ordinary train names.
_SSDA_LABELLED = (
    "0002 0023 0030 0042 0059 0120-0121 0123 0130-0131 0134-0135 0139 0151 0154 0157 0178-0179 0185 0188 0191 0193 "
    "0316 0362 0369-0372 0379 0381 0385 0399 0402-0403 0406-0407 0412 0417 0421 0423-0424 0426 0431 0436-0437 0947"
)
_SSDA_UNLABELLED = (
    "0001 0019-0022 0024-0029 0031-0034 0041 0043-0044 0055-0058 0060-0061 0122 0124-0129 0132-0133 0138 0149-0150 "
    "0152 0155 0158-0160 0177 0180-0184 0187 0190 0192 0194-0196 0315 0317-0318 0350-0355 0360-0361 0363-0368 0373-0378"
)
NAMES: dict[str, dict[str, list[str]]] = {
    "boston": {
        "train": _names("0161-0168 0170-0176 0200 0202-0204 0206-0214 0218-0220 0222 0224-0260 0283-0306 0440-0459 0499-0502"),
        "val": _names("0700-0701 0703-0719 0726-0728 0730-0731"),
        "test": _names("0552-0565 0625-0627 0629-0630 0632-0638 0904-0917 0919-0931"),
    },
    "singapore": {
        "labelled": _names(_SSDA_LABELLED),
        "unlabelled": _names(_SSDA_UNLABELLED),
        "val": _names("0004-0011 0045-0054 0347-0349 0356-0359 0786-0787 0789-0792 0847-0856 0858 0860-0866 0975-0984"),
        "test": _names("0003 0012-0018 0035-0036 0038-0039 0092-0110 0270-0278 0329-0332 0344-0346"),
    },
    "night": {
        "labelled": _names("1074-1075 1077-1079 1083 1085 1087 1090 1095-1096"),
        "unlabelled": _names("1076 1080-1082 1084 1086 1088-1089 1091-1094 1097-1102"),
        "val": _names("1044-1058"),
        "test": _names("1059-1072"),
    },
}


@cache
def _noise(dim: int, size: int, power: float) -> Array:
    """Tileable 1/f noise, float32 (size,)*dim, spread evenly over 0..1 so that a threshold is a share."""
    white = np.random.default_rng(7 + dim).standard_normal((size,) * dim)
    freq = np.sqrt(sum(f**2 for f in np.meshgrid(*[np.fft.fftfreq(size)] * dim, indexing="ij")))
    smooth = np.fft.ifftn(np.fft.fftn(white) / (freq + 1 / size) ** power).real
    ranks = np.empty(smooth.size, np.float32)
    ranks[np.argsort(smooth, axis=None, kind="stable")] = np.linspace(0, 1, smooth.size, dtype=np.float32)
    return ranks.reshape(smooth.shape)


def _noise2(x: Array, y: Array, texel: float, power: float = 1.1) -> Array:
    table = _noise(2, 512, power)
    picked: Array = table[np.floor(x / texel).astype(np.int64) & 511, np.floor(y / texel).astype(np.int64) & 511]
    return picked


def _hash(a: Array, b: Array, seed: Array | float) -> Array:
    wave: Array = np.sin(a * 12.9898 + b * 78.233 + seed * 37.719) * 43758.5453
    return wave - np.floor(wave)


def _rotation(q: Array) -> Array:
    """Rotation matrix (3, 3) of a unit quaternion (w, x, y, z)."""
    w, x, y, z = q
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip


def _compose(a: Array, b: Array) -> Array:
    """Quaternion product: rotate by b, then by a."""
    vector = a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])
    return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], vector])


def _euler(yaw: float, pitch: float = 0.0, roll: float = 0.0) -> Array:
    about = [np.array([math.cos(a / 2), *(math.sin(a / 2) * np.eye(3)[k])]) for a, k in ((yaw, 2), (pitch, 1), (roll, 0))]
    return _compose(_compose(about[0], about[1]), about[2])


_LIDAR_Q = np.array([0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817])
_CAMERA_Q = np.array([0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755])
_LIDAR_Q, _CAMERA_Q = _LIDAR_Q / np.linalg.norm(_LIDAR_Q), _CAMERA_Q / np.linalg.norm(_CAMERA_Q)
_LIDAR_T, _CAMERA_T = np.array([0.943713, 0.0, 1.84023]), np.array([1.70079118954, 0.0159456324149, 1.51095763913])
_FOCAL, _CU, _CV = 316.604300761, 204.066755, 122.876766
_INTRINSIC = [[_FOCAL, 0.0, _CU], [0.0, _FOCAL, _CV], [0.0, 0.0, 1.0]]


@dataclass
class Scene:
    """One street. `lut_*` are indexed by (side, distance beyond the kerb in 2 cm steps); side 1 is positive y."""

    city: City
    light: Light
    bend: tuple[float, float]
    cross: float  # x of the crossing street's centre; far away where there is none
    cross_half: float
    half: float
    lane: float
    lanes: int
    speed: float
    reach: tuple[float, float]  # first and last x that is built
    lut_height: Array
    lut_label: Array
    walk: list[tuple[float, float]]  # per side: where the pavement begins and ends beyond the kerb
    setback: list[float]  # per side: where the buildings may begin
    colors: dict[int, RGB]
    sun: Array
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    lamps: list[tuple[float, float, float]] = field(default_factory=list)

    def centre(self, x: Array | float) -> Any:
        return self.bend[0] * np.sin(np.asarray(x) / self.bend[1])

    def ground(self, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
        """Height and label of the ground, distance from the centre line and beyond the kerb; shaped like x and y."""
        across = y - self.centre(x)
        beyond = np.minimum(np.abs(across) - self.half, np.abs(x - self.cross) - self.cross_half)
        cell = np.clip(beyond * 50 + 1, 0, self.lut_height.shape[1] - 1).astype(np.int32)
        side = (across > 0).astype(np.int32)
        return self.lut_height[side, cell], self.lut_label[side, cell], across, beyond

    def put(
        self,
        base: Pose,
        kind: int,
        label: int,
        offset: RGB,
        half: RGB,
        color: RGB,
        texture: int = PLAIN,
        taper: tuple[float, float] = (0.0, 0.0),
        reflect: float = 0.3,
        seed: float = 0.0,
    ) -> None:
        """Adds a primitive at `offset` in the frame of `base` (x, y, z, yaw)."""
        c, s = math.cos(base[3]), math.sin(base[3])
        center = (base[0] + c * offset[0] - s * offset[1], base[1] + s * offset[0] + c * offset[1], base[2] + offset[2])
        self.rows.append((kind, label, texture, center, half, base[3], taper, color, reflect, seed))

    def leaves(self, base: Pose, kind: int, offset: RGB, half: RGB, color: RGB, seed: float) -> None:
        self.put(base, kind, VEGETATION, offset, half, color, LEAF, reflect=0.5, seed=seed)

    def clear(self, x: float, margin: float) -> bool:
        return abs(x - self.cross) > self.cross_half + margin

    def site(self, x: float, across: float, turn: float = 0.0) -> Pose:
        """The base (x, y, z, yaw) of something that stands at `x` along and `across` from the centre line."""
        y = float(self.centre(x)) + across
        z = float(self.ground(np.array([x]), np.array([y]))[0][0])
        return x, y, z, math.atan(self.bend[0] / self.bend[1] * math.cos(x / self.bend[1])) + turn


def _vehicle(s: Scene, base: Pose, rng: np.random.Generator) -> None:
    kind, color, size = int(rng.choice(7, p=s.city.mix)), _pick(rng, s.city.paint), rng.uniform(0.94, 1.06)
    tyre, dark = (0.02, 0.02, 0.02), (0.05, 0.06, 0.07)
    if kind >= 5:
        label, frame = (MOTORCYCLE, 0.16) if kind == 5 else (BICYCLE, 0.05)
        head = (0.6, 0.6, 0.6) if kind == 5 else (0.35, 0.2, 0.14)
        for dx in (-0.6, 0.6):
            s.put(base, BALL, label, (dx, 0, 0.31), (0.31, 0.07, 0.31), tyre, reflect=0.1)
        s.put(base, BALL, label, (0, 0, 0.6), (0.6, frame, 0.22), color)
        s.put(base, BALL, label, (-0.15, 0, 1.12), (0.22, 0.25, 0.42), _pick(rng, s.city.paint, 0.4))
        s.put(base, BALL, label, (-0.08, 0, 1.62), (0.15, 0.14, 0.16), head)
        return
    length, width, label = ((2.25, 0.9, CAR), (2.75, 1, TRUCK), (2.4, 0.98, CAR), (4.2, 1.2, TRUCK), (5.6, 1.25, BUS))[kind]
    length *= size
    if kind == 0:
        s.put(base, BOX, label, (0, 0, 0.61), (length, width, 0.33), color, taper=(0.16, 0.10))
        s.put(base, BOX, label, (-0.15, 0, 1.19), (0.64 * length, 0.92 * width, 0.28), color, GLASS, (0.85, 0.30))
    elif kind == 1:
        s.put(base, BOX, label, (0, 0, 0.75), (length, width, 0.36), color, taper=(0.05, 0.06))
        s.put(base, BOX, label, (0.25, 0, 1.48), (1.15, 0.92 * width, 0.38), color, GLASS, (0.45, 0.2))
    elif kind == 2:
        s.put(base, BOX, label, (0, 0, 0.7), (length, width, 0.42), color, taper=(0.10, 0.05))
        s.put(base, BOX, label, (-0.25, 0, 1.47), (0.84 * length, 0.95 * width, 0.36), color, GLASS, (0.4, 0.15))
    elif kind == 3:
        load = (0.62, 0.62, 0.60) if size > 1 else color
        s.put(base, BOX, label, (length - 0.9, 0, 1.3), (0.85, 1.05, 0.9), color, GLASS, (0.15, 0.03))
        s.put(base, BOX, label, (-0.9, 0, 1.9), (length - 1.1, width, 1.3), load)
        s.put(base, BOX, label, (0, 0, 0.5), (length, 0.9, 0.15), tyre)
    else:
        tall = 2.05 if s.city.side > 0 and size > 1 else 1.45  # with two decks, or one
        s.put(base, BOX, label, (0, 0, tall + 0.35), (length, width, tall), color, BANDS, (0.02, 0.02), seed=tall)
    radius, high = (0.33, 0.75) if kind < 3 else (0.48, 0.95)
    for side in (-1, 1):
        for dx in (-0.62, 0.62):
            wheel = (dx * length, side * (width - 0.08), radius)
            s.put(base, BALL, label, wheel, (radius, 0.14, radius), tyre, reflect=0.1)
        y = side * 0.72 * width
        s.put(base, BOX, label, (-length, y, high), (0.05, 0.16, 0.09), (0.55, 0.02, 0.02), LAMP, reflect=0.9)
        s.put(base, BOX, label, (length, y, high - 0.05), (0.05, 0.15, 0.08), (0.9, 0.9, 0.8), LAMP, reflect=0.9)
    s.put(base, BOX, label, (-length, 0, 0.5), (0.03, 0.26, 0.06), dark if kind else (0.7, 0.7, 0.65), reflect=0.9)


def _tree(s: Scene, base: Pose, rng: np.random.Generator) -> None:
    radius, high, trunk = (v * rng.uniform(0.8, 1.25) for v in s.city.crown)
    leaf = _pick(rng, s.city.leaves, 0.2)
    if rng.random() < s.city.palm:
        trunk = rng.uniform(4.5, 7.0)
        s.put(base, ROUND, VEGETATION, (0, 0, trunk / 2), (0.14, 0.14, trunk / 2), (0.24, 0.21, 0.17), reflect=0.25)
        for turn in np.arange(5) * 1.257 + trunk:
            s.leaves((*base[:3], base[3] + turn), BALL, (1, 0, trunk + 0.1), (1.2, 0.35, 0.45), leaf, turn)
        return
    middle = (trunk + high) / 2
    s.put(base, ROUND, VEGETATION, (0, 0, middle), (0.17, 0.17, middle), (0.13, 0.10, 0.075), reflect=0.25)
    for _ in range(4):
        dx, dy = rng.uniform(-0.5, 0.5, 2) * radius
        scale = rng.uniform(0.6, 0.85)
        size = (radius * scale, radius * scale, high * scale)
        s.leaves(base, BALL, (dx, dy, trunk + high * rng.uniform(0.7, 1.25)), size, leaf, rng.random() * 60)


def _person(s: Scene, base: Pose, rng: np.random.Generator) -> None:
    label, k = (CHILD, 0.7) if rng.random() < 0.12 else (ADULT, rng.uniform(0.93, 1.06))
    shirt = tuple(rng.uniform(0.04, 0.6, 3))
    s.put(base, BOX, label, (0, 0, 0.42 * k), (0.11, 0.15, 0.42 * k), (0.05, 0.06, 0.10))
    s.put(base, BALL, label, (0, 0, 1.13 * k), (0.16, 0.24, 0.36 * k), shirt)
    s.put(base, BALL, label, (0, 0, 1.62 * k), (0.11, 0.10, 0.14), (0.36, 0.22, 0.16))


def _along(rng: np.random.Generator, reach: tuple[float, float], gap: tuple[float, float]) -> Iterator[float]:
    x = reach[0] + rng.uniform(*gap) * rng.random()
    while x < reach[1]:
        yield x
        x += rng.uniform(*gap)


def _pick(rng: np.random.Generator, colors: tuple[RGB, ...], spread: float = 0.12) -> RGB:
    color = np.array(colors[rng.integers(len(colors))]) * rng.uniform(1 - spread, 1 + spread)
    return float(color[0]), float(color[1]), float(color[2])


def _buildings(s: Scene, side: int, rng: np.random.Generator) -> None:
    c, sign = s.city, 2 * side - 1
    for depth in (0, 1):
        for x in _along(rng, s.reach, (16, 26)):
            width, deep = rng.uniform(5.5, 11), rng.uniform(6, 11)
            tall = float(rng.integers(*c.floors, endpoint=True) * 1.6 * (1 + depth * 0.5))
            color, glass, seed = _pick(rng, c.walls), rng.uniform(*c.glass), float(rng.integers(1, 90))
            at = s.site(x, sign * (s.half + s.setback[side] + rng.uniform(0.3, 2.5) + deep + depth * 28))
            roof, podium, awning, gap = rng.random(4)
            if not s.clear(x, width + 3) or gap < c.building_gap:
                continue
            size = (width, deep, tall + 0.5)
            s.put(at, BOX, MANMADE, (0, 0, tall - 0.5), size, color, FACADE, reflect=0.35, seed=seed + glass)
            if roof < c.hip_roof and tall < 7:
                size = (width + 0.4, deep + 0.4, 1.6)
                s.put(at, BOX, MANMADE, (0, 0, 2 * tall + 1.6), size, (0.16, 0.10, 0.08), taper=(1.8, 1.8))
            elif podium < 0.35:
                size = (width + 1.2, deep + 1.2, 2.2)
                s.put(at, BOX, MANMADE, (0, 0, 2), size, _pick(rng, c.walls), FACADE, seed=seed + 7)
            if awning < 0.4:
                s.put(at, BOX, MANMADE, (0, -sign * (deep + 0.7), 3), (width * 0.7, 0.8, 0.12), _pick(rng, c.paint))


def _greenery(s: Scene, side: int, rng: np.random.Generator) -> None:
    """Trees, bushes and the hedge or wall behind the pavement."""
    c, sign, walk, setback = s.city, 2 * side - 1, s.walk[side], s.setback[side]
    verge = s.half + (0.9 if walk[0] < 0.5 else walk[0] * 0.5)
    for x in _along(rng, s.reach, c.tree_gap):
        if s.clear(x, 4) and rng.random() < 0.85:
            _tree(s, s.site(x, sign * (verge + rng.uniform(-0.1, 0.3))), rng)
    for x in _along(rng, s.reach, (8, 16)):
        if s.clear(x, 6) and setback > walk[1] + 1:
            _tree(s, s.site(x, sign * (s.half + rng.uniform(walk[1] + 0.8, setback + 1.5))), rng)
    hedge, wall = rng.random() < c.hedge, rng.random() < c.wall
    for x in _along(rng, s.reach, (8.2, 9.5)):
        high, chance = rng.uniform(0.35, 0.7), rng.random()
        if (hedge or wall) and chance < 0.8 and s.clear(x, 7):
            at = s.site(x, sign * (s.half + walk[1] + 0.5))
            if hedge:
                s.leaves(at, BOX, (0, 0, high), (4.0, 0.4, high), _pick(rng, c.leaves), high * 30)
            else:
                s.put(at, BOX, MANMADE, (0, 0, high), (4.0, 0.14, high), _pick(rng, c.walls), reflect=0.4)
    for x in _along(rng, s.reach, (5, 16)):
        if s.clear(x, 3) and rng.random() < 0.6:
            r = rng.uniform(0.35, 0.8)
            at = s.site(x, sign * (s.half + setback - rng.uniform(0.2, 0.9)))
            s.leaves(at, BALL, (0, 0, r * 0.7), (r * 1.2, r, r), _pick(rng, c.leaves), r * 40)


def _furniture(s: Scene, side: int, rng: np.random.Generator) -> None:
    """Street lamps, signs, bus stops, boxes; and the people on the pavement."""
    c, sign, walk = s.city, 2 * side - 1, s.walk[side]
    grey = (0.22, 0.23, 0.24)
    for x in _along(rng, s.reach, (24, 30)):
        if s.clear(x, 1):
            at = s.site(x, sign * (s.half + 0.45))
            s.put(at, ROUND, MANMADE, (0, 0, 3.6), (0.09, 0.09, 3.6), grey, reflect=0.5)
            s.put(at, BOX, MANMADE, (0, -sign * 1.1, 7.2), (0.06, 1.2, 0.05), grey)
            s.put(at, BOX, MANMADE, (0, -sign * 2.2, 7.12), (0.13, 0.35, 0.06), (0.9, 0.8, 0.6), LAMP)
            s.lamps.append((at[0], at[1] - sign * 2.2, at[2] + 6.9))
    for x in _along(rng, s.reach, (14, 40)):
        what, at = rng.random(), s.site(x, sign * (s.half + 0.5))
        if not s.clear(x, 1):
            continue
        if what < 0.5:
            plate = _pick(rng, ((0.45, 0.03, 0.03), (0.03, 0.12, 0.42), (0.5, 0.5, 0.48), (0.55, 0.36, 0.03)))
            s.put(at, ROUND, MANMADE, (0, 0, 1.25), (0.045, 0.045, 1.25), (0.35, 0.35, 0.35), reflect=0.5)
            s.put(at, BOX, MANMADE, (0, 0, 2.4), (0.03, 0.34, 0.34), plate, reflect=0.95)
        elif what < 0.7:
            at = s.site(x, sign * (s.half + max(walk[1] - 0.9, 1.3)))
            s.put(at, BOX, MANMADE, (0, 0, 2.45), (2.4, 0.8, 0.09), (0.12, 0.25, 0.22))
            s.put(at, BOX, MANMADE, (0, sign * 0.7, 1.2), (2.3, 0.04, 1.1), (0.30, 0.38, 0.40), reflect=0.2)
            s.put(at, BOX, MANMADE, (2.3, 0, 1.2), (0.05, 0.6, 1.1), _pick(rng, c.paint))
        else:
            s.put(at, BOX, MANMADE, (0, 0, 0.55), (0.3, 0.25, 0.55), (0.10, 0.22, 0.12))
    for x in _along(rng, s.reach, (6, 15)):
        _person(s, s.site(x, sign * (s.half + rng.uniform(*walk)), rng.uniform(-3, 3)), rng)


def _crossing(s: Scene, rng: np.random.Generator) -> None:
    for sign in (-1, 1):
        at = s.site(s.cross - sign * (s.cross_half + 0.8), sign * (s.half + 0.8))
        s.put(at, ROUND, MANMADE, (0, 0, 2.6), (0.07, 0.07, 2.6), (0.10, 0.10, 0.10), reflect=0.4)
        s.put(at, BOX, MANMADE, (0, 0, 4.7), (0.16, 0.18, 0.5), (0.05, 0.05, 0.04))
        s.put(at, BOX, MANMADE, (-sign * 0.16, 0, 4.4), (0.03, 0.1, 0.1), (0.05, 0.7, 0.25), LAMP)
        y = float(s.centre(s.cross)) + sign * (s.half + rng.uniform(4, 9))
        _vehicle(s, (s.cross + sign * s.lane / 2, y, 0.0, math.pi / 2), rng)
        _person(s, s.site(s.cross - s.cross_half - 1.5, rng.uniform(-s.half, s.half)), rng)


def _roadworks(s: Scene, rng: np.random.Generator) -> None:
    sign, start, cones = s.city.side * (2 * s.lanes - 3), rng.uniform(8, 40), rng.random() < 0.5
    for k in range(7):
        at = s.site(start + k * 2.4, sign * (s.half - 0.35))
        if cones:
            size, color = (0.19, 0.19, 0.37), (0.75, 0.16, 0.02)
            s.put(at, BOX, CONE, (0, 0, 0.37), size, color, taper=(0.23, 0.23), reflect=0.7)
        else:
            color = ((0.7, 0.7, 0.68), (0.65, 0.15, 0.04))[k % 2]
            s.put(at, BOX, BARRIER, (0, 0, 0.45), (1.1, 0.2, 0.45), color, taper=(0, 0.12))


def _traffic(s: Scene, parking: bool, time: float, rng: np.random.Generator) -> None:
    for sign in (-1, 1) if parking else ():
        for x in _along(rng, s.reach, (8, 24)):
            if s.clear(x, 9) and rng.random() < 0.8:
                _vehicle(s, s.site(x, sign * (s.half - 1.15), 0.0 if sign == s.city.side else math.pi), rng)
    for direction in (1, -1):
        for n in range(s.lanes):
            # The first car of the ego lane keeps its distance; behind the ego car that lane is empty.
            x = rng.uniform(15, 42) if direction == 1 and n == 0 else rng.uniform(-50, -30)
            while x < s.reach[1]:
                across = direction * s.city.side * s.lane * (n + 0.5) + rng.uniform(-0.2, 0.2)
                at = s.site(x + direction * s.speed * time, across, 0.0 if direction == 1 else math.pi)
                _vehicle(s, at, rng)
                x += rng.uniform(18, 48)


def build_scene(world: str, city: str, key: tuple[int, ...], travel: float, time: float) -> Scene:
    """The street of one scene at one moment.

    world, city: names in WORLDS and CITIES. key: the scene's random key. travel: metres that the ego car covers in the
    whole scene (the street is built as far as it will see). time: seconds since the scene's start; moves the traffic.
    """
    c, light, rng = CITIES[city], WORLDS[world].light, np.random.default_rng(key)
    lanes, parking, lane, crossing = (int(rng.choice([1, 1, 1, 2])), rng.random() < 0.33, rng.uniform(3, 3.4), rng.random())
    azimuth, elevation = rng.uniform(-math.pi, math.pi), math.radians(rng.uniform(*light.elevation))
    flat = math.cos(elevation)
    sun = np.array([math.cos(azimuth) * flat, math.sin(azimuth) * flat, math.sin(elevation)])
    height, label = np.zeros((2, 2500), np.float32), np.full((2, 2500), ROAD, np.uint8)
    setback, walk = [0.0, 0.0], [(0.0, 0.0), (0.0, 0.0)]
    for side in (0, 1):
        edge = 0.0
        for band, widths, level, slope in c.bands[rng.integers(len(c.bands))]:
            start, edge = edge, float(edge + rng.uniform(*widths))
            cell = 1 + round(start * 50)
            height[side, cell:] = level + np.minimum(np.arange(2500 - cell) / 50, 6.0) * slope
            label[side, cell:] = band
            if band == SIDEWALK:
                walk[side] = (start, edge)
        label[side, 1:10] = np.where(label[side, 1:10] == TERRAIN, SIDEWALK, label[side, 1:10])  # the kerb stone
        setback[side] = edge
    s = Scene(
        city=c,
        light=light,
        bend=(rng.uniform(-5, 5), rng.uniform(45, 90)),
        cross=rng.uniform(18, 55) if crossing < 0.45 else 1e6,
        cross_half=lane + 1.5,
        half=lanes * lane + (2.3 if parking else 0.0),
        lane=lane,
        lanes=lanes,
        speed=rng.uniform(6, 10),
        reach=(-75.0, travel + 115.0),
        lut_height=height,
        lut_label=label,
        walk=walk,
        setback=setback,
        colors={ROAD: _pick(rng, c.road), SIDEWALK: _pick(rng, c.sidewalk), TERRAIN: _pick(rng, c.terrain)},
        sun=sun,
    )
    for side in (0, 1):
        _buildings(s, side, rng)
        _greenery(s, side, rng)
        _furniture(s, side, rng)
    if crossing < 0.45:
        _crossing(s, rng)
    if rng.random() < 0.6:
        _roadworks(s, rng)
    _traffic(s, parking, time, rng)
    return s


@dataclass
class Rays:
    """A grid of rays. origin, direction: three float32 arrays each, (H, W) or scalar.

    `window` maps the primitives' bounding boxes (P, 8, 3) to (P, 4) row and column bounds of the rays that may hit
    them; with `wrap` the first column may be negative.
    """

    origin: tuple[Any, Any, Any]
    direction: tuple[Array, Array, Array]
    window: Callable[[Array], Array]
    wrap: bool = False


def _corners(prims: Array) -> Array:
    signs = np.array([(a, b, c) for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], np.float32)
    local = prims["half"][:, None] * signs
    c, s = np.cos(prims["yaw"])[:, None], np.sin(prims["yaw"])[:, None]
    turned = np.stack([c * local[..., 0] - s * local[..., 1], s * local[..., 0] + c * local[..., 1], local[..., 2]], -1)
    corners: Array = prims["center"][:, None] + turned
    return corners


def _span(prim: Any, o: Any, d: Any) -> tuple[Array, Array]:
    """Entry and exit distance of rays through one convex primitive; a miss has entry >= exit."""
    c, s, (hx, hy, hz) = math.cos(prim["yaw"]), math.sin(prim["yaw"]), prim["half"]
    px, py, pz = (o[k] - prim["center"][k] for k in range(3))
    ox, oy, oz, dx, dy, dz = c * px + s * py, c * py - s * px, pz, c * d[0] + s * d[1], c * d[1] - s * d[0], d[2] + 1e-9
    near: Any = np.float32(-1e9)
    far: Any = np.float32(1e9)
    if prim["kind"] == BOX and not prim["taper"].any():
        for po, pd, h in ((ox, dx + 1e-9, hx), (oy, dy + 1e-9, hy)):
            a, b = (-h - po) / pd, (h - po) / pd
            near, far = np.maximum(near, np.minimum(a, b)), np.minimum(far, np.maximum(a, b))
    elif prim["kind"] == BOX:
        for po, pd, h, k in ((ox, dx, hx, prim["taper"][0]), (oy, dy, hy, prim["taper"][1])):
            for sign in (1, -1):
                den = sign * pd + k * dz + 1e-9
                at = (h - k * (oz + hz) - sign * po) / den
                near, far = np.maximum(near, np.where(den < 0, at, near)), np.minimum(far, np.where(den > 0, at, far))
    else:
        ball = prim["kind"] == BALL
        a = (dx / hx) ** 2 + (dy / hy) ** 2 + ((dz / hz) ** 2 if ball else 0)
        b = ox * dx / hx**2 + oy * dy / hy**2 + (oz * dz / hz**2 if ball else 0)
        rest = (ox / hx) ** 2 + (oy / hy) ** 2 + ((oz / hz) ** 2 if ball else 0) - 1
        root = b * b - a * rest
        wide = np.sqrt(np.maximum(root, 0))
        near, far = np.where(root > 0, (-b - wide) / a, 1e9), np.where(root > 0, (-b + wide) / a, -1e9)
    if prim["kind"] != BALL:
        low, high = (-hz - oz) / dz, (hz - oz) / dz
        near, far = np.maximum(near, np.minimum(low, high)), np.minimum(far, np.maximum(low, high))
    return near, far


def _leaf_hit(prim: Any, o: Any, d: Any, near: Array, far: Array, mask: Array) -> Array:
    """Where rays end inside porous foliage: front or back surface with its holes, roughened; inf where they pass."""
    at = np.full(near.shape, np.inf, np.float32)
    spots = np.nonzero(mask)
    table, size = _noise(3, 64, 1.6), np.clip(prim["half"].min() * 0.09, 0.05, 0.14)
    for surface in (near, far):
        t = surface[spots]
        p = [np.broadcast_to(o[k], near.shape)[spots] + t * d[k][spots] for k in range(3)]
        cell = [np.floor((p[k] - prim["center"][k] + prim["seed"]) / size).astype(np.int64) & 63 for k in range(3)]
        noise = table[cell[0], cell[1], cell[2]]
        solid = (noise > 0.36) & (t > 0.05)
        at[spots] = np.where(
            solid & np.isinf(at[spots]), t + (noise - 0.36) * np.minimum(far - near, 0.9)[spots] * 0.5, at[spots]
        )
    return at


def cast(rays: Rays, prims: Array, scene: Scene | None) -> tuple[Array, Array]:
    """Distance (H, W) float32 (inf for the sky) and index of the primitive (H, W) int32 (-1: ground) along each ray."""
    shape = rays.direction[0].shape
    t, hit = np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int32)
    bounds = rays.window(_corners(prims))
    for k in np.nonzero((bounds[:, 0] < bounds[:, 1]) & (bounds[:, 2] < bounds[:, 3]))[0]:
        r0, r1, c0, c1 = bounds[k]
        pieces = [(c0 + shape[1], shape[1]), (0, c1)] if rays.wrap and c0 < 0 else [(c0, c1)]
        if rays.wrap and c1 > shape[1]:
            pieces = [(c0, shape[1]), (0, c1 - shape[1])]
        for a, b in pieces:
            view = np.s_[r0:r1, a:b]
            o = [v[view] if np.ndim(v) else v for v in rays.origin]
            d = [v[view] for v in rays.direction]
            near, far = _span(prims[k], o, d)
            mask = (near < far) & (far > 0.05)
            if prims[k]["texture"] == LEAF:
                if not mask.any():
                    continue
                near = _leaf_hit(prims[k], o, d, near, far, mask)
            mask &= (near > 0.05) & (near < t[view])
            t[view][mask], hit[view][mask] = near[mask], k
    if scene is not None:
        _cast_ground(rays, scene, t, hit)
    return t, hit


def _cast_ground(rays: Rays, scene: Scene, t: Array, hit: Array) -> None:
    """Marches between the highest and the lowest level of the ground, then bisects; writes into t and hit."""
    dz = rays.direction[2]
    top, bottom = float(scene.lut_height.max()) + 0.01, -0.01
    with np.errstate(divide="ignore"):
        first = np.where(dz < -1e-4, (top - rays.origin[2]) / dz, np.inf)
    spots = np.nonzero((first < t) & (first < 400))
    o, d = rays.origin, [v[spots] for v in rays.direction]
    low = first[spots]
    high = (bottom - o[2]) / d[2]

    def under(at: Array) -> Array:
        below: Array = o[2] + at * d[2] < scene.ground(o[0] + at * d[0], o[1] + at * d[1])[0]
        return below

    step, found = (high - low) / 6, np.zeros(low.shape, bool)
    start = low.copy()
    for k in range(1, 6):
        found |= under(start + k * step)
        low = np.where(found, low, start + k * step)
    high = np.where(found, low + step, high)
    for _ in range(9):
        middle = (low + high) / 2
        below = under(middle)
        low, high = np.where(below, low, middle), np.where(below, middle, high)
    closer = high < t[spots]
    spots = (spots[0][closer], spots[1][closer])
    t[spots], hit[spots] = high[closer], -1


def _box_window(u: Array, v: Array, valid: Array, whole: Array, shape: tuple[int, int]) -> Array:
    """Bounds of projected corners u (column), v (row), both (P, 8); `whole` takes all rays, not `valid` none."""
    rows, cols = np.full(len(u), shape[0]), np.full(len(u), shape[1])
    low_v, high_v = np.floor(v.min(1)).clip(0, rows), np.ceil(v.max(1) + 1).clip(0, rows)
    low_u, high_u = np.floor(u.min(1)).clip(0, cols), np.ceil(u.max(1) + 1).clip(0, cols)
    bounds = np.stack([low_v, high_v, low_u, high_u], 1).astype(np.int64)
    bounds[whole] = (0, shape[0], 0, shape[1])
    bounds[~valid] = 0
    return bounds


def _camera_rays(position: Array, rotation: Array, oversample: int) -> Rays:
    shape = HEIGHT * oversample, WIDTH * oversample
    v, u = np.meshgrid((np.arange(shape[0]) + 0.5) / oversample, (np.arange(shape[1]) + 0.5) / oversample, indexing="ij")
    local = np.stack([(u - _CU) / _FOCAL, (v - _CV) / _FOCAL, np.ones_like(u)])
    local /= np.sqrt((local**2).sum(0))
    d = [sum(rotation[k, j] * local[j] for j in range(3)).astype(np.float32) for k in range(3)]

    def window(corners: Array) -> Array:
        seen = (corners - position) @ rotation
        depth = np.maximum(seen[..., 2], 0.05)
        column, row = _FOCAL * seen[..., 0] / depth + _CU, _FOCAL * seen[..., 1] / depth + _CV
        inside, near = seen[..., 2].max(1) > 0.1, seen[..., 2].min(1) < 0.1
        return _box_window(column * oversample, row * oversample, inside, inside & near, shape)

    return Rays(tuple(np.float32(p) for p in position), (d[0], d[1], d[2]), window)  # type: ignore[arg-type]


def _lidar_rays(position: Array, rotation: Array) -> tuple[Rays, Array]:
    """The sweep's rays in the world, and their directions in the LiDAR's own frame (3, BEAMS, COLUMNS)."""
    elevation = np.radians(np.linspace(-30.67, 10.67, BEAMS))
    azimuth = np.arange(COLUMNS) / COLUMNS * 2 * np.pi
    flat = np.cos(elevation)[:, None]
    local = np.stack(
        [flat * np.cos(azimuth), flat * np.sin(azimuth), np.broadcast_to(np.sin(elevation)[:, None], (BEAMS, COLUMNS))]
    )
    d = [sum(rotation[k, j] * local[j] for j in range(3)).astype(np.float32) for k in range(3)]

    def window(corners: Array) -> Array:
        seen = (corners - position) @ rotation
        middle = (seen.min(1) + seen.max(1)) / 2
        radius = np.hypot(*(seen[..., :2] - middle[:, None, :2]).transpose(2, 0, 1)).max(1)
        distance = np.hypot(middle[:, 0], middle[:, 1])
        inner, outer = np.maximum(distance - radius, 0.3), distance + radius
        low, high = seen[..., 2].min(1), seen[..., 2].max(1)
        tilt = [np.arctan2(z, np.where(z * sign > 0, inner, outer)) for z, sign in ((low, -1), (high, 1))]
        rows = [(v - elevation[0]) / (elevation[1] - elevation[0]) for v in tilt]
        centre = np.arctan2(middle[:, 1], middle[:, 0]) % (2 * np.pi)
        wide = np.arcsin(np.minimum(radius / np.maximum(distance, 1e-3), 1.0))
        columns = [np.floor((centre - wide) / (2 * np.pi) * COLUMNS), np.ceil((centre + wide) / (2 * np.pi) * COLUMNS + 1)]
        bounds = np.stack([np.floor(rows[0]).clip(0, BEAMS), np.ceil(rows[1] + 1).clip(0, BEAMS), *columns], 1)
        bounds[distance <= radius * 1.02] = (0, BEAMS, 0, COLUMNS)
        bounds[inner > MAX_RANGE] = 0
        return bounds.astype(np.int64)

    return Rays(tuple(np.float32(p) for p in position), (d[0], d[1], d[2]), window, wrap=True), local  # type: ignore[arg-type]


def _surface(prims: Array, hit: Array, p: Array) -> tuple[Array, Array]:
    """Normals and local coordinates (both (N, 3)) of points p (N, 3) on the primitives `hit` (N,)."""
    q = prims[hit]
    c, s, d = np.cos(q["yaw"]), np.sin(q["yaw"]), p - q["center"]
    local = np.stack([c * d[:, 0] + s * d[:, 1], c * d[:, 1] - s * d[:, 0], d[:, 2]], 1)
    slack = q["half"].copy()
    slack[:, :2] -= q["taper"] * (local[:, 2:] + q["half"][:, 2:])
    face = np.argmin(slack - np.abs(local), 1)
    rows = np.arange(len(q))
    normal = np.zeros_like(local)
    normal[rows, face] = np.sign(local[rows, face])
    normal[:, 2] += np.where(face < 2, q["taper"][rows, np.minimum(face, 1)], 0)
    ball, tube = q["kind"] == BALL, (q["kind"] == ROUND) & (face < 2)
    normal[ball] = (local / q["half"] ** 2)[ball]
    normal[tube] = local[tube] * (1, 1, 0)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    world = np.stack([c * normal[:, 0] - s * normal[:, 1], s * normal[:, 0] + c * normal[:, 1], normal[:, 2]], 1)
    return world, local


def _ground_paint(s: Scene, p: Array) -> tuple[Array, Array, Array]:
    """Colour (N, 3), reflectance (N,) and label (N,) of ground points p (N, 3)."""
    x = p[:, 0].astype(np.float64)
    _, label, across, beyond = s.ground(x, p[:, 1])
    fine, coarse = _noise2(x, p[:, 1], 0.03), _noise2(x + 9, p[:, 1], 0.12)
    color = np.stack([np.array(s.colors.get(k, (0.3, 0.3, 0.3))) for k in range(32)])[label]
    reflect = np.select([label == ROAD, label == SIDEWALK], [0.10, 0.20], 0.34)
    contrast = np.select([label == ROAD, label == SIDEWALK], [0.30, 0.22], 0.9)
    color = color * (1 + contrast * (0.5 * fine + 0.5 * coarse - 0.5))[:, None]
    worn = (label == TERRAIN) & (coarse > 0.86)
    color[worn] = color[worn] * 0.5 + np.array((0.20, 0.14, 0.09))
    joint = (label == SIDEWALK) & ((x % 1.5 < 0.05) | ((across % 1.5) < 0.05))
    color[joint] *= 0.7
    kerb = (beyond > 0) & (beyond < 0.18)
    color[kerb] = np.where((np.floor(x / 2) % 2 == 0)[:, None], s.city.kerb[0], s.city.kerb[1])[kerb]
    # Tyres darken the middle of the tracks; patches of newer asphalt break the evenness of the road.
    inside = (label == ROAD) & (np.abs(x - s.cross) > s.cross_half + 1)
    track = np.abs((np.abs(across) % s.lane) - s.lane / 2)
    color[inside] *= (1 - 0.10 * np.exp(-((track - 0.8) ** 2) / 0.1))[inside, None]
    patch = (label == ROAD) & (_hash(np.floor(x / 7.3), np.floor(across / s.lane), 3.0) > 0.9)
    color[patch] *= 0.72
    white = np.array((0.66, 0.66, 0.64))
    worn_paint = (fine * 0.6 + coarse * 0.4 > 0.22) & inside
    lanes = np.abs(np.abs(across) - s.lane) < 0.07 if s.lanes == 2 else np.zeros(len(x), bool)
    dashes = lanes & (x % 9 < 3.5)
    edge = np.abs(np.abs(across) - s.lanes * s.lane - 0.05) < 0.06
    approach = np.abs(x - s.cross) - s.cross_half
    zebra = (approach > 1.2) & (approach < 3.6) & (across % 1.1 < 0.5) & (label == ROAD)
    stop = (approach > 4.4) & (approach < 4.8) & (across * (x - s.cross) * s.city.side < 0)
    centre = (np.abs(np.abs(across) - 0.13) < 0.055) if s.city.side < 0 else (np.abs(across) < 0.07) & (x % 6 < 3)
    paint = (dashes | edge | zebra | stop) & worn_paint
    color[paint] = white * (0.8 + 0.3 * fine[paint, None])
    color[centre & worn_paint] = s.city.centre_line
    reflect = np.where(paint | (centre & worn_paint), 0.6, reflect)
    reflect[worn] = 0.25
    return color, reflect * (0.85 + 0.3 * coarse), label


def _object_paint(s: Scene, prims: Array, hit: Array, p: Array, normal: Array, local: Array) -> tuple[Array, Array, Array]:
    """Colour (N, 3), emitted light (N, 3) and glassiness (N,) of points on primitives."""
    q = prims[hit]
    color, glassy, glow = q["color"].astype(np.float64), np.zeros(len(q)), np.zeros((len(q), 3))
    night = s.light.lamps
    fine = _noise2(local[:, 0] + local[:, 1] * 1.3, local[:, 2] + local[:, 0] * 0.3, 0.05)
    color *= np.where(q["texture"] == LEAF, 0.35 + 1.3 * fine, 0.9 + 0.2 * fine)[:, None]
    side = np.abs(normal[:, 2]) < 0.75
    height = local[:, 2] + q["half"][:, 2]
    across_x = np.abs(normal[:, 0] * np.cos(q["yaw"]) + normal[:, 1] * np.sin(q["yaw"])) > 0.5
    u = np.where(across_x, local[:, 1], local[:, 0])
    edge = np.where(across_x, q["half"][:, 1], q["half"][:, 0])

    facade = (q["texture"] == FACADE) & side
    number, share = np.floor(q["seed"]), q["seed"] % 1
    pitch, floor = 2.2 + (number % 5) * 0.35, 3.0 + (number % 3) * 0.25
    above = height - 1.0
    iu, iv = np.floor(u / pitch), np.floor(above / floor)
    fu, fv = np.abs(u / pitch - iu - 0.5), above / floor - iv
    shop = iv == 0
    window = (fu < np.where(shop, 0.44, share / 2)) & (fv > np.where(shop, 0.12, 0.26)) & (fv < np.where(shop, 0.72, 0.82))
    window &= facade & (height < 2 * q["half"][:, 2] - 0.5) & (above > 0) & (np.abs(u) < edge - 0.4)
    pick = _hash(iu, iv, number)
    color[facade] *= (1 - 0.25 * (fv[facade] > 0.93) - 0.12 * (pick[facade] > 0.8))[:, None]
    brick = facade & (s.city.side < 0)
    mortar = (height / 0.2 % 1 < 0.16) | ((u / 0.5 + 0.5 * np.floor(height / 0.2)) % 1 < 0.08)
    color[brick & mortar] *= 1.18
    color[window] = np.where(pick[window, None] > 0.75, (0.16, 0.15, 0.13), (0.035, 0.05, 0.065))
    glassy[window] = 0.35 + 0.4 * pick[window]
    if night:
        lit = window & (pick > np.where(shop, 0.4, 0.72))
        warm = np.where((pick * 57 % 1 > 0.3)[:, None], (0.75, 0.45, 0.16), (0.45, 0.52, 0.55))
        glow[lit] = (warm * (0.15 + 0.55 * (pick * 91 % 1))[:, None])[lit]

    cabin = (q["texture"] == GLASS) & side & (np.abs(u) < 0.86 * (edge - 0.3 * height)) & (np.abs(u) > 0.03)
    bands = (q["texture"] == BANDS) & side & (np.abs(u) < edge - 0.15)
    part = height / (2 * q["half"][:, 2])
    pane = bands & np.where(
        q["seed"] > 1.8, ((part > 0.2) & (part < 0.4)) | ((part > 0.62) & (part < 0.84)), (part > 0.42) & (part < 0.78)
    )
    pane &= (u % 1.4) > 0.1
    color[cabin | pane], glassy[cabin | pane] = (0.02, 0.024, 0.03), 0.45
    if night:
        glow[pane] = (0.22, 0.22, 0.17)
    lamp = q["texture"] == LAMP
    glow[lamp] = q["color"][lamp] * (6.0 if night else 0.25)
    painted = np.isin(q["label"], (CAR, TRUCK, BUS)) & ~lamp
    glassy[painted & (glassy == 0) & (q["reflect"] > 0.2)] = 0.08
    return color, glow, glassy


def _sky(light: Light, d: Array, seed: float) -> Array:
    """Radiance (N, 3) of the sky along directions d (N, 3)."""
    up = np.clip(d[:, 2], 0, 1)
    base = np.array(light.horizon) + (np.array(light.zenith) - light.horizon) * (1 - np.exp(-4.5 * up))[:, None]
    scale = 1 / (up + 0.12)
    clouds = np.clip((_noise2(d[:, 0] * scale + seed, d[:, 1] * scale, 0.012, 1.9) - 1 + light.clouds) / 0.4, 0, 1) * np.clip(
        up * 9, 0, 1
    )
    cover: Array = base + (np.array(light.horizon) * 1.18 - base) * (0.75 * clouds)[:, None]
    return cover


def _shadow(s: Scene, prims: Array, centre: Array, p: Array) -> Array:
    """1 where points p (N, 3) see the sun and 0 in shadow, by a depth map of parallel rays around `centre`."""
    extent, cells = 55.0, 440
    n = s.sun
    a = np.cross(n, (0, 0, 1.0))
    a /= np.linalg.norm(a)
    b = np.cross(n, a)
    axes = np.stack([a, b, n], 1)
    step = 2 * extent / cells
    v, u = np.meshgrid(*[(np.arange(cells) + 0.5) * step - extent] * 2, indexing="ij")
    start = centre + n * 90
    o = [(start[k] + u * a[k] + v * b[k]).astype(np.float32) for k in range(3)]
    d = [np.full((cells, cells), -n[k], np.float32) for k in range(3)]

    def window(corners: Array) -> Array:
        seen = ((corners - start) @ axes + extent) / step
        every = np.ones(len(corners), bool)
        return _box_window(seen[..., 0], seen[..., 1], every, ~every, (cells, cells))

    depth, _ = cast(Rays((o[0], o[1], o[2]), (d[0], d[1], d[2]), window), prims, None)
    seen = (p - start) @ axes
    lit = np.zeros(len(p))
    for shift in (-0.35, 0.35):
        column, row = ((seen[:, k] + extent) / step + shift for k in range(2))
        inside = (column >= 0) & (row >= 0) & (column < cells) & (row < cells)
        nearest = depth[row.clip(0, cells - 1).astype(int), column.clip(0, cells - 1).astype(int)]
        lit += np.where(inside & (nearest < -seen[:, 2] - 0.3), 0.0, 0.5)
    return lit


def _photo(
    s: Scene, prims: Array, position: Array, rotation: Array, rng: np.random.Generator, oversample: int = 2
) -> Image.Image:
    """The camera's image, (HEIGHT, WIDTH) RGB."""
    rays, light = _camera_rays(position, rotation, oversample), s.light
    t, hit = (v.ravel() for v in cast(rays, prims, s))
    d = np.stack([v.ravel() for v in rays.direction], 1)
    out = _sky(light, d, float(s.bend[1]))
    solid = np.isfinite(t)
    t, hit, d = t[solid], hit[solid], d[solid]
    p = position + d * t[:, None]
    color, glow, glassy, normal = (np.empty_like(d, np.float64), np.zeros_like(d, np.float64), np.zeros(len(t)), np.zeros_like(d))
    earth, thing = hit < 0, hit >= 0
    color[earth] = _ground_paint(s, p[earth])[0]
    normal[earth] = (0, 0, 1)
    normal[thing], local = _surface(prims, hit[thing], p[thing])
    color[thing], glow[thing], glassy[thing] = _object_paint(s, prims, hit[thing], p[thing], normal[thing], local)
    leafy = thing & (prims["texture"][hit] == LEAF)
    normal[leafy] = normal[leafy] * 0.7 + (0, 0, 0.3)

    ahead = rotation[:, 2]
    lit = _shadow(s, prims, position + ahead * 32, p)
    facing = np.clip(normal @ s.sun, 0, 1)
    facing[leafy] = 0.25 + 0.6 * facing[leafy]
    sky_share = (0.62 + 0.38 * normal[:, 2]) * (0.62 + 0.38 * lit)
    radiance = sky_share[:, None] * np.array(light.ambient) + (facing * lit)[:, None] * np.array(light.sun)
    if light.lamps:
        for lamp in s.lamps:
            if -25 < (np.array(lamp) - position) @ ahead < 90:
                to = np.array(lamp) - p
                far = (to**2).sum(1)
                cone = np.clip(to[:, 2] / np.sqrt(far + 0.01) - 0.1, 0, 1) * np.clip(
                    (normal * to).sum(1) / np.sqrt(far + 0.01), 0.12, 1
                )
                radiance += (22.0 * cone * (0.35 + 0.65 * lit) / (far + 6))[:, None] * np.array((1.0, 0.66, 0.30))
        beam = p - position + (0, 0, 0.8)
        far = np.sqrt((beam**2).sum(1))
        angle = np.clip((beam @ ahead) / far, 0, 1) ** 14
        grazing = np.clip(-(normal * beam).sum(1) / far, 0.08, 1)
        radiance += (26.0 * angle * grazing * np.clip(1.6 - beam[:, 2] * 0.5, 0.05, 1) / (far**2 + 25))[:, None] * np.array(
            (1.0, 0.95, 0.82)
        )
    mirror = d - 2 * (d * normal).sum(1, keepdims=True) * normal
    seen = color * radiance * (1 - glassy[:, None] * 0.6) + glassy[:, None] * _sky(light, mirror, float(s.bend[1])) + glow
    fog = np.exp(-t / light.haze)[:, None]
    out[solid] = seen * fog + (1 - fog) * np.array(light.horizon)
    picture = out.reshape(HEIGHT, oversample, WIDTH, oversample, 3).mean((1, 3))
    if light.lamps:
        halo = Image.fromarray((np.clip(picture, 0, 1.5) * 170).astype(np.uint8)).filter(ImageFilter.GaussianBlur(5))
        picture = picture + np.maximum(np.asarray(halo) / 170.0 - 0.08, 0) * 0.5
    v, u = np.mgrid[0:HEIGHT, 0:WIDTH]
    vignette = 1 - 0.28 * (((u - WIDTH / 2) / WIDTH) ** 2 + ((v - HEIGHT / 2) / HEIGHT) ** 2)
    film = (1 - np.exp(-light.exposure * picture * vignette[..., None])) ** (1 / 2.2)
    exposed = 255 * (film - 0.06 * np.sin(2 * np.pi * film))
    grain = rng.standard_normal((HEIGHT, WIDTH, 3)) + 0.5 * rng.standard_normal((HEIGHT, WIDTH, 1))
    return Image.fromarray(np.clip(exposed + light.sensor_noise * grain, 0, 255).astype(np.uint8))


def _sweep(
    s: Scene, prims: Array, position: Array, rotation: Array, drop: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Points (N, 5) float32: x, y, z in the LiDAR's frame, intensity 0-255, ring; and labels (N,) uint8."""
    rays, local = _lidar_rays(position, rotation)
    t, hit = cast(rays, prims, s)
    # Column by column, as the sensor spins.
    t, hit = t.T.ravel(), hit.T.ravel()
    d, own = (np.stack([v.T.ravel() for v in grid], 1) for grid in (rays.direction, local))
    ring = np.tile(np.arange(BEAMS, dtype=np.float32), COLUMNS)
    seen = t < MAX_RANGE
    t, hit, d, own, ring = t[seen], hit[seen], d[seen], own[seen], ring[seen]
    p = position + d * t[:, None]
    earth, thing = hit < 0, hit >= 0
    reflect, label, normal = np.empty(len(t)), np.empty(len(t), np.uint8), np.zeros_like(d)
    _, reflect[earth], label[earth] = _ground_paint(s, p[earth])
    normal[earth] = (0, 0, 1)
    normal[thing], at = _surface(prims, hit[thing], p[thing])
    glassy = _object_paint(s, prims, hit[thing], p[thing], normal[thing], at)[2]
    reflect[thing] = prims["reflect"][hit[thing]] * np.where(glassy > 0.3, 0.12, 1.0)
    label[thing] = prims["label"][hit[thing]]
    incidence = np.abs((normal * d).sum(1)) ** 0.6
    echo = reflect * (0.1 + 0.9 * incidence) * rng.uniform(0.8, 1.2, len(t))
    keep = (rng.random(len(t)) > drop) & (rng.random(len(t)) < 1 - np.exp(-echo * (55.0 / t) ** 2 * 3.0))
    # Grass scatters the beam, which is what tells a lawn from a pavement at the same height.
    t = t + rng.normal(0, 1, len(t)) * np.where(label == TERRAIN, 0.04, 0.015)
    intensity = np.floor(np.clip(echo * 110 * np.exp(-t / 90), 1, 255))
    stray = rng.random(len(t)) < 0.0008
    t[stray] *= rng.uniform(0.3, 0.95, len(t))[stray]
    label[stray] = NOISE
    points = np.concatenate([own * t[:, None], intensity[:, None], ring[:, None]], 1)[keep].astype(np.float32)
    return points, label[keep]


@dataclass(frozen=True)
class _Job:
    """One frame to render: where it belongs, and the files it becomes."""

    root: Path
    world: str
    city: str
    key: tuple[int, ...]
    number: int  # of the frame within its scene
    travel: float
    start: int  # microseconds
    log: str
    lidar_token: str
    camera_token: str

    def sensor(self, channel: str) -> tuple[str, int, str]:
        """Token, timestamp and file name of a channel's sample_data. The image comes before the sweep ends."""
        stamp = self.start + self.number * 1_000_000 - (35_491 if channel == "CAM_FRONT" else 0)
        token, ending = (self.camera_token, "jpg") if channel == "CAM_FRONT" else (self.lidar_token, "pcd.bin")
        return token, stamp, f"samples/{channel}/{self.log}__{channel}__{stamp}.{ending}"


def _mount(city: str, channel: str) -> tuple[Array, Array]:
    translation, rotation = (_CAMERA_T, _CAMERA_Q) if channel == "CAM_FRONT" else (_LIDAR_T, _LIDAR_Q)
    return translation + np.array([0, 0, CITIES[city].mount]), rotation


def _render(job: _Job) -> list[dict[str, Any]]:
    """Writes the frame's three files and returns its two rows of ego_pose.json."""
    scene = build_scene(job.world, job.city, job.key, job.travel, float(job.number))
    prims = np.array(scene.rows, PRIM)
    phase = np.random.default_rng([*job.key, 1]).uniform(0, 6.28, 6)
    rng = np.random.default_rng([*job.key, 2, job.number])
    street_q = _euler(float(phase[3]))
    street_t = np.array([300 + 200 * phase[4], 300 + 200 * phase[5], 0.0])
    poses = []
    for channel in ("LIDAR_TOP", "CAM_FRONT"):
        token, stamp, name = job.sensor(channel)
        time = (stamp - job.start) / 1e6
        x = scene.speed * time
        sway = [
            a * math.sin(w * time + p) for a, w, p in ((0.012, 0.9, phase[0]), (0.007, 2.1, phase[1]), (0.006, 1.7, phase[2]))
        ]
        ego_t = np.array([x, float(scene.centre(x)) + scene.city.side * scene.lane / 2, 0.0])
        ego_q = _euler(math.atan(scene.bend[0] / scene.bend[1] * math.cos(x / scene.bend[1])) + sway[0], sway[1], sway[2])
        mount_t, mount_q = _mount(job.city, channel)
        position, rotation = ego_t + _rotation(ego_q) @ mount_t, _rotation(_compose(ego_q, mount_q))
        if channel == "CAM_FRONT":
            _photo(scene, prims, position, rotation, rng).save(job.root / name, quality=92)
        else:
            points, label = _sweep(scene, prims, position, rotation, WORLDS[job.world].lidar_drop, rng)
            points.tofile(job.root / name)
            label.tofile(job.root / f"lidarseg/v1.0-trainval/{token}_lidarseg.bin")
        translation = street_t + _rotation(street_q) @ ego_t
        poses.append({"token": token, "timestamp": stamp, "rotation": _compose(street_q, ego_q).tolist(),
                      "translation": translation.tolist()})  # fmt: skip
    return poses


def _plan(world: str, split: str) -> list[tuple[str, str]]:
    """The (city, scene name) pairs that a split may use, in the order of use."""
    queues = []
    for city in WORLDS[world].cities:
        names = NAMES["night" if WORLDS[world].light.lamps else city]
        if split == "train" and "labelled" in names:
            ranked = [
                ((i + 0.5) / share, n)
                for part, share in (("labelled", 0.3), ("unlabelled", 0.7))
                for i, n in enumerate(names[part])
            ]
            queues.append([(city, name) for _, name in sorted(ranked)])
        else:
            queues.append([(city, name) for name in names[split]])
    return [pair for row in zip(*queues, strict=False) for pair in row]


def _token(*parts: object) -> str:
    return hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _tables(
    root: Path, source: str, target: str, frames: dict[str, int], seed: int
) -> tuple[dict[str, list[dict[str, Any]]], list[_Job]]:
    """All tables (ego_pose still empty) and the frames to render."""
    names = "sample sample_data scene log calibrated_sensor ego_pose sensor category lidarseg attribute visibility instance"
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in [*names.split(), "sample_annotation", "map"]}
    salt = (VERSION, source, target, seed)

    def add(table: str, token: str, **row: Any) -> str:
        tables[table].append({"token": token, **row})
        return token

    for index, name in enumerate(CATEGORIES):
        add("category", _token("category", name), name=name, description="", index=index)
    for channel, modality in (("LIDAR_TOP", "lidar"), ("CAM_FRONT", "camera")):
        add("sensor", _token("sensor", channel), channel=channel, modality=modality)
    jobs: list[_Job] = []
    for index, (part, world) in enumerate((("source", source), ("target", target), ("val", target), ("test", target))):
        pool = _plan(world, part if part in ("val", "test") else "train")
        length = max(FRAMES_PER_SCENE, math.ceil(frames[part] / len(pool)))
        for number in range(math.ceil(frames[part] / length)):
            count = min(length, frames[part] - number * length)
            jobs += _scene_rows(add, root, world, pool[number], (seed, list(WORLDS).index(world), index, number), count,
                                10.0 * (length - 1), len(tables["scene"]), salt)  # fmt: skip
    return tables, jobs


def _scene_rows(
    add: Callable[..., str], root: Path, world: str, place: tuple[str, str], key: tuple[int, ...], count: int,
    travel: float, ordinal: int, salt: tuple[Any, ...],
) -> list[_Job]:  # fmt: skip
    """Adds the rows of one scene and returns its frames."""
    (city, name), zone = place, timezone(timedelta(hours=8 if place[0] == "singapore" else -4))
    hour, later = 20 if WORLDS[world].light.lamps else 10, timedelta(days=ordinal % 90, minutes=7 * (ordinal // 90))
    begin = datetime(2018, 7, 1, hour, tzinfo=zone) + later
    start, vehicle, where = int(begin.timestamp()) * 1_000_000, CITIES[city].vehicle, CITIES[city].locations
    file = f"{vehicle}-{begin:%Y-%m-%d-%H-%M-%S%z}"
    log = add("log", _token(*salt, "log", name), logfile=file, vehicle=vehicle, date_captured=f"{begin:%Y-%m-%d}",
              location=where[key[-1] % len(where)])  # fmt: skip
    mounts = {}
    for channel in ("LIDAR_TOP", "CAM_FRONT"):
        (shift, rotation), sensor = _mount(city, channel), _token("sensor", channel)
        mounts[channel] = add(
            "calibrated_sensor", _token(*salt, "calibration", name, channel), sensor_token=sensor,
            translation=shift.tolist(), rotation=rotation.tolist(),
            camera_intrinsic=_INTRINSIC if channel == "CAM_FRONT" else [],
        )  # fmt: skip
    samples = ["", *(_token(*salt, "sample", name, k) for k in range(count)), ""]
    scene = add("scene", _token(*salt, "scene", name), log_token=log, nbr_samples=count, name=name,
                first_sample_token=samples[1], last_sample_token=samples[count],
                description=WORLDS[world].description)  # fmt: skip
    jobs = [
        _Job(root, world, city, key, k, travel, start, file, *(_token(*salt, name, k, c) for c in mounts)) for k in range(count)
    ]
    for k, job in enumerate(jobs):
        stamp = job.sensor("LIDAR_TOP")[1]
        add("sample", samples[k + 1], timestamp=stamp, prev=samples[k], next=samples[k + 2], scene_token=scene)
        add("lidarseg", job.lidar_token, sample_data_token=job.lidar_token,
            filename=f"lidarseg/v1.0-trainval/{job.lidar_token}_lidarseg.bin")  # fmt: skip
        for channel, ending, height, width in (("LIDAR_TOP", "pcd", 0, 0), ("CAM_FRONT", "jpg", HEIGHT, WIDTH)):
            token, stamp, filename = job.sensor(channel)
            beside = ["", *(other.sensor(channel)[0] for other in jobs), ""]
            add("sample_data", token, sample_token=samples[k + 1], ego_pose_token=token, timestamp=stamp,
                calibrated_sensor_token=mounts[channel], fileformat=ending, is_key_frame=True, height=height,
                width=width, filename=filename, prev=beside[k], next=beside[k + 2])  # fmt: skip
    return jobs


def _check(root: Path, source: str, target: str, frames: dict[str, int], seed: int, workers: int) -> None:
    for name in (source, target):
        if name not in WORLDS:
            near = difflib.get_close_matches(name, WORLDS, 1)
            raise ValueError(
                f"unknown world {name!r}{f', did you mean {near[0]!r}?' if near else ''} (known: {', '.join(WORLDS)})"
            )
    if frozenset((source, target)) not in map(frozenset, (("usa", "singapore"), ("day", "night"), ("usa", "night"))):
        raise ValueError(
            f"worlds {source!r} and {target!r} cannot share a data set: readers could not tell their scenes apart. "
            "Use usa with singapore, day with night, or usa with night."
        )
    unknown = sorted(set(frames) - set(DEFAULT_FRAMES))
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r} in frames (known: {', '.join(DEFAULT_FRAMES)})")
    for key, count in frames.items():
        if count < 1:
            raise ValueError(f"frames[{key!r}] is {count}, expected at least 1")
    if seed < 0 or workers < 1:
        raise ValueError(f"seed is {seed} and workers {workers}, expected seed >= 0 and workers >= 1")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f"{root} exists and is not an empty folder: remove it or choose another place")


def write_world(
    root: Path,
    source: str,
    target: str,
    frames: dict[str, int] | None = None,
    seed: int = 0,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a data set in the nuScenes layout with source-train and target-train, -val and -test frames.

    root: the folder to create; its parent is made if need be. source, target: names in WORLDS. frames: overrides of
    DEFAULT_FRAMES by key. workers: processes; the files do not depend on it. progress: called with (done, total).

    The files are written to a sibling folder that is renamed at the end, so `root` is whole or absent. Raises
    ValueError for unknown or inseparable worlds and for counts out of range, FileExistsError if `root` is not empty.
    """
    root, frames = Path(root), frames or {}
    _check(root, source, target, frames, seed, workers)
    partial = root.with_name(f".{root.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for folder in ("v1.0-trainval", "samples/LIDAR_TOP", "samples/CAM_FRONT", "lidarseg/v1.0-trainval"):
            (partial / folder).mkdir(parents=True)
        tables, jobs = _tables(partial, source, target, DEFAULT_FRAMES | frames, seed)
        for done, poses in enumerate(_render_all(jobs, workers), 1):
            tables["ego_pose"] += poses
            if progress:
                progress(done, len(jobs))
        for name, rows in tables.items():
            (partial / "v1.0-trainval" / f"{name}.json").write_text(json.dumps(rows, indent=0) + "\n")
        os.replace(partial, root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _render_all(jobs: list[_Job], workers: int) -> Iterator[list[dict[str, Any]]]:
    if min(workers, len(jobs)) == 1:
        yield from map(_render, jobs)
        return
    # Spawned, not forked: the caller may hold threads or a CUDA context.
    with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(_render, jobs)
        finally:
            pool.shutdown(cancel_futures=True)
