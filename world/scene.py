"""What stands where in the street world: cities, their light, and the street of one scene.

A scene is a street and a list of convex primitives. The street is a height field whose bands
(pavement, lawn) follow the distance to the kerb. How places are built, painted, lit and
photographed, and what things are made of, stands in `tables.toml`.

Lengths are in metres, angles in radians, colours linear RGB in 0..1. The x axis runs along the
street, z points up.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ftdpp.readers.base import Array

TABLES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("tables.toml").read_text())
LABELS = tuple(TABLES["labels"])  # a label is an index into this list
NOISE, ROAD, LANE_MARKING, PARKING, SIDEWALK, TERRAIN = range(6)
SHAPES = ("box", "cylinder", "ellipsoid")  # a box may have slanted sides; a cylinder stands upright
BOX, CYLINDER, ELLIPSOID = range(3)
TEXTURES = ("plain", "facade", "glass", "bands", "leaf", "lamp", "slats", "brick")
PLAIN, FACADE, GLASS, BANDS, LEAF, LAMP, SLATS, BRICK = range(8)
CODES = {name: code for names in (LABELS, SHAPES, TEXTURES) for code, name in enumerate(names)}
VEGETATION, SKY = CODES["vegetation"], CODES["sky"]
VEHICLES = [CODES[name] for name in ("car", "van", "truck", "bus", "train")]

Vector = Sequence[float]  # x, y, z
RGB = Sequence[float] | Array
Rng = np.random.Generator
Pose = tuple[float, float, float, float]  # x, y, z, yaw

# half: half extents; cos, sin: of the yaw; taper: how far the x and y sides lean inwards, per metre
# of height; reflect: for the LiDAR, 0..1; pattern: of leaves the offset into the noise, of a facade
# the style, plus the share of glass as its fraction.
PRIMITIVE = np.dtype(
    [
        ("center", "f4", 3), ("half", "f4", 3), ("cos", "f4"), ("sin", "f4"), ("taper", "f4", 2),
        ("color", "f4", 3), ("reflect", "f4"), ("pattern", "f4"),
        ("kind", "u1"), ("label", "u1"), ("texture", "u1"),
    ],
    align=True,
)  # fmt: skip
PROFILE_CELLS, CELLS_PER_METRE = 2500, 50  # of the street's cross-section
ROW_PIECE = 8.0  # metres between the pieces of a wall or a hedge


def _rows(table: str) -> dict[str, SimpleNamespace]:
    """The rows of a table. One that is `like` another has that one's values where it has none."""
    full: dict[str, dict[str, Any]] = {}
    for name, row in TABLES[table].items():
        full[name] = full.get(row.get("like"), {}) | row
    return {name: SimpleNamespace(**row) for name, row in full.items()}


CITIES, LIGHTS, WORLDS = _rows("cities"), _rows("lights"), _rows("worlds")


class Scene:
    """One street with everything on it, at one moment."""

    def __init__(self, world: str, city: str, key: tuple[int, ...], travel: float, time: float):
        """Builds the street.

        world, city: names in WORLDS and CITIES. key: the scene's random key. travel: metres that
        the ego car covers in the whole scene; the street is built as far as it will see. time:
        seconds since the scene's start; moves the traffic.
        """
        rng = np.random.default_rng(key)
        self.rows: list[tuple[Any, ...]] = []  # of PRIMITIVE
        self.lamps: list[Vector] = []  # positions of street lamps
        self.reach = (-75.0, travel + 115.0)  # first and last x that is built
        self.city, self.world = CITIES[city], WORLDS[world]
        dull = len(self.world.lights) > 1 and rng.random() < 0.5
        self.light = LIGHTS[self.world.lights[dull]]
        self.lanes = 1 + int(rng.random() < self.city.two_lanes)  # in each direction
        parking = rng.random() < self.city.parking
        self.lane = rng.uniform(3, 3.4)  # width
        crossing = rng.random() < 0.45
        azimuth = rng.uniform(-math.pi, math.pi)
        elevation = math.radians(rng.uniform(*self.light.elevation))
        flat, up = math.cos(elevation), math.sin(elevation)
        # Unit vector (3,) towards it.
        self.sun = np.array([math.cos(azimuth) * flat, math.sin(azimuth) * flat, up])
        # The cross-section of each side beyond the kerb, (2, PROFILE_CELLS). Cell 0 is the road;
        # side 1 lies at positive y.
        self.profile_height = np.zeros((2, PROFILE_CELLS), np.float32)
        self.profile_label = np.full((2, PROFILE_CELLS), ROAD, np.uint8)
        self.walk = [(0.0, 0.0), (0.0, 0.0)]  # where the pavement begins and ends beyond the kerb
        self.setback = [0.0, 0.0]  # where the buildings may begin
        self._lay_bands(rng)
        self.colors = np.zeros((TERRAIN + 1, 3), np.float32)  # (labels, 3) of the ground
        for ground in (ROAD, SIDEWALK, TERRAIN):
            self.colors[ground] = _pick(rng, [getattr(self.city, LABELS[ground])], 0.15)
        # The centre line is bend[0] * sin(x / bend[1]).
        self.bend = rng.uniform(-5, 5), rng.uniform(45, 90)
        # x of the crossing street's centre; far away where there is none.
        self.cross = rng.uniform(18, 55) if crossing else 1e6
        self.cross_half = self.lane + 1.5  # half its width
        self.half = self.lanes * self.lane + (2.3 if parking else 0.0)  # half the road's width
        self.speed = rng.uniform(6, 10)  # of the traffic and of the ego car, m/s
        for side in (0, 1):
            self._line(side, rng)
        if crossing:
            self._crossing(rng)
        if rng.random() < self.city.roadworks:
            self._roadworks(rng)
        self._traffic(parking, time, rng)

    def _lay_bands(self, rng: Rng) -> None:
        """One of the city's variants of what lies between kerb and buildings, for each side."""
        variants = self.city.bands
        for side in (0, 1):
            edge = 0.0
            for label, narrow, wide, level, slope in variants[rng.integers(len(variants))]:
                start, edge = edge, edge + rng.uniform(narrow, wide)
                cell = 1 + round(start * CELLS_PER_METRE)
                rise = np.minimum(np.arange(PROFILE_CELLS - cell) / CELLS_PER_METRE, 6.0) * slope
                self.profile_height[side, cell:] = level + rise
                self.profile_label[side, cell:] = CODES[label]
                if label == "sidewalk":
                    self.walk[side] = (start, edge)
            self.setback[side] = edge

    def _line(self, side: int, rng: Rng) -> None:
        """What the city's strips put along one side of the street."""
        chance, seed = rng.random(), int(rng.integers(1 << 31))
        for what, gap in self.city.strips:
            place, margin = TABLES["strips"][what]
            build = BUILDERS.get(what) or partial(_thing, what=what)
            row = gap < 1
            if row:  # a side of the street has one row, or none
                chance -= gap
                if not -gap <= chance < 0:
                    continue
            for x in _along(rng, self.reach, ROW_PIECE if row else gap, 0 if row else 0.3):
                across = (2 * side - 1) * (self.half + self.across(place, side, rng))
                if rng.random() < 0.85 and abs(x - self.cross) > self.cross_half + margin:
                    turn = rng.uniform(-3, 3) if what == "person" else 0.0
                    # The pieces of a row are alike.
                    draw = np.random.default_rng(seed) if row else rng
                    build(self, self.site(x, across, turn), draw)

    def _crossing(self, rng: Rng) -> None:
        """Traffic lights, a car waiting on each side and people who cross."""
        for sign in (-1, 1):
            x = self.cross - self.city.side * sign * (self.cross_half + 0.8)
            _thing(self, self.site(x, sign * (self.half + 0.8)), rng, "signal")
            y = float(self.centre(self.cross)) + sign * (self.half + rng.uniform(6, 9))
            _vehicle(self, (self.cross + sign * self.lane / 2, y, 0.0, math.pi / 2), rng)
            for _ in range(2):
                x = self.cross - self.cross_half - rng.uniform(1.4, 3.2)
                across = rng.uniform(-self.half, self.half)
                _person(self, self.site(x, across, math.pi / 2), rng)

    def _roadworks(self, rng: Rng) -> None:
        """A row of cones or of barriers along the kerb."""
        sign = self.city.side * (2 * self.lanes - 3)
        start, what = rng.uniform(8, 40), "cone" if rng.random() < 0.5 else "barrier"
        for k in range(7):
            base = self.site(start + k * 2.4, sign * (self.half - 0.35))
            _assemble(self, base, what, TABLES["palettes"]["barrier"][k % 2])

    def _traffic(self, parking: bool, time: float, rng: Rng) -> None:
        """Parked cars, then moving ones lane by lane."""
        keep_side = self.city.side
        for sign in (-1, 1) if parking else ():
            for x in _along(rng, self.reach, 10):
                if abs(x - self.cross) > self.cross_half + 9 and rng.random() < 0.8:
                    turn = 0.0 if sign == keep_side else math.pi
                    _vehicle(self, self.pose(x, sign * (self.half - 1.15), turn), rng, parked=True)
        for direction in (1, -1):
            for lane in range(self.lanes):
                # The first car of the ego lane keeps its distance; behind the ego car that lane is
                # empty.
                x = rng.uniform(*((15, 42) if direction == 1 and lane == 0 else (-50, -30)))
                while x < self.reach[1]:
                    middle = direction * keep_side * self.lane * (lane + 0.5)
                    at = x + direction * self.speed * time
                    turn = 0.0 if direction == 1 else math.pi
                    _vehicle(self, self.pose(at, middle + rng.uniform(-0.2, 0.2), turn), rng)
                    x += rng.uniform(18, 48)

    @cached_property
    def primitives(self) -> Array:
        """All that was added, (P,) of PRIMITIVE."""
        return np.array(self.rows, PRIMITIVE)

    @cached_property
    def corners(self) -> Array:
        """(P, 8, 3) of the boxes around the primitives."""
        prims = self.primitives
        signs = np.array(list(itertools.product((-1, 1), repeat=3)), np.float32)
        x, y, z = np.moveaxis(prims["half"][:, None] * signs, -1, 0)
        cos, sin = prims["cos"][:, None], prims["sin"][:, None]
        return np.stack([cos * x - sin * y, sin * x + cos * y, z], -1) + prims["center"][:, None]

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
        cell += PROFILE_CELLS * (across > 0)
        return self.profile_height.ravel()[cell], self.profile_label.ravel()[cell], across, beyond

    def across(self, place: str, side: int, rng: Rng) -> float:
        """Distance from the kerb of a place that the table `strips` names."""
        (begin, end), setback = self.walk[side], self.setback[side]
        return {
            "kerb": 0.45,
            "verge": (0.9 if begin < 0.5 else begin * 0.5) + rng.uniform(-0.1, 0.3),
            "walk": rng.uniform(begin + 0.3, max(end, begin + 1.0) - 0.3),
            "fence": end + 0.5,
            "garden": rng.uniform(end + 1.1, max(end + 1.6, setback)),
            "front": max(setback, end + 0.8) + rng.uniform(0.3, 2.0),
            "back": setback + rng.uniform(22.0, 30.0),
        }[place]

    def pose(self, x: float, across: float, turn: float = 0.0) -> Pose:
        """The base of something that stands at `x`, `across` from the centre line."""
        y = float(self.centre(x)) + across
        z = float(self.ground(np.array([x]), np.array([y]))[0][0])
        return x, y, z, self.heading(x) + turn

    def site(self, x: float, across: float, turn: float = 0.0) -> Pose:
        """As `pose`; its y axis points to the road."""
        return self.pose(x, across, turn + (math.pi if across > 0 else 0.0))

    def place(self, base: Pose, offset: Vector) -> Vector:
        """The point of the scene at `offset` in the frame of `base`."""
        (x, y, z, yaw), (dx, dy, dz) = base, offset
        cos, sin = math.cos(yaw), math.sin(yaw)
        return x + cos * dx - sin * dy, y + sin * dx + cos * dy, z + dz

    def add(
        self, base: Pose, shape: str, label: str, offset: Vector, half: Vector, color: RGB,
        texture: str = "plain", taper: Sequence[float] = (0.0, 0.0), reflect: float = 0.3,
        pattern: float = 0.0,
    ) -> None:  # fmt: skip
        """Adds a primitive whose centre is at `offset` in the frame of `base`."""
        where = self.place(base, offset), half, math.cos(base[3]), math.sin(base[3]), taper
        codes = CODES[shape], CODES[label], CODES[texture]
        self.rows.append((*where, color, reflect, pattern, *codes))


def _pick(rng: Rng, colors: Sequence[RGB], spread: float = 0.12) -> Array:
    """One of the colours (3,), brighter or darker by up to `spread`."""
    color = np.array(colors[int(rng.integers(len(colors)))])
    return color * rng.uniform(1 - spread, 1 + spread)


def _along(rng: Rng, reach: Vector, gap: float, spread: float = 0.3) -> Iterator[float]:
    """Positions along the street, `gap` apart on average."""
    x = reach[0] + gap * rng.random()
    while x < reach[1]:
        yield x
        x += gap * rng.uniform(1 - spread, 1 + spread)


def _assemble(
    scene: Scene, base: Pose, what: str, paint: RGB, along: float = 1.0, tall: float = 1.0
) -> None:
    """Something of the table `parts`, stretched in length and height.

    paint: for the materials that have no colour.
    """
    for shape, label, (x, y, z), (hx, hy, hz), material, *more in TABLES["parts"][what]:
        twins, taper = more or ("", (0, 0))
        look = {"color": paint, "taper": taper} | TABLES["materials"][material]
        if not look.pop("rigid", False):
            hx, hz = hx * abs(along), hz * tall
        for ahead in (x * along, -x * along) if "x" in twins else (x * along,):
            for left in (y, -y) if "y" in twins else (y,):
                scene.add(base, shape, label, (ahead, left, z * tall), (hx, hy, hz), **look)


def _thing(scene: Scene, base: Pose, rng: Rng, what: str) -> None:
    """Street furniture."""
    tall = rng.uniform(*TABLES["stretch"][what])
    tone = _pick(rng, scene.city.walls if what == "wall" else TABLES["palettes"]["tones"])
    _assemble(scene, base, what, tone, -scene.city.side, tall)
    if what == "lamp":
        scene.lamps.append(scene.place(base, (0, 2.2, 6.9)))


def _vehicle(scene: Scene, base: Pose, rng: Rng, parked: bool = False) -> None:
    """Something of the city's traffic, with its rider; or something short that is parked."""
    long = ("truck", "bus", "tram") if parked else ()
    mix = {kind: share for kind, share in scene.city.mix.items() if kind not in long}
    kind = str(rng.choice(list(mix), p=np.array(list(mix.values())) / sum(mix.values())))
    paint, scale = _pick(rng, scene.city.paint), rng.uniform(0.95, 1.05)
    lean = {"bicycle": 0.28, "motorcycle": 0.12}.get(kind)
    if lean:
        paint, scale = _pick(rng, scene.city.paint), 1.0
    _assemble(scene, base, kind, paint, scale)
    if lean and not parked:
        _person(scene, base, rng, lean)


def _bike(scene: Scene, base: Pose, rng: Rng) -> None:
    """A bicycle that leans on a fence."""
    _assemble(scene, base, "bicycle", _pick(rng, scene.city.paint))


def _person(scene: Scene, base: Pose, rng: Rng, riding: float = 0.0) -> None:
    """Somebody who walks; or who rides, leaning forward by `riding` metres."""
    scale = 0.7 if rng.random() < 0.12 and not riding else rng.uniform(0.93, 1.06)
    palettes, label = TABLES["palettes"], "rider" if riding else "person"
    shirt, trousers, hair = (_pick(rng, palettes[of], 0.5) for of in ("shirt", "trousers", "hair"))
    skin = _pick(rng, palettes["skin"])
    stride, hip = rng.uniform(0.02, 0.09), 0.95 if riding else 0.84 * scale
    ball = partial(scene.add, base, "ellipsoid", label)
    for side in (-1, 1):
        step = side * stride
        leg, arm = (step, side * 0.09, hip / 2), (riding * 1.4 - step, side * 0.23, hip + 0.28)
        scene.add(base, "cylinder", label, leg, (0.1, 0.085, hip / 2), trousers)
        ball(arm, (0.3, 0.065, 0.09) if riding else (0.09, 0.065, 0.3 * scale), shirt)
    ball((riding * 0.5, 0, hip + 0.28 * scale), (0.15 + riding * 0.4, 0.2, 0.38 * scale), shirt)
    head = hip + 0.72 * scale
    ball((riding, 0, head), (0.11, 0.095, 0.14), skin)
    ball((riding - 0.03, 0, head + 0.05), (0.115, 0.105, 0.12), hair)


def _leaves(scene: Scene, base: Pose, at: Vector, half: Vector, rng: Rng, shape: str) -> None:
    color, offset = _pick(rng, scene.city.leaves, 0.25), rng.random() * 60
    scene.add(base, shape, "vegetation", at, half, color, "leaf", reflect=0.5, pattern=offset)


def _tree(scene: Scene, base: Pose, rng: Rng) -> None:
    radius, half_height, trunk = (size * rng.uniform(0.8, 1.25) for size in scene.city.crown)
    palm = rng.random() < scene.city.palm
    middle = rng.uniform(2.4, 3.6) if palm else (trunk + half_height) / 2
    thick = 0.14 if palm else 0.07 * radius
    stem, bark = (thick, thick, middle), (0.15, 0.12, 0.09)
    scene.add(base, "cylinder", "trunk", (0, 0, middle), stem, bark, reflect=0.25)
    for k in range(7):
        turned = (*base[:3], base[3] + k * 0.898 + trunk)
        at, size = (1.0, 0, 2 * middle + 0.1), (1.2, 0.22, 0.32)
        if not palm:
            draw = rng.uniform
            out, width, rise = draw(0.4, 0.62), draw(0.42, 0.62), draw(0.45, 1.5)
            if k == 0:
                out, width, rise = 0.0, 0.65, 1.2
            at = (radius * out, 0, trunk + half_height * rise)
            size = (radius * width, radius * width, half_height * width)
        _leaves(scene, turned, at, size, rng, "ellipsoid")


def _bush(scene: Scene, base: Pose, rng: Rng, hedge: bool = False) -> None:
    """A bush, or a piece of a hedge."""
    tall = rng.uniform(0.35, 0.8)
    half = (4.0, 0.4, tall) if hedge else (tall * 1.2, tall, tall)
    _leaves(scene, base, (0, 0, tall * 0.9), half, rng, "box" if hedge else "ellipsoid")


def _house(scene: Scene, base: Pose, rng: Rng, grow: float = 1.0) -> None:
    """A building that faces the street; grow: factor of its height."""
    city = scene.city
    width, depth = rng.uniform(*city.house), rng.uniform(5.0, 9.0)
    fewest, most = city.floors
    tall = float(rng.integers(fewest, most, endpoint=True) * 1.55 * grow)  # half the height
    style = float(rng.integers(1, 90)) + rng.uniform(*city.glass)
    wall, roof, extra = _pick(rng, city.walls), rng.random(), rng.random()
    dark, pale = wall * 0.55, wall * 0.8
    box = partial(scene.add, base, "box", "building")
    body = (width, depth, tall + 0.5)
    box((0, -depth, tall - 0.5), body, wall, "facade", reflect=0.35, pattern=style)
    box((0, -depth, 0.3), (width + 0.06, depth + 0.06, 0.5), dark)
    if roof < 1.5 * city.gable and tall < 11:
        rise = min(depth, width) * 0.4
        slope = 0.02 if roof < city.gable else (width + 0.5) / (2.6 * rise)
        lean = slope, (depth + 0.5) / (2 * rise)
        tiles = _pick(rng, TABLES["palettes"]["tiles"])
        box((0, -depth, 2 * tall + rise), (width + 0.4, depth + 0.5, rise), tiles, taper=lean)
        box((width / 2, -depth - 0.8, 2 * tall + 1.6 * rise), (0.35, 0.35, 0.7 * rise), tiles)
    else:  # a cornice
        box((0, -depth, 2 * tall + 0.1), (width + 0.25, depth + 0.25, 0.22), dark)
    if extra < 0.3:  # an awning
        box((0, 0.7, 3), (width * 0.7, 0.8, 0.12), _pick(rng, city.paint))
    elif extra < 0.6:  # balconies
        for floor in range(1, int(tall * 2 / 3.1)):
            box((width * 0.4, 0.5, 3.1 * floor + 0.9), (1.3, 0.55, 0.5), pale, "slats")


# Who builds what lines a street; all else is street furniture.
BUILDERS: dict[str, Callable[..., None]] = {
    "house": _house, "tower": partial(_house, grow=1.5), "behind": _house, "forest": _tree,
    "tree": _tree, "garden": _tree, "bush": _bush, "hedge": partial(_bush, hedge=True),
    "person": _person, "bike": _bike,
}  # fmt: skip
